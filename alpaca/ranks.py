"""Processes that torchrun started: who speaks for all, and how a user's mistake ends them."""

import os
import sys
import time

from alpaca.cli import UserError
from alpaca.files import jdump


def is_main() -> bool:
    """Whether this is the first of all ranks."""
    return os.environ.get("RANK", "0") == "0"


def announce(line: str) -> None:
    """Prints a line, once for all ranks."""
    if is_main():
        print(line, flush=True)


def refuse(error: UserError) -> None:
    """Ends this rank with exit status 2, having said why: once for all ranks, and in torchrun's closing report.

    torchrun prints a traceback of its own below any rank's failure. The last lines of that are what it finds here
    (`torch.distributed.elastic.multiprocessing.errors`), or else a hint on how to get tracebacks.

    Raises:
        SystemExit: always.
    """
    if is_main():
        print(f"error: {error}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        jdump({"message": {"message": f"error: {error}", "extraInfo": {"timestamp": int(time.time())}}}, report)
    raise SystemExit(2)
