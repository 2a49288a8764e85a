"""The append-only record of every answer that was paid for, `requests.jsonl`: fsynced before an answer is used."""

import contextlib
import json
import os
from typing import Any

from alpaca.cli import UserError


class Journal:
    """`requests.jsonl` of one output folder, held open and locked by one run.

    A line is one answer:
    `{"request_index", "prompt_sha256", "model", "settings", "text", "finish_reason", "usage", "cost"}`.

    Attributes:
        records: request index -> record, those found in the file and those appended since.
    """

    def __init__(self, path: str) -> None:
        """Opens the file or makes it, and reads what it holds; a last line that a crash tore is cut off.

        Raises:
            UserError: another run holds the file, or a line in it is no record.
        """
        import fcntl

        self.path = path
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing {path}; wait for it, or name another --output_dir") from error
        self.records, whole = read_journal(path)
        size = os.fstat(self._file).st_size
        if whole < size:
            os.ftruncate(self._file, whole)
        elif size and os.pread(self._file, 1, size - 1) != b"\n":  # the last line lacks its end and nothing else
            os.write(self._file, b"\n")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds answers and returns when they are on the disk."""
        data = memoryview("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.records.update((record["request_index"], record) for record in records)

    @property
    def model(self) -> str | None:
        """The model that gave the answers so far."""
        return next((record["model"] for record in self.records.values()), None)

    def check(self, model: str, settings: dict[str, Any]) -> None:
        """Refuses a journal that was written under other settings.

        Raises:
            UserError: names the first setting that differs.
        """
        for record in self.records.values():
            check_settings(self.path, {"model": record["model"], **record["settings"]}, {"model": model, **settings})

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the file and its lock back; a file without an answer goes."""
        with contextlib.suppress(OSError):
            if not self.records and not os.fstat(self._file).st_size:
                os.unlink(self.path)
            os.close(self._file)


def check_settings(path: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares the settings under which a file was written with those of this run.

    Raises:
        UserError: names the first one that differs; of long values (hashes of files) it says only that they do.
    """
    for name in sorted(found.keys() | wanted.keys()):
        have, want = found.get(name), wanted.get(name)
        if have != want:
            long = max(len(str(have)), len(str(want))) > 40
            difference = f"another {name}" if long else f"{name} {have}, this run has {name} {want}"
            raise UserError(f"{path} was written with {difference}; use the same, or name another --output_dir")


def read_journal(path: str) -> tuple[dict[int, dict[str, Any]], int]:
    """Reads a journal.

    Returns:
        Request index -> record, and the number of bytes that hold whole records: all but a torn last line.

    Raises:
        UserError: with the line number: a line that is no record, or an index that stands twice.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    records: dict[int, dict[str, Any]] = {}
    whole = 0
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        if line.strip():
            record = None
            with contextlib.suppress(ValueError):
                record = json.loads(line)
            if record is None and last:
                break
            if not _is_record(record):
                raise UserError(f"{path}, line {number}: not a record of an answer; restore or remove it")
            index = record["request_index"]
            if index in records:
                raise UserError(f"{path}, line {number}: request_index {index} stands there twice")
            records[index] = record
        whole += len(line) + (not last)
    return records, whole


def _is_record(record: Any) -> bool:
    """Whether a line has what a run reads of it, in the right types: a person may have edited it."""
    try:
        usage = record.get("usage") or {"prompt_tokens": 0, "completion_tokens": 0}
        numbers = record.get("cost") or 0, usage["prompt_tokens"], usage["completion_tokens"]
        return (
            isinstance(record["request_index"], int)
            and record["request_index"] >= 0
            and all(isinstance(record[name], str) for name in ("text", "model"))
            and isinstance(record["settings"], dict)
            and all(isinstance(number, (int, float)) for number in numbers)
            and "finish_reason" in record
        )
    except (KeyError, TypeError, AttributeError):
        return False
