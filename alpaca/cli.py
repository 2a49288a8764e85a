"""Command lines as every script here has them: checked before anything runs, a user's mistake told in one line."""

import contextlib
import difflib
import functools
import inspect
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


class UserError(Exception):
    """A user's mistake. Its text is one line: what was found, what was expected, what to do next."""


def run_cli(commands: dict[str, Callable], argv: list[str] | None = None) -> None:
    """Runs one of several commands from the command line, the way every script here does it.

    The form is fire's, which also writes the help; but names, flags and types are checked before anything runs, and a
    value takes the type of its parameter: fire would read the instruction "1,2" as a tuple. `--flag`, `--flag True`,
    `--flag=False` and `--noflag` all set a bool. What a command returns is for Python callers and isn't printed.

    Args:
        commands: name on the command line -> function.
        argv: the arguments; `sys.argv[1:]` when None.

    Raises:
        SystemExit: with status 2 and one line on stderr for a user's mistake, or a file or disk that can't be read or
            written; 130 after Ctrl-C, 141 where nobody reads stdout any more, as shells say it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        asks_help = {"-h", "--help"} & set(argv)
        if asks_help and argv[0].startswith("-"):
            _print_help(commands)
        if not argv or argv[0].startswith("-"):
            given = f"{argv[0]!r} stands before the command" if argv else "no command given"
            raise UserError(f"{given}; there are {', '.join(commands)} (--help tells more)")
        command = _nearest(argv[0].replace("-", "_"), commands, "command")
        if asks_help:
            _print_help(commands, command)
        commands[command](**_read_flags(commands[command], command, argv[1:]))
        print(end="", flush=True)  # what a closed pipe refuses is told here and not at Python's end
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what reads stdout has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(141)
    except OSError as error:
        if not error.strerror:  # of a library, in words of its own
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def say(message: str) -> None:
    """Prints a message to stderr, where it doesn't mix with results."""
    print(message, file=sys.stderr, flush=True)


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
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise UserError(f"unknown {kind} {name}; {hint}")


def _read_flags(function: Callable, command: str, arguments: list[str]) -> dict[str, Any]:
    """Refuses unknown flags, stray values, wrong types and missing flags; the first mistake is reported.

    Returns:
        Parameter name -> value in its parameter's type.
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
        if flag.startswith("--no") and flag not in flags and "--" + flag[4:] in flags:
            flag, has_value, value = "--" + flag[4:], True, "False"
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
    return kind.__name__ in str(getattr(parameter.annotation, "__name__", parameter.annotation)).split(" | ") or (
        kind in getattr(parameter.annotation, "__args__", ())
    )


def _parse(text: str, parameter: inspect.Parameter) -> Any:
    """Turns a flag's text into its parameter's type; a plain str annotation takes the text as it stands."""
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
        return text
    names = {bool: "True or False", int: "a whole number", float: "a number"}
    raise UserError(f"--{parameter.name} must be {' or '.join(names[kind] for kind in expected)}, found {text!r}")


def _finite(text: str) -> float:
    """A float, but no NaN, which passes every limit, and no infinity."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number
