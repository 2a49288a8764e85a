"""Which tasks are kept: answers are taken in request order, so the result doesn't depend on when they arrived."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from alpaca.generation.dedup import RougePool
from alpaca.generation.parser import PROBLEMS


@dataclass
class Harvest:
    """The tasks kept and rejected so far.

    Attributes:
        read_answer: Gives the tasks in an answer as `instruction`, `input` and `output`; those that the filters drop
            have a `reason` too.
        pool: Every instruction that a new one must differ from.
        similarity_threshold: Tasks with a higher ROUGE-L F with any instruction in the pool are dropped.
        target: How many tasks to keep in all, None for every one there is.
        kept: The tasks for regen.json. The first `earlier` of them were there before the first answer.
        rejected: The tasks for rejected.jsonl.
        reasons: How many tasks were rejected for each reason.
        answers: How many answers were taken. They come in order, so this is also the index of the next one.
        parsed: How many well-formed tasks the answers held.
        empty_answers: How many answers in a row, up to the last one, brought no task to keep.
    """

    read_answer: Callable[[dict[str, Any]], list[dict[str, str]]]
    pool: RougePool
    similarity_threshold: float
    target: int | None
    kept: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    answers: int = 0
    parsed: int = 0
    empty_answers: int = 0

    def __post_init__(self) -> None:
        self.earlier = len(self.kept)

    @property
    def remaining(self) -> int:
        """How many tasks are still to be kept."""
        return sys.maxsize if self.target is None else max(0, self.target - len(self.kept))

    @property
    def kept_per_answer(self) -> float:
        """The tasks kept of an answer on average, 0 before the first one."""
        return (len(self.kept) - self.earlier) / self.answers if self.answers else 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Takes the tasks of the next answer; those past the target are rejected as surplus.

        Args:
            record: A record of the journal, with `text`, `finish_reason` and `request_index`.
        """
        tasks = self.read_answer(record)
        malformed = [task.get("reason") in PROBLEMS for task in tasks]
        verdicts = self.pool.screen(
            ["" if bad else task["instruction"] for task, bad in zip(tasks, malformed, strict=True)],
            self.similarity_threshold,
            self.remaining,
            eligible=["reason" not in task for task in tasks],
        )
        for task, bad, verdict in zip(tasks, malformed, verdicts, strict=True):
            if verdict.kept:
                similar = {"most_similar_instructions": verdict.most_similar, "avg_similarity_score": verdict.mean}
                self.kept.append({**task, **similar})
                continue
            too_similar = verdict.score > self.similarity_threshold
            reason = task.pop("reason", "similar" if too_similar else "surplus")
            nearest = {} if bad else {"nearest_instruction": verdict.nearest, "score": verdict.score}
            self._reject(record, reason, {**task, **nearest})
        if not tasks:
            known = record["finish_reason"] in ("content_filter", "prompt_too_long")
            self._reject(record, record["finish_reason"] if known else "empty_answer", {})
        self.answers += 1
        self.parsed += malformed.count(False)
        self.empty_answers = 0 if any(verdict.kept for verdict in verdicts) else self.empty_answers + 1

    def _reject(self, record: dict[str, Any], reason: str, details: dict[str, Any]) -> None:
        self.reasons[reason] += 1
        self.rejected.append({"request_index": record["request_index"], "reason": reason, **details})
