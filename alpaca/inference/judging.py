"""Blind pairwise judging, the evaluation of the Alpaca report: a person sees two answers and says which is better."""

import hashlib
import json
import math
import random
import sys
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError
from alpaca.journal import Format, Journal
from alpaca.records import check_text, load_records

Z_95 = 1.959964  # the normal distribution's 97.5 % point
CHOICES = ("a", "b", "tie")


@dataclass(frozen=True)
class Pair:
    """Two answers to one instruction, and which of them is shown first."""

    instruction: str
    input: str
    a: str
    b: str
    first: str  # "a" or "b"
    key: str  # of the instruction and both answers, so that a judgement is never counted for another pair

    @property
    def shown(self) -> tuple[str, str]:
        """Both answers in the order in which they are shown."""
        return (self.a, self.b) if self.first == "a" else (self.b, self.a)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Gives the 95 % score interval of a proportion of one trial or more (E. B. Wilson, JASA 22, 1927, pp. 209-212).

    Example:
        90 of 179 -> (0.430, 0.575)
    """
    p, z2 = successes / trials, Z_95**2
    centre = p + z2 / (2 * trials)
    half = Z_95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return max(0.0, (centre - half) / (1 + z2 / trials)), min(1.0, (centre + half) / (1 + z2 / trials))


def load_pairs(a: str, b: str, seed: int) -> tuple[list[Pair], dict[str, str]]:
    """Pairs two outputs of `inference.py batch` and shuffles them: which pair comes when, which answer stands first.

    Returns:
        The pairs in the order of judging, and the `generator` of each side.

    Raises:
        UserError: the files answer different instructions.
    """
    sides = [load_records(path) for path in (a, b)]
    for side in sides:
        for where, record in side:
            for field in ("instruction", "output"):
                if not isinstance(record.get(field), str):
                    raise UserError(f"{where}: no text in '{field}'; expected an output of inference.py batch")
                check_text(f"{where}: '{field}'", record[field])
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{a} has {len(sides[0])} answers and {b} has {len(sides[1])}; compare answers to the same data"
        )
    pairs = []
    for (where_a, record_a), (where_b, record_b) in zip(*sides, strict=True):
        question = [record_a["instruction"], record_a.get("input") or ""]
        if question != [record_b["instruction"], record_b.get("input") or ""]:
            raise UserError(f"{where_a} and {where_b} answer different instructions; compare answers to the same data")
        pair = [*question, record_a["output"], record_b["output"]]
        key = hashlib.sha256(json.dumps([len(pairs), *pair]).encode()).hexdigest()[:16]
        pairs.append(Pair(*pair, first=random.Random(f"{seed}-{key}").choice("ab"), key=key))
    random.Random(seed).shuffle(pairs)
    names = [side[0][1].get("generator") or path for side, path in zip(sides, (a, b), strict=True)]
    return pairs, dict(zip("ab", names, strict=True))


class Verdicts(Journal):
    """The judgements made so far, each on the disk before the next pair is shown."""

    def __init__(self, path: str, pairs: list[Pair], names: dict[str, str]):
        self.names, known = names, {pair.key for pair in pairs}

        def key(record: Any) -> str | None:
            return record["key"] if record["key"] in known and record["better"] in CHOICES else None

        super().__init__(path, Format("key", key, "a judgement of these answers", "--output"))
        self.waiting = [pair for pair in pairs if pair.key not in self.records]

    def record(self, choice: str) -> None:
        """Keeps the verdict on the pair that waits first.

        Args:
            choice: "1" or "2" for the answer shown first or second, "t" for a tie.
        """
        pair = self.waiting[0]
        second = "b" if pair.first == "a" else "a"
        better = {"1": pair.first, "2": second, "t": "tie"}[choice]
        line = {"key": pair.key, "better": better, "shown_first": pair.first, "instruction": pair.instruction}
        line |= {"input": pair.input, "output_a": pair.a, "output_b": pair.b, "generators": self.names}
        self.append([line])
        del self.waiting[0]

    def summary(self) -> str:
        """Counts wins, ties and losses; the interval is on the share of wins among the pairs that weren't ties."""
        found = [record["better"] for record in self.records.values()]
        wins, losses, ties = (found.count(choice) for choice in ("a", "b", "tie"))
        counts = f"{self.names['a']} against {self.names['b']}: {wins} wins, {ties} ties, {losses} losses"
        decided = "no pair was decided yet"
        if wins + losses:
            low, high = wilson_interval(wins, wins + losses)
            share = f"{wins / (wins + losses):.1%} of the {wins + losses} decided pairs won"
            decided = f"{share}, 95 % interval {low:.1%} to {high:.1%} (Wilson)"
        return f"{counts} (to go: {len(self.waiting)})\n{decided}"


def judge_in_terminal(journal: Verdicts) -> None:
    """Shows pair after pair and asks for a verdict, until all are judged or the person leaves."""
    while journal.waiting:
        pair = journal.waiting[0]
        print(f"\n{'=' * 80}\nPairs to go: {len(journal.waiting)}\n\nInstruction: {pair.instruction}")
        if pair.input:
            print(f"Input: {pair.input}")
        for number, text in enumerate(pair.shown, start=1):
            print(f"\n--- Answer {number} ---\n{text}")
        choice = _ask_choice()
        if choice == "q":
            break
        journal.record(choice)
    print(f"\n{journal.summary()}")


def _ask_choice() -> str:
    while True:
        try:
            choice = input("\nBetter: 1, 2, t (tie), or q (leave and go on later)? ").strip().lower()
        except EOFError:
            return "q"
        if choice in ("1", "2", "t", "q"):
            return choice
        print("please type 1, 2, t or q", file=sys.stderr)
