"""The README cannot rot: every command in it is checked against the script that it calls, every link and file too."""

import contextlib
import functools
import os
import re
import runpy
import shlex
import sys
import tempfile

import pytest

from alpaca import cli

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as readme:
    TEXT = readme.read()

# Programs that are not ours: what the README may call without a check of its own.
OTHERS = {"cd", "cmp", "curl", "echo", "export", "git", "kill", "ollama", "transformers", "vllm"}


def commands() -> list[str]:
    """Every command in a bash block, continuation lines joined, comments and blank lines left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#\s.*", "", line).strip()
            found += [re.sub(r"\s+", " ", part) for part in line.split(" && ") if part]
    return found


def split(command: str) -> list[str]:
    """The words of a command without leading VARIABLE=value pairs, a trailing & and `.venv/bin/`."""
    words = shlex.split(command.removesuffix("&").strip())
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


@functools.lru_cache
def cli_commands(script: str, command: str) -> dict:
    """The commands that a script hands to `utils.run_cli`; none for one that reads its flags in another way."""
    seen = {}
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        if "run_cli(" not in file.read():
            return seen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run_cli", lambda table, argv=None: seen.update(table))
        patch.setattr(sys, "argv", [script, command])
        patch.setattr(sys, "path", [*sys.path, os.path.dirname(os.path.join(ROOT, script))])
        with contextlib.suppress(SystemExit):
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    return seen


def check_script(words: list[str]) -> None:
    """Checks `python script.py command --flags` against the signature of what it calls."""
    script, *arguments = [f"{words[1].replace('.', '/')}.py", *words[2:]] if words[0] == "-m" else words
    assert os.path.isfile(os.path.join(ROOT, script)), f"no such script: {script}"
    if script == "train.py" and arguments[0] != "merge":
        check_training(arguments)
    elif table := cli_commands(script, arguments[0]):
        command, *flags = arguments
        assert command in table, f"{script} has {list(table)}"
        if flags != ["--help"]:
            cli._read_flags(table[command], command, flags)
    else:
        check_argparse(script, arguments)


def check_argparse(script: str, arguments: list[str]) -> None:
    """Checks that a script which parses its own flags names each flag that is used."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        source = file.read()
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def check_training(arguments: list[str]) -> None:
    """Parses train.py's flags as train.py does, where the folders exist that the README leaves to its reader."""
    import train

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("alpaca_data.json", "configs"):
            os.symlink(os.path.join(ROOT, name), name)
        model = arguments[arguments.index("--model_name_or_path") + 1]
        os.makedirs(model)
        train.parse_arguments(["--output_dir", "unused", *arguments])


def check_torchrun(words: list[str]) -> None:
    """Parses torchrun's own flags with torchrun's parser, the rest with train.py's."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args([word.replace("$RANK", "0") for word in words])
    assert parsed.training_script == "train.py"
    check_training(parsed.training_script_args)


def check_make(words: list[str]) -> None:
    with open(os.path.join(ROOT, "Makefile"), encoding="utf-8") as makefile:
        targets = re.findall(r"^([\w-]+):", makefile.read(), flags=re.MULTILINE)
    for target in words:
        assert "=" in target or target in targets, f"the Makefile has {targets}"


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for name in (word for word in words if word.endswith(".txt")):
        assert os.path.isfile(os.path.join(ROOT, name)), name


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_its_program_takes(command):
    program, *rest = split(command)
    checks = {"make": check_make, "python": check_script, "torchrun": check_torchrun, "pip": check_pip}
    assert program in checks or program in OTHERS, f"README.md calls {program}, which no check here knows"
    if program in checks:
        checks[program](rest)


def test_two_commands_stand_by_line_25():
    head = TEXT.splitlines()[:25]
    assert any(line.startswith("make demo") for line in head)
    assert any(line.startswith("make test") for line in head)


def test_file_map_names_every_script_and_nothing_that_is_gone():
    section = TEXT.split("## File map", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`([\w./]+)`", section))
    missing = {name for name in named if not os.path.exists(os.path.join(ROOT, name))}
    scripts = {name for name in os.listdir(ROOT) if name.endswith(".py")}
    assert not missing
    assert scripts <= named


def test_links_and_pictures_point_at_something():
    slug = re.compile(r"[^\w\- ]")
    headings = {slug.sub("", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert os.path.exists(os.path.join(ROOT, target)), target


def test_difference_table_has_rows_for_every_script():
    section = TEXT.split("## Differences from the original", 1)[1].split("\n## ", 1)[0]
    for part in section.split("\n### ")[1:]:
        assert part.count("\n|") >= 3, f"no table under {part.splitlines()[0]!r}"
