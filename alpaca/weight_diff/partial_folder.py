"""A folder that grows beside its target and takes the target's name when it is whole.

A journal in it names the tensors that are done, so that an interrupted run can go on where it stopped.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import IO, Any

from alpaca.cli import UserError
from alpaca.files import nearest_existing
from alpaca.weight_diff.checkpoint_files import Output
from alpaca.weight_diff.stream import Progress, run_jobs

SUFFIX = ".part"  # of a weights file in the making, which nothing takes for a model
SPOOL = "corrections.spool"  # what make_diff gathers at its end
_JOURNAL = "journal.jsonl"
_SPARE_BYTES = 64 << 20  # for the small files and the file system


class PartialFolder:
    """The folder TARGET.partial, for one run at a time.

    Args:
        target: what the folder will be called.
        inputs: folders that the run reads.
        overwrite: whether an existing target is replaced, once the new one is whole.
        resume: whether to go on with what an interrupted run left.

    Raises:
        UserError: the target is an input or holds one, or exists and isn't to be overwritten.
    """

    def __init__(self, target: str, inputs: list[str], overwrite: bool, resume: bool):
        if not target:  # as from an unset shell variable; it would be the working folder
            raise UserError("the output folder's name is empty; name a new folder")
        self.target = os.path.realpath(target)
        self.folder = self.target + ".partial"
        self.progress = Progress()
        self._overwrite, self._resume = overwrite, resume
        self._done: dict[str, dict] = {}
        self._journal: IO[str] | None = None
        self._begun = False
        for path in inputs:
            if os.path.commonpath([self.target, os.path.realpath(path)]) == self.target:
                raise UserError(f"{target} is or holds {path}, an input of this command; name another output folder")
        if os.path.lexists(target) and not os.path.isdir(target):
            raise UserError(f"{target} is a file; expected the name of a new folder")
        if os.path.isdir(target) and os.listdir(target) and not overwrite:
            raise UserError(f"{target} exists; name a new folder, or pass --overwrite to replace this one when done")

    def __enter__(self) -> "PartialFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if self._journal:
            self._journal.close()
        if not self._begun:
            return
        if kind and issubclass(kind, UserError):
            shutil.rmtree(self.folder)
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"the disk of {self.folder} is full; make room, then run again with --resume") from error
        elif kind:
            print(f"\n{self.folder} holds what is done; run again with --resume to go on", file=sys.stderr)

    def begin(self, output: Output, settings: dict[str, Any]) -> dict[str, dict]:
        """Makes the files, or takes up those of an interrupted run.

        Args:
            output: the files.
            settings: what the run depends on; one with other settings cannot be taken up. JSON.

        Returns:
            What `finish` was told of each tensor that is done already.
        """
        self._output = output
        self._check_disk(sum(output.sizes.values()))
        # Files written before a power cut may lack what the journal says of them: it holds for this boot only.
        with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            settings = {**settings, "boot": file.read().strip()}
        settings = json.loads(json.dumps(settings))
        os.makedirs(self.folder, exist_ok=True)
        self._journal = open(os.path.join(self.folder, _JOURNAL), "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing {self.folder}; wait for it or stop it") from None
        self._journal.seek(0)
        text = self._journal.read()
        lines = text.split("\n")[:-1]
        self._journal.truncate(len(text[: text.rfind("\n") + 1].encode()))  # a killed run may leave half a line
        if self._resume and lines and json.loads(lines[0]) != settings:
            raise UserError(
                f"{self.folder} was begun with other files or flags, or before a reboot; run without --resume"
            )
        self._begun = True
        if self._resume and lines:
            self._done = {entry["name"]: entry for entry in map(json.loads, lines[1:])}
            for path in output.headers:
                # Stopped within `publish`; where nothing is done yet, a full disk may have left fewer files.
                if self._done and not os.path.exists(path):
                    os.rename(path.removesuffix(SUFFIX), path)
        else:
            self._clear()
            self._write(settings)
        output.create()
        return self._done

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        """Notes that a tensor is written and verified."""
        self._done[name] = {"name": name, **entry}
        self._write(self._done[name])

    def run(self, title: str, sizes: dict[str, int], job: Callable[[str], None]) -> None:
        """Runs `job` for each tensor that isn't done, the largest first, and shows progress in bytes read."""
        names = sorted(sizes.keys() - self._done.keys(), key=lambda name: (-sizes[name], name))
        run_with_bar(title, {name: sizes[name] for name in names}, job, self.progress)

    def publish(self) -> None:
        """Gives the files and then the folder their final names.

        Raises:
            FileExistsError: somebody has put files under the target's name during the run.
        """
        if not self._overwrite and os.path.isdir(self.target) and os.listdir(self.target):
            raise FileExistsError(errno.EEXIST, "somebody made this folder during the run; move it away", self.target)
        for path in self._output.headers:
            os.rename(path, path.removesuffix(SUFFIX))
        for name in (_JOURNAL, SPOOL):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, name))
        replaced = self.target + ".replaced"
        if self._overwrite and os.path.isdir(self.target):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.target, replaced)
        os.rename(self.folder, self.target)
        if self._overwrite and os.path.isdir(replaced):
            shutil.rmtree(replaced)

    def _check_disk(self, nbytes: int) -> None:
        there = 0
        if os.path.isdir(self.folder):
            there = sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.folder))
        free = shutil.disk_usage(nearest_existing(self.folder)).free + there
        if free < nbytes + _SPARE_BYTES:
            raise UserError(
                f"{self.target} needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk; make room first"
            )

    def _clear(self) -> None:
        self._journal.truncate(0)
        for entry in os.scandir(self.folder):
            if entry.name != _JOURNAL:
                os.unlink(entry.path)

    def _write(self, entry: dict) -> None:
        os.write(self._journal.fileno(), (json.dumps(entry) + "\n").encode())  # one call: no other thread's between


def run_with_bar(title: str, sizes: dict[str, int], job: Callable[[str], None], progress: Progress) -> None:
    """Runs `job` for each name on several threads under a bar of bytes, rate and time left."""
    from tqdm import tqdm

    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=title, mininterval=0.5) as bar:
        run_jobs([partial(job, name) for name in sizes], progress, lambda: bar.update(progress.done - bar.n))
