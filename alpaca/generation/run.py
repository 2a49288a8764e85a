"""The life of an answer, however it is asked for: which request comes next, the journal, the cost, the tasks."""

import hashlib
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from alpaca.cli import UserError
from alpaca.client import Completion
from alpaca.generation.config import Config
from alpaca.generation.harvest import Harvest
from alpaca.generation.requests import RequestJournal
from alpaca.generation.spending import Spending

# What the journal says of a prompt that the model's context can't hold: asking again is useless, and it cost nothing.
PROMPT_TOO_LONG = Completion("", "prompt_too_long", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
EMPTY_ROUNDS = 5  # rounds of answers without a task to keep after which a run stops


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        stopped: Why it ended before its target, None if the target was met.
        interrupted: True after Ctrl-C.
        failure: The error that ended it.
    """

    stopped: str | None = None
    interrupted: bool = False
    failure: UserError | None = None


@dataclass
class Run:
    """One invocation: decides what to ask for next and takes the answers.

    Attributes:
        config: The flags.
        prompt_of: Gives the prompt of a request by its index.
        harvest: Takes the answers in request order.
        journal: Records every answer before anything else happens to it.
        spending: What the answers cost, and the limits.
        model: The model's name at the server.
        settings: What each record of the journal says about how its answer was made.
        save: Writes the output files if it is time to; called now and then, from another thread.
        answered: Answers that came in this invocation.
        stopped: Why no more requests are sent, None if they are.
    """

    config: Config
    prompt_of: Callable[[int], str]
    harvest: Harvest
    journal: RequestJournal
    spending: Spending
    model: str
    settings: dict[str, Any]
    save: Callable[[Harvest], None]
    answered: int = 0
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.parameters = self.config.request_parameters()
        for index, record in self.journal.records.items():
            self.spending.add(record, self.prompt_of(index))
        self._harvest_answers()

    def parameters_of(self, index: int) -> dict[str, Any]:
        """Returns what a request carries besides prompt and model: the run's parameters and a seed of its own."""
        return {**self.parameters, "seed": (self.config.seed * 1_000_003 + index) % 2**31}

    @property
    def unharvested(self) -> int:
        """How many answers are in the journal and not yet in the harvest."""
        return len(self.journal.records) - self.harvest.answers

    @property
    def can_harvest(self) -> bool:
        """True if the journal holds the next answer in order and more tasks are needed."""
        return self.harvest.remaining > 0 and self.harvest.answers in self.journal.records

    def needs_more(self, in_flight: Set[int]) -> bool:
        """True if the answers so far won't meet the target, or if the next one in order is missing.

        Example:
            40 of 100 tasks are kept of 4 answers: 10 an answer, 60 remaining. With 5 requests in flight 50 more tasks
            are expected, so another request is needed; with 6 it isn't. After a crash the journal may hold answers 0,
            1 and 3: nothing can be kept of 3 before 2 has come, so 2 is needed, however much 3 may bring.

        Args:
            in_flight: Indices of the requests whose answers haven't come yet.
        """
        if not self.harvest.remaining:
            return False
        following = self.harvest.answers
        if following not in self.journal.records and following not in in_flight:
            return True
        return self.harvest.kept_per_answer * (self.unharvested + len(in_flight)) < self.harvest.remaining

    def next_request(self, in_flight: Set[int], first: int = 0) -> int | None:
        """Returns the index to ask for next, or None if a limit forbids it; `stopped` then says which.

        Args:
            in_flight: Indices of the requests whose answers haven't come yet.
            first: The lowest index that may be free.
        """
        index = max(first, self.harvest.answers)
        while index in self.journal.records or index in in_flight:
            index += 1
        limit = self.config.max_requests
        if limit is not None and index >= limit:
            self.stopped = f"--max_requests {limit} is reached"
        elif limit := self.spending.limit_reached(self.prompt_of(index), len(in_flight)):
            # Answers in flight may turn out short and leave enough for another request, so only with none of them
            # in flight is this the end.
            self.stopped = None if in_flight else f"the next request could pass {limit}"
        else:
            return index
        return None

    def requests_needed(self, assumed_kept_per_answer: float) -> int:
        """Estimates how many more requests will meet the target, one at least.

        Args:
            assumed_kept_per_answer: Tasks kept of an answer, used before there is any.
        """
        requests = math.ceil(self.harvest.remaining / (self.harvest.kept_per_answer or assumed_kept_per_answer))
        return max(1, requests - self.unharvested)

    def take(self, answers: dict[int, Completion]) -> None:
        """Journals answers by request index; when this returns they are on the disk."""
        records = []
        for index, completion in answers.items():
            prompt, usage, text = self.prompt_of(index), completion.usage, completion.text
            record = {
                "request_index": index,
                "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                "model": self.model,
                "settings": self.settings,
                "text": text,
                "finish_reason": completion.finish_reason,
                "usage": usage,
                "cost": self.spending.cost_of(usage, prompt, text),
            }
            records.append(record)
        self.journal.append(records)
        for record in records:
            self.spending.add(record, self.prompt_of(record["request_index"]))
        self.answered += len(records)

    def harvest_answers(self) -> None:
        """Keeps the tasks of the journal's next answers, and saves the files now and then.

        Raises:
            UserError: Five rounds of answers brought no task to keep.
        """
        self._harvest_answers()
        self.save(self.harvest)
        empty = self.harvest.empty_answers
        if self.harvest.remaining and empty >= EMPTY_ROUNDS * self.config.request_batch_size:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.harvest.reasons.most_common())
            raise UserError(
                f"no task to keep in the last {empty} answers, {EMPTY_ROUNDS} rounds (all rejections: {reasons}); "
                "look at rejected.jsonl, then try another model, prompt or rule"
            )

    def _harvest_answers(self) -> None:
        while self.can_harvest:
            self.harvest.add(self.journal.records[self.harvest.answers])
