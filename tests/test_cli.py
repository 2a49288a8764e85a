"""Flags are checked before anything runs; a user's mistake is one line, a bug keeps its traceback."""

import os
import shlex
import subprocess
import sys

import pytest

from alpaca.cli import UserError, run_cli

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
