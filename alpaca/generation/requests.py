"""requests.jsonl: one line for every answer that was paid for."""

import os
from typing import Any

from alpaca.journal import Format, Journal, check_settings, read_journal

_MOST = 1e12  # tokens or dollars: no number, or none that is finite, is more


def _request_index(record: Any) -> int | None:
    """Returns a record's index, or None if a field that runs use is missing or has the wrong type.

    Somebody may have edited the file.
    """
    usage = record.get("usage") or {"prompt_tokens": 0, "completion_tokens": 0}
    numbers = record.get("cost") or 0, usage["prompt_tokens"], usage["completion_tokens"]
    fits = (
        type(record["request_index"]) is int
        and record["request_index"] >= 0
        and all(isinstance(record[name], str) for name in ("text", "model"))
        and isinstance(record["settings"], dict)
        and all(isinstance(number, (int, float)) and 0 <= number < _MOST for number in numbers)
        and "finish_reason" in record
    )
    return record["request_index"] if fits else None


# A line: {"request_index", "prompt_sha256", "model", "settings", "text", "finish_reason", "usage", "cost"}
REQUESTS = Format("request_index", _request_index, "a record of an answer", "--output_dir")


class RequestJournal(Journal):
    """The journal of one output folder's requests."""

    def __init__(self, output_dir: str) -> None:
        super().__init__(os.path.join(output_dir, "requests.jsonl"), REQUESTS)

    @property
    def model(self) -> str | None:
        """The model that gave the answers so far, None before the first one."""
        return next((record["model"] for record in self.records.values()), None)

    def check(self, model: str, settings: dict[str, Any]) -> None:
        """Checks that the journal was written with this model and these settings.

        Raises:
            UserError: It wasn't; the message names the first setting that differs.
        """
        for record in self.records.values():
            check_settings(self.path, {"model": record["model"], **record["settings"]}, {"model": model, **settings})


def read_requests(path: str) -> dict[int, dict[str, Any]]:
    """Reads a journal's records by index, without locking it."""
    return read_journal(path, REQUESTS)[0]
