"""The command line of every script: checked before anything runs, with one clear line for a user's mistake."""

import contextlib
import difflib
import functools
import inspect
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, get_args

# A flag with one of these words in its name names a file or folder: in its value, a leading ~ is the home folder.
# (a and b are the two files of `inference.py compare`.)
_PATH_WORDS = {"path", "dir", "data", "output", "compare", "a", "b"}


class UserError(Exception):
    """A user's mistake. The message is one line: what was found, what was expected, what to do next."""


def printable(text: str) -> str:
    r"""Escapes what a terminal would obey rather than show: line ends, escape sequences, reversed writing.

    Messages quote file names, servers and data, so any of these may stand in one.

    Example:
        "a\x1b[2Jb\n" -> r"a\x1b[2Jb\n"
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def steady_streams() -> None:
    """Makes stdin, stdout and stderr usable whatever the caller has done to them.

    A character that stdout or stderr can't encode is escaped, because an emoji must not end a run under
    PYTHONIOENCODING=latin-1. A stream that was closed (`>&-`) becomes /dev/null. Otherwise the next file to be opened
    would take its number, and what a C library prints would land in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def run_cli(commands: dict[str, Callable], argv: list[str] | None = None) -> None:
    """Runs the command that the command line names.

    The syntax is that of fire, which also writes the help. Names, flags and types are checked before anything runs,
    and a value is read as the type of its parameter (fire would read the instruction "1,2" as a tuple). `--flag`,
    `--flag True`, `--flag=False` and `--noflag` all set a bool. What a command returns is meant for Python callers
    and is not printed.

    Args:
        commands: Command name -> function.
        argv: The arguments; `sys.argv[1:]` when None.

    Raises:
        SystemExit: Status 2, with one line on stderr, for a user's mistake or a file that can't be read or written;
            130 after Ctrl-C and 141 after a broken pipe, the statuses that shells use.
    """
    steady_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        asks_help = {"-h", "--help"} & set(argv)
        if asks_help and argv[0].startswith("-"):
            _print_help(commands)
        if not argv or argv[0].startswith("-"):
            found = f"{argv[0]!r} comes before the command" if argv else "no command given"
            raise UserError(f"{found}; the commands are {', '.join(commands)} (see --help)")
        command = _nearest(argv[0].replace("-", "_"), commands, "command")
        if asks_help:
            _print_help(commands, command)
        commands[command](**_read_flags(commands[command], command, argv[1:]))
        print(end="", flush=True)  # a broken pipe shows up here rather than while Python exits
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it exits
        sys.exit(141)
    except OSError as error:
        if not error.strerror:  # raised by a library, not by the operating system
            raise
        say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def say(message: str) -> None:
    """Prints a message of one line to stderr, apart from the results on stdout."""
    print(printable(message), file=sys.stderr, flush=True)


def _print_help(commands: dict[str, Callable], *command: str) -> NoReturn:
    try:
        import fire
    except ModuleNotFoundError:
        for name in command or commands:
            print(f"{name}{inspect.signature(commands[name])}\n\n{inspect.getdoc(commands[name])}\n")
        sys.exit(0)

    def flags_only(function: Callable) -> Callable:
        @functools.wraps(function)
        def described(**values: Any) -> None: ...

        signature = inspect.signature(function)
        flags = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
        described.__signature__ = signature.replace(parameters=flags)
        return described

    fire.Fire({name: flags_only(function) for name, function in commands.items()}, [*command, "--", "--help"])
    sys.exit(0)


def _nearest(name: str, known: Mapping[str, Any], kind: str) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"the {kind}s are {', '.join(known)}"
    raise UserError(f"unknown {kind} {name}; {hint}")


def _read_flags(function: Callable, command: str, arguments: list[str]) -> dict[str, Any]:
    """Reads a command's flags into arguments for its function.

    Example:
        for `def answer(instruction: str, num_beams: int = 1)`,
        ["--instruction", "1,2", "--num-beams=3"] -> {"instruction": "1,2", "num_beams": 3}

    Raises:
        UserError: Names the first unknown flag, stray value, wrong type or missing flag.
    """
    flags = {f"--{name}": parameter for name, parameter in inspect.signature(function).parameters.items()}
    letters = Counter(flag[2] for flag in flags)
    shorts = {flag[1:3]: flag for flag in flags if letters[flag[2]] == 1}  # as fire's help shows them
    given, waiting = {}, list(arguments)
    while waiting:
        flag, has_value, value = waiting.pop(0).partition("=")
        flag = shorts.get(flag, flag)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; {command} takes its values by flags: {' '.join(flags)}")
        flag = "--" + flag[2:].replace("-", "_")
        positive = "--" + flag[4:] if flag.startswith("--no") and flag not in flags else ""
        if positive in flags and _accepts(flags[positive], bool):
            if has_value:
                raise UserError(f"{flag} takes no value; write {positive}=VALUE")
            flag, has_value, value = positive, True, "False"
        parameter = flags[_nearest(flag, flags, "flag")]
        if not has_value and waiting and not waiting[0].startswith("--") and waiting[0] not in shorts:
            value = waiting.pop(0)
        elif not has_value and _accepts(parameter, bool):
            value = "True"
        elif not has_value:
            raise UserError(f"{flag} needs a value (one that starts with dashes is written {flag}=VALUE)")
        if parameter.name in given:
            raise UserError(f"{flag} is given twice")
        given[parameter.name] = _parse(value, parameter)
    missing = [flag for flag, p in flags.items() if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"{command} needs {' and '.join(missing)}; see {command} --help")
    return given


def _accepts(parameter: inspect.Parameter, kind: type) -> bool:
    """Tells whether a parameter takes values of a type: `float | None` accepts float and NoneType."""
    return kind in (get_args(parameter.annotation) or (parameter.annotation,))


def _parse(text: str, parameter: inspect.Parameter) -> Any:
    """Converts a flag's text to its parameter's type; other parameters get the text, or the path, as it is."""
    if text == "None" and _accepts(parameter, type(None)):
        return None
    readers = {
        bool: lambda t: {"true": True, "1": True, "false": False, "0": False}[t.lower()],
        int: int,
        float: _finite,
    }
    expected = [kind for kind in readers if _accepts(parameter, kind)]
    for kind in expected:
        with contextlib.suppress(ValueError, KeyError):
            return readers[kind](text)
    if not expected or _accepts(parameter, str):
        return expand_home(parameter.name, text)
    names = {bool: "True or False", int: "a whole number", float: "a number"}
    raise UserError(f"--{parameter.name} must be {' or '.join(names[kind] for kind in expected)}, found {text!r:.80}")


def expand_home(name: str, value: str) -> str:
    """Puts the home folder for a leading ~ into the value of a flag that names a file or folder.

    A shell does so for `--data_path ~/x`, but not for `--data_path=~/x` or a quoted value.

    Example:
        ("data_path", "~/data.json") -> "/home/ada/data.json", ("instruction", "~/data.json") -> "~/data.json"
    """
    return os.path.expanduser(value) if _PATH_WORDS & set(name.split("_")) else value


def _finite(text: str) -> float:
    """Reads a float but refuses infinity, and NaN, which would pass every comparison with a limit."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number
