"""Keeps requests in flight until enough tasks are kept: order, limits, interruption, and what a person sees of it."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from completions import Client
from journal import Journal
from spending import Spending
from utils import UserError

DRY_ROUNDS = 5  # rounds without a kept task after which a run stops
_SECONDS_BETWEEN_SAVES = 30.0


@dataclass
class Dispatcher:
    """One sitting of a run.

    Attributes:
        prompts: request index -> prompt.
        harvest: takes the answers in request order (`add`), says how many tasks are wanted (`room`), writes (`write`).
        journal: where answers are recorded before anything else happens to them.
        spending: the limits.
        model: the model's name at the server.
        parameters: of each request.
        settings: what each record of the journal says about how it was made.
        request_batch_size: requests in flight together.
        max_requests: request indices from this one on are never asked for.
        save: writes the output files.
        show: is called after every round with this object.
        log: prints a line for a person.
    """

    prompts: Any
    harvest: Any
    journal: Journal
    spending: Spending
    model: str
    parameters: dict[str, Any]
    settings: dict[str, Any]
    request_batch_size: int
    max_requests: int | None
    save: Callable[[], None]
    show: Callable[["Dispatcher"], None]
    log: Callable[[str], None]
    requested: int = 0
    stopped: str | None = None
    in_flight: dict[asyncio.Task, int] = field(default_factory=dict)
    _failure: Exception | None = None
    _saved: float = field(default_factory=time.monotonic)
    _save_took: float = 0.0

    def catch_up(self) -> None:
        """Adds the journal's answers to the harvest, as far as they follow on one another."""
        while self.harvest.room > 0 and (record := self.journal.records.get(self.harvest.answers)):
            self.harvest.add(record)

    def record(self, index: int, completion: Any, discount: float = 1.0) -> dict[str, Any]:
        """The journal's line for an answer, booked as spent."""
        prompt, usage, text = self.prompts[index], completion.usage, completion.text
        record = {
            "request_index": index,
            "prompt_sha256": self.prompts.sha256(index),
            "model": self.model,
            "settings": self.settings,
            "text": text,
            "finish_reason": completion.finish_reason,
            "usage": usage,
            "cost": self.spending.cost_of(usage, prompt, text, discount),
        }
        self.spending.add(record, prompt)
        return record

    def next_index(self) -> int:
        """The lowest request index that is neither answered nor in flight."""
        index, taken = self.harvest.answers, set(self.in_flight.values())
        while index in self.journal.records or index in taken:
            index += 1
        return index

    async def run(self, client: Client) -> None:
        """Asks until the target is met, a limit is reached or Ctrl-C is pressed.

        Raises:
            UserError: the server can't be used, or five rounds brought nothing; all answers are in the journal.
        """
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not in a thread or on Windows
            loop.add_signal_handler(signal.SIGINT, self._interrupt, client)
        while True:
            self._send_more(client)
            if not self.in_flight:
                break
            done, _ = await asyncio.wait(self.in_flight, return_when=asyncio.FIRST_COMPLETED)
            self._take(done, client)
            if self.harvest.answers:  # refill before the de-duplication, once it is known how much an answer brings
                self._send_more(client)
            await asyncio.to_thread(self._commit)
            self.show(self)
        if self._failure:
            raise self._failure

    def _send_more(self, client: Client) -> None:
        # The first request goes alone: a wrong key or model costs one call, and refused parameters are learnt once.
        width = self.request_batch_size if self.requested else 1
        while len(self.in_flight) < width and not self._failure and not self.stopped and self._wants_more():
            index = self.next_index()
            prompt = self.prompts[index]
            if self.max_requests is not None and index >= self.max_requests:
                self.stopped = f"--max_requests {self.max_requests} is reached"
            elif (forbidden := self.spending.forbids(prompt, len(self.in_flight))) is not None:
                if self.in_flight:
                    return  # they may take less than they could
                self.stopped = f"the next request could pass {forbidden}"
            else:
                task = asyncio.ensure_future(client.complete(prompt, self.model, **self.parameters))
                self.in_flight[task] = index

    def _wants_more(self) -> bool:
        """Whether the answers on their way will probably not fill the room that is left."""
        harvest = self.harvest
        waiting = len(self.journal.records) - harvest.answers + len(self.in_flight)
        kept_per_answer = len(harvest.kept) / harvest.answers if harvest.answers else 0.0
        return harvest.room > 0 and kept_per_answer * waiting < harvest.room

    def _take(self, done: set[asyncio.Task], client: Client) -> None:
        """Records answers that came; a failure stops the sending, and what is in flight is waited for."""
        records = []
        for task in done:
            index = self.in_flight.pop(task)
            if error := task.exception():
                self._failure = self._failure or error
                client.give_up()
            else:
                records.append(self.record(index, task.result()))
        self.journal.append(records)
        self.requested += len(records)

    def _commit(self) -> None:
        self.catch_up()
        if self.harvest.dry >= DRY_ROUNDS * self.request_batch_size and self.requested and self.harvest.room:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.harvest.reasons.most_common())
            self._failure = self._failure or UserError(
                f"{self.harvest.dry} answers in a row without a task to keep (rejected so far: {reasons}); "
                "see rejected.jsonl, then try another model, prompt or rule"
            )
        # Files are made from the journal: saving now and then is a convenience, for a tenth of the time at most.
        if time.monotonic() - self._saved > max(_SECONDS_BETWEEN_SAVES, 10 * self._save_took):
            start = time.monotonic()
            self.save()
            self._saved, self._save_took = time.monotonic(), time.monotonic() - start

    def _interrupt(self, client: Client) -> None:
        if self.stopped == "interrupted":
            self.log("Dropping the requests in flight.")
            for task in self.in_flight:
                task.cancel()
            sys.exit(130)
        self.stopped = "interrupted"
        client.give_up()
        self.log(f"Waiting for the {len(self.in_flight)} requests in flight; Ctrl-C again drops them.")
