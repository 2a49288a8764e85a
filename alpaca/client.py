"""Everything that talks to an OpenAI-compatible server: one request at a time, patient where waiting helps.

`Client.complete` sends one prompt, in the dialect that the server understands, and either returns its completion or
raises a `UserError` that says in one line what is wrong. Retries are counted, jittered and do what Retry-After says.
"""

import asyncio
import email.utils
import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from alpaca.cli import UserError

# Words with which servers say that they don't take a parameter (OpenAI, vLLM, FastAPI/pydantic, transformers serve).
_REFUSAL = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown (param|field|arg)|unexpected|extra (inputs|fields)"
    r"|extra_forbidden|not permitted|not allowed",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context.{0,20}length|context.{0,10}window|maximum.{0,20}(context|model) len", re.IGNORECASE)
_NO_QUOTA = {"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"}
_NEW_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_SMALLEST_MAX_TOKENS = 64
_NO_KEY = "none"  # local servers need no key, but openai's client sends one


@dataclass
class Completion:
    """One answer.

    Attributes:
        text: the model's text, "" where it gave none.
        finish_reason: "stop", "length", "content_filter" or what else the server calls it.
        usage: the server's `prompt_tokens`, `completion_tokens` and `total_tokens`, None where it doesn't count.
    """

    text: str
    finish_reason: str | None
    usage: dict[str, int] | None

    def __getitem__(self, name: str) -> Any:
        """`completion["text"]`, as the original's completions allowed."""
        return getattr(self, name)


class Malformed(Exception):
    """The answer is no completion; its text says what came instead."""


@dataclass
class Client:
    """A server and what was learnt about it.

    Attributes:
        base_url: as `https://host/v1`; from OPENAI_BASE_URL or the Azure endpoint in AZURE_OPENAI_ENDPOINT when None,
            OpenAI's when neither is set.
        api: "chat", "completions", or "auto": chat, and completions where the server has no chat for the model.
        max_retries: tries after the first one, for one request.
        timeout: seconds that one answer may take.
        log: takes the lines that tell a person what was learnt or waited for.
        max_tokens: the highest `max_tokens` that fits the model's context, once the server has refused more.
    """

    base_url: str | None = None
    api: str = "auto"
    max_retries: int = 8
    timeout: float = 600.0
    log: Callable[[str], None] = print
    max_tokens: int | None = field(default=None, init=False)
    _renamed: dict[str, str | None] = field(default_factory=dict, init=False)  # parameter -> new name, None: dropped
    _answered: bool = field(default=False, init=False)
    _first_api: str = field(default="chat", init=False)  # that "auto" tries
    _not_before: float = field(default=0.0, init=False)
    _given_up: bool = field(default=False, init=False)
    _pauses: set[asyncio.Future] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.api not in ("auto", "chat", "completions"):
            raise UserError(f"--api must be auto, chat or completions, found {self.api!r}")
        self.openai = _connect(self.base_url, self.timeout)
        self.url = str(self.openai.base_url).rstrip("/")

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    def give_up(self) -> None:
        """From now on a failure is final: requests in flight may end well, but none is sent or waited for."""
        self._given_up = True
        for pause in self._pauses:
            pause.cancel()

    async def served_models(self) -> list[str]:
        """The ids that the server lists under /models.

        Raises:
            UserError: it doesn't answer, or refuses the key.
        """
        import openai

        try:
            raw = await self.openai.models.with_raw_response.list()
            return [model["id"] for model in json.loads(raw.text)["data"]]
        except openai.APIError as error:
            if getattr(error, "status_code", None) in (404, 405, 501):
                return []
            raise self._explained(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url}/models gave no list of models; is --base_url an OpenAI-compatible server?"
            ) from error

    async def only_model(self) -> str:
        """The served model, where there is exactly one.

        Raises:
            UserError: there are none or several; the message lists them.
        """
        served = await self.served_models()
        if len(served) == 1:
            return served[0]
        found = f"serves {_shortened(served)}" if served else f"lists no model{self._hint()}"
        raise UserError(f"{self.url} {found}; say which one with --model_name")

    def _hint(self) -> str:
        return "" if self.url.endswith("/v1") else " (an OpenAI-compatible --base_url mostly ends in /v1)"

    async def complete(self, prompt: str | list[dict], model: str, **parameters: Any) -> Completion:
        """Completes one prompt.

        Args:
            prompt: a text, or chat messages.
            model: the model's name at the server.
            parameters: `max_tokens`, `temperature` and so on; those that the server refuses by name are renamed or
                left out from then on, and the request is sent again.

        Raises:
            UserError: no use in trying again, or tried often enough.
        """
        import openai

        async def attempt() -> Completion:
            while True:
                api, body = self.request(prompt, model, parameters)
                try:
                    completion = await self._send(api, body)
                    self._settle_on(api)
                    return completion
                except openai.APIStatusError as error:
                    if self.learns_from(error, body, api) or self._tries_other_api(error, api):
                        continue
                    if error.code == "content_filter":  # Azure refuses such a prompt; asking again changes nothing
                        return Completion("", "content_filter", None)
                    if error.status_code == 404:
                        raise await self._not_found(error, model) from error
                    raise

        return await self.patiently(attempt)

    async def patiently(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Awaits what `attempt` gives, and tries again where waiting may help.

        Raises:
            UserError: it didn't help.
        """
        import openai

        failures = 0
        while True:
            await self._wait_for_server()
            try:
                return await attempt()
            except openai.APIStatusError as error:
                final = None if _is_transient(error) else self._explained(error)
                trouble, wait = f"{error.status_code} {_said(error)}".strip(), _retry_after(error.response.headers)
            except openai.APIConnectionError as error:
                refused = not self._answered and "ConnectError" in type(error.__cause__).__name__
                final = self._explained(error) if refused else None
                trouble, wait = _cause(error), None
            except Malformed as error:
                final, trouble, wait = None, str(error), None
            failures += 1
            if final is None and (failures > self.max_retries or self._given_up):
                final = UserError(f"{self.url} failed {failures} times: {trouble}")
            if final is not None:
                raise final
            await self._back_off(trouble, wait, failures)

    def request(self, prompt: str | list[dict], model: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The API for a request ("chat" or "completions") and its body, in the dialect learnt so far."""
        sent = {self._renamed.get(name, name): value for name, value in parameters.items() if value is not None}
        sent.pop(None, None)
        for name in _NEW_NAMES:
            if name in sent and self.max_tokens is not None:
                sent[name] = min(sent[name], self.max_tokens)
        if self.api == "completions" or (self.api == "auto" and self._first_api == "completions"):
            text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
            return "completions", {"model": model, "prompt": text, **sent}
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "chat", {"model": model, "messages": messages, **sent}

    async def _send(self, api: str, body: dict[str, Any]) -> Completion:
        resource = self.openai.chat.completions if api == "chat" else self.openai.completions
        needed = {name: body[name] for name in ("model", "messages", "prompt") if name in body}
        # Everything else travels in extra_body: the client then sends it as it is, whatever its own version knows.
        raw = await resource.with_raw_response.create(
            **needed, extra_body={name: value for name, value in body.items() if name not in needed}
        )
        return read_completion(raw.text)

    def learns_from(self, error: Any, body: dict[str, Any], api: str) -> bool:
        """Whether a refusal teaches something that lets the request be sent again in another form.

        Args:
            error: has `status_code`, `code`, `param` and `body`, as openai's errors do.
            body: of the refused request.
            api: that it was sent to.
        """
        message = _text_of(error.body)
        if api == "chat" and self.api != "chat" and _speaks_no_chat(error, message):
            if self.api == "auto":
                self._settle_on("completions")
            return True
        if error.status_code not in (400, 422):
            return False
        limit = next((name for name in _NEW_NAMES if name in body), None)
        if limit and (error.code == "context_length_exceeded" or _TOO_LONG.search(message)):
            return self._lower_max_tokens(limit, body[limit])
        name = _refused_parameter(error, message, body)
        if name is None:
            return False
        original = next((old for old, new in self._renamed.items() if new == name), name)
        if name not in self._renamed:  # else another request in flight has learnt it already
            new = _NEW_NAMES.get(name) if original == name else None
            self._renamed[original] = new
            self.log(f"The server refuses {name}; " + (f"sending {new} instead." if new else "leaving it out."))
        return True

    def _settle_on(self, api: str) -> None:
        if self.api == "auto" and api == "completions":
            self.log("The server has no chat for this model; using /completions.")
        self._answered, self.api = True, api

    def _tries_other_api(self, error: Any, api: str) -> bool:
        """Before the first answer: `transformers serve` meets a model without a chat template with a bare 500.

        Returns:
            Whether to send the request again at once; after a 500 it waits as after any.
        """
        if self.api != "auto":
            return False
        self._first_api = "completions" if api == "chat" and error.status_code == 500 else "chat"
        return api == "completions" and error.status_code < 500

    def _lower_max_tokens(self, name: str, value: int) -> bool:
        lowered = int(value * 0.8)  # the original's step
        if lowered < _SMALLEST_MAX_TOKENS:
            return False
        if self.max_tokens is None or lowered < self.max_tokens:
            self.max_tokens = lowered
            self.log(f"The model's context is too short for {name}={value}; trying {lowered}.")
        return True

    async def _wait_for_server(self) -> None:
        while (pause := self._not_before - time.monotonic()) > 0:
            await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        pause = asyncio.ensure_future(asyncio.sleep(seconds))
        self._pauses.add(pause)
        await asyncio.wait({pause})
        self._pauses.discard(pause)
        if self._given_up:
            raise UserError(f"the request to {self.url} was given up while it waited for its next try")

    async def _back_off(self, trouble: str, wait: float | None, failures: int) -> None:
        """Waits before the next try: as long as the server asked, else exponentially with jitter."""
        if wait is not None:
            wait += random.uniform(0, min(1.0, 0.1 * wait))
            self._not_before = max(self._not_before, time.monotonic() + wait)  # one limit, shared by all requests
        else:
            wait = min(60.0, 0.5 * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        self.log(f"{_one_line(trouble)}; try {failures} of {self.max_retries} again in {wait:.1f} s.")
        await self._pause(wait)

    async def _not_found(self, error: Any, model: str) -> UserError:
        """A 404: an unknown model, where the server lists others, or what the server says."""
        try:
            served = await self.served_models()
        except UserError:
            served = []
        if served and model not in served:
            return UserError(f"{self.url} serves no model {model!r}; it serves {_shortened(served)}")
        return UserError(f"{self.url} answered 404: {_said(error)}{self._hint()}")

    def _explained(self, error: Any) -> UserError:
        """One line for a failure that ends the run."""
        status = getattr(error, "status_code", None)
        said = _said(error)
        if status is None:
            start = "start the server (transformers serve MODEL, say) or mend --base_url"
            return UserError(f"cannot reach {self.url}: {_cause(error)}; {start}")
        if status in (401, 403):
            variable = "AZURE_OPENAI_API_KEY" if "azure" in type(self.openai).__name__.lower() else "OPENAI_API_KEY"
            found = "the key was refused" if self.openai.api_key != _NO_KEY else "a key is needed and none is set"
            return UserError(f"{self.url} answered {status}: {said}; {found}: set {variable}")
        if status == 402 or (status == 429 and {error.code, error.type} & _NO_QUOTA):
            return UserError(f"{self.url} answered {status}: no quota or credit left ({said}); see to the billing")
        return UserError(f"{self.url} answered {status}: {said}")


def _connect(base_url: str | None, timeout: float) -> Any:
    """The openai client for the given or configured server.

    Raises:
        UserError: neither a key nor a server is known, or one cannot be right.
    """
    import openai

    azure = None if base_url else os.environ.get("AZURE_OPENAI_ENDPOINT")
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    variable = "AZURE_OPENAI_API_KEY" if azure and os.environ.get("AZURE_OPENAI_API_KEY") else "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not key and (azure or not base_url):
        raise UserError(
            "no API key and no server: set OPENAI_API_KEY (Azure: AZURE_OPENAI_API_KEY), or start a local server "
            "(transformers serve MODEL --port 8000) and give --base_url http://127.0.0.1:8000/v1"
        )
    if not re.fullmatch("[!-~]*", key):  # the HTTP client would print the key with its complaint
        raise UserError(f"{variable} holds a character that no key has, like a curly quote or a space; copy it anew")
    if not (azure or base_url or "https://").startswith(("http://", "https://")):
        raise UserError(f"--base_url must begin with http:// or https://, found {azure or base_url!r}")
    settings = {"api_key": key or _NO_KEY, "timeout": timeout, "max_retries": 0}
    try:
        _ = urllib.parse.urlsplit(azure or base_url or "").port  # raises where it is none; httpx does at a request
        if azure and os.environ.get("OPENAI_API_VERSION"):
            return openai.AsyncAzureOpenAI(azure_endpoint=azure, **settings)
        return openai.AsyncOpenAI(base_url=azure.rstrip("/") + "/openai/v1" if azure else base_url, **settings)
    except Exception as error:  # an unusable URL fails in httpx in several ways
        raise UserError(f"--base_url {base_url or azure!r} cannot be used: {_one_line(str(error))}") from error


def read_completion(body: str | dict) -> Completion:
    """Reads the body of a chat or text completion.

    Raises:
        Malformed: it is no completion.
    """
    try:
        answer = json.loads(body) if isinstance(body, str) else body
        choice = answer["choices"][0]
        message = choice.get("message") or choice
        text = message["content"] if "content" in message else message["text"]
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Malformed(f"the answer is no completion: {_one_line(str(body))[:120] or 'it is empty'}") from error
    usage = usage if isinstance(usage := answer.get("usage"), dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    counted = all(isinstance(count, int) for count in counts.values())
    counts = {**counts, "total_tokens": sum(counts.values())} if counted else None
    text = re.sub("[\ud800-\udfff]", "\ufffd", text or "")  # half a surrogate pair: JSON can hold it, UTF-8 can't
    return Completion(text, choice.get("finish_reason"), counts)


def _text_of(body: Any) -> str:
    return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _said(error: Any) -> str:
    """What the server said, in one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or json.dumps(body)
    return _one_line(str(body or error.message)).rstrip(".")


def _cause(error: Any) -> str:
    """Why the connection failed: the last cause in the chain says it best."""
    cause = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__
    return _one_line(
        f"{error.message.rstrip('.')} ({cause or type(cause).__name__})" if cause is not error else str(error)
    )


def _speaks_no_chat(error: Any, message: str) -> bool:
    unknown = error.status_code in (405, 501) or (error.status_code == 404 and "model" not in message.lower())
    return unknown or bool(re.search(r"not a chat model|chat.?template", message, re.IGNORECASE))


def _refused_parameter(error: Any, message: str, sent: dict[str, Any]) -> str | None:
    """The name of the sent parameter that the server says it doesn't take."""
    if not (error.code in ("unsupported_parameter", "unsupported_value") or _REFUSAL.search(message)):
        return None
    optional = [name for name in sent if name not in ("model", "messages", "prompt")]
    if error.param in optional:
        return error.param
    places = {name: found.start() for name in optional if (found := re.search(rf"\b{name}\b", message))}
    return min(places, key=places.get) if places else None


def _is_transient(error: Any) -> bool:
    if error.status_code == 429:
        return not {error.code, error.type} & _NO_QUOTA
    return error.status_code in (408, 409) or error.status_code >= 500


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait (RFC 9110: a number or a date; OpenAI and Azure also send milliseconds)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    parsed = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else None


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")


async def complete_all(
    prompts: list[str | list[dict]], model: str | None, concurrency: int, parameters: dict[str, Any]
) -> list[Completion]:
    """Completes several prompts, some at a time; the server is the one that the environment names."""
    async with Client() as client:
        slots, model = asyncio.Semaphore(concurrency), model or await client.only_model()

        async def complete(prompt: str | list[dict]) -> Completion:
            async with slots:
                return await client.complete(prompt, model, **parameters)

        return await asyncio.gather(*map(complete, prompts))
