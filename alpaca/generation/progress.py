"""What a person sees of a run: a bar of the tasks kept, or plain lines, and the table at the end."""

import sys
import time

from tqdm import tqdm

from alpaca.generation.dispatch import Run
from alpaca.generation.harvest import Harvest


class Progress:
    """A bar of the tasks kept on a terminal, now and then a plain line elsewhere; both on stderr."""

    def __init__(self) -> None:
        """Shows nothing before the first `show`."""
        self._bar: tqdm | None = None
        self._said = 0.0

    def log(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        tqdm.write(line, file=sys.stderr)

    def show(self, run: Run) -> None:
        """Brings the bar up to date; it begins at the tasks that an earlier sitting kept."""
        harvest, spent, kept = run.harvest, run.spending, len(run.harvest.kept)
        if self._bar is None:
            off = not sys.stderr.isatty()
            self._bar = tqdm(total=harvest.target, initial=kept, unit=" tasks", disable=off, dynamic_ncols=True)
            self._began, self._first = time.monotonic(), kept
        figures = f"{run.in_flight} requests in flight, {harvest.kept_per_answer:.1f} tasks kept of each"
        figures += f", {sum(spent.tokens):,} tokens"
        if spent.prices and kept:
            figures += f", ${spent.cost / kept:.5f} a task"
        now = time.monotonic()
        if now - self._said < (10 if self._bar.disable else 0.1) and harvest.room:
            return
        self._said = now
        if not self._bar.disable:
            self._bar.n = kept
            self._bar.set_postfix_str(figures)
        else:
            pace = (kept - self._first) / max(now - self._began, 1e-9)
            left = f", {harvest.room / pace / 60:.0f} min left" if pace and harvest.room else ""
            self.log(f"{kept} of {harvest.target} tasks kept, {figures}{left}")

    def close(self) -> None:
        """Leaves the bar standing."""
        if self._bar is not None:
            self._bar.close()


def closing_table(run: Run) -> str:
    """What was asked for, what came of it, and what it cost; the answers of earlier sittings included."""
    spent, kept = run.spending, len(run.harvest.kept) - run.harvest.earlier
    cost, each = "unknown", f"no price for {run.model}: give --price_input and --price_output"
    if spent.prices:
        cost, each = f"${spent.cost:.4f}", f"${spent.cost / kept:.6f} a task" if kept else ""
    return table(
        run.harvest,
        [("requests answered", len(run.journal.records), f"{run.requested:,} in this sitting")],
        [("prompt tokens", spent.tokens[0], ""), ("completion tokens", spent.tokens[1], ""), ("cost", cost, each)],
    )


def table(harvest: Harvest, above: list[tuple], below: list[tuple] = ()) -> str:
    """What became of the tasks, line by line, between further lines of name, figure and note."""
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
