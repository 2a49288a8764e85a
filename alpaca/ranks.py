"""Several processes started by torchrun: which one prints, and how all of them stop on a user's mistake."""

import os
import time

from alpaca.cli import UserError, printable, say
from alpaca.files import jdump


def is_main() -> bool:
    """Tells whether this process is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def announce(line: str) -> None:
    """Prints a line to stdout, from rank 0 only."""
    if is_main():
        print(line, flush=True)


def refuse(error: UserError) -> None:
    """Ends this rank with exit status 2. Rank 0 prints the error, and torchrun's closing report repeats it.

    When a rank fails, torchrun prints a traceback of its own. It ends with the message written to
    TORCHELASTIC_ERROR_FILE (see `torch.distributed.elastic.multiprocessing.errors`), or else with a hint on how to get
    tracebacks.

    Raises:
        SystemExit: Always.
    """
    if is_main():
        say(f"error: {error}")
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        jdump(
            {"message": {"message": f"error: {printable(str(error))}", "extraInfo": {"timestamp": int(time.time())}}},
            report,
        )
    raise SystemExit(2)
