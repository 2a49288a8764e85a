r"""Turns seed tasks into instruction-following data, with any OpenAI-compatible server.

    python -m generate_instruction generate_instruction_following_data \
        --output_dir ./out --num_instructions_to_generate 100 --model_name gpt-4o-mini

    python -m generate_instruction replay --journal_path out/requests.jsonl --output_dir stricter --min_words 6

The model sees a few seed tasks and continues the list with its own. Every answer is on the disk, in `requests.jsonl`,
before it is used. All other files in the output folder are made from that journal in request order, and can be made
again from it. To continue an interrupted run, run the same command again.
"""

import asyncio
import os
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from alpaca.cli import UserError, run_cli
from alpaca.client import Client
from alpaca.generation.batch_api import ask_in_batches, refuse_waiting_batch
from alpaca.generation.config import KEYWORDS, Config
from alpaca.generation.dedup import RougePool
from alpaca.generation.dispatch import ask_live
from alpaca.generation.harvest import Harvest
from alpaca.generation.inputs import Prompts, load_seed_tasks, read_prompt_header
from alpaca.generation.output import OutputFolder, open_output, writing_to
from alpaca.generation.parser import parse_tasks
from alpaca.generation.progress import Progress, closing_table, log, table
from alpaca.generation.requests import RequestJournal, read_requests
from alpaca.generation.run import Outcome, Run
from alpaca.generation.spending import Spending, estimate_cost, find_prices


def encode_prompt(prompt_instructions: Sequence[dict[str, str]], prompt: str | None = None) -> str:
    r"""Writes the prompt of one request: the header, some seed tasks, and the number of the next task.

    Args:
        prompt_instructions: Tasks with `instruction`, `input` and `output`.
        prompt: The header; the text of ./prompt.txt if None.

    Returns:
        The prompt. After k tasks it ends in `###\n{k+1}. Instruction:`, which the model continues.
    """
    text = (read_prompt_header("./prompt.txt") if prompt is None else prompt).removesuffix("\n") + "\n"
    for number, task in enumerate(prompt_instructions, start=1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        text += f"###\n{number}. Instruction: {instruction}\n"
        text += f"{number}. Input:\n{task['input'] or '<noinput>'}\n"
        text += f"{number}. Output:\n{task['output']}\n"
    return text + f"###\n{len(prompt_instructions) + 1}. Instruction:"


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """Finds a whole word, given as a regular expression, in a text; upper and lower case are the same."""
    return re.search(rf"\b({w})\b", s, flags=re.IGNORECASE)


def find_objection(instruction: str, output: str, config: Config) -> str | None:
    """Applies the original's filters to one task.

    Returns:
        The reason to drop it, None to keep it.
    """
    words = len(instruction.split())
    if words < config.min_words:
        return "too_short"
    if words > config.max_words:
        return "too_long"
    if config.keyword_pattern and find_word_in_string(config.keyword_pattern, instruction):
        return "keyword"
    if instruction.startswith("Write a program"):
        return "write_a_program"
    if instruction[:1] in string.punctuation:  # true of "" as well, which --min_words 0 lets through
        return "punctuation"
    if not instruction[0].isascii():
        return "non_ascii"
    return None if output else "empty_output"


def post_process_gpt3_response(
    num_prompt_instructions: int, response: Any, config: Config | None = None, with_rejected: bool = False
) -> list[dict[str, str]]:
    """Reads the tasks in one answer and filters them.

    Args:
        num_prompt_instructions: Seed tasks in the prompt; the answer's first task has the next number.
        response: The answer, with `["text"]` and `["finish_reason"]`; None gives no tasks.
        config: The limits of the filters; the original's if None.
        with_rejected: Return the tasks that don't pass too, each with a `reason`.

    Returns:
        The tasks in order, as `instruction`, `input` and `output`.
    """
    if response is None:
        return []
    config, found = config or Config(), []
    truncated = response["finish_reason"] in ("length", "content_filter")
    for task in parse_tasks(response["text"], num_prompt_instructions + 1, truncated):
        fields = {"instruction": task.instruction, "input": task.input, "output": task.output}
        reason = task.problem or find_objection(task.instruction, task.output, config)
        if reason is None:
            found.append(fields)
        elif with_rejected:
            found.append({**fields, "reason": reason})
    return found


def start_harvest(config: Config, seed_tasks: Sequence[dict], earlier: Sequence[dict] = ()) -> Harvest:
    """Returns an empty harvest, to which answers are added in request order.

    It keeps a task that passes the filters and differs from all before it: the seed tasks, the `earlier` ones that the
    run begins with, and those kept since.
    """
    pool = RougePool([task["instruction"] for task in [*seed_tasks, *earlier]], config.num_cpus)
    read = partial(post_process_gpt3_response, config.num_prompt_instructions, config=config, with_rejected=True)
    return Harvest(read, pool, config.similarity_threshold, config.num_instructions_to_generate, list(earlier))


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
    max_outage: float = 600.0,
    similarity_threshold: float = 0.7,
    min_words: int = 4,
    max_words: int = 150,
    keywords: str = KEYWORDS,
) -> None:
    """Generates instruction-following data from seed tasks. Run the same command again to continue.

    Args:
        output_dir: Folder for requests.jsonl (every answer), regen.json, alpaca_data.json and rejected.jsonl.
        seed_tasks_path: File of seed tasks, one JSON object a line.
        num_instructions_to_generate: Number of tasks to keep, met exactly.
        model_name: Name of the model at the server. Not needed if the server has only one.
        num_prompt_instructions: Number of seed tasks in each prompt.
        request_batch_size: Number of requests in flight at once.
        temperature: Sampling temperature.
        top_p: Nucleus sampling: sample from the most likely tokens that make up this share of the probability.
        num_cpus: Number of threads that compare instructions, at most one per core.
        base_url: The server, as http://host:port/v1. By default OPENAI_BASE_URL, or OpenAI itself.
        api: Which API to use: chat, completions, or auto, which is chat if the server has it for the model.
        prompt_path: File with the text that heads every prompt.
        seed: Seed for sampling the seed tasks of each prompt, and for the server's own sampling if it takes one.
        max_tokens: Maximum number of tokens in one completion.
        logit_bias: JSON object of token ids and biases, as {"50256": -100}. Token ids are the model's own.
        max_requests: Stop after this many requests and keep all their tasks, even if the target isn't met.
        max_cost_usd: Stop before a request that could take the total cost above this many dollars.
        max_tokens_total: Stop before a request that could take prompt and completion tokens above this total.
        price_input: Dollars per million prompt tokens. By default taken from configs/prices.json.
        price_output: Dollars per million completion tokens. By default taken from configs/prices.json.
        batch_api: Use OpenAI's Batch API, which takes up to a day at half the price.
        dry_run: Print the first prompt and an estimate of the cost, and send nothing.
        max_retries: Retries of one request after failures that may pass (429, 5xx, a lost connection).
        request_timeout: Seconds to wait for one whole answer.
        max_outage: Seconds to wait for a server that has gone down, and the longest Retry-After to obey.
        similarity_threshold: Drop tasks with a higher ROUGE-L F score than this with any earlier instruction.
        min_words: Drop instructions with fewer words than this.
        max_words: Drop instructions with more words than this.
        keywords: Drop instructions that contain one of these words, separated by commas.
    """
    config = Config(**locals())  # the first statement, while the locals are the flags and nothing else
    prompts = Prompts(config, encode_prompt)
    if config.dry_run:
        print(f"{prompts.of(0)}\n\n{estimate_cost(prompts.of(0), config)}")
        return
    client = Client(config.base_url, config.api, config.max_retries, config.request_timeout, log, config.max_outage)
    with writing_to(config.output_dir), RequestJournal(config.output_dir) as journal:
        if not config.batch_api:
            refuse_waiting_batch(config.output_dir)
        output, earlier = open_output(config.output_dir, is_new_run=not journal.records)
        harvest = start_harvest(config, prompts.seed_tasks, earlier)
        try:
            outcome = asyncio.run(_ask(config, prompts, client, journal, harvest, output))
        except KeyboardInterrupt:  # while waiting for a batch; ask_live handles its own
            print("Interrupted; the server continues the batch. Run the same command to continue.")
            raise
    if outcome.failure:
        raise outcome.failure
    if outcome.stopped and harvest.remaining:
        how = "Run the same command" if outcome.interrupted else "Run it again with a higher limit"
        print(f"Stopped before {harvest.target} tasks: {outcome.stopped}. {how} to continue.")
    if outcome.interrupted:
        raise KeyboardInterrupt


async def _ask(
    config: Config, prompts: Prompts, client: Client, journal: RequestJournal, harvest: Harvest, output: OutputFolder
) -> Outcome:
    """Asks the server until enough tasks are kept. After a failure, too, the files are written and the costs shown."""
    async with client:
        model = config.model_name or journal.model or await client.only_model()
        settings = prompts.settings(earlier=harvest.kept)
        journal.check(model, settings)
        output.refuse_foreign(partial(_harvest_again, config, prompts.seed_tasks, journal.records, harvest.kept[:]))
        spending = Spending(config, find_prices(model, config))
        run = Run(config, prompts.of, harvest, journal, spending, model, settings, output.write_now_and_then)
        ask = ask_in_batches if config.batch_api else ask_live
        with Progress(harvest, spending) as progress:
            try:
                outcome = await ask(run, client, progress.show)
            except UserError as error:
                outcome = Outcome(failure=error)
    if journal.records:
        output.write(harvest)
        print(closing_table(harvest, spending, model, len(journal.records), run.answered))
    return outcome


def _harvest_again(
    config: Config, seed_tasks: Sequence[dict], records: dict[int, dict], earlier: Sequence[dict], target: int | None
) -> Harvest:
    """Takes the answers of a journal in order, up to the first that is missing or to so many tasks."""
    harvest = start_harvest(replace(config, num_instructions_to_generate=target), seed_tasks, earlier)
    while harvest.remaining and harvest.answers in records:
        harvest.add(records[harvest.answers])
    return harvest


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
    """Reads and filters the answers of an earlier run again, under other rules. No server is asked.

    Args:
        journal_path: The requests.jsonl of an earlier run.
        output_dir: Folder for regen.json, alpaca_data.json and rejected.jsonl; not the journal's own.
        seed_tasks_path: The seed tasks of that run, from which new tasks must differ.
        num_instructions_to_generate: Number of tasks to keep. By default all.
        num_cpus: Number of threads that compare instructions, at most one per core.
        similarity_threshold: Drop tasks with a higher ROUGE-L F score than this with any earlier instruction.
        min_words: Drop instructions with fewer words than this.
        max_words: Drop instructions with more words than this.
        keywords: Drop instructions that contain one of these words, separated by commas.
    """
    flags = {name: value for name, value in locals().items() if name != "journal_path"}
    records = read_requests(journal_path)
    if not records:
        raise UserError(f"{journal_path} holds no answers")
    if os.path.exists(os.path.join(output_dir, "requests.jsonl")):
        raise UserError(f"{output_dir} holds a journal and its run's own files; name another --output_dir")
    index, record = next(iter(records.items()))
    count = record["settings"].get("num_prompt_instructions")
    if type(count) is not int or count < 1:
        raise UserError(
            f"{journal_path}: the settings of request {index} have no num_prompt_instructions, which says where its "
            "tasks begin; add it"
        )
    config = Config(num_prompt_instructions=count, **flags)
    output = OutputFolder(output_dir)
    output.refuse_foreign()
    harvest = start_harvest(config, load_seed_tasks(seed_tasks_path))
    for _, record in sorted(records.items()):
        if harvest.remaining:
            harvest.add(record)
    with writing_to(output_dir):
        output.write(harvest)
    print(table(harvest, [("answers", len(records), f"of {journal_path}")]))


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    run_cli({"generate_instruction_following_data": generate_instruction_following_data, "replay": replay}, argv)


if __name__ == "__main__":
    main()
