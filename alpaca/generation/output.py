"""The output folder: files made from the journal, and files that were there before."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.files import OwnFiles, jload, json_text, parse_json, read_text
from alpaca.generation.harvest import Harvest
from alpaca.records import load_examples

_SECONDS_BETWEEN_WRITES = 30.0


@dataclass
class OutputFolder:
    """The three files that are made from the journal and can be made again from it. Nobody else's are replaced.

    Attributes:
        folder: Where they are.
        data_file: The name of the file for train.py: regen.json with nothing but instruction, input and output.
    """

    folder: str
    data_file: str = "alpaca_data.json"
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def __post_init__(self) -> None:
        self._own = OwnFiles(self.folder)

    @property
    def _names(self) -> tuple[str, str, str]:
        return "regen.json", self.data_file, "rejected.jsonl"

    def write(self, harvest: Harvest) -> None:
        """Replaces regen.json, the file for train.py and rejected.jsonl, each atomically.

        Raises:
            UserError: Somebody has edited one of them since this script wrote it. Nothing is written.
        """
        self._own.replace(dict(zip(self._names, _contents(harvest), strict=True)))

    def refuse_foreign(self, remake: Callable[[int | None], Harvest] | None = None) -> None:
        """Checks that a run will replace nobody else's files.

        Args:
            remake: Makes the harvest of the journal again, up to so many tasks. It proves files of an earlier version
                of this script, which kept no proof: the beginning of what the journal yields is the script's own.

        Raises:
            UserError: A file is somebody else's, or was edited.
        """
        foreign = self._own.foreign(self._names)
        if foreign and remake:
            regen = os.path.join(self.folder, "regen.json")
            kept = len(_read(regen) or [])
            made = [_records(remake(target)) for target in {None, kept or None}]
            for name in foreign:
                found = _read(os.path.join(self.folder, name))
                position = self._names.index(name)
                if found is not None and any(found == records[position][: len(found)] for records in made):
                    self._own.adopt(name)
        self._own.refuse(self._own.foreign(self._names))

    def begin(self) -> None:
        """Before the first answer, keeps what is in the folder: see `open_output`.

        Raises:
            UserError: A file that this would replace is somebody else's.
        """
        path = os.path.join(self.folder, "regen.json")
        if os.path.exists(path):
            self._own.replace({"regen_start.json": read_text(path)})
            self._own.adopt("regen.json")
        if os.path.exists(os.path.join(self.folder, "alpaca_data.json")):
            beside = "regen_alpaca_data.json"
            if not os.path.exists(os.path.join(self.folder, beside)):
                self._own.replace({beside: json_text([])})

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
    if is_new_run:
        OutputFolder(folder).begin()
    start, beside = (os.path.join(folder, name) for name in ("regen_start.json", "regen_alpaca_data.json"))
    earlier = load_examples(start, require_output=False) if os.path.exists(start) else []
    return OutputFolder(folder, os.path.basename(beside) if os.path.exists(beside) else "alpaca_data.json"), earlier


def _records(harvest: Harvest) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the records of regen.json, of the file for train.py and of rejected.jsonl."""
    slim = [{name: task.get(name, "") for name in ("instruction", "input", "output")} for task in harvest.kept]
    return harvest.kept, slim, harvest.rejected


def _contents(harvest: Harvest) -> tuple[str, str, str]:
    kept, slim, rejected = _records(harvest)
    return json_text(kept), json_text(slim), "".join(json_text(task, indent=None) + "\n" for task in rejected)


def _read(path: str) -> list[Any] | None:
    """Reads back the records of a file that `_contents` may have written, None if it can't have."""
    try:
        if path.endswith(".json"):
            found = jload(path)
            return found if isinstance(found, list) else None
        lines = read_text(path).split("\n")
        return [parse_json(line, path, number) for number, line in enumerate(lines, start=1) if line]
    except UserError:
        return None


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
