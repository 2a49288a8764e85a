"""Blind pairwise judging, as in the Alpaca report: a person sees two answers and says which one is better."""

import hashlib
import json
import math
import random
import sys
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError
from alpaca.inference.terminal import read_line
from alpaca.journal import Format, Journal
from alpaca.records import check_text, load_records

Z_95 = 1.959964  # the 97.5th percentile of the normal distribution
CHOICES = ("a", "b", "tie")
# What a person types, in the terminal and on the page.
KEYS = {"1": "1", "2": "2", "3": "t", "t": "t", "u": "u", "q": "q"}


@dataclass(frozen=True)
class Pair:
    """Two answers to one instruction.

    Attributes:
        instruction: What both models were asked.
        input: Its input, or "".
        a: The answer from the first file.
        b: The answer from the second file.
        first: The side shown first, "a" or "b".
        key: A hash of the instruction and both answers, so that a verdict is never counted for another pair.
    """

    instruction: str
    input: str
    a: str
    b: str
    first: str
    key: str

    @property
    def shown(self) -> tuple[str, str]:
        """Both answers as the person sees them, without the space around them, which would tell the models apart."""
        a, b = self.a.strip(), self.b.strip()
        return (a, b) if self.first == "a" else (b, a)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (E. B. Wilson, JASA 22, 1927, pp. 209-212).

    Args:
        successes: How many trials succeeded.
        trials: How many there were, at least 1.

    Example:
        90 of 179 -> (0.430, 0.575)
    """
    p, z2 = successes / trials, Z_95**2
    centre = p + z2 / (2 * trials)
    half = Z_95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return max(0.0, (centre - half) / (1 + z2 / trials)), min(1.0, (centre + half) / (1 + z2 / trials))


def load_pairs(a: str, b: str, seed: int) -> tuple[list[Pair], dict[str, str]]:
    """Pairs the answers in two outputs of `inference.py batch`, in random order and with a random side first.

    Args:
        a: The path of one output.
        b: The path of the other.
        seed: The seed for the order of the pairs and for the side shown first.

    Returns:
        The pairs in the order of judging, and {"a": generator of the first file, "b": generator of the second}.

    Raises:
        UserError: A file is not an output of `batch`, or the files answer different instructions.
    """
    sides = [load_records(path) for path in (a, b)]
    for side in sides:
        for where, record in side:
            for field in ("instruction", "output"):
                if not isinstance(record.get(field), str):
                    raise UserError(f"{where}: '{field}' must be text; expected an output of inference.py batch")
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
    """The verdicts so far. Each one is on disk before the next pair is shown.

    Attributes:
        names: Side -> the model's name.
        waiting: The pairs still to judge, in order.
    """

    def __init__(self, path: str, pairs: list[Pair], names: dict[str, str]):
        """Opens the file, or creates it, and leaves out the pairs that have a verdict.

        Raises:
            UserError: The file holds verdicts on other answers, or is no file of verdicts.
        """
        self.names, self._pairs = names, {pair.key: pair for pair in pairs}

        def key(record: Any) -> str | None:
            return record["key"] if record["key"] in self._pairs and record["better"] in CHOICES else None

        super().__init__(path, Format("key", key, "a verdict on these answers", "--output"))
        self.waiting = [pair for pair in pairs if pair.key not in self.records]

    def record(self, choice: str) -> None:
        """Writes down the verdict on the first pair that is waiting.

        Args:
            choice: "1" if the answer shown first is better, "2" if the second one is, "t" for a tie.
        """
        pair = self.waiting[0]
        second = "b" if pair.first == "a" else "a"
        better = {"1": pair.first, "2": second, "t": "tie"}[choice]
        line = {"key": pair.key, "better": better, "shown_first": pair.first, "instruction": pair.instruction}
        line |= {"input": pair.input, "output_a": pair.a, "output_b": pair.b, "generators": self.names}
        self.append([line])
        del self.waiting[0]

    def undo(self) -> bool:
        """Takes the last verdict back and puts its pair first again; False if there is no verdict."""
        if not self.records:
            return False
        self.waiting.insert(0, self._pairs[self.remove_last()["key"]])
        return True

    def summary(self) -> str:
        """Counts the first model's wins, ties and losses and gives the interval of its share of the decided pairs."""
        found = [record["better"] for record in self.records.values()]
        wins, losses, ties = (found.count(choice) for choice in ("a", "b", "tie"))
        counts = f"{self.names['a']} against {self.names['b']}: {wins} wins, {ties} ties, {losses} losses"
        decided = "no pair has been decided yet"
        if wins + losses:
            low, high = wilson_interval(wins, wins + losses)
            share = f"{wins / (wins + losses):.1%} of the {wins + losses} decided pairs won"
            decided = f"{share}, 95 % interval {low:.1%} to {high:.1%} (Wilson)"
        return f"{counts} (to go: {len(self.waiting)})\n{decided}"


def judge_in_terminal(verdicts: Verdicts) -> None:
    """Shows one pair after another and asks for a verdict, until all are judged or the person leaves."""
    while verdicts.waiting:
        pair = verdicts.waiting[0]
        print(f"\n{'=' * 80}\nPairs to go: {len(verdicts.waiting)}\n\nInstruction: {pair.instruction}")
        if pair.input:
            print(f"Input: {pair.input}")
        for number, text in enumerate(pair.shown, start=1):
            print(f"\n--- Answer {number} ---\n{text}")
        choice = _ask_choice()
        if choice == "q":
            break
        if choice != "u":
            verdicts.record(choice)
        elif not verdicts.undo():
            print("there is no verdict to take back", file=sys.stderr)
    print(f"\n{verdicts.summary()}")


def _ask_choice() -> str:
    question = "\nBetter: 1, 2, 3 (tie), u (undo the last verdict), or q (quit and continue later)? "
    while (line := read_line(question)) is not None:
        if choice := KEYS.get(line.strip().lower()):
            return choice
        print("please type 1, 2, 3, u or q", file=sys.stderr)
    return "q"
