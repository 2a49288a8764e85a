"""What a person sees of a run: a bar of the tasks kept, or plain lines, and the table at the end."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from alpaca.cli import printable
from alpaca.generation.harvest import Harvest
from alpaca.generation.spending import Spending

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_FRAMES = 10, 0.1


def log(line: str) -> None:
    """Prints a line to stderr, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere; both on stderr."""

    def __init__(self, harvest: Harvest, spending: Spending) -> None:
        """Takes what to show; the bar begins at the tasks that were kept before this invocation."""
        self._harvest, self._spending = harvest, spending
        self._began, self._first, self._shown = time.monotonic(), len(harvest.kept), 0.0
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=harvest.target, initial=self._first, unit=" tasks", disable=not on_terminal, dynamic_ncols=True
        )

    def show(self, in_flight: int) -> None:
        """Brings the bar up to date, or prints a line, unless it has just done so."""
        harvest, spent, kept = self._harvest, self._spending, len(self._harvest.kept)
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_LINES if self._bar.disable else _SECONDS_BETWEEN_FRAMES
        if now - self._shown < pause and harvest.remaining:
            return
        self._shown = now
        figures = f"{in_flight} requests in flight, {harvest.kept_per_answer:.1f} tasks kept of each"
        figures += f", {sum(spent.tokens):,} tokens"
        if spent.prices and kept:
            figures += f", ${spent.cost / kept:.5f} a task"
        if not self._bar.disable:
            self._bar.n = kept
            self._bar.set_postfix_str(figures)
        else:
            pace = (kept - self._first) / max(now - self._began, 1e-9)
            left = f", {harvest.remaining / pace / 60:.0f} min left" if pace and harvest.remaining else ""
            log(f"{kept} of {harvest.target} tasks kept, {figures}{left}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()  # the bar stays on the screen


def closing_table(harvest: Harvest, spending: Spending, model: str, answers: int, new_answers: int) -> str:
    """Sums up a run, the answers of earlier invocations included.

    Args:
        harvest: The tasks.
        spending: What they cost.
        model: The model that was asked, for a hint about unknown prices.
        answers: Answers in the journal.
        new_answers: Those that came in this invocation.
    """
    kept = len(harvest.kept) - harvest.earlier
    cost, each = "unknown", f"no price for {printable(model)}: give --price_input and --price_output"
    if spending.prices:
        cost, each = f"${spending.cost:.4f}", f"${spending.cost / kept:.6f} a task" if kept else ""
    prompt_tokens, completion_tokens = spending.tokens
    return table(
        harvest,
        [("requests answered", answers, f"{new_answers:,} in this invocation")],
        [("prompt tokens", prompt_tokens, ""), ("completion tokens", completion_tokens, ""), ("cost", cost, each)],
    )


def table(harvest: Harvest, above: Sequence[tuple], below: Sequence[tuple] = ()) -> str:
    """Lays out what became of the tasks, between further rows of name, figure and note."""
    kept = len(harvest.kept) - harvest.earlier
    rows = [
        *above,
        ("tasks parsed", harvest.parsed, ""),
        ("tasks kept", kept, f"{kept / harvest.parsed:.1%} of those parsed" if harvest.parsed else ""),
        ("rejected", harvest.reasons.total(), "each in rejected.jsonl, with the reason"),
        *((f"  {reason}", count, "") for reason, count in harvest.reasons.most_common()),
        *below,
    ]
    cells = [(name, value if isinstance(value, str) else f"{value:,}", note) for name, value, note in rows]
    width = max(len(value) for _, value, _ in cells)
    return "\n".join(f"{name:<20}{value:>{width}}  {note}".rstrip() for name, value, note in cells)
