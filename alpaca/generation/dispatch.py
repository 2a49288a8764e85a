"""Keeps requests in flight until enough tasks are kept; a failure or Ctrl-C waits for those on their way."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from alpaca.cli import UserError
from alpaca.client import Client, PromptTooLong
from alpaca.generation.run import PROMPT_TOO_LONG, Outcome, Run


async def ask_live(run: Run, client: Client, show: Callable[[int], None]) -> Outcome:
    """Sends requests until the target is met, a limit is reached or Ctrl-C is pressed.

    Args:
        run: What to ask for.
        client: The server.
        show: Called with the number of requests in flight whenever something may have changed.

    Raises:
        UserError: The server can't be used, or five rounds of answers brought nothing. Every answer that was paid for
            is in the journal.
    """
    flight = _Flight(run, client)
    with _on_ctrl_c(flight.interrupt):
        while True:
            flight.start_harvesting()
            flight.send_requests()
            show(len(flight.requests))
            if not flight.pending:
                break
            done, _ = await asyncio.wait(flight.pending, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            await flight.collect(done)
    if flight.failure and not flight.interrupted:
        raise flight.failure
    return Outcome(run.stopped, flight.interrupted)


class _Flight:
    """What is on its way: requests, and a thread that parses and de-duplicates while they are awaited."""

    def __init__(self, run: Run, client: Client) -> None:
        self.run, self.client = run, client
        self.requests: dict[asyncio.Future, int] = {}  # -> request index
        self.harvesting: asyncio.Future | None = None
        self.failure: UserError | None = None
        self.interrupted = False

    @property
    def pending(self) -> list[asyncio.Future]:
        return [*self.requests, self.harvesting] if self.harvesting else [*self.requests]

    def start_harvesting(self) -> None:
        if self.harvesting is None and self.run.can_harvest:
            self.harvesting = asyncio.ensure_future(asyncio.to_thread(self.run.harvest_answers))

    def send_requests(self) -> None:
        run, width = self.run, self._width()
        while len(self.requests) < width and run.needs_more(in_flight := set(self.requests.values())):
            index = run.next_request(in_flight)
            if index is None:
                break
            request = self.client.complete(run.prompt_of(index), run.model, **run.parameters_of(index))
            self.requests[asyncio.ensure_future(request)] = index

    def _width(self) -> int:
        """Returns how many requests may be in flight now."""
        run, full = self.run, self.run.config.request_batch_size
        if self.failure or run.stopped:
            return 0
        if self.harvesting and run.unharvested >= 2 * full:
            return 0  # harvesting lags two rounds behind, and what they bring may be enough
        if not run.answered:
            return 1  # the first request goes alone: a wrong key costs one call, refused parameters are learned once
        return full if run.harvest.answers else 0  # the first answer's tasks tell how many requests are needed

    async def collect(self, done: set[asyncio.Future]) -> None:
        """Journals the answers among what has finished, and remembers the first failure."""
        answers = {}
        for future in done:
            index = self.requests.pop(future, None)
            if future is self.harvesting:
                self.harvesting = None
            try:
                result = future.result()
            except PromptTooLong:
                answers[index] = PROMPT_TOO_LONG
            except UserError as error:
                self.failure = self.failure or error
                self.client.give_up()
            except asyncio.CancelledError:  # by a second Ctrl-C
                continue
            else:
                if index is not None:
                    answers[index] = result
        if answers:
            await asyncio.to_thread(self.run.take, answers)

    def interrupt(self) -> None:
        """On Ctrl-C sends nothing more and waits for what is in flight; the second time doesn't wait."""
        if self.interrupted:
            for request in self.requests:
                request.cancel()
            return
        self.interrupted, self.run.stopped = True, "Ctrl-C"
        self.client.give_up()
        if self.requests:
            self.client.log(f"Waiting for {len(self.requests)} requests in flight; press Ctrl-C again to drop them.")


@contextlib.contextmanager
def _on_ctrl_c(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(signal.SIGINT, handler)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread: Ctrl-C ends at once
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
