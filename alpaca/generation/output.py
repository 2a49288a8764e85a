"""The output folder: files made from the journal, and files that were there before."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.files import atomic_write, jdump
from alpaca.generation.harvest import Harvest
from alpaca.records import load_examples

_SECONDS_BETWEEN_WRITES = 30.0


@dataclass
class OutputFolder:
    """The three files that are made from the journal and can be made again from it.

    Attributes:
        folder: Where they are.
        data_file: The name of the file for train.py: regen.json with nothing but instruction, input and output.
    """

    folder: str
    data_file: str = "alpaca_data.json"
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def write(self, harvest: Harvest) -> None:
        """Replaces regen.json, the file for train.py and rejected.jsonl, each atomically."""
        jdump(harvest.kept, os.path.join(self.folder, "regen.json"))
        slim = [{name: task.get(name, "") for name in ("instruction", "input", "output")} for task in harvest.kept]
        jdump(slim, os.path.join(self.folder, self.data_file))
        with atomic_write(os.path.join(self.folder, "rejected.jsonl")) as file:
            file.writelines(json.dumps(task, ensure_ascii=False) + "\n" for task in harvest.rejected)

    def write_now_and_then(self, harvest: Harvest) -> None:
        """Writes the files every 30 seconds, or less often if writing would take over a tenth of the time.

        The files lag behind the journal in between, which costs nothing: they are made from it.
        """
        if time.monotonic() - self._written > max(_SECONDS_BETWEEN_WRITES, 10 * self._took):
            start = time.monotonic()
            self.write(harvest)
            self._written, self._took = time.monotonic(), time.monotonic() - start


def open_output(folder: str, is_new_run: bool) -> tuple[OutputFolder, list[dict[str, Any]]]:
    """Protects files that were in the folder before the first answer.

    Somebody's alpaca_data.json stays as it is: the run writes regen_alpaca_data.json beside it. A run begins with the
    tasks of a regen.json that it finds, as the original's did, and keeps a copy of it in regen_start.json.

    Args:
        folder: The output folder.
        is_new_run: True before the first answer, when files in the folder can't be this run's own.

    Returns:
        The output, and the tasks to begin with.

    Raises:
        UserError: regen.json, or later regen_start.json, holds no tasks.
    """
    regen, start, taken, beside = (
        os.path.join(folder, name)
        for name in ("regen.json", "regen_start.json", "alpaca_data.json", "regen_alpaca_data.json")
    )
    if is_new_run:
        if os.path.exists(regen):
            shutil.copyfile(regen, start + ".tmp")
            os.replace(start + ".tmp", start)
        if os.path.exists(taken) and not os.path.exists(beside):
            jdump([], beside)
    earlier = load_examples(start, require_output=False) if os.path.exists(start) else []
    return OutputFolder(folder, os.path.basename(beside if os.path.exists(beside) else taken)), earlier


@contextlib.contextmanager
def writing_to(folder: str) -> Iterator[None]:
    """Turns a full disk or a folder that can't be written into a one-line error."""
    try:
        yield
    except BrokenPipeError:  # whatever read stdout has gone; nothing is wrong with the folder
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; answers in requests.jsonl are safe: fix that, then run the "
            "same command to continue"
        ) from error
