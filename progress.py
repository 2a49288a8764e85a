"""What a person sees of a run: a bar of the tasks kept, or plain lines, and the table at the end."""

import sys
import time

from dispatch import Run
from harvest import Harvest


class Progress:
    """A bar of the tasks kept on a terminal, now and then a plain line elsewhere; both on stderr."""

    def __init__(self, target: int, kept: int) -> None:
        """Begins at the tasks that are kept already."""
        from tqdm import tqdm

        self._bar = tqdm(total=target, initial=kept, unit=" tasks", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._said, self._started, self._first = 0.0, time.monotonic(), kept

    def log(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def show(self, run: Run) -> None:
        """Brings the bar up to date."""
        kept, spent = len(run.harvest.kept), run.spending
        figures = (
            f"{run.in_flight} in flight, {run.harvest.kept_per_answer:.1f} kept an answer, {sum(spent.tokens):,} tokens"
        )
        if spent.prices and kept:
            figures += f", ${spent.cost / kept:.5f} a task"
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(kept - self._bar.n)  # redraws at most ten times a second
        if self._bar.disable and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            pace = (kept - self._first) / (self._said - self._started + 1e-9)
            left = f", {run.harvest.room / pace / 60:.0f} min left" if pace > 0 else ""
            print(f"{kept} of {run.harvest.target} tasks kept, {figures}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar standing."""
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
