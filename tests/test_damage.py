"""Generated damage: every reader takes what its format allows and refuses the rest in one line.

Each test draws hundreds of cases, the same ones on every run. "Refuses" is UserError, which the scripts print as one
line; any other exception fails the test. Where there is a second opinion, "takes" is checked against it: what the
safetensors library refuses, `read_header` must refuse too.
"""

import contextlib
import io
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from alpaca.cli import UserError, run_cli
from alpaca.files import parse_json
from alpaca.generation.parser import PROBLEMS, parse_tasks
from alpaca.generation.requests import REQUESTS
from alpaca.journal import read_journal
from alpaca.records import check_example, load_records
from alpaca.weight_diff.checkpoint_files import read_header


def cases(count: int):
    """Draws `count` cases, the same ones on every run."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What the function returns and None, or None and the one line with which it refuses."""
    try:
        return function(*arguments), None
    except UserError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 600
    return None, message


# ---------------------------------------------------------------------------------------------------------------------
# Damage

NASTY = [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\\ud83d", b'"', b"{", b"]", b",", b"NaN", b"-", b"1e999", b"true",
         b"9" * 5000, b"[" * 150, b"[" * 100_000, b'{"a":' * 300, b"\xed\xa0\x80", "é😀\u2028".encode()]  # fmt: skip


@st.composite
def damaged(draw, intact: bytes, most: int = 3) -> bytes:
    """Cuts, repeats, overwrites or inserts, `most` times at most; without any of these the bytes stay intact."""
    data = intact
    for _ in range(draw(st.integers(0, most))):
        a, b = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(st.sampled_from(["cut", "truncate", "repeat", "insert", "flip"]))
        if kind == "cut":
            data = data[:a] + data[b:]
        elif kind == "truncate":
            data = data[:a]
        elif kind == "repeat":
            data = data[:b] + data[a:b] + data[b:]
        elif kind == "insert":
            data = data[:a] + draw(st.sampled_from(NASTY)) + data[a:]
        elif a < len(data):
            data = data[:a] + bytes([data[a] ^ (1 << draw(st.integers(0, 7)))]) + data[a + 1 :]
    return data


TEXTS = st.text('ab "\\{[,é😀\u2028\n', max_size=5)
SCALARS = st.sampled_from([None, True, False, 0, -1, 7, 10**20, 0.5, -1e300, 5e-324]) | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


@cases(600)
@given(st.data())
def test_damaged_json_is_read_as_the_format_says_or_refused_in_one_line(data):
    value = data.draw(VALUES)
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False).encode()
    hurt = data.draw(damaged(text))
    found, refusal = attempt(parse_json, hurt, "data.json")
    if refusal:
        assert refusal.startswith("data.json, line")
        assert hurt != text
    else:
        assert repr(found) == repr(json.loads(hurt.decode()))
        assert hurt != text or repr(found) == repr(value)


@cases(300)
@given(st.data())
def test_damaged_files_of_records_hold_objects_or_are_refused_in_one_line(tmp_path, data):
    records = data.draw(
        st.lists(st.dictionaries(st.sampled_from(["instruction", "input", "output"]), VALUES), max_size=4)
    )
    lines = data.draw(st.booleans())
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    path = tmp_path / "data.json"
    path.write_bytes(data.draw(damaged(text.encode())))
    found, refusal = attempt(load_records, path)
    assert refusal is None or str(path) in refusal
    for where, record in found or ():
        checked, refusal = attempt(check_example, where, record)
        if refusal:
            assert refusal.startswith(str(path))
        else:
            assert all(isinstance(checked[field], str) for field in ("instruction", "input", "output"))
            assert checked["instruction"].strip()
            assert checked["output"].strip()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "U32": 32, "I8": 8, "BOOL": 8, "F4": 4}
NUMBERS = st.sampled_from(
    [0, 1, 2, 4, 8, 12, 16, -1, -4, 1 << 31, 1 << 63, 1 << 64, 10**30, True, 1.0, None, "4", math.nan]
)


@st.composite
def safetensors_files(draw) -> tuple[bytes, bool]:
    """A safetensors file, and whether it is as its writer left it."""
    header, end = {}, 0
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from([*BITS]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3)) if dtype != "F4" else [2, 3]
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    whole, body, twice = True, bytes(range(256))[:end] + bytes(max(0, end - 256)), False
    for _ in range(draw(st.integers(0, 2))):
        entries = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
        kind = draw(st.sampled_from(["number", "swap", "type", "field", "metadata", "body", "twice", "share"]))
        whole = False
        if kind in ("number", "field", "type", "swap", "share") and not entries:
            continue
        entry = draw(st.sampled_from(entries)) if entries else {}
        if kind == "number":
            numbers = (
                entry[draw(st.sampled_from(["shape", "data_offsets"]))] if "data_offsets" in entry else entry["shape"]
            )
            numbers[:] = [*numbers[:-1], draw(NUMBERS)]
        elif kind == "swap" and "data_offsets" in entry:
            entry["data_offsets"] = entry["data_offsets"][::-1]
        elif kind == "type":
            entry["dtype"] = draw(st.sampled_from(["F32", "F16", "F99", "f32", "", 7, None, ["F32"]]))
        elif kind == "field":
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "strides"]))
            entry.pop(field, None) if draw(st.booleans()) else entry.update({field: draw(VALUES)})
            if not isinstance(entry.get("shape"), list) or not isinstance(entry.get("data_offsets", []), list):
                break
        elif kind == "share":
            entry["data_offsets"] = draw(st.sampled_from(entries)).get("data_offsets")
        elif kind == "metadata":
            header["__metadata__"] = draw(st.sampled_from([None, {}, {"a": "b"}, {"a": 1}, [], "x", {"a": None}]))
        elif kind == "body":
            body = draw(damaged(body, 1))[:1000]
        else:
            twice = True
    text = json.dumps(header)
    if twice and len(header) > 1:
        name, entry = list(header.items())[-1]
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}" + "}"
    else:
        twice = False
    text = text.encode() + b" " * draw(st.integers(0, 9))
    hurt = draw(damaged(text, 1)) if draw(st.integers(0, 3)) == 0 else text
    length = len(hurt) + (draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, 8, 1 << 40, (1 << 64) - 1])) if not whole else 0)
    return struct.pack("<Q", length % (1 << 64)) + hurt + body, whole and hurt == text


@cases(1000)
@given(safetensors_files())
def test_damaged_safetensors_are_read_as_the_format_says_or_refused_in_one_line(tmp_path, drawn):
    """Every tensor found is the one that the safetensors library finds, byte for byte."""
    content, intact = drawn
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found, refusal = attempt(read_header, str(path))
    if refusal:
        assert not intact
        assert str(path) in refusal
        return
    tensors, metadata = found
    try:
        wanted = dict(deserialize(content))
    except SafetensorError as error:
        raise AssertionError(f"accepted, though the safetensors library says: {error}") from error
    assert metadata is None or all(isinstance(text, str) for item in metadata.items() for text in item)
    assert [tensor.name for tensor in tensors] == sorted(wanted, key=[tensor.name for tensor in tensors].index)
    for tensor in tensors:
        other = wanted[tensor.name]
        assert list(tensor.shape) == other["shape"]
        assert content[tensor.offset :][: len(other["data"])] == bytes(other["data"])


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

PIECES = st.sampled_from(
    ["4. Instruction:", "5. Instruction:", "**5. Input:**", "4. Input:", "4. Output:", "Output:", "### 6. Output:",
     "###", "<noinput>", "\n", "\n\n", " ", "  \t", "Instruction:", "Task 7 - Instruction:", "text", "#", "-", "```",
     "<think>", "</think>", "> ", "\r\n", "\u2028", "٣. Instruction:", "9" * 5000 + ". Instruction:", "-1. Input:",
     "{0}", "%s"]
)  # fmt: skip


@cases(700)
@given(st.lists(PIECES | TEXTS, max_size=25), st.integers(1, 21), st.booleans())
@example(["9" * 5000, ". Instruction: x"], 4, False)
@example(["4. Output: y\n", "9" * 5000, ". Instruction: x"], 4, True)
def test_any_text_is_parsed_into_tasks_that_stand_in_it(pieces, first_number, truncated):
    text = "".join(pieces)
    tasks = parse_tasks(text, first_number, truncated)
    for task in tasks:
        assert task.problem is None or task.problem in PROBLEMS
        for field in (task.instruction, task.input, task.output):
            assert field in text
            assert field == field.strip()


@pytest.mark.parametrize("filler", [" ", "\t", ">", "#", "*", "9", "_", "\n", "<think>", "4 ", "** ", "n/a "])
def test_no_text_keeps_the_parser_busy_for_long(filler):
    """A broken server may send 100,000 times the same. Rules that try again at every character would take hours."""
    text = (filler * 100_000)[:100_000]
    for truncated in (False, True):
        for whole in (f"{text}x", f"4. Output: x\n###\n{text}x", f"4{text}x", f"4. Output{text}x"):
            for task in parse_tasks(whole, 4, truncated):
                assert task.instruction in whole


# ---------------------------------------------------------------------------------------------------------------------
# Journals

USAGES = [None, {"prompt_tokens": 1, "completion_tokens": 2}, {"prompt_tokens": 1}, [], 7, "x", {}]
RECORDS = st.fixed_dictionaries(
    {"request_index": st.integers(0, 5), "text": TEXTS | SCALARS, "model": st.just("m"), "settings": st.just({}),
     "finish_reason": st.just("stop"), "usage": st.sampled_from(USAGES)},
    optional={"cost": st.sampled_from([None, 0.5, "1", [], 10**400, True])},
)  # fmt: skip


@cases(500)
@given(st.data())
def test_a_damaged_journal_is_read_whole_or_refused_with_its_line(tmp_path, data):
    """Only a last line that was cut short is left out: no other line is ever skipped."""
    records = data.draw(st.lists(RECORDS, max_size=4))
    content = data.draw(damaged("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode(), 2))
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    read, refusal = attempt(read_journal, str(path), REQUESTS)
    if refusal:
        assert refusal.startswith(f"{path}, line ")
        return
    found, whole = read
    lines = [line for line in content[:whole].split(b"\n") if line.strip()]
    assert len(lines) == len(found)
    assert whole == len(content) or REQUESTS.begins_like_a_line(content[whole:])
    assert b"\n" not in content[whole:]
    for key, record in found.items():
        assert REQUESTS.key_of(record) == key


# ---------------------------------------------------------------------------------------------------------------------
# Flags

WORDS = st.sampled_from(
    ["--text", "--path=~/x", "--count", "--rate=0.5", "--flag", "--noflag", "--maybe", "-c", "-t", "--", "-", "", "=",
     "--count=1", "--count=1.0", "--rate=nan", "--rate=1e999", "--flag=yes", "--text=--text", "--noflag=1", "--tex",
     "5", "True", "None", "9" * 5000, "-3", "\x1b[2J", "\udcff", "--\udcff=1", "é", "--te-xt", "command",
     "--path", "--no"]
)  # fmt: skip


@cases(900)
@given(st.lists(WORDS | TEXTS, max_size=6))
def test_any_command_line_runs_with_the_right_types_or_is_refused_in_one_line(arguments):
    ran = []

    def command(
        text: str = "", path: str | None = None, count: int = 0, rate: float = 0.0, flag: bool = False,
        maybe: int | None = None,
    ) -> None:  # fmt: skip
        ran.append((text, path, count, rate, flag, maybe))

    if {"-h", "--help"} & set(arguments):
        return
    err, status = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_cli({"command": command}, ["command", *arguments])
        except SystemExit as stop:
            status = stop.code
    said = err.buffer.getvalue().decode()
    if status:
        assert status == 2
        assert not ran
        assert said.startswith("error: ")
        assert said.removesuffix("\n").isprintable()
        return
    text, path, count, rate, flag, maybe = ran[0]
    assert (type(text), type(count), type(rate), type(flag)) == (str, int, float, bool)
    assert math.isfinite(rate)
    assert path is None or type(path) is str
    assert maybe is None or type(maybe) is int
    assert said == ""
