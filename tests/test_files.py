"""Files are replaced whole or not at all; JSON survives the round trip."""

import io
import json
import os
import resource
import stat
import subprocess
import sys
import tempfile

import pytest

from alpaca.cli import UserError
from alpaca.files import OwnFiles, atomic_write, jdump, jload, parse_json, size_text

VALUE = {"text": "naïve — 雨 🌧 \u2028", "list": [1, 2.5, None, True], "empty": {}}


def test_jdump_and_jload_round_trip_utf8(tmp_path):
    path = tmp_path / "new folder" / "value.json"
    jdump(VALUE, path)
    assert jload(path) == VALUE
    assert "naïve — 雨 🌧" in path.read_bytes().decode("utf-8")
    assert path.read_text(encoding="utf-8") == json.dumps(VALUE, indent=4, ensure_ascii=False)


def test_jdump_takes_paths_and_files_dicts_lists_and_strings(tmp_path):
    jdump([1], tmp_path / "list.json", indent=None)
    jdump("plain text", str(tmp_path / "text.txt"))
    jdump(" and more", str(tmp_path / "text.txt"), mode="a")
    with open(tmp_path / "file.json", "w") as file:
        jdump({"a": 1}, file)
    assert file.closed
    assert (tmp_path / "list.json").read_text() == "[1]"
    assert (tmp_path / "text.txt").read_text() == "plain text and more"
    with open(tmp_path / "file.json") as file:
        assert jload(file) == {"a": 1}
    assert jload(io.StringIO("[2]")) == [2]
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:
        file.write("[3]")
        file.seek(0)
        assert jload(file) == [3]
    with pytest.raises(ValueError, match="got int"):
        jdump(7, tmp_path / "seven.json")
    assert not (tmp_path / "seven.json").exists()


def test_half_a_surrogate_pair_survives_the_round_trip(tmp_path):
    (tmp_path / "in.json").write_text('["\\ud83d cut, \\ud83c\\udf27 whole"]')
    value = jload(tmp_path / "in.json")
    jdump(value, tmp_path / "out.json")
    assert jload(tmp_path / "out.json") == value == ["\ud83d cut, 🌧 whole"]


def test_a_failed_dump_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "data.json"
    jdump({"old": True}, path)
    with pytest.raises(TypeError):
        jdump({("no", "key"): 1}, path)
    write = atomic_write(path)
    write.__enter__().write("half of the n")
    assert len(os.listdir(tmp_path)) == 2
    assert jload(path) == {"old": True}
    write.__exit__(RuntimeError, RuntimeError(), None)
    assert jload(path) == {"old": True}
    assert os.listdir(tmp_path) == ["data.json"]


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_file(tmp_path):
    jdump({"old": True}, tmp_path / "data.json")
    script = "from alpaca import cli, files\ncli.run_cli({'dump': lambda: files.jdump(['x' * 10**6], 'data.json')})"

    def limit():  # a file of at most 4 kB stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{script}", "dump"]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {tmp_path}/data.json: File too large")
    assert done.stderr.count("\n") == 1
    assert jload(tmp_path / "data.json") == {"old": True}
    assert os.listdir(tmp_path) == ["data.json"]


def test_a_target_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, reason in [(tmp_path, "Is a directory"), (tmp_path / "file" / "below", "Not a directory|File exists")]:
        with pytest.raises(UserError, match=f"cannot write {path}: ({reason})"):
            jdump([], path)


def test_an_os_error_of_the_callers_own_is_not_blamed_on_the_target(tmp_path):
    write = atomic_write(tmp_path / "data.json")
    write.__enter__()
    passed_on = write.__exit__(FileNotFoundError, FileNotFoundError(2, "No such file", "another"), None) is False
    assert passed_on
    assert os.listdir(tmp_path) == []


def test_new_files_get_the_umasks_mode_and_old_ones_keep_theirs(tmp_path):
    umask = os.umask(0o027)
    try:
        jdump([], tmp_path / "new.json")
        jdump([], tmp_path / "secret.json")
        os.chmod(tmp_path / "secret.json", 0o600)
        jdump([1], tmp_path / "secret.json")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat(tmp_path / "new.json").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(tmp_path / "secret.json").st_mode) == 0o600


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    jdump([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert jload(tmp_path / "target.json") == [1]
    script = "from utils import jdump; jdump([2], '/dev/stdout')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[\n    2\n]"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read .*: No such file or directory"),
        (b"", "line 1, column 1: not JSON"),
        (b'{"a": 1,\n "b": }', "line 2, column 7: not JSON"),
        (b'["caf\xe9"]', "not UTF-8 text .byte 5"),
        (b"[" * 100_000, ", line 1: JSON nested more than 100 levels deep"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, ", line 1: JSON nested more than 100 levels deep"),
        (b"[\n" * 101 + b"]" * 101, ", lines 1 to 102: JSON nested more than 100 levels deep"),
        (b'{"n": [1,\n-' + b"7" * 5000 + b"]}", ", lines 1 to 2: an integer of more than 4,300 digits"),
    ],
)
def test_jload_refuses_what_is_no_json(content, complaint, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as refusal:
        jload(path)
    assert str(path) in str(refusal.value)


def test_json_may_be_nested_100_levels_deep():
    value = parse_json("[" * 100 + "]" * 100, "name")
    for _ in range(99):
        [value] = value
    assert value == []


def test_a_line_of_many_is_named_by_its_number():
    for damage in ("[" * 10**5, "9" * 5000, "[1,", b'"\xff"', b"\xff\xfe1\x00"):
        with pytest.raises(UserError, match=r"^data.jsonl, line 7\b.*") as refusal:
            parse_json(damage, "data.jsonl", 7)
        assert len(str(refusal.value)) < 120


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (102, "102 bytes"), (103, "0.1 KiB"), (1 << 20, "1.0 MiB"), (2 << 30, "2.0 GiB")],
)
def test_a_size_never_rounds_to_zero(size, text):
    assert size_text(size) == text


def test_own_files_are_replaced_and_edited_or_foreign_ones_are_not(tmp_path):
    (tmp_path / "mine").write_text("by hand")
    OwnFiles(tmp_path).replace({"a": "1", "b": "2"})
    own = OwnFiles(tmp_path)  # another run
    own.replace({"a": "3"})
    assert (tmp_path / "a").read_text() == "3"
    (tmp_path / "b").write_text("edited")
    for names in (["a", "b"], ["a", "mine"]):
        before = {path.name: path.read_text() for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=rf"{names[1]} is not as this script wrote it; move it away"):
            own.replace(dict.fromkeys(names, "4"))
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    own.adopt("b")
    assert OwnFiles(tmp_path).foreign(["a", "b", "mine", "none"]) == ["mine"]


@pytest.mark.parametrize("written", [0, 1])
def test_a_crash_at_any_file_leaves_all_of_them_provable(tmp_path, monkeypatch, written):
    OwnFiles(tmp_path).replace({"a": "old", "b": "old"})
    replaced, replace = [], os.replace

    def crash(source, target):
        if len(replaced) == written + 1:  # the proof is the first
            raise KeyboardInterrupt
        replaced.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        OwnFiles(tmp_path).replace({"a": "new", "b": "new"})
    monkeypatch.undo()
    OwnFiles(tmp_path).replace({"a": "newer", "b": "newer"})
    assert [(tmp_path / name).read_text() for name in "ab"] == ["newer", "newer"]


@pytest.mark.parametrize("proof", ["[]", '{"a": 1}', "[" * 5000, "x"])
def test_a_damaged_proof_is_one_line(tmp_path, proof):
    (tmp_path / ".written.json").write_text(proof)
    with pytest.raises(UserError, match=r"\.written\.json"):
        OwnFiles(tmp_path)
