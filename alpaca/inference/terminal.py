"""A person's lines from stdin: one that can't be decoded doesn't end the conversation, and no stdin is its end."""

import contextlib
import sys


def read_line(prompt: str) -> str | None:
    """Reads a line, with history and editing in a terminal.

    Returns:
        The line; a byte that is not UTF-8 becomes half of a surrogate pair, which whoever uses the text refuses. None
        at the end of the input (Ctrl-D), or if stdin is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        return None
    if sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401
    else:
        print(prompt, end="", file=sys.stderr, flush=True)
    try:
        return input(prompt if in_terminal else "")
    except EOFError:
        return None
