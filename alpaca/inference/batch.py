"""Answers a file of instructions, in process or by an engine. Every answer is on disk before it is used."""

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from typing import Any

from alpaca.cli import UserError, say
from alpaca.inference.answering import Alpaca
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import LARGEST_SEED
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


def fold(example: dict[str, str]) -> dict[str, str]:
    r"""Puts an example's input into its instruction, as AlpacaEval's own data has it.

    Its judge is shown `instruction` alone, and two models' answers are paired by it alone
    (https://github.com/tatsu-lab/alpaca_eval, "AlpacaEval merges instructions and inputs").

    Example:
        {"instruction": "Add.", "input": "1, 2"} -> {"instruction": "Add.\n\n1, 2", "input": ""}
    """
    return {"instruction": "\n\n".join(filter(None, example.values())), "input": ""}


def warn_of_shared_instructions(examples: list[dict[str, str]]) -> None:
    """Warns if records could not be told apart by a judge that sees and pairs by `instruction` alone."""
    counts = Counter(example["instruction"] for example in examples)
    if shared := sum(count for count in counts.values() if count > 1):
        helps = len({fold(example)["instruction"] for example in examples}) > len(counts)
        hint = "; --fold_input tells them apart by their inputs" if helps else ""
        say(
            f"warning: {shared:,} records share their instruction with another, such as "
            f"{counts.most_common(1)[0][0]!r:.50}; AlpacaEval's judge sees no input and pairs each with each{hint}"
        )


def encode_all(alpaca: Alpaca | Engine, examples: list[dict[str, str]], settings: Any) -> list[Any]:
    """Turns examples into their prompts and warns about each one that had to be cut."""
    prompts = []
    for number, example in enumerate(examples):
        ids, notice = alpaca.encode(example, settings.max_new_tokens)
        prompts.append(ids)
        if notice:
            say(f"warning: record {number}: {notice}")
    return prompts


def _rows(record: Any) -> tuple[int, ...] | None:
    rows, outputs = record["rows"], record["outputs"] if record["rows"] else []
    fits = len(rows) == len(outputs) and all(type(row) is int for row in rows)
    return tuple(rows) if fits and all(isinstance(text, str) for text in outputs) else None


class AnswerJournal(Journal):
    """`OUTPUT.partial.jsonl`: the answers of one run, kept until the output is written.

    The first line tells what the answers depend on, and each further line holds the answers of one batch, or those
    that came from an engine at the same moment:

        {"rows": [], "run": {"model": "5f1d...", "dtype": "torch.bfloat16", ...}}
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

    def begin(self, run: dict[str, Any], records: int) -> None:
        """Notes what the answers depend on, or checks it if an earlier run of the same command was interrupted.

        Args:
            run: What the answers depend on.
            records: How many records the data has.

        Raises:
            UserError: The earlier run had another model, other data or other settings.
        """
        run = json.loads(json.dumps(run))
        if not self.records:
            self.append([{"rows": [], "run": run}])
        begun = self.records.get((), {}).get("run")
        if not isinstance(begun, dict):
            raise UserError(f"{self.path} doesn't say what its answers depend on; delete it, or name another --output")
        if changed := sorted(name for name in begun.keys() | run.keys() if begun.get(name) != run.get(name)):
            raise UserError(
                f"{self.path} was begun with another {' and '.join(changed)}; its answers don't fit this run: use the "
                "same again, or delete the file"
            )
        rows = [row for batch in self.records for row in batch]
        if len(set(rows)) < len(rows) or not set(rows) <= set(range(records)):
            raise UserError(f"{self.path} has an answer twice, or to no record; delete it, or name another --output")
        if rows:
            say(f"{self.path}: continuing after {len(rows)} answers")

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


def describe_run(alpaca: Alpaca | Engine, prompts: list[Any], settings: Any, seed: int, **width: int) -> dict[str, Any]:
    """Lists what the answers depend on: the model, the prompts, the settings and, if answers are sampled, the seed.

    Args:
        alpaca: The model.
        prompts: What it is asked.
        settings: What `alpaca.settings` returned.
        seed: The seed.
        width: The batch size in process, where a sampled answer depends on the rest of its batch.
    """
    run = {"data": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    run |= alpaca.describe(settings)
    return run | {"seed": seed} | width if settings.do_sample else run


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
                ids = alpaca.generate([prompts[row] for row in rows], settings, (seed + first) % (LARGEST_SEED + 1))
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of memory with {len(rows)} prompts at once; lower --batch_size") from error
            outputs = [alpaca.decode(answer) for answer in ids]
            journal.append([{"rows": rows, "outputs": outputs}])
            answers |= zip(rows, outputs, strict=True)
            tokens += sum(len(answer) + 1 for answer in ids)  # with EOS
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(rows))
    return [answers[row] for row in range(len(prompts))]


def answer_all_by_engine(
    engine: Engine, prompts: list[str], settings: Any, seed: int, in_flight: int, journal: AnswerJournal
) -> list[str]:
    """Asks an engine for the answers that are not in the journal yet, with `in_flight` requests on their way.

    Returns:
        All answers in the order of the prompts.

    Raises:
        UserError: The server can't be used, or the journal can't be written.
    """
    from tqdm import tqdm

    answers, tokens, start = journal.answers, 0, time.perf_counter()
    waiting = {row: prompt for row, prompt in enumerate(prompts) if row not in answers}
    arriving = engine.answers(waiting, settings, seed, in_flight)
    with (
        contextlib.closing(arriving),
        tqdm(total=len(prompts), initial=len(answers), unit="answer", file=sys.stderr) as bar,
    ):
        for arrived in arriving:
            if arrived:
                rows, completions = zip(*arrived, strict=True)
                outputs = [completion.text for completion in completions]
                journal.append([{"rows": list(rows), "outputs": outputs}])
                answers |= zip(rows, outputs, strict=True)
            for row, completion in arrived:
                tokens += (completion.usage or {}).get("completion_tokens", 0)
                if completion.finish_reason not in ("stop", "length", None):
                    bar.write(f"warning: record {row}: the answer ended with {completion.finish_reason}", sys.stderr)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
            bar.update(len(arrived))
    return [answers[row] for row in range(len(prompts))]
