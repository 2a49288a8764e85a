"""What answers cost, the limits that are checked before a request is sent, and the estimate of --dry_run."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.files import jload
from alpaca.generation.config import Config

PRICES_PATH = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "prices.json")
BATCH_DISCOUNT = 0.5  # OpenAI's Batch API takes half the price
# An estimate of prompt tokens before a server has counted any. English text has four bytes a token or more.
_BYTES_PER_TOKEN = 3.0
# What --dry_run assumes of an answer: of the 17 tasks asked for, most are kept.
_KEPT_PER_ANSWER, _TOKENS_PER_ANSWER = 13, 1700


@dataclass
class Spending:
    """Tokens and dollars of one output folder, earlier invocations included.

    Attributes:
        config: The run's limits.
        prices: Dollars per million prompt and completion tokens, None if unknown.
        tokens: Prompt and completion tokens so far.
        cost: Dollars so far.
    """

    config: Config
    prices: tuple[float, float] | None
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cost: float = 0.0
    _bytes_per_token: float = _BYTES_PER_TOKEN

    def __post_init__(self) -> None:
        if self.config.max_cost_usd is not None and self.prices is None:
            raise UserError(
                "--max_cost_usd needs the model's prices, and configs/prices.json has none for it; give "
                "--price_input and --price_output in dollars per million tokens"
            )

    def cost_of(self, usage: dict[str, int] | None, prompt: str, text: str) -> float | None:
        """Returns the dollars of one answer, None without prices.

        Args:
            usage: The server's count of tokens. If there is none, tokens are estimated by length.
            prompt: The prompt.
            text: The answer.
        """
        if self.prices is None:
            return None
        return self.dollars(*self._counts(usage, prompt, text))

    def add(self, record: dict[str, Any], prompt: str) -> None:
        """Counts an answer of the journal."""
        counts = self._counts(record.get("usage"), prompt, record["text"])
        self.tokens = [have + new for have, new in zip(self.tokens, counts, strict=True)]
        cost = record.get("cost")
        if cost is None:  # it came in an invocation that had no prices
            cost = self.cost_of(record.get("usage"), prompt, record["text"])
        self.cost += cost or 0.0
        if record.get("usage") and counts[0]:
            self._bytes_per_token = min(self._bytes_per_token, len(prompt.encode()) / counts[0])

    def limit_reached(self, prompt: str, in_flight: int) -> str | None:
        """Names the limit that one more request could pass if every answer in flight had its full length, or None.

        Example:
            --max_cost_usd 1 with $0.90 spent and at most $0.03 a request: with 2 in flight a third is sent
            (0.90 + 3 * 0.03 = 0.99), with 3 in flight a fourth is not (1.02).
        """
        config, requests = self.config, in_flight + 1
        each = len(prompt.encode()) / self._bytes_per_token, config.max_tokens
        used, limit = sum(self.tokens), config.max_tokens_total
        if limit is not None and used + requests * sum(each) > limit:
            return f"--max_tokens_total {limit} ({used} used, one more may take {sum(each):.0f})"
        if config.max_cost_usd is not None:
            most = self.dollars(*each)
            if self.cost + requests * most > config.max_cost_usd:
                return f"--max_cost_usd {config.max_cost_usd} (${self.cost:.4f} spent, one more may cost ${most:.4f})"
        return None

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Returns the price of so many tokens; prices must be known."""
        discount = BATCH_DISCOUNT if self.config.batch_api else 1.0
        return discount * (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6

    def _counts(self, usage: dict[str, int] | None, prompt: str, text: str) -> tuple[int, int]:
        if usage:
            return usage["prompt_tokens"], usage["completion_tokens"]
        return tuple(round(len(part.encode()) / self._bytes_per_token) for part in (prompt, text))


def find_prices(model: str | None, config: Config) -> tuple[float, float] | None:
    """Returns dollars per million prompt and completion tokens: the flags', else configs/prices.json's, else None."""
    if config.price_input is not None:
        return config.price_input, config.price_output
    models = jload(PRICES_PATH)["models"]
    entry = models.get(model) or models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model or ""))
    return (entry["input"], entry["output"]) if entry else None


def estimate_cost(prompt: str, config: Config) -> str:
    """Says for --dry_run what a run may take, given its first prompt."""
    spending = Spending(config, find_prices(config.model_name, config))
    target = config.num_instructions_to_generate
    requests = math.ceil(target / _KEPT_PER_ANSWER)
    prompt_tokens, completion_tokens = requests * len(prompt.encode()) // 4, requests * _TOKENS_PER_ANSWER
    tokens = f"{prompt_tokens:,} prompt and {completion_tokens:,} completion tokens"
    cost = "cost unknown: give --price_input and --price_output"
    if spending.prices:
        most = spending.dollars(prompt_tokens, requests * config.max_tokens)
        cost = f"${spending.dollars(prompt_tokens, completion_tokens):.4f}, ${most:.4f} at full-length completions"
    return (
        f"That is the first prompt. {target:,} tasks by {config.model_name or 'the served model'} would take about "
        f"{requests:,} requests (at {_KEPT_PER_ANSWER} tasks kept each), {tokens}; {cost}. Nothing was sent."
    )
