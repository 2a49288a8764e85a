"""What a run reads before its first request: the header of every prompt and the seed tasks, which make the prompts."""

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from alpaca.cli import UserError
from alpaca.generation.config import Config
from alpaca.records import check_text, load_records


def read_prompt_header(path: str) -> str:
    """Reads prompt.txt: what the model is to do, up to "List of 20 tasks:".

    Raises:
        UserError: The file is missing or not UTF-8.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read the prompt {path}: {error.strerror}; name one with --prompt_path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt {path} is not UTF-8 text (byte {error.start})") from error


def load_seed_tasks(path: str) -> list[dict[str, str]]:
    """Reads seed tasks in Self-Instruct's format, one JSON object a line.

    Example:
        {"id": "seed_0", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]}
        -> {"instruction": "Add.", "input": "1 2", "output": "3"}

    Returns:
        Each task with its first instance: `instruction`, `input` ("" if it has none) and `output`.

    Raises:
        UserError: A line is no seed task. The message has its number and what was found there.
    """
    tasks, lines_of_ids = [], {}
    for where, record in load_records(path):
        if "id" in record:
            first = lines_of_ids.setdefault(str(record["id"]), where)
            if first != where:
                raise UserError(f"{where}: duplicate id {record['id']!r}, first used at {first}")
        tasks.append(_read_seed_task(where, record))
    return tasks


def _read_seed_task(where: str, record: dict) -> dict[str, str]:
    instances = record.get("instances")
    instance = instances[0] if isinstance(instances, list) and instances else None
    if not isinstance(instance, dict):
        found = json.dumps(instances)[:60] if "instances" in record else f"the fields {', '.join(record)}"
        raise UserError(f"{where}: 'instances' must be a list with an input and an output, found {found}")
    fields = record.get("instruction"), instance.get("input", ""), instance.get("output")
    task = dict(zip(("instruction", "input", "output"), fields, strict=True))
    for name, value in task.items():
        if not isinstance(value, str) or (name != "input" and not value.strip()):
            raise UserError(f"{where}: '{name}' must be text, found {json.dumps(value)[:60]}")
        check_text(f"{where}: '{name}'", value)
    return task


class Prompts:
    """The prompt of every request. It depends on nothing but the seed, the request's index and the two files."""

    def __init__(self, config: Config, encode: Callable[[list[dict[str, str]], str], str]) -> None:
        """Reads the header and the seed tasks.

        Args:
            config: The files and the sampling.
            encode: Makes a prompt of tasks and header.

        Raises:
            UserError: A file can't be used, or there are fewer seed tasks than each prompt needs.
        """
        self.config, self.encode = config, encode
        self.header, self.seed_tasks = read_prompt_header(config.prompt_path), load_seed_tasks(config.seed_tasks_path)
        if not 1 <= config.num_prompt_instructions <= len(self.seed_tasks):
            found = f"{len(self.seed_tasks)} seed tasks, found {config.num_prompt_instructions}"
            raise UserError(f"--num_prompt_instructions must be 1 to the number of {found}")

    def of(self, index: int) -> str:
        """Returns the prompt of one request."""
        rng = random.Random(f"{self.config.seed}-{index}")
        return self.encode(rng.sample(self.seed_tasks, self.config.num_prompt_instructions), self.header)

    def settings(self, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what decides about prompts and answers, for the journal; texts and tasks as hashes.

        Args:
            earlier: The tasks that the run begins with.
        """
        settings = {
            "seed": self.config.seed,
            "num_prompt_instructions": self.config.num_prompt_instructions,
            "prompt_file": _sha256(self.header),
            "seed_tasks": _sha256(json.dumps(self.seed_tasks)),
            **self.config.request_parameters(),
        }
        return settings | ({"earlier_tasks": _sha256(json.dumps(earlier))} if earlier else {})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
