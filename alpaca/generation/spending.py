"""What answers cost, and the limits that are checked before a request goes out."""

import os
import re
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.files import jload

PRICES_PATH = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "prices.json")
# An estimate of prompt tokens before a server has counted any; English text has four bytes a token or more.
_BYTES_PER_TOKEN = 3.0


@dataclass
class Spending:
    """Tokens and dollars of one run, those of earlier sittings included.

    Attributes:
        prices: dollars per million prompt and completion tokens, None where unknown.
        max_cost_usd: no request goes out that could carry the sum past it.
        max_tokens_total: likewise for prompt and completion tokens together.
        max_tokens: the most that one completion can have.
        discount: factor on all prices.
        tokens: prompt and completion tokens so far.
    """

    prices: tuple[float, float] | None
    max_cost_usd: float | None = None
    max_tokens_total: int | None = None
    max_tokens: int = 3072
    discount: float = 1.0
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    cost: float = 0.0
    _bytes_per_token: float = _BYTES_PER_TOKEN

    def __post_init__(self) -> None:
        if self.max_cost_usd is not None and self.prices is None:
            raise UserError(
                "--max_cost_usd needs the model's prices, and configs/prices.json has none for it; give "
                "--price_input and --price_output in dollars per million tokens"
            )

    def cost_of(self, usage: dict[str, int] | None, prompt: str, text: str) -> float | None:
        """Dollars of one answer; counted by length where the server doesn't count tokens, None without prices."""
        if self.prices is None:
            return None
        return self.dollars(*self._counts(usage, prompt, text))

    def add(self, record: dict[str, Any], prompt: str) -> None:
        """Books an answer of the journal."""
        counts = self._counts(record.get("usage"), prompt, record["text"])
        self.tokens = [have + new for have, new in zip(self.tokens, counts, strict=True)]
        cost = record.get("cost")
        if cost is None:  # of a sitting that had no prices
            cost = self.cost_of(record.get("usage"), prompt, record["text"])
        self.cost += cost or 0.0
        if record.get("usage") and counts[0]:
            self._bytes_per_token = min(self._bytes_per_token, len(prompt.encode()) / counts[0])

    def forbids(self, prompt: str, in_flight: int) -> str | None:
        """Why one more request would pass a limit if every answer in flight had its full length; None if it can't."""
        each = len(prompt.encode()) / self._bytes_per_token, self.max_tokens
        requests = in_flight + 1
        if self.max_tokens_total is not None and sum(self.tokens) + requests * sum(each) > self.max_tokens_total:
            limit = self.max_tokens_total
            return f"--max_tokens_total {limit} ({sum(self.tokens)} used, one more may take {sum(each):.0f})"
        if self.max_cost_usd is not None:
            most = self.dollars(*each)
            if self.cost + requests * most > self.max_cost_usd:
                return f"--max_cost_usd {self.max_cost_usd} (${self.cost:.4f} spent, one more may cost ${most:.4f})"
        return None

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost; only where the prices are known."""
        return self.discount * (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6

    def _counts(self, usage: dict[str, int] | None, prompt: str, text: str) -> tuple[int, int]:
        if usage:
            return usage["prompt_tokens"], usage["completion_tokens"]
        return tuple(round(len(part.encode()) / self._bytes_per_token) for part in (prompt, text))


def find_prices(model: str | None, price_input: float | None, price_output: float | None) -> tuple[float, float] | None:
    """Dollars per million prompt and completion tokens: those given, else those of configs/prices.json, else None."""
    if (price_input is None) != (price_output is None):
        raise UserError("--price_input and --price_output belong together; give both, in dollars per million tokens")
    if price_input is not None:
        if min(price_input, price_output) < 0:
            raise UserError(f"--price_input and --price_output must be 0 or more, found {price_input}, {price_output}")
        return price_input, price_output
    models = jload(PRICES_PATH)["models"]
    entry = models.get(model) or models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model or ""))
    return (entry["input"], entry["output"]) if entry else None
