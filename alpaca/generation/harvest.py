"""Which tasks are kept: the original's filters and de-duplication, applied to answers in request order."""

import json
import os
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.files import atomic_write, jdump
from alpaca.generation.dedup import RougePool
from alpaca.generation.parser import ParsedTask, parse_tasks

# Words for things that a text model cannot take or give: the original's list.
KEYWORDS = (
    "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,flowchart,diagram"
)


@dataclass
class Rules:
    """Which tasks are good; the defaults are the original's.

    Attributes:
        similarity_threshold: a task with a ROUGE-L F measure above it to any earlier instruction is dropped.
        min_words: of an instruction.
        max_words: of an instruction.
        keywords: comma-separated; whole words, in any case.
    """

    similarity_threshold: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keywords: str = KEYWORDS

    def __post_init__(self) -> None:
        if not 0 <= self.similarity_threshold <= 1:
            raise UserError(f"--similarity_threshold must be from 0 to 1, found {self.similarity_threshold}")
        words = [re.escape(word.strip()) for word in self.keywords.split(",") if word.strip()]
        self._keywords = re.compile(rf"\b({'|'.join(words)})\b" if words else r"(?!)", re.IGNORECASE)

    def objection(self, instruction: str, output: str) -> str | None:
        """The reason why a task is no good, None where it is."""
        words = len(instruction.split())
        if words < self.min_words:
            return "too_short"
        if words > self.max_words:
            return "too_long"
        if self._keywords.search(instruction):
            return "keyword"
        if instruction.startswith("Write a program"):
            return "write_a_program"
        if instruction[:1] in string.punctuation:  # "" too, where min_words lets it through
            return "punctuation"
        if not instruction[0].isascii():
            return "non_ascii"
        return None if output else "empty_output"


def tasks_of(answer: Any, num_prompt_instructions: int) -> list[ParsedTask]:
    """The tasks in an answer, problems included; it has `["text"]` and `["finish_reason"]`."""
    truncated = answer["finish_reason"] in ("length", "content_filter")
    return parse_tasks(answer["text"], num_prompt_instructions + 1, truncated)


@dataclass
class Harvest:
    """The tasks kept and rejected so far. Answers come in request order, so nothing depends on their arrival.

    Attributes:
        rules: which tasks are good.
        num_prompt_instructions: seed tasks in a prompt.
        target: how many tasks to keep in all, None for all there are.
        pool: all instructions that a new one must differ from.
        kept: tasks for regen.json, the first `earlier` of which no answer brought.
        rejected: tasks for rejected.jsonl.
        reasons: how many were rejected, by reason.
        answers: how many answers were added.
        parsed: how many well-formed tasks they held.
        dry: answers since the last kept task.
    """

    rules: Rules
    num_prompt_instructions: int
    target: int | None
    pool: RougePool
    kept: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    answers: int = 0
    parsed: int = 0
    dry: int = 0

    def __post_init__(self) -> None:
        self.earlier = len(self.kept)

    @property
    def room(self) -> int:
        """How many tasks are still wanted."""
        return sys.maxsize if self.target is None else max(0, self.target - len(self.kept))

    @property
    def kept_per_answer(self) -> float:
        """The yield so far, 0 before the first answer."""
        return (len(self.kept) - self.earlier) / self.answers if self.answers else 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Adds the tasks of one answer of the journal; good ones past the target are surplus."""
        tasks = tasks_of(record, self.num_prompt_instructions)
        objections = [task.problem or self.rules.objection(task.instruction, task.output) for task in tasks]
        instructions = ["" if task.problem else task.instruction for task in tasks]
        good = [objection is None for objection in objections]
        verdicts = self.pool.screen(instructions, self.rules.similarity_threshold, self.room, good)
        for task, objection, verdict in zip(tasks, objections, verdicts, strict=True):
            fields = {"instruction": task.instruction, "input": task.input, "output": task.output}
            if verdict.kept:
                similar = {"most_similar_instructions": verdict.most_similar, "avg_similarity_score": verdict.mean}
                self.kept.append({**fields, **similar})
                continue
            too_close = verdict.score > self.rules.similarity_threshold
            known = {} if task.problem else {"nearest_instruction": verdict.nearest, "score": verdict.score}
            self._reject(record, objection or ("similar" if too_close else "surplus"), {**fields, **known})
        if not tasks:
            self._reject(
                record, "content_filter" if record["finish_reason"] == "content_filter" else "empty_answer", {}
            )
        self.answers += 1
        self.parsed += sum(not task.problem for task in tasks)
        self.dry = 0 if any(verdict.kept for verdict in verdicts) else self.dry + 1

    def _reject(self, record: dict[str, Any], reason: str, details: dict[str, Any]) -> None:
        self.reasons[reason] += 1
        self.rejected.append({"request_index": record["request_index"], "reason": reason, **details})

    def write(self, output_dir: str, three_fields: str = "alpaca_data.json") -> None:
        """Replaces regen.json, rejected.jsonl and the three-field form of regen.json, each atomically."""
        jdump(self.kept, os.path.join(output_dir, "regen.json"))
        slim = [{name: task.get(name, "") for name in ("instruction", "input", "output")} for task in self.kept]
        jdump(slim, os.path.join(output_dir, three_fields))
        with atomic_write(os.path.join(output_dir, "rejected.jsonl")) as file:
            file.writelines(json.dumps(task, ensure_ascii=False) + "\n" for task in self.rejected)
