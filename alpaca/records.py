"""Lists of JSON objects, and instruction-following data in Alpaca's format, checked record by record."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from alpaca.cli import UserError


def load_records(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """Reads a list of JSON objects, from a JSON array or from JSON Lines (one object a line, blank lines skipped).

    Returns:
        A pair for each object: where it stands, for messages ("data.json, record 3" counted from 0 as
        `json.load(...)[3]` is, or "data.jsonl, line 4" counted from 1 as editors do), and the object.

    Raises:
        UserError: the file is missing, empty, not JSON, or holds something else than objects.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON or JSON Lines") from error
    if text.lstrip().startswith("["):
        try:
            found = [(f"{path}, record {i}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
            if line.strip():
                try:
                    found.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    if not found and _is_json(text):
                        raise UserError(f"{path} holds one JSON object; expected a list or one a line") from error
                    raise UserError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})") from error
    for where, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
    if not found:
        raise UserError(f"{path} holds no records; expected a JSON list or one JSON object a line")
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def load_examples(path: str | os.PathLike, *, require_output: bool = True) -> list[dict[str, str]]:
    """Reads instruction-following data in Alpaca's format and checks it record by record.

    Args:
        path: JSON (a list) or JSON Lines of objects with `instruction`, an optional `input`, and `output`.
        require_output: whether a record without an `output`, or with an empty one, is refused.

    Returns:
        The records in file order, further fields kept; a missing or null `input` becomes "".

    Raises:
        UserError: names the first record that is wrong and what was found there.
    """
    return [check_example(where, record, require_output=require_output) for where, record in load_records(path)]


def check_example(where: str, record: Mapping[str, Any], *, require_output: bool = True) -> dict[str, Any]:
    """Checks one record of instruction-following data.

    Args:
        where: where the record stands, for the message.
        record: the record.
        require_output: whether a missing or empty `output` is refused.

    Returns:
        The record, further fields kept; a missing or null `input` becomes "".

    Raises:
        UserError: says where, which field, and what was found there.
    """
    example = {**record, "input": "" if record.get("input") is None else record["input"]}
    for field in ("instruction", "input", "output") if require_output else ("instruction", "input"):
        if field not in example:
            raise UserError(f"{where}: no '{field}'; found the fields {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(example[field], str):
            found = type(example[field]).__name__
            raise UserError(f"{where}: '{field}' must be text, found {found} {example[field]!r:.40}")
        if field != "input" and not example[field].strip():
            raise UserError(f"{where}: '{field}' is empty")
        check_text(f"{where}: '{field}'", example[field])
    return example


def check_text(what: str, text: str) -> None:
    """Refuses a text with half a surrogate pair, which JSON and a command line can hold and no tokenizer reads."""
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{what} is no text: character {half.start()} is {half.group()!a}, half of a surrogate pair")
