"""Keeps requests in flight until enough tasks are kept: order, limits, failures and Ctrl-C."""

import asyncio
import contextlib
import hashlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError
from alpaca.client import Client, Completion
from alpaca.generation.harvest import Harvest
from alpaca.generation.requests import RequestJournal
from alpaca.generation.spending import Spending

DRY_ROUNDS = 5  # rounds without a kept task after which a run stops
_SECONDS_BETWEEN_SAVES = 30.0


@dataclass
class Run:
    """One sitting: what is asked for, what came, and why it ended.

    Attributes:
        prompts: request index -> prompt.
        harvest: takes the answers in request order.
        journal: where answers are recorded before anything else happens to them.
        spending: what they cost, and the limits.
        model: the model's name at the server.
        parameters: of each request.
        settings: what each record of the journal says about how it was made.
        request_batch_size: requests in flight together.
        max_requests: no request has this index or a higher one.
        save: writes the output files.
        show: is called with this object whenever something changed.
        log: prints a line for a person.
        requested: answers that came in this sitting.
        in_flight: requests on their way.
        stopped: why the run ended before the target was met, None where it didn't.
    """

    prompts: Any
    harvest: Harvest
    journal: RequestJournal
    spending: Spending
    model: str
    parameters: dict[str, Any]
    settings: dict[str, Any]
    request_batch_size: int
    max_requests: int | None
    save: Callable[[], None]
    show: Callable[["Run"], None]
    log: Callable[[str], None]
    requested: int = 0
    in_flight: int = 0
    stopped: str | None = None
    interrupted: bool = False
    _saved: float = field(default_factory=time.monotonic)
    _save_took: float = 0.0

    def __post_init__(self) -> None:
        for index, record in self.journal.records.items():
            self.spending.add(record, self.prompts[index])
        self.catch_up()

    def wants(self, taken: set[int]) -> bool:
        """Whether another answer is wanted beside those in the journal and those on their way.

        It is where they will probably not fill the room that is left, and where they are of no use yet because the one
        that comes before them is missing, as after a crash.
        """
        expected = self.harvest.kept_per_answer * (self.unharvested + len(taken))
        missing = self.harvest.answers not in self.journal.records and self.harvest.answers not in taken
        return self.harvest.room > 0 and (missing or expected < self.harvest.room)

    @property
    def unharvested(self) -> int:
        """Answers that are in the journal and not yet in the harvest."""
        return len(self.journal.records) - self.harvest.answers

    def next_request(self, taken: set[int], first: int = 0) -> int | None:
        """The next request index to ask for, or None with `stopped` set where a limit forbids it.

        Args:
            taken: indices asked for already, whose answers haven't come.
            first: the lowest index that may be free.
        """
        index = max(first, self.harvest.answers)
        while index in self.journal.records or index in taken:
            index += 1
        if self.max_requests is not None and index >= self.max_requests:
            self.stopped = f"--max_requests {self.max_requests} is reached"
        elif limit := self.spending.forbids(self.prompts[index], len(taken)):
            # What is on its way may take less than it could: only with nothing in flight is that final.
            self.stopped = None if taken else f"the next request could pass {limit}"
        else:
            return index
        return None

    @property
    def can_catch_up(self) -> bool:
        """Whether the journal holds the next answer for the harvest."""
        return self.harvest.room > 0 and self.harvest.answers in self.journal.records

    def take(self, answers: dict[int, Completion]) -> None:
        """Journals answers; when this returns they are on the disk."""
        records = []
        for index, completion in answers.items():
            prompt, usage, text = self.prompts[index], completion.usage, completion.text
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
            self.spending.add(record, self.prompts[record["request_index"]])
        self.requested += len(records)

    def catch_up(self) -> None:
        """Adds the journal's answers to the harvest, as far as they follow on one another."""
        while self.can_catch_up:
            self.harvest.add(self.journal.records[self.harvest.answers])

    def commit(self) -> None:
        """Harvests, and saves from time to time.

        Raises:
            UserError: five rounds brought no task to keep.
        """
        self.catch_up()
        # The files are made from the journal: saving now and then is a convenience, for a tenth of the time at most.
        if time.monotonic() - self._saved > max(_SECONDS_BETWEEN_SAVES, 10 * self._save_took):
            start = time.monotonic()
            self.save()
            self._saved, self._save_took = time.monotonic(), time.monotonic() - start
        if self.harvest.room > 0 and self.harvest.dry >= DRY_ROUNDS * self.request_batch_size:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.harvest.reasons.most_common())
            raise UserError(
                f"no task to keep in the last {self.harvest.dry} answers, {DRY_ROUNDS} rounds (rejected in all: "
                f"{reasons}); look at rejected.jsonl, then try another model, prompt or rule"
            )

    def expected_requests(self, kept_per_answer: float) -> int:
        """How many more requests will probably fill the room, at a yield that is assumed where none is known."""
        requests = math.ceil(self.harvest.room / (self.harvest.kept_per_answer or kept_per_answer))
        return max(1, requests - self.unharvested)


async def ask_live(run: Run, client: Client) -> None:
    """Asks until the target is met, a limit is reached or Ctrl-C is pressed; what is in flight is always waited for.

    Raises:
        UserError: the server can't be used, or five rounds brought nothing. All answers are in the journal.
    """
    tasks: dict[asyncio.Task, int] = {}
    harvesting: asyncio.Future | None = None  # parsing and de-duplication run beside the waiting, in a thread
    failure: UserError | None = None

    def send_more() -> None:
        # The first request goes alone: a wrong key or model costs one call, refused parameters are learnt once, and
        # its tasks tell how much an answer brings.
        width = 1 if not run.requested else run.request_batch_size if run.harvest.answers else 0
        if harvesting is not None and run.unharvested >= 2 * run.request_batch_size:
            width = 0  # what those bring may change what is wanted
        while len(tasks) < width and not failure and not run.stopped and run.wants(taken := set(tasks.values())):
            index = run.next_request(taken)
            if index is None:
                break
            tasks[asyncio.ensure_future(client.complete(run.prompts[index], run.model, **run.parameters))] = index
        run.in_flight = len(tasks)

    with _ctrl_c(run, client, tasks):
        while True:
            if harvesting is None and run.can_catch_up:
                harvesting = asyncio.ensure_future(asyncio.to_thread(run.commit))
            send_more()
            run.show(run)
            waited_for = [*tasks, harvesting] if harvesting else [*tasks]
            if not waited_for:
                break
            done, _ = await asyncio.wait(waited_for, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            answers = {}
            for task in done:
                index = tasks.pop(task, None)
                harvesting = None if task is harvesting else harvesting
                try:
                    result = task.result()
                except UserError as error:
                    failure = failure or error
                    client.give_up()
                except asyncio.CancelledError:  # by a second Ctrl-C
                    continue
                else:
                    if index is not None:
                        answers[index] = result
            if answers:
                await asyncio.to_thread(run.take, answers)
    if failure and not run.interrupted:
        raise failure


@contextlib.contextmanager
def _ctrl_c(run: Run, client: Client, tasks: dict[asyncio.Task, int]) -> Any:
    """Ctrl-C ends the asking and waits for what is in flight; a second one doesn't wait."""

    def interrupt() -> None:
        if run.interrupted:
            for task in tasks:
                task.cancel()
            return
        run.interrupted, run.stopped = True, "Ctrl-C"
        client.give_up()
        if tasks:
            run.log(f"Waiting for the {len(tasks)} requests in flight; Ctrl-C again drops them.")

    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread: Ctrl-C ends at once
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
