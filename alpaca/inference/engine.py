"""Asks a model that a server holds, such as vLLM or llama.cpp: the prompt is ours, the server only continues it."""

import asyncio
import dataclasses
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from alpaca.cli import UserError, say
from alpaca.client import Client, Completion
from alpaca.inference.sampling import check_example_text, check_sampling
from alpaca.prompts import format_prompt

# Without these, a server fills in its own defaults: vLLM those of the checkpoint's generation_config.json, llama.cpp
# top_k 40 and min_p 0.05. In process nothing but temperature and top_p shapes an answer, and so it is here. A server
# that doesn't know one of them refuses it by name, and the client leaves it out.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How an engine picks tokens; `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float

    @property
    def do_sample(self) -> bool:
        """False if the answers are greedy and need no seed."""
        return self.temperature > 0

    def parameters(self, seed: int | None) -> dict[str, Any]:
        """Returns the fields of a request."""
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed} if self.do_sample else {}
        return {"max_tokens": self.max_new_tokens, "temperature": 0.0, **NEUTRAL, **chosen}


class Engine:
    """A model behind an OpenAI-compatible server, with the interface of `answering.Alpaca`.

    Attributes:
        client: The server.
        model: The model's name there.
        name: The last part of that name.
    """

    def __init__(self, base_url: str, model_name: str | None = None):
        """Connects to a server.

        Args:
            base_url: The server, as `http://host:port/v1`.
            model_name: The model's name there; the server's only model when None.

        Raises:
            UserError: The URL can't be right, the server doesn't answer, or it has several models.
        """
        if not base_url.strip():
            raise UserError("--base_url is empty; give the server's address, such as http://127.0.0.1:8000/v1")
        self.client = Client(base_url, api="completions", log=say)
        # One event loop for the engine's life: connections and what refusals have taught belong to it.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.model = model_name or next(self._deliver(self._find_model))
        self.name = self.model.rstrip("/").rpartition("/")[2]
        say(f"{self.name} at {self.client.url}")

    async def _find_model(self, deliver: Callable[[Any], None]) -> None:
        deliver(await self.client.only_model())

    def answer_length(self, max_new_tokens: int) -> int:
        """Returns the wish as it is: only the server knows its context."""
        return max_new_tokens

    def settings(self, max_new_tokens: int, temperature: float, top_p: float) -> Sampling:
        """Checks the sampling parameters.

        Raises:
            UserError: A parameter is outside its range.
        """
        check_sampling(max_new_tokens, temperature, top_p)
        return Sampling(max_new_tokens, temperature, top_p)

    def describe(self, settings: Sampling) -> dict[str, Any]:
        """Lists what an answer depends on besides its prompt and the seed."""
        return {"base_url": self.client.url, "model_name": self.model, "settings": dataclasses.asdict(settings)}

    def encode(self, example: Mapping[str, str], max_new_tokens: int) -> tuple[str, None]:
        """Puts an example into the training template. Nothing is cut: a server says itself what is too long.

        Raises:
            UserError: A field is not valid text.
        """
        check_example_text(example)
        return format_prompt(example), None

    def stream(self, prompt: str, settings: Sampling, seed: int | None = None) -> Iterator[str]:
        """Yields one answer piece by piece. Closing the iterator hangs up, which stops the server.

        Raises:
            UserError: The server can't be used, or began another answer after the connection was lost.
        """
        written = ""

        async def work(deliver: Callable[[str], None]) -> None:
            def on_text(text: str) -> None:
                # After a lost connection the client asks again; a greedy or seeded answer then goes on where it was.
                nonlocal written
                if not text.startswith(written[: len(text)]):
                    raise UserError("the connection was lost and the server now answers otherwise; ask again")
                if len(text) > len(written):
                    deliver(text[len(written) :])
                    written = text

            parameters = settings.parameters(seed)
            completion = await self.client.complete(prompt, self.model, on_text=on_text, **parameters)
            on_text(completion.text)

        yield from self._deliver(work)

    def answers(
        self, prompts: Mapping[int, str], settings: Sampling, seed: int, in_flight: int
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Yields the answers to many prompts as they arrive, with `in_flight` requests on their way at any time.

        After a failure nothing more is sent, but what is on its way is still delivered before the failure is raised.

        Args:
            prompts: Row of the data -> prompt, sent in this order.
            settings: What `self.settings` returned.
            seed: Row r is sampled with seed + r, so that its answer doesn't depend on which others are on their way.
            in_flight: The most requests at once.

        Yields:
            The rows that have arrived since the last time, with their answers.

        Raises:
            UserError: The server can't be used any more.
        """

        async def work(deliver: Callable[[list], None]) -> None:
            waiting = list(prompts.items())[::-1]
            asked: dict[asyncio.Task, int] = {}
            failure = None
            try:
                while waiting or asked:
                    while waiting and len(asked) < in_flight:
                        row, prompt = waiting.pop()
                        parameters = settings.parameters(seed + row)
                        asked[asyncio.create_task(self.client.complete(prompt, self.model, **parameters))] = row
                    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                    arrived = []
                    for task in done:
                        row = asked.pop(task)
                        if error := task.exception():
                            failure = failure or error
                            waiting.clear()
                            self.client.give_up()
                        else:
                            arrived.append((row, task.result()))
                    deliver(arrived)
            finally:
                for task in asked:
                    task.cancel()
            if failure:
                raise failure

        yield from self._deliver(work)

    def _deliver(self, work: Callable[[Callable[[Any], None]], Awaitable[None]]) -> Iterator[Any]:
        """Runs `work(deliver)` on the engine's loop and yields what it delivers; closing the iterator cancels it."""
        items: queue.Queue = queue.Queue()

        async def run() -> None:
            try:
                await work(items.put)
                items.put(None)
            except BaseException as error:
                items.put(error)

        running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            running.cancel()

    def close(self) -> None:
        """Does nothing: whatever is still being asked ends with the connection."""
