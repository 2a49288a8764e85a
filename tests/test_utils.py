"""The shared leaf: templates to the byte, files that are whole or not there, flags that are checked before anything."""

import io
import json
import os
import resource
import shlex
import stat
import subprocess
import sys
import tempfile

import pytest

import utils
from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write, jdump, jload
from alpaca.prompts import format_prompt
from alpaca.records import load_examples, load_records

# ---------------------------------------------------------------------------------------------------------------------
# Templates


def test_prompt_with_an_input_is_the_originals_to_the_byte():
    assert format_prompt({"instruction": "Add.", "input": "1, 2"}).encode() == (
        b"Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        b"response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        b"### Response:"
    )


@pytest.mark.parametrize("example", [{"instruction": "Rhyme."}, {"instruction": "Rhyme.", "input": ""}])
def test_prompt_without_an_input_is_the_originals_to_the_byte(example):
    assert format_prompt(example).encode() == (
        b"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        b"### Instruction:\nRhyme.\n\n### Response:"
    )


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    prompt = format_prompt({"instruction": "Fill {input} and {0} in {instruction}.", "input": "{instruction} {input}"})
    assert "### Instruction:\nFill {input} and {0} in {instruction}.\n" in prompt
    assert "### Input:\n{instruction} {input}\n" in prompt


# ---------------------------------------------------------------------------------------------------------------------
# jdump, jload, atomic_write

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
    ],
)
def test_jload_refuses_what_is_no_json(content, complaint, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as refusal:
        jload(path)
    assert str(path) in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# load_records, load_examples


def test_records_come_from_json_and_from_json_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"n": 1}, {"n": 2}]')
    (tmp_path / "b.jsonl").write_text('{"n": "\u2028"}\r\n\n{"n": 2}', encoding="utf-8")
    places, records = zip(*load_records(tmp_path / "a.json"), strict=True)
    assert places == (f"{tmp_path}/a.json, record 0", f"{tmp_path}/a.json, record 1")
    assert records == ({"n": 1}, {"n": 2})
    places, records = zip(*load_records(tmp_path / "b.jsonl"), strict=True)
    assert places == (f"{tmp_path}/b.jsonl, line 1", f"{tmp_path}/b.jsonl, line 3")
    assert records == ({"n": "\u2028"}, {"n": 2})


def test_examples_keep_further_fields_and_a_missing_or_null_input_is_empty(tmp_path):
    jdump(
        [{"instruction": "i", "output": "o", "id": 7}, {"instruction": "j", "input": None, "output": "p"}],
        tmp_path / "d",
    )
    assert load_examples(tmp_path / "d") == [
        {"instruction": "i", "output": "o", "id": 7, "input": ""},
        {"instruction": "j", "input": "", "output": "p"},
    ]
    jdump([{"instruction": "i", "output": ""}], tmp_path / "e")
    assert load_examples(tmp_path / "e", require_output=False)[0]["instruction"] == "i"


GOOD = '{"instruction": "i", "output": "o"}'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", " holds no records"),
        ("[]", " holds no records"),
        (f"[{GOOD},\n{GOOD},]", ", line 2, column 3[67]: not JSON"),
        (f"{GOOD}\n{GOOD[:-9]}", ", line 2, column [0-9]+: not JSON"),
        ('{"a":\n [1]}', " holds one JSON object; expected a list or one a line"),
        (f"[{GOOD}, 5]", ", record 1: expected an object with named fields, found int"),
        (f'{GOOD}\n"text"', ", line 2: expected an object with named fields, found str"),
        (
            f'[{GOOD}, {{"prompt": "x", "output": "o"}}]',
            ", record 1: no 'instruction'; found the fields 'prompt', 'output'",
        ),
        (f'{GOOD}\n\n{{"instruction": "i"}}', ", line 3: no 'output'; found the fields 'instruction'"),
        ('[{"instruction": 7, "output": "o"}]', ", record 0: 'instruction' must be text, found int 7"),
        (
            '[{"instruction": "i", "input": ["x"], "output": "o"}]',
            r", record 0: 'input' must be text, found list \['x'\]",
        ),
        ('[{"instruction": "i", "output": null}]', ", record 0: 'output' must be text, found NoneType None"),
        ('[{"instruction": " ", "output": "o"}]', ", record 0: 'instruction' is empty"),
        ('[{"instruction": "i", "output": "\\n"}]', ", record 0: 'output' is empty"),
        (r'[{"instruction": "i", "output": "a \ud83d"}]', r", record 0: 'output' is no text: character 2 is '.ud83d'"),
    ],
)
def test_malformed_examples_are_refused_with_their_place(content, complaint, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}{complaint}"):
        load_examples(path)


# ---------------------------------------------------------------------------------------------------------------------
# run_cli

ran = []


def answer(
    instruction: str,
    num_beams: int = 1,
    stream: bool = False,
    top_p: float | None = None,
    model_name: str | None = None,
) -> str:
    """Answers.

    Args:
        instruction: what is asked.
    """
    ran.append((instruction, num_beams, stream, top_p, model_name))
    return "not printed"


@pytest.fixture(autouse=True)
def _nothing_ran():
    ran.clear()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (["--instruction", "1,2"], ("1,2", 1, False, None, None)),
        (["--instruction", "None"], ("None", 1, False, None, None)),
        (["--instruction", "True", "--num-beams", "-3"], ("True", -3, False, None, None)),
        (["--instruction=--help me", "--model_name", "7"], ("--help me", 1, False, None, "7")),
        (["--instruction", "a=b", "--top_p", "1", "--model_name", "None"], ("a=b", 1, False, 1.0, None)),
        (["--stream", "--instruction", ""], ("", 1, True, None, None)),
        (["--instruction", "x", "--stream", "True"], ("x", 1, True, None, None)),
        (["--instruction", "x", "--stream=true"], ("x", 1, True, None, None)),
        (["--stream", "False", "--instruction", "x"], ("x", 1, False, None, None)),
        (["--nostream", "--instruction", "x"], ("x", 1, False, None, None)),
        (["-s", "-i", "x", "-t", "0.5"], ("x", 1, True, 0.5, None)),
    ],
)
def test_values_take_the_type_of_their_parameter(line, values, capsys):
    run_cli({"answer": answer}, ["answer", *line])
    assert ran == [values]
    assert [type(value) for value in ran[0]] == [type(value) for value in values]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "no command given; there are answer, batch (--help tells more)"),
        ("anser", "unknown command anser; did you mean answer?"),
        ("zip", "unknown command zip; there are answer, batch"),
        ("--instruction x", "'--instruction' stands before the command; there are answer, batch (--help tells more)"),
        ("answer", "answer needs --instruction; see answer --help"),
        ("answer --instrution x", "unknown flag --instrution; did you mean --instruction?"),
        ("answer --instruction x --zzz", "unknown flag --zzz; there are --instruction, --num_beams, --stream, --top_p"),
        ("answer x", "unexpected argument 'x'; answer takes its values by flags: --instruction --num_beams"),
        (
            "answer --instruction",
            "--instruction needs a value (one that starts with dashes is written --instruction=VAL",
        ),
        ("answer --instruction --stream", "--instruction needs a value"),
        ("answer --instruction x --num_beams 1.5", "--num_beams must be a whole number, found '1.5'"),
        ("answer --instruction x --top_p high", "--top_p must be a number, found 'high'"),
        ("answer --instruction x --stream maybe", "--stream must be True or False, found 'maybe'"),
        ("answer --instruction x --instruction y", "--instruction is given twice"),
    ],
)
def test_a_mistyped_line_is_refused_before_anything_runs(line, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli({"answer": answer, "batch": answer}, line.split())
    assert stop.value.code == 2
    assert ran == []
    err = capsys.readouterr().err
    assert err.startswith(f"error: {complaint}")
    assert err.count("\n") == 1


def test_a_user_error_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fail(kind: str = "user"):
        raise {"user": UserError, "bug": KeyError, "ctrl-c": KeyboardInterrupt}[kind]("found 3, expected 4")

    with pytest.raises(SystemExit) as stop:
        run_cli({"fail": fail}, ["fail"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: found 3, expected 4\n"
    with pytest.raises(KeyError):
        run_cli({"fail": fail}, ["fail", "--kind", "bug"])
    with pytest.raises(SystemExit) as stop:
        run_cli({"fail": fail}, ["fail", "--kind", "ctrl-c"])
    assert stop.value.code == 130


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    def read():
        os.stat(tmp_path / "none")

    with pytest.raises(SystemExit) as stop:
        run_cli({"read": read}, ["read"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(root):
    program = (
        "from alpaca.cli import run_cli\ndef say():\n    for _ in range(10**5): print('word')\nrun_cli({'say': say})"
    )
    command = [sys.executable, "-c", program, "say"]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "word\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_command_runs_without_a_stdout(root):
    program = "from alpaca.cli import run_cli\nrun_cli({'say': lambda: print('word')})"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} say >&-"
    done = subprocess.run(command, shell=True, cwd=root, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", ["--help", "-h", "answer --help", "answer --instruction x -h"])
def test_help_shows_what_can_be_typed_and_runs_nothing(line, capsys, monkeypatch):
    monkeypatch.setenv("PAGER", "cat")
    with pytest.raises(SystemExit) as stop:
        run_cli({"answer": answer}, line.split())
    assert not stop.value.code
    assert ran == []
    shown = "".join(capsys.readouterr())
    if line.startswith("-"):
        assert "answer\n" in shown
    else:
        assert "--instruction=INSTRUCTION (required)" in shown
        assert "what is asked." in shown
        assert "POSITIONAL" not in shown
        assert "GROUP" not in shown


def test_importing_the_leaf_loads_no_heavy_library():
    script = "import sys, utils; print({'torch', 'transformers', 'openai', 'fire', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.path.dirname(utils.__file__)
    )
    assert done.stdout == "set()\n"
