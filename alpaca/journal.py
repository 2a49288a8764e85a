"""Append-only JSON Lines files: every record is on the disk before it is used, and one run at a time may write."""

import contextlib
import json
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError
from alpaca.files import lock, parse_json


@dataclass(frozen=True)
class Format:
    """What the lines of one kind of journal look like.

    Attributes:
        first_field: The name that every line begins with, as in `{"request_index": `. A last line that a crash cut
            short is removed only if it begins like that, because otherwise the file is somebody else's.
        key: Returns a record's key. None, a KeyError, a TypeError or an AttributeError means that it is no record.
        what: What messages call a line, as in "a record of an answer".
        flag: The flag with which the user can name another file, for messages.
    """

    first_field: str
    key: Callable[[Any], Hashable]
    what: str
    flag: str

    def key_of(self, record: Any) -> Hashable:
        """Returns a record's key, or None if it is no record of this format."""
        try:
            return self.key(record)
        except (KeyError, TypeError, AttributeError):
            return None

    def begins_like_a_line(self, torn: bytes) -> bool:
        """True if this may be a line that a crash cut short, rather than the text of another file.

        Example:
            With first_field "key", b'{"ke' and b'{"key": "a1' begin like a line; b'[1,' doesn't.
        """
        start = b'{"%s": ' % self.first_field.encode()
        return torn.startswith(start[: len(torn)])


class Journal:
    """A journal that one run holds open and locked.

    Attributes:
        path: The file.
        records: Key -> record in the file's order: those found in it, then those appended.
    """

    def __init__(self, path: str, format: Format) -> None:
        """Opens or creates the file and reads its records. A last line that a crash cut short is removed.

        Raises:
            UserError: Another run holds the file, or a line is no record of this format.
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
            elif size and os.pread(self._file, 1, size - 1) != b"\n":  # a whole record without its newline
                os.write(self._file, b"\n")
        except BaseException:
            os.close(self._file)
            raise

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and returns when they are on the disk.

        Raises:
            OSError: The disk is full or broken. The file is as it was before.
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

    def remove_last(self) -> dict[str, Any]:
        """Takes the last record back, from the file too, and returns it.

        Raises:
            KeyError: There is no record.
        """
        _, record = self.records.popitem()
        size = os.fstat(self._file).st_size
        whole = os.pread(self._file, size, 0).rstrip()
        os.ftruncate(self._file, whole.rfind(b"\n") + 1)
        os.fsync(self._file)
        return record

    def close(self) -> None:
        """Closes the file, which unlocks it, and removes it if it is empty."""
        with contextlib.suppress(OSError):
            if not self.records and not os.fstat(self._file).st_size:
                os.unlink(self.path)
            os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: str, format: Format) -> tuple[dict[Hashable, dict[str, Any]], int]:
    """Reads a journal without locking it.

    Returns:
        Key -> record, and the number of bytes that hold whole records: all but a last line that was cut short.

    Raises:
        UserError: A line is no record, or its key is a duplicate. The message has the line's number.
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
            with contextlib.suppress(UserError):
                record = parse_json(line, path, number)
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
    """Checks that a file was written with the settings of this run.

    Raises:
        UserError: Names the first setting that differs, without its value if that is long, like the hash of a file.
    """
    for name in sorted(found.keys() | wanted.keys()):
        have, want = found.get(name), wanted.get(name)
        if have != want:
            long = max(len(str(have)), len(str(want))) > 40
            difference = f"another {name}" if long else f"{name} {have}, this run has {name} {want}"
            raise UserError(f"{path} was written with {difference}; use the same, or name another --output_dir")
