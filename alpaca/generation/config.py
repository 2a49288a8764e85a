"""The settings of a run, made once from the command's flags and checked here."""

import contextlib
import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from alpaca.cli import UserError
from alpaca.files import parse_json

# Things that a text model can neither take nor give: the original's list.
KEYWORDS = (
    "image,images,graph,graphs,picture,pictures,file,files,map,maps,draw,plot,go to,video,audio,music,flowchart,diagram"
)


_NOT_NEGATIVE = (
    "temperature", "max_retries", "max_outage", "max_requests", "max_cost_usd", "max_tokens_total", "min_words",
    "max_words",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What one run was asked to do; every field is a flag of the same name.

    Raises:
        UserError: A flag is out of range. The message names it.
    """

    # Files
    output_dir: str = "./"
    seed_tasks_path: str = "./seed_tasks.jsonl"
    prompt_path: str = "./prompt.txt"

    # The server
    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI
    model_name: str | None = None  # None: the only model that the server has
    api: str = "auto"  # "chat", "completions" or "auto"; checked by the client
    max_retries: int = 8  # tries after the first one, for each request
    request_timeout: float = 600.0  # seconds, for the whole answer
    max_outage: float = 600.0  # seconds that the server may be down; no Retry-After is obeyed for longer

    # What each request asks
    num_prompt_instructions: int = 3  # seed tasks in a prompt
    seed: int = 0  # with the request's index it decides which ones, and how the server samples
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 3072  # of one completion; the client asks for fewer if the model's context is too short
    logit_bias: str | None = None  # a JSON object, '{"50256": -100}'

    # When to stop; every limit is checked before a request is sent
    num_instructions_to_generate: int | None = 100  # tasks kept, met exactly; None: every task there is
    max_requests: int | None = None  # no request has this index or a higher one
    max_cost_usd: float | None = None  # dollars, if every answer in flight had max_tokens
    max_tokens_total: int | None = None  # prompt and completion tokens, counted the same way
    price_input: float | None = None  # dollars per million prompt tokens; None: from configs/prices.json
    price_output: float | None = None  # dollars per million completion tokens
    dry_run: bool = False  # send nothing at all

    # How much at a time
    request_batch_size: int = 5  # requests in flight
    num_cpus: int = 16  # threads that compare instructions, at most one per core
    batch_api: bool = False  # OpenAI's Batch API instead of requests in flight

    # Which tasks are kept; the defaults are the original's
    similarity_threshold: float = 0.7  # drop a task whose ROUGE-L F with an earlier instruction is higher
    min_words: int = 4  # drop an instruction with fewer
    max_words: int = 150  # drop an instruction with more
    keywords: str = KEYWORDS  # drop an instruction with one of these, comma-separated; whole words in any case

    def __post_init__(self) -> None:
        for name in ("num_instructions_to_generate", "request_batch_size", "max_tokens", "num_cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be 1 or more, found {value}")
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} must be 0 or more, found {getattr(self, name)}")
        if self.request_timeout <= 0:
            raise UserError(f"--request_timeout must be above 0, found {self.request_timeout}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.similarity_threshold <= 1:
            raise UserError(f"--similarity_threshold must be from 0 to 1, found {self.similarity_threshold}")
        if self.min_words > self.max_words:
            raise UserError(f"--min_words {self.min_words} and --max_words {self.max_words} leave no task; swap them")
        if os.path.isfile(self.output_dir):
            raise UserError(f"--output_dir {self.output_dir} is a file; name a folder")
        prices = [price for price in (self.price_input, self.price_output) if price is not None]
        if len(prices) == 1:
            raise UserError("--price_input and --price_output go together; give both, in dollars per million tokens")
        if prices and min(prices) < 0:
            raise UserError(f"--price_input and --price_output must be 0 or more, found {prices[0]}, {prices[1]}")
        self.request_parameters()  # raises if logit_bias is malformed

    @functools.cached_property
    def keyword_pattern(self) -> str:
        """The keywords as one regular expression, "image, map" as "image|map"; "" if there are none."""
        return "|".join(re.escape(word.strip()) for word in self.keywords.split(",") if word.strip())

    def request_parameters(self) -> dict[str, Any]:
        """Returns what every request carries besides its prompt and the model, by OpenAI's names."""
        parameters = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        if self.logit_bias is not None:
            parameters["logit_bias"] = _json_object(self.logit_bias)
        return parameters


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        if isinstance(value := parse_json(text, "--logit_bias"), dict):
            return value
    raise UserError(f'--logit_bias must be a JSON object like {{"50256": -100}}, found {text!r:.80}')
