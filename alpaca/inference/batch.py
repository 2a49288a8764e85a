"""Answers a file of instructions in batches. Each batch is on disk before the next one starts."""

import hashlib
import json
import os
import sys
import time
from typing import Any

from alpaca.cli import UserError, say
from alpaca.inference.answering import Alpaca
from alpaca.journal import Format, Journal
from alpaca.records import check_text, load_examples


def load_instances(path: str) -> list[dict[str, str]]:
    """Reads the instructions to answer; each of the `instances` of a Self-Instruct task counts as one.

    Returns:
        `instruction` and `input` of each, in file order. A reference output is left out.

    Raises:
        UserError: Names the first bad record and what it holds.
    """
    examples = []
    for number, task in enumerate(load_examples(path, require_output=False)):
        instances = task.get("instances", [task])
        if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
            raise UserError(f"{path}, record {number}: 'instances' must be a list of at least one object")
        for instance in instances:
            text = instance.get("input") or ""
            if not isinstance(text, str):
                raise UserError(f"{path}, record {number}: 'input' must be text, found {type(text).__name__}")
            check_text(f"{path}, record {number}: 'input'", text)
            examples.append({"instruction": task["instruction"], "input": text})
    return examples


def encode_all(alpaca: Alpaca, examples: list[dict[str, str]], settings: Any) -> list[list[int]]:
    """Turns examples into the token ids of their prompts and warns about each one that had to be cut."""
    prompts = []
    for number, example in enumerate(examples):
        ids, notice = alpaca.encode(example, settings.max_new_tokens)
        prompts.append(ids)
        if notice:
            say(f"warning: record {number}: {notice}")
    return prompts


def _rows(record: Any) -> tuple[int, ...] | None:
    rows, outputs = record["rows"], record["outputs"] if record["rows"] else []
    fits = len(rows) == len(outputs) and all(isinstance(row, int) for row in rows)
    return tuple(rows) if fits and all(isinstance(text, str) for text in outputs) else None


class AnswerJournal(Journal):
    """`OUTPUT.partial.jsonl`: the answers of one run, kept until the output is written.

    The first line tells what the answers depend on, and each further line holds the answers of one batch:

        {"rows": [], "run": {"model": "/models/alpaca-7b", "dtype": "torch.bfloat16", ...}}
        {"rows": [7, 3], "outputs": ["Red, blue and yellow.", "Bonjour"]}

    A batch is one line so that it is kept whole or not at all: a sampled answer depends on the rest of its batch.
    """

    def __init__(self, output: str) -> None:
        super().__init__(f"{output}.partial.jsonl", Format("rows", _rows, "a batch of answers", "--output"))

    @property
    def answers(self) -> dict[int, str]:
        """The answers so far, by row of the data."""
        batches = [record for rows, record in self.records.items() if rows]
        return {row: text for batch in batches for row, text in zip(batch["rows"], batch["outputs"], strict=True)}

    def begin(self, run: dict[str, Any]) -> None:
        """Notes what the answers depend on, or checks it if an earlier run of the same command was interrupted.

        Raises:
            UserError: The earlier run had other data or settings.
        """
        header = {"rows": [], "run": json.loads(json.dumps(run))}
        if not self.records:
            self.append([header])
        elif self.records.get(()) != header:
            raise UserError(f"{self.path} was begun with other data or settings; use those again, or delete the file")
        elif self.answers:
            say(f"{self.path}: continuing after {len(self.answers)} answers")

    def append(self, records: list[dict[str, Any]]) -> None:
        """Adds records and returns once they are on disk.

        Raises:
            UserError: The disk is full or broken.
        """
        try:
            super().append(records)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the answers in it are safe, and the same command "
                "continues from there"
            ) from error


def describe_run(alpaca: Alpaca, prompts: list[list[int]], settings: Any, seed: int, batch_size: int) -> dict[str, Any]:
    """Lists what the answers depend on. A greedy run may therefore be continued with smaller batches."""
    run = {"model": os.path.abspath(alpaca.path), "dtype": str(alpaca.model.dtype), "settings": settings.to_diff_dict()}
    run["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return run | {"seed": seed, "batch_size": batch_size} if settings.do_sample else run


def answer_all(
    alpaca: Alpaca, prompts: list[list[int]], settings: Any, seed: int, batch_size: int, journal: AnswerJournal
) -> list[str]:
    """Answers the prompts that have no answer in the journal yet, in batches of similar length, the longest first.

    Returns:
        All answers in the order of the prompts.

    Raises:
        UserError: A batch doesn't fit into memory, or the journal can't be written.
    """
    import torch
    from tqdm import tqdm

    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers, tokens, start = journal.answers, 0, time.perf_counter()
    with tqdm(total=len(prompts), initial=len(answers), unit="answer", file=sys.stderr) as bar:
        for first in range(0, len(order), batch_size):
            rows = [row for row in order[first : first + batch_size] if row not in answers]
            if not rows:
                continue
            try:
                ids = alpaca.generate([prompts[row] for row in rows], settings, seed + first)
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of memory with {len(rows)} prompts at once; lower --batch_size") from error
            outputs = [alpaca.decode(answer) for answer in ids]
            journal.append([{"rows": rows, "outputs": outputs}])
            answers |= zip(rows, outputs, strict=True)
            tokens += sum(len(answer) + 1 for answer in ids)  # with EOS
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(rows))
    return [answers[row] for row in range(len(prompts))]
