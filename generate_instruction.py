r"""Turns seed tasks into instruction-following data, against any OpenAI-compatible server.

    python -m generate_instruction generate_instruction_following_data \
        --output_dir ./out --num_instructions_to_generate 100 --model_name gpt-4o-mini

Every answer is fsynced to `requests.jsonl` before it is used; all other files in the output folder are made from that
journal, in request order, and can be made again from it. The same command continues an interrupted run.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError, run_cli
from alpaca.client import Client
from alpaca.files import jdump
from alpaca.generation.batch_api import DISCOUNT, ask_in_batches
from alpaca.generation.dedup import RougePool
from alpaca.generation.dispatch import Run, ask_live
from alpaca.generation.harvest import KEYWORDS, Harvest, Rules, tasks_of
from alpaca.generation.progress import Progress, closing_table, table
from alpaca.generation.requests import RequestJournal, read_requests
from alpaca.generation.spending import Spending, find_prices
from alpaca.records import check_text, load_examples, load_records

# What --dry_run assumes of an answer, before there are any: of 17 tasks asked for most are kept.
_KEPT_PER_ANSWER, _TOKENS_PER_ANSWER = 13, 1700


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
    tasks, ids = [], {}
    for where, record in load_records(path):
        if "id" in record and ids.setdefault(str(record["id"]), where) != where:
            raise UserError(f"{where}: the id {record['id']!r} stands at {ids[str(record['id'])]} already")
        instances = record.get("instances")
        first = instances[0] if isinstance(instances, list) and instances else None
        if not isinstance(first, dict):
            found = json.dumps(instances)[:60] if "instances" in record else f"the fields {', '.join(record)}"
            raise UserError(f"{where}: 'instances' must be a list with an input and an output, found {found}")
        task = {
            "instruction": record.get("instruction"),
            "input": first.get("input", ""),
            "output": first.get("output"),
        }
        for name, value in task.items():
            if not isinstance(value, str) or (name != "input" and not value.strip()):
                raise UserError(f"{where}: '{name}' must be text, found {json.dumps(value)[:60]}")
            check_text(f"{where}: '{name}'", value)
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

    def settings(self) -> dict[str, Any]:
        """What decides about the prompts; files stand there as hashes."""
        files = {"prompt_file": _sha256(self.rules), "seed_tasks": _sha256(json.dumps(self.seed_tasks))}
        return {"seed": self.seed, "num_prompt_instructions": self.count, **files}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The original's parsing, by name


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """Finds a whole word in a text, in any case."""
    return re.search(rf"\b({w})\b", s, flags=re.IGNORECASE)


def post_process_gpt3_response(num_prompt_instructions: int, response: Any) -> list[dict[str, str]]:
    """Parses one completion and filters its tasks by the original's rules, de-duplication aside.

    Args:
        num_prompt_instructions: seed tasks in the prompt; the completion's first task has the next number.
        response: has `["text"]` and `["finish_reason"]`; None gives no tasks.

    Returns:
        The tasks that pass, as `instruction`, `input` and `output`.
    """
    rules = Rules()
    return [
        {"instruction": task.instruction, "input": task.input, "output": task.output}
        for task in (tasks_of(response, num_prompt_instructions) if response is not None else [])
        if not task.problem and not rules.objection(task.instruction, task.output)
    ]


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
    max_tokens: int = 3072,
    logit_bias: str | None = None,
    max_requests: int | None = None,
    max_cost_usd: float | None = None,
    max_tokens_total: int | None = None,
    price_input: float | None = None,
    price_output: float | None = None,
    batch_api: bool = False,
    dry_run: bool = False,
    max_retries: int = 8,
    request_timeout: float = 600.0,
    similarity_threshold: float = 0.7,
    min_words: int = 4,
    max_words: int = 150,
    keywords: str = KEYWORDS,
) -> None:
    """Generates instruction-following data from seed tasks; the same command continues an interrupted run.

    Args:
        output_dir: gets requests.jsonl (every answer), regen.json, alpaca_data.json and rejected.jsonl.
        seed_tasks_path: seed tasks, one JSON object a line.
        num_instructions_to_generate: tasks to keep, met exactly.
        model_name: the model at the server; not needed where the server has just one.
        num_prompt_instructions: seed tasks in each prompt.
        request_batch_size: requests in flight together.
        temperature: of the sampling.
        top_p: of the sampling.
        num_cpus: threads that compare instructions, at most one a core.
        base_url: the server, as http://host:port/v1; when not given OPENAI_BASE_URL, then OpenAI itself.
        api: auto, chat or completions; auto takes chat where the server has it for the model.
        prompt_path: the rules that begin each prompt.
        seed: makes the prompts reproducible.
        max_tokens: of one completion.
        logit_bias: JSON, as {"50256": -100}; token ids are the model's own.
        max_requests: stop after that many requests and keep all that they yield, the target met or not.
        max_cost_usd: stop before a request that could pass it.
        max_tokens_total: likewise for prompt and completion tokens together.
        price_input: dollars per million prompt tokens; when not given from configs/prices.json.
        price_output: dollars per million completion tokens.
        batch_api: ask through OpenAI's Batch API: half the price, within a day.
        dry_run: print the first prompt and what the run may cost, and ask nothing.
        max_retries: of one request, after failures that may pass (429, 5xx, a lost connection).
        request_timeout: seconds for one answer.
        similarity_threshold: a task with a higher ROUGE-L F to any earlier instruction is dropped.
        min_words: of an instruction.
        max_words: of an instruction.
        keywords: comma-separated; an instruction with one of them is dropped.
    """
    rules = Rules(similarity_threshold, min_words, max_words, keywords)
    counts = {
        "num_instructions_to_generate": num_instructions_to_generate,
        "request_batch_size": request_batch_size,
        "max_tokens": max_tokens,
        "num_cpus": num_cpus,
    }
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} must be 1 or more, found {value}")
    if request_timeout <= 0:
        raise UserError(f"--request_timeout must be above 0, found {request_timeout}")
    if os.path.isfile(output_dir):
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    prompts = Prompts(_read_text(prompt_path), load_seed_tasks(seed_tasks_path), num_prompt_instructions, seed)
    parameters = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if logit_bias is not None:
        parameters["logit_bias"] = _json_object(logit_bias)
    settings = {**prompts.settings(), **parameters}
    limits = {"max_cost_usd": max_cost_usd, "max_tokens_total": max_tokens_total, "max_tokens": max_tokens}
    limits["discount"] = DISCOUNT if batch_api else 1.0
    if dry_run:
        spending = Spending(find_prices(model_name, price_input, price_output), **limits)
        print(_estimate(prompts[0], spending, num_instructions_to_generate, model_name))
        return

    progress = Progress()
    client = Client(base_url, api, max_retries, request_timeout, progress.log)
    with _writing_to(output_dir), RequestJournal(output_dir) as journal:
        batch = os.path.join(output_dir, "batch.json")
        if os.path.exists(batch) and not batch_api:
            raise UserError(f"{batch} is a batch under way, paid for already; go on with --batch_api, or delete it")
        earlier, three_fields = _files_found(output_dir, journal)
        if earlier:
            settings["earlier_tasks"] = _sha256(json.dumps(earlier))
        pool = RougePool([task["instruction"] for task in [*prompts.seed_tasks, *earlier]], num_cpus)
        harvest = Harvest(rules, num_prompt_instructions, num_instructions_to_generate, pool, earlier)

        async def ask() -> Run:
            async with client:
                model = model_name or journal.model or await client.only_model()
                journal.check(model, settings)
                spending = Spending(find_prices(model, price_input, price_output), **limits)
                run = Run(
                    prompts=prompts,
                    harvest=harvest,
                    journal=journal,
                    spending=spending,
                    model=model,
                    parameters=parameters,
                    settings=settings,
                    request_batch_size=request_batch_size,
                    max_requests=max_requests,
                    save=lambda: harvest.write(output_dir, three_fields),
                    show=progress.show,
                    log=progress.log,
                )
                try:
                    await (ask_in_batches(run, client, output_dir) if batch_api else ask_live(run, client))
                except UserError:
                    _finish(run, progress)
                    raise
                _finish(run, progress)
                return run

        try:
            run = asyncio.run(ask())
        except KeyboardInterrupt:  # while waiting for a batch; with requests in flight it is handled there
            print("Interrupted; what was asked for goes on at the server. The same command goes on from there.")
            raise
    if run.stopped and harvest.room:
        print(
            f"Stopped before {num_instructions_to_generate} tasks: {run.stopped}. The same command goes on from there."
        )
    if run.interrupted:
        raise KeyboardInterrupt


def _finish(run: Run, progress: Progress) -> None:
    progress.close()
    if run.journal.records:
        run.save()
        print(closing_table(run))


@contextlib.contextmanager
def _writing_to(output_dir: str) -> Iterator[None]:
    """Says in one line that a disk is full or a folder not writable."""
    try:
        yield
    except BrokenPipeError:  # nobody reads stdout any more
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {output_dir}: {error.strerror}; answers in requests.jsonl are safe, and the same command "
            "goes on from there once that is mended"
        ) from error


def _files_found(output_dir: str, journal: RequestJournal) -> tuple[list[dict[str, Any]], str]:
    """Files that lay in the output folder before the first answer aren't overwritten.

    Returns:
        The tasks of a regen.json found there, with which the run begins as the original's did (regen_start.json keeps
        them), and the name of the three-field file: another one where somebody's alpaca_data.json is in its place.
    """
    regen, start, taken, other = (
        os.path.join(output_dir, name)
        for name in ("regen.json", "regen_start.json", "alpaca_data.json", "regen_alpaca_data.json")
    )
    if not journal.records:
        if os.path.exists(regen):
            shutil.copyfile(regen, start + ".tmp")
            os.replace(start + ".tmp", start)
        if os.path.exists(taken) and not os.path.exists(other):
            jdump([], other)
    return load_examples(start, require_output=False) if os.path.exists(start) else [], os.path.basename(
        other if os.path.exists(other) else taken
    )


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise UserError(f'--logit_bias must be a JSON object like {{"50256": -100}}, found {text!r}')


def _estimate(prompt: str, spending: Spending, target: int, model: str | None) -> str:
    """The first prompt, and what a run may take."""
    requests = math.ceil(target / _KEPT_PER_ANSWER)
    prompt_tokens, completion_tokens = requests * len(prompt.encode()) // 4, requests * _TOKENS_PER_ANSWER
    tokens = f"{prompt_tokens:,} prompt and {completion_tokens:,} completion tokens"
    cost = "cost unknown: give --price_input and --price_output"
    if spending.prices:
        most = spending.dollars(prompt_tokens, requests * spending.max_tokens)
        cost = f"${spending.dollars(prompt_tokens, completion_tokens):.4f}, ${most:.4f} at full-length completions"
    return (
        f"{prompt}\n\n"
        f"That is the first prompt. {target:,} tasks by {model or 'the served model'} would take about {requests:,} "
        f"requests (at {_KEPT_PER_ANSWER} tasks kept each), {tokens}; {cost}. Nothing was sent."
    )


def replay(
    journal_path: str,
    output_dir: str,
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int | None = None,
    num_cpus: int = 16,
    similarity_threshold: float = 0.7,
    min_words: int = 4,
    max_words: int = 150,
    keywords: str = KEYWORDS,
) -> None:
    """Parses and filters a journal's answers anew, under other rules; nothing is asked of any server.

    Args:
        journal_path: the requests.jsonl of an earlier run.
        output_dir: another folder than the journal's; gets regen.json, alpaca_data.json and rejected.jsonl.
        seed_tasks_path: the seed tasks of that run, from which new tasks must differ.
        num_instructions_to_generate: tasks to keep; all there are when not given.
        num_cpus: threads that compare instructions, at most one a core.
        similarity_threshold: a task with a higher ROUGE-L F to any earlier instruction is dropped.
        min_words: of an instruction.
        max_words: of an instruction.
        keywords: comma-separated; an instruction with one of them is dropped.
    """
    records = read_requests(journal_path)
    if not records:
        raise UserError(f"{journal_path} holds no answers")
    if os.path.realpath(output_dir) == os.path.dirname(os.path.realpath(journal_path)):
        raise UserError(f"{output_dir} holds the journal and the run's own files; name another --output_dir")
    seed_tasks = load_seed_tasks(seed_tasks_path)
    pool = RougePool([task["instruction"] for task in seed_tasks], num_cpus)
    count = next(iter(records.values()))["settings"]["num_prompt_instructions"]
    rules = Rules(similarity_threshold, min_words, max_words, keywords)
    harvest = Harvest(rules, count, num_instructions_to_generate, pool)
    for _, record in sorted(records.items()):
        if harvest.room:
            harvest.add(record)
    with _writing_to(output_dir):
        harvest.write(output_dir)
    print(table(harvest, [("answers", len(records), f"of {journal_path}")]))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run_cli({"generate_instruction_following_data": generate_instruction_following_data, "replay": replay}, argv)


if __name__ == "__main__":
    main()
