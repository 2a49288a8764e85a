"""train.py's command line: its flags are known, checked and explained before torch and transformers are imported.

Importing the Trainer takes seconds. So the dataclasses that define the flags are read as source, not imported.
"""

import ast
import difflib
import importlib.util
import os
from dataclasses import dataclass

from utils import UserError


@dataclass
class Flag:
    """A command-line flag, as its dataclass field tells."""

    name: str
    default: str
    help: str


def declared_flags(path: str, classes: tuple[str, ...]) -> dict[str, Flag]:
    """Reads the fields of dataclasses from a source file, without importing it.

    Args:
        path: a Python file.
        classes: the names of the dataclasses.

    Returns:
        Flag name -> flag, in order.
    """
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    flags = {}
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in classes):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
                default, text = _default_and_help(item.value)
                flags[item.target.id] = Flag(item.target.id, default, text)
    return flags


def _default_and_help(value: ast.expr | None) -> tuple[str, str]:
    if not isinstance(value, ast.Call):
        return ("" if value is None else ast.unparse(value)), ""
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    default = ast.unparse(keywords["default"]) if "default" in keywords else ""
    text = ""
    if isinstance(keywords.get("metadata"), ast.Dict):
        pairs = zip(keywords["metadata"].keys, keywords["metadata"].values, strict=True)
        texts = [node for key, node in pairs if isinstance(key, ast.Constant) and key.value == "help"]
        if texts and isinstance(texts[0], ast.Constant):
            text = " ".join(str(texts[0].value).split())
    return default, text


def known_flags(script: str) -> tuple[dict[str, Flag], dict[str, Flag]]:
    """Lists the script's own flags and those it inherits from the Hugging Face Trainer."""
    own = declared_flags(script, ("ModelArguments", "DataArguments", "TrainingArguments"))
    package = importlib.util.find_spec("transformers")
    if package is None:
        raise UserError("transformers is not installed; expected: pip install -r requirements.txt")
    inherited = declared_flags(
        os.path.join(package.submodule_search_locations[0], "training_args.py"), ("TrainingArguments",)
    )
    return own, {name: flag for name, flag in inherited.items() if name not in own}


def check_flags(argv: list[str], script: str) -> None:
    """Refuses a flag that does not exist, naming the nearest that does; answers --help.

    Args:
        argv: the arguments.
        script: path of the script whose dataclasses define the flags.

    Raises:
        UserError: the first unknown flag or stray value.
        SystemExit: after --help.
    """
    own, inherited = known_flags(script)
    if {"-h", "--help"} & set(argv):
        print(_help(script, own, inherited))
        raise SystemExit(0)
    names = {**own, **inherited}
    takes_value = False
    for argument in argv:
        if not argument.startswith("--"):
            if not takes_value:
                raise UserError(f"unexpected argument {argument!r}; every value follows its flag (--help lists them)")
            takes_value = False
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        if name not in names and name.removeprefix("no_") not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            raise UserError(f"unknown flag --{name}; " + (f"did you mean --{close[0]}?" if close else "see --help"))
        takes_value = "=" not in argument


def _help(script: str, own: dict[str, Flag], inherited: dict[str, Flag]) -> str:
    import textwrap

    with open(script, encoding="utf-8") as file:
        lines = [ast.get_docstring(ast.parse(file.read())), "", "Flags:"]
    for flag in own.values():
        lines.append(f"  --{flag.name}" + (f" (default {flag.default})" if flag.default not in ("", "None") else ""))
        lines += textwrap.wrap(flag.help, 110, initial_indent="      ", subsequent_indent="      ")
    lines += ["", "From the Hugging Face Trainer (its documentation explains them):"]
    with_defaults = " ".join(f"--{flag.name}={flag.default or 'None'}" for flag in inherited.values())
    lines += textwrap.wrap(with_defaults, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)
