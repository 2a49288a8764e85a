r"""Turns seed tasks into instruction-following data, against any OpenAI-compatible server.

    python -m generate_instruction generate_instruction_following_data \
        --output_dir ./out --num_instructions_to_generate 100 --model_name gpt-4o-mini

Every answer is fsynced to `requests.jsonl` before it is used; all other files in the output folder are made from that
journal, in request order, and can be made again from it. The same command continues an interrupted run.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from completions import Client
from dedup import RougePool
from dispatch import Dispatcher
from journal import Journal
from spending import Spending, find_prices
from task_parser import parse_tasks
from utils import UserError, atomic_write, jdump, load_records, run_cli

# Words for things that a text model cannot take or give: the original's list.
KEYWORDS = (
    "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,flowchart,diagram"
)
MAX_TOKENS = 3072  # of one completion, as in the original


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def encode_prompt(prompt_instructions: list[dict[str, str]], prompt: str | None = None) -> str:
    r"""Writes the prompt for one request: the rules, some seed tasks, and the number of the task to go on with.

    Args:
        prompt_instructions: tasks with `instruction`, `input` and `output`.
        prompt: the rules; the text of ./prompt.txt when None.

    Returns:
        The prompt; it ends in `###\n{k+1}. Instruction:` after k tasks.
    """
    text = (_read_text("./prompt.txt") if prompt is None else prompt).removesuffix("\n") + "\n"
    for number, task in enumerate(prompt_instructions, start=1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        text += f"###\n{number}. Instruction: {instruction}\n"
        text += f"{number}. Input:\n{task['input'] or '<noinput>'}\n"
        text += f"{number}. Output:\n{task['output']}\n"
    return text + f"###\n{len(prompt_instructions) + 1}. Instruction:"


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}; name one with --prompt_path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt {path} is not UTF-8 text (byte {error.start})") from error


def load_seed_tasks(path: str) -> list[dict[str, str]]:
    """Reads seed tasks in Self-Instruct's schema (`instruction`, `instances: [{input, output}]`), one object a line.

    Raises:
        UserError: names the line and what is wrong there.
    """
    tasks = []
    for where, record in load_records(path):
        instances = record.get("instances")
        first = instances[0] if isinstance(instances, list) and instances else None
        if not isinstance(first, dict):
            raise UserError(f"{where}: 'instances' must be a list with an input and an output")
        task = {
            "instruction": record.get("instruction"),
            "input": first.get("input", ""),
            "output": first.get("output"),
        }
        for name, value in task.items():
            if not isinstance(value, str) or (name != "input" and not value.strip()):
                raise UserError(f"{where}: '{name}' must be text, found {json.dumps(value)[:60]}")
        tasks.append(task)
    return tasks


@dataclass
class Prompts:
    """The prompt of every request, by its index alone.

    Attributes:
        rules: the text of prompt.txt.
        seed_tasks: what the prompts are sampled from.
        count: seed tasks in a prompt.
        seed: makes the sampling reproducible.
    """

    rules: str
    seed_tasks: list[dict[str, str]]
    count: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(self.seed_tasks):
            found = f"{len(self.seed_tasks)} seed tasks"
            raise UserError(f"--num_prompt_instructions must be 1 to the number of {found}, found {self.count}")

    def __getitem__(self, index: int) -> str:
        sampled = random.Random(f"{self.seed}-{index}").sample(self.seed_tasks, self.count)
        return encode_prompt(sampled, self.rules)

    def sha256(self, index: int) -> str:
        """What the journal calls the prompt."""
        return _sha256(self[index])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# From answers to tasks


@dataclass
class Rules:
    """Which tasks are kept; the defaults are the original's.

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
        words = [re.escape(word.strip()) for word in self.keywords.split(",") if word.strip()]
        self._keywords = re.compile(rf"\b({'|'.join(words)})\b" if words else r"(?!)", re.IGNORECASE)

    def rejects(self, instruction: str, output: str) -> str | None:
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
        if instruction[0] in string.punctuation:
            return "punctuation"
        if not instruction[0].isascii():
            return "non_ascii"
        return None if output else "empty_output"


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """Finds a whole word in a text, in any case."""
    return re.search(rf"\b({w})\b", s, flags=re.IGNORECASE)


def post_process_gpt3_response(num_prompt_instructions: int, response: Any) -> list[dict[str, str]]:
    """Parses one completion and filters its tasks by the original's rules, de-duplication aside.

    Args:
        num_prompt_instructions: seed tasks in the prompt; the completion's first task has the next number.
        response: a dict or an object with `text` and `finish_reason`; None gives no tasks.

    Returns:
        The tasks that pass, as `instruction`, `input` and `output`.
    """
    if response is None:
        return []
    if not isinstance(response, dict):
        response = {"text": response.text, "finish_reason": response.finish_reason}
    rules = Rules()
    return [
        {"instruction": task.instruction, "input": task.input, "output": task.output}
        for task in _parsed(response, num_prompt_instructions)
        if not task.problem and not rules.rejects(task.instruction, task.output)
    ]


def _parsed(record: dict[str, Any], num_prompt_instructions: int) -> list:
    truncated = record["finish_reason"] in ("length", "content_filter")
    return parse_tasks(record["text"], num_prompt_instructions + 1, truncated)


@dataclass
class Harvest:
    """The tasks kept and rejected so far. Answers are added in request order, so nothing depends on their arrival.

    Attributes:
        rules: which tasks are kept.
        num_prompt_instructions: seed tasks in a prompt.
        target: how many tasks to keep in all, None for all there are.
        pool: all instructions that a new one must differ from.
        kept: tasks for regen.json.
        rejected: tasks for rejected.jsonl.
        reasons: how many were rejected by reason.
        answers: how many answers were added.
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

    @property
    def room(self) -> int:
        """Tasks that are still wanted."""
        return sys.maxsize if self.target is None else self.target - len(self.kept)

    def add(self, record: dict[str, Any]) -> None:
        """Adds the tasks of one answer; those past the target are surplus."""
        tasks = _parsed(record, self.num_prompt_instructions)
        reasons = [task.problem or self.rules.rejects(task.instruction, task.output) for task in tasks]
        instructions = ["" if task.problem else task.instruction for task in tasks]
        passed = [reason is None for reason in reasons]
        verdicts = self.pool.screen(instructions, self.rules.similarity_threshold, self.room, passed)
        kept = 0
        for task, reason, verdict in zip(tasks, reasons, verdicts, strict=True):
            fields = {"instruction": task.instruction, "input": task.input, "output": task.output}
            self.parsed += not task.problem
            if verdict.kept:
                kept += 1
                similar = {"most_similar_instructions": verdict.most_similar, "avg_similarity_score": verdict.mean}
                self.kept.append({**fields, **similar})
                continue
            if reason is None:
                reason = "similar" if verdict.score > self.rules.similarity_threshold else "surplus"
            known = {} if task.problem else {"most_similar_instruction": verdict.nearest, "score": verdict.score}
            self._reject(record, reason, {**fields, **known})
        if not tasks:
            self._reject(
                record, "content_filter" if record["finish_reason"] == "content_filter" else "empty_answer", {}
            )
        self.answers += 1
        self.dry = 0 if kept else self.dry + 1

    def _reject(self, record: dict[str, Any], reason: str, details: dict[str, Any]) -> None:
        self.reasons[reason] += 1
        self.rejected.append({"request_index": record["request_index"], "reason": reason, **details})

    def write(self, output_dir: str) -> None:
        """Replaces regen.json, alpaca_data.json and rejected.jsonl, each atomically."""
        jdump(self.kept, os.path.join(output_dir, "regen.json"))
        three = [{name: task[name] for name in ("instruction", "input", "output")} for task in self.kept]
        jdump(three, os.path.join(output_dir, "alpaca_data.json"))
        with atomic_write(os.path.join(output_dir, "rejected.jsonl")) as file:
            file.writelines(json.dumps(task, ensure_ascii=False) + "\n" for task in self.rejected)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str | None = None,
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_cpus: int = 16,
    base_url: str | None = None,
    api: str = "auto",
    prompt_path: str = "./prompt.txt",
    seed: int = 0,
    max_requests: int | None = None,
    max_cost_usd: float | None = None,
    max_tokens_total: int | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
) -> None:
    """Generates instruction-following data from seed tasks.

    Args:
        output_dir: gets requests.jsonl (every answer), regen.json, alpaca_data.json and rejected.jsonl.
        seed_tasks_path: seed tasks, one JSON object a line.
        num_instructions_to_generate: tasks to keep, met exactly.
        model_name: the model at the server; the served one when the server has just one.
        num_prompt_instructions: seed tasks in each prompt.
        request_batch_size: requests in flight together.
        temperature: of the sampling.
        top_p: of the sampling.
        num_cpus: threads that compare instructions.
        base_url: the server, as http://host:port/v1; OPENAI_BASE_URL, then OpenAI, when not given.
        api: auto, chat or completions.
        prompt_path: the rules that begin each prompt.
        seed: makes the prompts reproducible.
        max_requests: stop after that many requests and keep all that they yield, the target met or not.
        max_cost_usd: stop before a request that could pass it.
        max_tokens_total: likewise for prompt and completion tokens together.
        price_input: dollars per million prompt tokens; from configs/prices.json when not given.
        price_output: dollars per million completion tokens.
    """
    seed_tasks = load_seed_tasks(seed_tasks_path)
    prompts = Prompts(_read_text(prompt_path), seed_tasks, num_prompt_instructions, seed)
    parameters = {"max_tokens": MAX_TOKENS, "temperature": temperature, "top_p": top_p}
    settings = {
        "seed": seed,
        "prompt": _sha256(prompts.rules),
        "seed_tasks": _sha256(json.dumps(seed_tasks)),
        "num_prompt_instructions": num_prompt_instructions,
        **parameters,
    }
    pool = RougePool([task["instruction"] for task in seed_tasks], workers=num_cpus)
    harvest = Harvest(Rules(), num_prompt_instructions, num_instructions_to_generate, pool)
    journal = Journal(os.path.join(output_dir, "requests.jsonl"))
    if journal.records and model_name is None:
        model_name = next(iter(journal.records.values()))["model"]
    if model_name is not None:
        journal.check({"model": model_name, **settings})

    async def ask() -> Dispatcher:
        async with Client(base_url, api) as client:
            model = model_name or await client.only_model()
            spending = Spending(
                find_prices(model, price_input, price_output), max_cost_usd, max_tokens_total, MAX_TOKENS
            )
            dispatcher = Dispatcher(
                prompts,
                harvest,
                journal,
                spending,
                model,
                parameters,
                settings,
                request_batch_size,
                max_requests,
                save=lambda: harvest.write(output_dir),
                show=_show,
                log=print,
            )
            for index, record in sorted(journal.records.items()):
                spending.add(record, prompts[index])
            dispatcher.catch_up()
            try:
                await dispatcher.run(client)
            finally:
                harvest.write(output_dir)
            return dispatcher

    dispatcher = asyncio.run(ask())
    if dispatcher.stopped:
        print(f"Stopped: {dispatcher.stopped}.")
    print(f"Kept {len(harvest.kept)} tasks of {harvest.parsed} parsed from {harvest.answers} answers.")


def _show(dispatcher: Dispatcher) -> None:
    print(f"{len(dispatcher.harvest.kept)} tasks kept, {len(dispatcher.in_flight)} requests in flight", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run_cli({"generate_instruction_following_data": generate_instruction_following_data}, argv)


if __name__ == "__main__":
    main()
