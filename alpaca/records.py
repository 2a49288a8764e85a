"""Lists of JSON objects, and instruction-following data in Alpaca's format, checked record by record."""

import os
from collections.abc import Mapping
from typing import Any

from alpaca.cli import UserError
from alpaca.files import LONE_SURROGATE, parse_json, read_text


def load_records(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """Reads a list of JSON objects from a JSON array or from JSON Lines (one object per line, blank lines skipped).

    Returns:
        A pair for each object: its place for messages, and the object. The place is "data.json, record 3", counted
        from 0 like `json.load(...)[3]`, or "data.jsonl, line 4", counted from 1 as editors do.

    Raises:
        UserError: The file is missing, empty, not JSON, or holds anything but objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        found = [(f"{path}, record {i}", record) for i, record in enumerate(parse_json(text, path))]
    else:
        found = _parse_lines(text, path)
    for where, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
    if not found:
        raise UserError(f"{path} holds no records; expected a JSON list or one JSON object a line")
    return found


def _parse_lines(text: str, path: str | os.PathLike) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may contain U+2028
        if line.strip():
            try:
                found.append((f"{path}, line {number}", parse_json(line, path, number)))
            except UserError as error:
                if not found and _is_json(text):
                    raise UserError(f"{path} holds one JSON object; expected a list or one a line") from error
                raise
    return found


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "")
    except UserError:
        return False
    return True


def load_examples(path: str | os.PathLike, *, require_output: bool = True) -> list[dict[str, str]]:
    """Reads instruction-following data in Alpaca's format and checks it record by record.

    Args:
        path: JSON (a list) or JSON Lines of objects with `instruction`, an optional `input`, and `output`.
        require_output: Whether to refuse a record whose `output` is missing or empty.

    Returns:
        The records in file order with all their fields. A missing or null `input` becomes "".

    Raises:
        UserError: Names the first bad record and what it holds.
    """
    return [check_example(where, record, require_output=require_output) for where, record in load_records(path)]


def check_example(where: str, record: Mapping[str, Any], *, require_output: bool = True) -> dict[str, Any]:
    """Checks one record of instruction-following data.

    Args:
        where: The record's place, for the message.
        record: The record.
        require_output: Whether to refuse a missing or empty `output`.

    Returns:
        The record with all its fields. A missing or null `input` becomes "".

    Raises:
        UserError: Names the place, the field and what it holds.
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
    """Refuses a text with a lone surrogate, which JSON and a command line can hold but no tokenizer can read.

    Raises:
        UserError: Names the text, as `what`, and the character.
    """
    if half := LONE_SURROGATE.search(text):
        raise UserError(f"{what} is no text: character {half.start()} is {half.group()!a}, half of a surrogate pair")
