"""Append-only JSON Lines files: a record is on the disk before it is used, and one run at a time writes the file."""

import contextlib
import json
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError
from alpaca.files import lock


@dataclass(frozen=True)
class Format:
    """What the lines of one kind of journal look like.

    Attributes:
        first_field: The name that every line begins with, as in `{"request_index": `. A torn last line is cut off only
            if it begins like that too: any other file is somebody else's.
        key: Gives a record's key; None, or a KeyError, TypeError or AttributeError, means that it is no such record.
        what: What a line is called in messages, as in "a record of an answer".
        flag: The flag that names another place for the file.
    """

    first_field: str
    key: Callable[[Any], Hashable]
    what: str
    flag: str

    def key_of(self, record: Any) -> Hashable:
        """Gives a record's key, or None if it is no such record."""
        try:
            return self.key(record)
        except (KeyError, TypeError, AttributeError):
            return None

    def begins_like_a_line(self, torn: bytes) -> bool:
        """Tells a line of ours that a crash cut short from the text of another file.

        Example:
            with first_field "key", b'{"ke' and b'{"key": "a1' begin like a line; b'[1,' doesn't.
        """
        start = b'{"%s": ' % self.first_field.encode()
        return torn.startswith(start[: len(torn)])


class Journal:
    """A journal held open and locked by one run.

    Attributes:
        path: The file.
        records: Key -> record, those found in the file and those appended since, in the file's order.
    """

    def __init__(self, path: str, format: Format) -> None:
        """Opens the file, or makes it, and reads what it holds; a last line that a crash tore is cut off.

        Raises:
            UserError: Another run holds the file, or a line in it is no record of this format.
        """
        self.path, self.format = path, format
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            lock(self._file, path, format.flag)
            self.records, whole = read_journal(path, format)
            size = os.fstat(self._file).st_size
            if whole < size:
                os.ftruncate(self._file, whole)
            elif size and os.pread(self._file, 1, size - 1) != b"\n":  # the last line lacks its end and nothing else
                os.write(self._file, b"\n")
        except BaseException:
            os.close(self._file)
            raise

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and returns when they are on the disk; a full disk leaves the file as it was.

        Raises:
            OSError: The disk is full or broken.
        """
        data = memoryview("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        size = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.records.update((self.format.key(record), record) for record in records)

    def close(self) -> None:
        """Gives the file and its lock back; a file without a record is removed."""
        with contextlib.suppress(OSError):
            if not self.records and not os.fstat(self._file).st_size:
                os.unlink(self.path)
            os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str, format: Format) -> tuple[dict[Hashable, dict[str, Any]], int]:
    """Reads a journal without holding it.

    Returns:
        Key -> record, and the number of bytes that hold whole records: all but a torn last line.

    Raises:
        UserError: A line is no record, or a key stands twice; the message has the line's number.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records: dict[Hashable, dict[str, Any]] = {}
    whole = 0
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if line.strip():
            record = None
            with contextlib.suppress(ValueError):
                record = json.loads(line)
            if record is None and last and format.begins_like_a_line(line):
                break
            key = format.key_of(record)
            if key is None:
                raise UserError(
                    f"{path}, line {number}: not {format.what}; restore or remove it, or name another {format.flag}"
                )
            if key in records:
                raise UserError(f"{path}, line {number}: duplicate {format.first_field} {key}")
            records[key] = record
        whole += len(line) + (not last)
    return records, whole


def check_settings(path: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares the settings under which a file was written with those of this run.

    Raises:
        UserError: Names the first setting that differs; of long values (hashes of files) it says only that they do.
    """
    for name in sorted(found.keys() | wanted.keys()):
        have, want = found.get(name), wanted.get(name)
        if have != want:
            long = max(len(str(have)), len(str(want))) > 40
            difference = f"another {name}" if long else f"{name} {have}, this run has {name} {want}"
            raise UserError(f"{path} was written with {difference}; use the same, or name another --output_dir")
