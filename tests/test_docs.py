"""The documentation cannot rot: every command is checked against its program, every link against what it points at."""

import contextlib
import fnmatch
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile

import pytest
from documented import PAGES, ROOT, bash_blocks, commands, read

from alpaca import cli

# Programs that are not ours: what a page may call without a check of its own.
OTHERS = {"alpaca_eval", "cd", "cmp", "cp", "curl", "echo", "export", "git", "hf", "kill"}
OTHERS |= {"convert_hf_to_gguf.py", "llama-server", "mkdir", "transformers", "vllm"}


def split(command: str) -> list[str]:
    """The words of a command without leading VARIABLE=value pairs, a trailing & and `.venv/bin/`."""
    words = shlex.split(command.removesuffix("&").strip())
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


def inline_commands(page: str) -> list[str]:
    """The commands of our own that stand inside a sentence or a table."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`((?:python|make|pip) [^`]+)`", text)]


def cli_commands(script: str, arguments: list[str]) -> tuple[dict, list[str]]:
    """The commands that a script hands to `run_cli`, and the arguments; no commands if it reads its flags otherwise."""
    seen = []
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        if "run_cli(" not in file.read():
            return {}, arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run_cli", lambda table, argv=None: seen.append((table, argv or arguments)))
        patch.setattr(sys, "argv", [script, *arguments])
        with contextlib.suppress(SystemExit):
            runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    return seen[0]


def check_python(words: list[str]) -> None:
    """Checks `python script.py command --flags` or `python -m module ...` against the signature of what it calls."""
    if words[:2] == ["-m", "pytest"]:
        return check_pytest(words[2:])
    script, arguments = words[0], words[1:]
    if script == "-m":
        script, arguments = words[1].replace(".", "/"), words[2:]
        script += "/__main__.py" if os.path.isdir(os.path.join(ROOT, script)) else ".py"
    assert os.path.isfile(os.path.join(ROOT, script)), f"no such script: {script}"
    if script == "train.py" and arguments[0] != "merge":
        return check_training(arguments)
    table, arguments = cli_commands(script, arguments)
    if not table:
        return check_argparse(script, arguments)
    command, *flags = arguments
    assert command in table, f"{script} has {list(table)}"
    if "..." not in flags:  # a command that a sentence names without its flags
        cli._read_flags(table[command], command, flags)


def check_pytest(words: list[str]) -> None:
    for path in (word for word in words if word.startswith("tests")):
        assert os.path.exists(os.path.join(ROOT, path)), path


def check_argparse(script: str, arguments: list[str]) -> None:
    """Checks that a script which parses its own flags names each flag that is used."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        source = file.read()
    for flag in (word.split("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def check_training(arguments: list[str]) -> None:
    """Parses train.py's flags as train.py does, where the folders exist that the page leaves to its reader."""
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


PRINTED = {(page, command): None for page in PAGES for command in commands(page) + inline_commands(page)}


@pytest.mark.parametrize(("page", "command"), PRINTED)
def test_command_is_one_that_its_program_takes(page, command):
    program, *rest = split(command)
    checks = {"make": check_make, "python": check_python, "torchrun": check_torchrun, "pip": check_pip}
    assert program in checks or program in OTHERS, f"{page} calls {program}, which no check here knows"
    if program in checks:
        checks[program](rest)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_wider_than_100_columns(page):
    lines = [line for block in bash_blocks(page) for line in block.splitlines()]
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_fits_in_250_lines_and_15_kb():
    assert len(read("README.md").splitlines()) <= 250
    assert len(read("README.md").encode()) <= 15 * 1024


def test_two_commands_stand_by_line_25():
    head = read("README.md").splitlines()[:25]
    assert any(line.startswith("make demo") for line in head)
    assert any(line.startswith("make test") for line in head)


def tree() -> list[str]:
    """The paths that the README's tree names: folders end in a slash, two spaces of indent are one folder deeper."""
    block = re.search(r"```text\n(.*?)```", read("README.md"), re.DOTALL)[1]
    found, parents = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = []
        for cell in re.split(r"\s{2,}", line.strip()):
            if not re.fullmatch(r"[\w.*-]+(\.\w+|/)|LICENSE|Makefile", cell):
                break  # the rest describes them
            names.append("".join(parents[:depth]) + cell)
        assert names, f"no file or folder: {line!r}"
        parents[depth:] = [names[-1].removeprefix("".join(parents[:depth]))] if names[-1].endswith("/") else []
        found += names
    return found


def tracked() -> list[str]:
    """The files of the project; what lies beside them in a working folder is none of the README's business."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [path for path in done.stdout.splitlines() if not path.startswith(".")]


def test_everything_in_the_readmes_tree_exists():
    files = tracked()
    for name in tree():
        folder = name.endswith("/")
        assert any(path.startswith(name) if folder else fnmatch.fnmatch(path, name) for path in files), name


def test_the_readmes_tree_names_every_package_folder_and_root_file():
    named, files = tree(), [path for path in tracked() if path != "README.md"]
    roots = {path.split("/")[0] + ("/" if "/" in path else "") for path in files}
    packages = {os.path.dirname(path) + "/" for path in files if path.startswith("alpaca/")}
    missing = [one for one in sorted(roots | packages) if not any(fnmatch.fnmatch(one, name) for name in named)]
    assert missing == []


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub makes them: "## Two commands, `now`" is #two-commands-now."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_point_at_something(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), target
        assert not anchor or anchor in headings(path), target


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", read(page))}
        near = {os.path.normpath(os.path.join(os.path.dirname(page), link)) for link in links}
        new |= (near & set(PAGES)) - reached
    assert reached == set(PAGES)


def test_differences_have_a_table_for_every_script():
    for part in read("DIFFERENCES.md").split("\n## ")[1:]:
        assert part.count("\n|") >= 3, f"no table under {part.splitlines()[0]!r}"
    scripts = re.findall(r"^## (\w+\.py)$", read("DIFFERENCES.md"), re.MULTILINE)
    assert scripts == ["generate_instruction.py", "train.py", "weight_diff.py"]


def test_every_test_that_the_table_of_faults_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", read("docs/reliability.md"))
    rows = [line for line in read("docs/reliability.md").splitlines() if re.match(r"\| (?!fault)", line)]
    assert len(named) == len(rows) > 40
    for path, name in named:
        assert f"\ndef {name}(" in "\n" + read(path), f"{path} has no {name}"


def test_the_table_of_faults_counts_the_generated_cases():
    counts = re.findall(r"@cases\((\d+)\)(?:\n@.*)*\ndef (test_\w+)", read("tests/test_damage.py"))
    rows = read("docs/reliability.md").splitlines()
    assert len(counts) == 6
    for count, name in counts:
        assert any(row.startswith(f"| {int(count):,} ") and f"::{name}`" in row for row in rows), name
