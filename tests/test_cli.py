"""Flags are checked before anything runs; a user's mistake is one line, a bug keeps its traceback."""

import inspect
import os
import shlex
import subprocess
import sys
from typing import get_args

import pytest

from alpaca.cli import UserError, expand_home, run_cli

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
        ("", "no command given; the commands are answer, batch (see --help)"),
        ("anser", "unknown command anser; did you mean answer?"),
        ("zip", "unknown command zip; the commands are answer, batch"),
        ("--instruction x", "'--instruction' comes before the command; the commands are answer, batch (see --help)"),
        ("answer", "answer needs --instruction; see answer --help"),
        ("answer --instrution x", "unknown flag --instrution; did you mean --instruction?"),
        (
            "answer --instruction x --zzz",
            "unknown flag --zzz; the flags are --instruction, --num_beams, --stream, --top_p",
        ),
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
        ("answer --instruction x --nostream=True", "--nostream takes no value; write --stream=VALUE"),
        ("answer --noinstruction", "unknown flag --noinstruction; did you mean --instruction?"),
        (f"answer --instruction x --num_beams {'9' * 5000}", "--num_beams must be a whole number, found '999"),
        ("answer --instruction x --top_p 1e999", "--top_p must be a number, found '1e999'"),
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


def test_a_leading_tilde_is_the_home_folder_in_every_flag_that_names_a_file_or_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    got = {}

    def command(data_path: str, path_raw: str, output_dir: str = "", data: str = "", instruction: str = "") -> None:
        got.update(locals())

    run_cli({"c": command}, ["c", "--data_path=~/a", "--path_raw", "~", "--output_dir=./~", "--instruction", "~/a"])
    assert got["data_path"] == "/home/ada/a"
    assert got["path_raw"] == "/home/ada"
    assert got["output_dir"] == "./~"
    assert got["instruction"] == "~/a"


def test_every_flag_of_the_scripts_that_names_a_file_or_folder_has_its_home_expanded(monkeypatch):
    import generate_instruction
    import inference
    import parse_analysis
    import weight_diff

    monkeypatch.setenv("HOME", "/home/ada")
    commands = [generate_instruction.generate_instruction_following_data, generate_instruction.replay]
    commands += [inference.answer, inference.chat, inference.batch, inference.demo, inference.compare]
    commands += [parse_analysis.plot, weight_diff.make_diff, weight_diff.recover, weight_diff.verify, weight_diff.info]
    parameters = {p.name: p for command in commands for p in inspect.signature(command).parameters.values()}
    names = {
        name
        for name, parameter in parameters.items()
        if str in get_args(parameter.annotation) or parameter.annotation is str
    }
    assert {name for name in names if expand_home(name, "~") == "/home/ada"} == {
        "a", "b", "compare", "data", "data_path", "journal_path", "model_path", "output", "output_dir", "output_path",
        "path", "path_diff", "path_raw", "path_tuned", "prompt_path", "seed_tasks_path",
    }  # fmt: skip


def test_what_a_terminal_would_obey_is_escaped_in_every_error(capsys):
    server = "\x1b[2J\x1b]0;title\x07 said\r\nno\u202e"

    def fail(kind: str) -> None:
        raise UserError(server) if kind == "user" else FileNotFoundError(2, "No such file", server)

    for kind in ("user", "os"):
        with pytest.raises(SystemExit):
            run_cli({"fail": fail}, ["fail", "--kind", kind])
        err = capsys.readouterr().err
        assert r"\x1b[2J\x1b]0;title\x07 said\r\nno\u202e" in err
        assert err.count("\n") == 1
        assert "\x1b" not in err
    with pytest.raises(SystemExit):
        run_cli({"fail": fail}, ["\x1b[31mfail"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_character_that_the_terminal_lacks_is_escaped_and_ends_nothing(root, encoding):
    program = (
        "from alpaca import cli\n"
        "def say():\n    print('é 😀 \\ud83d'); cli.say('é 😀'); raise cli.UserError('😀')\n"
        "cli.run_cli({'say': say})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "say"],
        cwd=root,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    shown = "é 😀 \ud83d\n".encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout) == (2, shown)
    assert done.stderr == "é 😀\nerror: 😀\n".encode(encoding, "backslashreplace")


def test_a_file_never_takes_the_place_of_a_closed_stream(root, tmp_path):
    """Without stdout the next open file would be number 1, and libraries in C would print into it."""
    program = (
        "import os, sys\nfrom alpaca import cli\n"
        "def write():\n"
        "    with open(sys.argv[2], 'w') as file:\n"
        "        os.write(1, b'noise'); os.write(2, b'noise'); print('word'); cli.say('word')\n"
        "        try:\n            input()\n"
        "        except EOFError:\n            file.write(f'whole {file.fileno() > 2}')\n"
        "cli.run_cli({'write': write}, ['write'])"
    )
    path = tmp_path / "file"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} write {path} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=root).returncode == 0
    assert path.read_text() == "whole True"
