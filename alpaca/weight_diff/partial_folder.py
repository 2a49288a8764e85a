"""A folder that is written beside its target and takes the target's name once it is whole and verified."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from alpaca.cli import UserError
from alpaca.files import lock, size_text
from alpaca.weight_diff.checkpoint_files import Output
from alpaca.weight_diff.manifest import MARKER, differing_files, not_ours, read_manifest

_SPARE_BYTES = 64 << 20  # for the small files and the file system


class PartialFolder:
    """Writes the folder TARGET.partial, for one run at a time, and renames it to TARGET at the end.

    A run that fails removes what it has written. A run that is killed leaves TARGET.partial, which the next one clears.
    With `overwrite`, a folder that stands at TARGET is called TARGET.replaced for the moment between two renames. Only
    a folder whose manifest proves that this script wrote all of it is replaced.

    Args:
        target: What the folder will be called.
        flag: The flag that named it, for messages.
        inputs: Folders that the run reads.
        overwrite: Whether to replace an existing target, once the new one is whole.

    Raises:
        UserError: The target is an input or holds one, or exists and isn't to be overwritten, or isn't ours.
    """

    def __init__(self, target: str, flag: str, inputs: list[str], overwrite: bool):
        if not target:  # as from an unset shell variable; it would be the working folder
            raise UserError("the output folder's name is empty; name a new folder")
        self.target = os.path.realpath(target)
        self.folder = self.target + ".partial"
        self._replaced = self.target + ".replaced"
        self._flag, self._overwrite = flag, overwrite
        for path in inputs:
            if os.path.commonpath([self.target, os.path.realpath(path)]) == self.target:
                raise UserError(f"{target} is or holds {path}, an input of this command; name another output folder")
        if os.path.lexists(target) and not os.path.isdir(target):
            raise UserError(f"{target} is a file; expected the name of a new folder")
        if self._target_is_filled() and not overwrite:
            raise UserError(f"{target} exists; name a new folder, or pass --overwrite to replace this one when done")
        self._check_target()

    def _check_target(self) -> None:
        if self._target_is_filled() and (strange := not_ours(self.target)):
            raise UserError(
                f"--overwrite replaces only what this script wrote, and {self.target} is not: {strange}; "
                f"move the folder away, or name another {self._flag}"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the folder, empty, and removes it if the block ends without `publish`.

        Raises:
            UserError: Somebody else made the folder, another run is writing it, or the disk is full.
        """
        for path in (self.folder, self._replaced) if self._overwrite else (self.folder,):
            if _is_foreign(path):
                raise UserError(f"{path} exists, and this script didn't make it; move it, or name another {self._flag}")
        os.makedirs(self.folder, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            lock(descriptor, self.folder, self._flag)
            try:
                _clear(self.folder)
                if self._overwrite:
                    self._tidy()
                _mark(
                    self.folder, "weight_diff.py is writing this folder. If it was stopped, run the same command again."
                )
                yield
            except BaseException:
                if os.path.isdir(self.folder):
                    _remove(self.folder)
                raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"the disk of {self.target} is full; make room, then run the command again") from error
        finally:
            os.close(descriptor)

    def _tidy(self) -> None:
        """Finishes, or takes back, the replacing that a killed run began, so that nothing takes its place twice."""
        if not os.path.isdir(self._replaced):
            return
        if self._target_is_filled():
            _remove(self._replaced)
        elif not_ours(self._replaced) is None and not differing_files(self._replaced, read_manifest(self._replaced)):
            # Killed between the two renames: it is the only whole model there is.
            if os.path.isdir(self.target):
                os.rmdir(self.target)
            os.rename(self._replaced, self.target)

    def create(self, output: Output) -> None:
        """Makes the weights' files, if they fit on the disk."""
        needed, free = sum(output.sizes.values()), shutil.disk_usage(self.folder).free
        if free < needed + _SPARE_BYTES:
            raise UserError(
                f"{self.target} needs {size_text(needed + _SPARE_BYTES)}, {size_text(free)} are free on its disk; "
                "make room first"
            )
        output.create()

    def publish(self, output: Output) -> None:
        """Gives the weights' files and then the folder their final names.

        Raises:
            UserError: Somebody has put files under the target's name during the run.
        """
        if self._target_is_filled() and not self._overwrite:
            raise UserError(f"{self.target} was made by somebody else during the run; move it away, then run again")
        self._check_target()
        output.publish()
        if self._target_is_filled():
            _mark(
                self.target, "weight_diff.py was replacing this folder. If it was stopped, run the same command again."
            )
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        os.unlink(os.path.join(self.target, MARKER))
        if self._overwrite and os.path.isdir(self._replaced):
            _remove(self._replaced)

    def _target_is_filled(self) -> bool:
        return os.path.isdir(self.target) and bool(os.listdir(self.target))


def _is_foreign(path: str) -> bool:
    """Whether a path is anything but an empty folder or one with our marker and files alone, so we may not clear it."""
    if not os.path.lexists(path):
        return False
    if os.path.islink(path) or not os.path.isdir(path):
        return True
    entries = list(os.scandir(path))
    marked = any(entry.name == MARKER for entry in entries)
    return bool(entries) and (not marked or any(entry.is_dir(follow_symlinks=False) for entry in entries))


def _mark(folder: str, text: str) -> None:
    with open(os.path.join(folder, MARKER), "w", encoding="utf-8") as file:
        file.write(text + "\n")


def _clear(folder: str) -> None:
    """Empties a folder that bears the marker. It goes last, so that a killed run leaves no folder without it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name == MARKER):
        os.unlink(entry.path)


def _remove(folder: str) -> None:
    _clear(folder)
    os.rmdir(folder)
