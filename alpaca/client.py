"""The client of OpenAI-compatible servers: it retries if waiting may help, and adapts to what the server accepts.

`Client.complete` sends one prompt and either returns its completion or raises a `UserError` that says in one line what
is wrong. Retries are counted, back off with jitter and obey Retry-After. An outage is waited for by the clock instead:
one probe asks whether the server is back, and all requests wait for it.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from alpaca.cli import UserError, printable
from alpaca.files import parse_json

# How servers say that they don't accept a parameter (OpenAI, vLLM, FastAPI/pydantic, transformers serve).
_REFUSAL = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown (param|field|arg)|unexpected|extra (inputs|fields)"
    r"|extra_forbidden|not permitted|not allowed",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context.{0,20}(length|size|limit)|context.{0,10}window|max(imum)?.{0,20}(context|model).len|prompt is too long"
    r"|max_(completion_)?tokens. is too large|max_(completion_)?tokens is too large",
    re.IGNORECASE,
)
# Where such a refusal says how many tokens the model's context has, and how many the prompt takes.
_CONTEXT = re.compile(
    "|".join(
        (
            r"maximum (?:context|model) length (?:is|of) (\d{1,9})",  # OpenAI, vLLM: "maximum context length is 2048"
            r"max_model_len\s?=\s?(\d{1,9})",  # vLLM 0.32: "cannot be greater than max_model_len=2048"
            r"context size \((\d{1,9}) tokens",  # llama.cpp: "exceeds the available context size (2048 tokens)"
            r"at most (\d{1,9}) completion tokens",  # OpenAI, of the answer alone
            r"(?:tokens|context limit:[ \d+]*) > (\d{1,9})",  # Anthropic through litellm: "3100 tokens > 2048 maximum"
        )
    ),
    re.IGNORECASE,
)
_PROMPT = re.compile(
    "|".join(
        (
            r"\((\d{1,9}) (?:in the (?:messages|prompt)|of text input)",  # OpenAI: "(528 in the messages, 3072 in ..."
            r"(?:prompt contains|request has|resulted in) (?:at least )?(\d{1,9}) (?:input )?tokens",  # OpenAI and vLLM
            r"request \((\d{1,9}) tokens\)",  # llama.cpp
            r"prompt \(length (\d{1,9})\)",  # older vLLM
            r"(?:prompt is too long|context limit): (\d{1,9})",  # Anthropic
        )
    ),
    re.IGNORECASE,
)
_NO_QUOTA = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")
_NEW_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_SMALLEST_MAX_TOKENS = 64
_DOWN = (502, 503)  # what a proxy without its server, and a server that still loads its model, answer to everything
_PROBE_SECONDS = 10.0  # what one question whether the server is back may take
_LONGEST_PAUSE = 30.0  # between two of them
_MOST_TOKENS = 10**9  # a server that counts more than this in one answer doesn't count
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|.)?", re.DOTALL)
_KEYS = ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY")
_NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_NO_KEY = "none"  # local servers need no key, but openai's client insists on one


@dataclass
class Completion:
    """One answer.

    Attributes:
        text: The model's text, "" if it gave none.
        finish_reason: "stop", "length", "content_filter" or another name of the server's.
        usage: `prompt_tokens`, `completion_tokens` and `total_tokens`, None if the server doesn't count them.
    """

    text: str
    finish_reason: str | None
    usage: dict[str, int] | None

    def __getitem__(self, name: str) -> Any:
        """Allows `completion["text"]`, as the original's completions did."""
        return getattr(self, name)


@dataclass(frozen=True)
class Lesson:
    """What a refusal teaches about a server; one of these is set.

    Attributes:
        api: The API to use.
        prompt_too_long: This prompt leaves no room for an answer in the model's context.
        max_tokens: The most tokens to ask for.
        refused: A parameter to send under its other name, or to leave out.
    """

    api: str | None = None
    prompt_too_long: bool = False
    max_tokens: int | None = None
    refused: str | None = None


class Malformed(Exception):
    """The server's answer is not a completion; the text says what came instead."""


class PromptTooLong(UserError):
    """The prompt leaves no room for an answer in the model's context. Another prompt may fit."""


def clean(text: str) -> str:
    r"""Makes text safe for messages, whoever wrote it: one line, no escape sequences, no keys, no passwords in URLs.

    Example:
        "no such user at http://ada:secret@host/v1\x1b[2J" -> "no such user at http://***@host/v1"
    """
    text = re.sub(r"//[^/\s]*@", "//***@", " ".join(_ESCAPE.sub("", text).split()))
    for key in {os.environ.get(name, "").strip() for name in _KEYS}:
        if len(key) >= 8:  # a shorter one is no secret, like the "none" of local servers
            text = text.replace(key, "***")
    return printable(text)


def _error(text: str) -> UserError:
    return UserError(clean(text))


@dataclass
class Client:
    """A server, and what its refusals have taught about it.

    Attributes:
        base_url: The server, as `https://host/v1`. If None, the one that AZURE_OPENAI_ENDPOINT or OPENAI_BASE_URL
            names, and OpenAI if neither is set.
        api: "chat", "completions", or "auto": chat, or completions if the server has no chat for the model.
        max_retries: How often one request is tried again.
        timeout: Seconds that one answer may take, from the request to its last byte.
        log: Called with each line for a person: what was learned, what is waited for.
        max_outage: Seconds that the server may be down before all requests fail. No Retry-After is obeyed for longer.
        max_tokens: The most tokens to ask for, once the server has refused more as too many for the model's context.
    """

    base_url: str | None = None
    api: str = "auto"
    max_retries: int = 8
    timeout: float = 600.0
    log: Callable[[str], None] = print
    max_outage: float = 600.0
    max_tokens: int | None = field(default=None, init=False)
    # Parameter -> the name to send it under, None to leave it out: {"max_tokens": "max_completion_tokens"}
    _renamed: dict[str, str | None] = field(default_factory=dict, init=False)
    _answered: bool = field(default=False, init=False)
    _first_api: str = field(default="chat", init=False)  # what "auto" tries
    _no_chat: bool = field(default=False, init=False)
    _not_before: float = field(default=0.0, init=False)  # by time.monotonic(): no request is sent earlier
    _outage: asyncio.Future | None = field(default=None, init=False)  # the probe, which everybody waits for
    _given_up: bool = field(default=False, init=False)
    _pauses: set[asyncio.Future] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        log = self.log
        self.log = lambda line: log(clean(line))
        if self.api not in ("auto", "chat", "completions"):
            raise _error(f"--api must be auto, chat or completions, found {self.api!r}")
        self.openai = _connect(self.base_url, self.timeout)
        self.url = str(self.openai.base_url).rstrip("/")

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    def give_up(self) -> None:
        """Ends all retries: requests in flight may still succeed, but a failure is final from now on."""
        self._given_up = True
        for pause in self._pauses:
            pause.cancel()

    async def served_models(self) -> list[str]:
        """Returns the ids that the server lists under /models, none if it has no such list.

        Raises:
            UserError: The server doesn't answer, or refuses the key.
        """
        import openai

        while True:
            await self._wait_for_server()
            try:
                raw = await self._within(self.timeout, self.openai.models.with_raw_response.list())
                models = [model["id"] for model in parse_json(raw.text, f"{self.url}/models")["data"]]
                if all(isinstance(name, str) for name in models):
                    return models
                raise TypeError
            except openai.APIError as error:
                status = getattr(error, "status_code", None)
                if status in (404, 405, 501):
                    return []
                if status in _DOWN:  # a server that still loads its model
                    await self._sit_out(f"{status} {_said(error)}")
                    continue
                explained = self._explained(error)
                if status is not None and status >= 500:
                    explained = _error(f"{explained}, at /models; say which model it serves with --model_name")
                raise explained from error
            except (UserError, KeyError, TypeError) as error:
                raise _error(
                    f"{self.url}/models gave no list of models; is --base_url an OpenAI-compatible server?"
                ) from error

    async def only_model(self) -> str:
        """Returns the id of the server's only model.

        Raises:
            UserError: It has none, or several; the message lists them.
        """
        served = await self.served_models()
        if len(served) == 1:
            return served[0]
        found = f"serves {_shortened(served)}" if served else f"lists no models{self._hint()}"
        raise _error(f"{self.url} {found}; say which one with --model_name")

    def _hint(self) -> str:
        return "" if self.url.endswith("/v1") else " (the --base_url of such a server usually ends in /v1)"

    async def complete(
        self,
        prompt: str | list[dict],
        model: str,
        on_text: Callable[[str], None] | None = None,
        **parameters: Any,
    ) -> Completion:
        """Completes one prompt.

        Args:
            prompt: A text, or chat messages.
            model: The model's name at the server.
            on_text: Called with the text so far whenever it has grown. After a lost connection it starts again.
            parameters: `max_tokens`, `temperature` and so on. Those that the server refuses by name are renamed or
                left out from then on, and the request is sent again.

        Raises:
            UserError: Trying again is useless, or was useless `max_retries` times.
        """
        return await self.patiently(lambda: self._attempt(prompt, model, parameters, on_text))

    async def _attempt(
        self,
        prompt: str | list[dict],
        model: str,
        parameters: dict[str, Any],
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Sends a prompt, and sends it again in another form for as long as refusals teach one."""
        import openai

        while True:
            api, body = self.request(prompt, model, parameters)
            try:
                completion = await self._send(api, body, on_text)
                self._settle_on(api)
                return completion
            except openai.APIStatusError as error:
                if lesson := self.lesson(error, body, api):
                    if lesson.prompt_too_long:
                        text = f"the prompt is too long for the model's context: {_said(error)}"
                        raise PromptTooLong(clean(text)) from error
                    self.learn(lesson)
                    continue
                if self._tries_other_api(error, api):
                    continue
                if error.code == "content_filter":  # Azure refuses such a prompt; asking again changes nothing
                    return Completion("", "content_filter", None)
                if error.status_code == 404:
                    raise await self._not_found(error, model) from error
                raise

    async def patiently(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Awaits `attempt()`, and tries again after failures that may pass: 408, 409, 429, 5xx, a lost connection.

        Time spent while the server was down doesn't count as a try.

        Raises:
            UserError: The failure won't pass, didn't within `max_retries` tries, or the outage takes too long.
        """
        import openai

        failures = 0
        while True:
            await self._wait_for_server()
            final, wait, lost = None, None, False
            try:
                return await self._within(self.timeout, attempt())
            except openai.APIStatusError as error:
                final = None if _is_transient(error) else self._explained(error)
                trouble, wait = f"{error.status_code} {_said(error)}".strip(), _retry_after(error.response.headers)
                lost = error.status_code in _DOWN and wait is None
            except openai.APIConnectionError as error:
                refused = not self._answered and "ConnectError" in type(error.__cause__).__name__
                final, trouble, lost = self._explained(error) if refused else None, _cause(error), True
            except Malformed as error:
                trouble = str(error)
            if final is None and lost and not self._given_up and await self._sit_out(trouble):
                continue
            failures += 1
            if final is None and (failures > self.max_retries or self._given_up):
                final = _error(f"{self.url} failed {failures} times: {trouble}")
            if final is not None:
                raise final
            await self._back_off(trouble, wait, failures)

    async def _within(self, seconds: float, answer: Awaitable[Any]) -> Any:
        """Awaits an answer for so long in all. (httpx's limits are for each read: a server may drip bytes for ever.)"""
        import openai

        try:
            return await asyncio.wait_for(answer, seconds)
        except asyncio.TimeoutError as error:
            request = SimpleNamespace(url=self.url)
            raise openai.APITimeoutError(request=request) from error

    async def _sit_out(self, trouble: str) -> bool:
        """Asks whether the server is down and, if so, waits with all other requests until it is back.

        Returns:
            True if it was down; False if it isn't, so that only the caller's request was lost.

        Raises:
            UserError: It was down for `max_outage` seconds, or the client gave up.
        """
        if self._outage is None:
            self._outage = asyncio.ensure_future(self._probe(trouble))
        outage = self._outage
        await asyncio.wait({outage})
        return outage.result()

    async def _probe(self, trouble: str) -> bool:
        began, probes = time.monotonic(), 0
        try:
            while not await self._is_up():
                if probes == 0:
                    self.log(
                        f"{self.url} is down ({_one_line(trouble)}); waiting up to {self.max_outage:.0f} s for it."
                    )
                left = began + self.max_outage - time.monotonic()
                if left <= 0:
                    down = f"has been down for {self.max_outage:.0f} s ({trouble})"
                    raise _error(f"{self.url} {down}; start it again, then run the same command")
                await self._pause(min(left, _LONGEST_PAUSE, 0.5 * 2 ** min(probes, 10)))
                probes += 1
            if probes:
                self.log(f"{self.url} is back after {time.monotonic() - began:.0f} s.")
            return probes > 0
        finally:
            self._outage = None

    async def _is_up(self) -> bool:
        import openai

        try:
            await self._within(min(_PROBE_SECONDS, self.timeout), self.openai.models.with_raw_response.list())
        except openai.APIStatusError as error:
            return error.status_code not in _DOWN
        except openai.APIConnectionError:
            return False
        return True

    def request(self, prompt: str | list[dict], model: str, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Returns the API for a request ("chat" or "completions") and its body, in the form learned so far."""
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

    async def _send(self, api: str, body: dict[str, Any], on_text: Callable[[str], None] | None = None) -> Completion:
        resource = self.openai.chat.completions if api == "chat" else self.openai.completions
        needed = {name: body[name] for name in ("model", "messages", "prompt") if name in body}
        # extra_body is sent as it is, so a parameter works even if this version of openai doesn't know it.
        extra = {name: value for name, value in body.items() if name not in needed}
        if on_text:
            return await _read_stream(resource, {**needed, "extra_body": {**extra, "stream": True}}, on_text)
        raw = await resource.with_raw_response.create(**needed, extra_body=extra)
        return read_completion(raw.text)

    def lesson(self, error: Any, body: dict[str, Any], api: str) -> Lesson | None:
        """Returns how to send a refused request in another form, None if there is no such form. Changes nothing.

        Example:
            404 from /chat/completions -> Lesson(api="completions")
            400 "maximum context length is 2048 tokens ... (528 in the messages" -> Lesson(max_tokens=1520)
            400 "max_tokens=3072 cannot be greater than max_model_len=2048" -> Lesson(max_tokens=2048)
            400 "request (3100 tokens) exceeds the available context size (2048" -> Lesson(prompt_too_long=True)
            400 "Unsupported parameter: 'top_p'" -> Lesson(refused="top_p")

        Args:
            error: The refusal; it has `status_code`, `code`, `param` and `body`, as openai's errors do.
            body: The refused request.
            api: The API that it was sent to.
        """
        message = _text_of(error.body)
        if api == "chat" and self.api != "chat" and _speaks_no_chat(error, message):
            return Lesson(api="completions")
        if error.status_code not in (400, 422):
            return None
        limit = next((name for name in _NEW_NAMES if name in body), None)
        if limit and (error.code == "context_length_exceeded" or _TOO_LONG.search(message)):
            return _room_for_an_answer(message, body[limit])
        name = _refused_parameter(error, message, body)
        return Lesson(refused=name) if name else None

    def learn(self, lesson: Lesson) -> None:
        """Changes how requests are sent from now on and says so in one line, unless that is known already.

        Of another API it is said when that has given an answer: a server may have neither.
        """
        if lesson.api:
            self._first_api, self._no_chat = lesson.api, True  # settled, and said, once it has given an answer
        if lesson.max_tokens and (self.max_tokens is None or lesson.max_tokens < self.max_tokens):
            self.max_tokens = lesson.max_tokens
            self.log(f"The model's context is too short for that many tokens; trying max_tokens={self.max_tokens}.")
        if (name := lesson.refused) and name not in self._renamed:
            original = next((old for old, new in self._renamed.items() if new == name), name)
            new = _NEW_NAMES.get(name) if original == name else None  # a new name that is refused too has no other
            self._renamed[original] = new
            self.log(f"The server refuses {name}; " + (f"sending {new} instead." if new else "leaving it out."))

    def _settle_on(self, api: str) -> None:
        if self.api == "auto" and api == "completions":
            self.log("The server has no chat for this model; using /completions.")
        self._answered, self.api = True, api

    def _tries_other_api(self, error: Any, api: str) -> bool:
        """Changes what "auto" tries, before the first answer has settled it.

        `transformers serve` answers a chat request to a model without a chat template with a bare 500. After a 500
        from chat, completions is tried next, after the usual pause; any failure there brings back chat.

        Returns:
            True if the request should be sent again at once.
        """
        if self.api != "auto" or self._no_chat:
            return False
        self._first_api = "completions" if api == "chat" and error.status_code == 500 else "chat"
        return api == "completions" and error.status_code < 500

    async def _wait_for_server(self) -> None:
        while (pause := self._not_before - time.monotonic()) > 0 or self._outage:
            if self._outage:
                await self._sit_out("")
            else:
                await self._pause(pause)

    async def _pause(self, seconds: float) -> None:
        pause = asyncio.ensure_future(asyncio.sleep(seconds))
        self._pauses.add(pause)
        await asyncio.wait({pause})
        self._pauses.discard(pause)
        if self._given_up:
            raise _error(f"the request to {self.url} was given up while it waited to be tried again")

    async def _back_off(self, trouble: str, wait: float | None, failures: int) -> None:
        """Waits before the next try: as long as the server asks, else 0.5 s, 1 s, 2 s up to 60 s, less up to half."""
        usual = min(60.0, 0.5 * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        asked = ""
        if wait is not None:
            if wait > self.max_outage:
                asked = f" (the server asks to wait {wait:.0f} s)"
                wait = max(usual, self.max_outage)
            wait += random.uniform(0, min(1.0, 0.1 * wait))
            self._not_before = max(self._not_before, time.monotonic() + wait)  # holds back all requests
        else:
            wait = usual
        self.log(f"{_one_line(trouble)}; retry {failures} of {self.max_retries} in {wait:.1f} s{asked}.")
        await self._pause(wait)

    async def _not_found(self, error: Any, model: str) -> UserError:
        """Explains a 404: an unknown model if the server lists others, else in the server's words."""
        try:
            served = await self.served_models()
        except UserError:
            served = []
        if served and model not in served:
            return _error(f"{self.url} serves no model {model!r}; it serves {_shortened(served)}")
        return _error(f"{self.url} answered 404: {_said(error)}{self._hint()}")

    def _explained(self, error: Any) -> UserError:
        """Explains in one line a failure that waiting won't cure."""
        status = getattr(error, "status_code", None)
        said = _said(error)
        if status is None:
            cause = _cause(error)
            return _error(f"cannot reach {self.url}: {cause}; {_way_out(self.url, cause)}")
        if status in (401, 403):
            variable = "AZURE_OPENAI_API_KEY" if "azure" in type(self.openai).__name__.lower() else "OPENAI_API_KEY"
            found = "the key was refused" if self.openai.api_key != _NO_KEY else "a key is needed and none is set"
            return _error(f"{self.url} answered {status}: {said}; {found}: set {variable}")
        if status == 402 or (status == 429 and not _is_transient(error)):
            return _error(
                f"{self.url} answered {status}: no quota or credit left ({said}); check the account's billing"
            )
        return _error(f"{self.url} answered {status}: {said}")


def _connect(base_url: str | None, timeout: float) -> Any:
    """Returns openai's client for the given server, or for the one that the environment names.

    Raises:
        UserError: Neither a key nor a server is given, or one can't be right.
    """
    import openai

    named = {"--base_url": base_url}
    named |= {name: os.environ.get(name) for name in ("AZURE_OPENAI_ENDPOINT", "OPENAI_BASE_URL")}
    empty = next((name for name, value in named.items() if value is not None and not value.strip()), None)
    if empty and (empty == "--base_url" or not base_url):
        # An unset variable in somebody's script must not send prompts and key to OpenAI.
        raise _error(f"{empty} is empty; give the server's URL, or leave it out to use OpenAI")
    azure = None if base_url else os.environ.get("AZURE_OPENAI_ENDPOINT")
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    variable = "AZURE_OPENAI_API_KEY" if azure and os.environ.get("AZURE_OPENAI_API_KEY") else "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not key and (azure or not base_url):
        raise UserError(
            "no API key and no server: set OPENAI_API_KEY (Azure: AZURE_OPENAI_API_KEY), or start a local server "
            "(transformers serve MODEL --port 8000) and give --base_url http://127.0.0.1:8000/v1"
        )
    if not re.fullmatch("[!-~]*", key):  # httpx would print the key in its error
        raise _error(f"{variable} holds a character that no key has, like a curly quote or a space; copy it again")
    if not (azure or base_url or "https://").startswith(("http://", "https://")):
        raise _error(f"--base_url must begin with http:// or https://, found {azure or base_url!r}")
    url = azure or base_url or ""
    try:
        _ = urllib.parse.urlsplit(url).port  # raises if it is no port, before a request does
    except ValueError as error:
        raise _error(f"--base_url {url!r} cannot be used: {error}") from error
    settings = {"api_key": key or _NO_KEY, "timeout": timeout, "max_retries": 0}
    try:
        if azure and os.environ.get("OPENAI_API_VERSION"):
            return openai.AsyncAzureOpenAI(azure_endpoint=azure, **settings)
        return openai.AsyncOpenAI(base_url=azure.rstrip("/") + "/openai/v1" if azure else base_url, **settings)
    except Exception as error:  # httpx has several, for an unusable URL, proxy or certificate
        name = _bad_setting(lambda: openai.AsyncOpenAI(base_url=url or None, **settings))
        culprit = f"{name}={os.environ[name]}, set in the environment," if name else f"--base_url {url!r}"
        raise _error(f"{culprit} cannot be used: {_one_line(str(error))}") from error


def _bad_setting(connect: Callable[[], Any]) -> str | None:
    """Returns the variable of the environment without which `connect` works, None if there is none."""
    for name in filter(os.environ.__contains__, [*_NETWORK, *map(str.lower, _NETWORK)]):
        value = os.environ.pop(name)
        try:
            connect()
            return name
        except Exception:
            continue
        finally:
            os.environ[name] = value
    return None


def _way_out(url: str, cause: str) -> str:
    """Says what to correct if a server can't be reached: a proxy, certificates, or else the server or --base_url."""
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    proxy = None if urllib.request.proxy_bypass(parts.hostname or "") else proxies.get(parts.scheme, proxies.get("all"))
    if proxy:
        return f"the environment sends it through the proxy {proxy}: correct {parts.scheme.upper()}_PROXY or NO_PROXY"
    certificates = [f"{name}={os.environ[name]}" for name in _NETWORK if "SSL" in name and name in os.environ]
    if "certificate" in cause.lower() and certificates:
        return f"the environment has {' and '.join(certificates)}: correct that, or --base_url"
    return "start the server (for example transformers serve MODEL) or correct --base_url"


def read_completion(body: str | dict) -> Completion:
    """Reads the body of a chat or text completion.

    Raises:
        Malformed: The body is not a completion.
    """
    try:
        answer = parse_json(body, "the answer") if isinstance(body, str) else body
        choice = answer["choices"][0]
        message = choice.get("message") or choice
        text = message["content"] if "content" in message else message["text"]
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (UserError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Malformed(f"the answer is not a completion: {_one_line(str(body))[:120] or 'it is empty'}") from error
    usage = usage if isinstance(usage := answer.get("usage"), dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    counted = all(type(count) is int and 0 <= count < _MOST_TOKENS for count in counts.values())
    counts = {**counts, "total_tokens": sum(counts.values())} if counted else None
    text = re.sub("[\ud800-\udfff]", "\ufffd", text or "")  # lone surrogates: JSON can hold them, UTF-8 can't
    reason = choice.get("finish_reason")
    return Completion(text, reason if isinstance(reason, str) else None, counts)


async def _read_stream(resource: Any, request: dict[str, Any], on_text: Callable[[str], None]) -> Completion:
    """Sends a request whose answer comes as server-sent events, and calls `on_text` with the text so far.

    Raises:
        Malformed: An event is not a part of a completion, or the answer broke off.
    """
    import httpx
    import openai

    text, reason = "", None
    async with resource.with_streaming_response.create(**request) as raw:
        try:
            if "event-stream" not in raw.headers.get("content-type", ""):
                return read_completion(await raw.text())  # a server that doesn't stream
            async for line in raw.iter_lines():
                kind, _, data = line.partition(":")
                if kind != "data" or data.strip() == "[DONE]":
                    continue
                part = _read_part(data)
                text, reason = text + part.text, part.finish_reason or reason
                on_text(text)
        except httpx.HTTPError as error:
            raise openai.APIConnectionError(request=raw.http_request) from error
    if reason is None:
        raise Malformed("the answer broke off")
    return Completion(text, reason, None)


def _read_part(data: str) -> Completion:
    try:
        choices = json.loads(data)["choices"]
        if not choices:  # the last event may hold nothing but the usage
            return Completion("", None, None)
        message = choices[0].get("delta") or {"text": choices[0].get("text")}
        return read_completion({"choices": [{**choices[0], "message": {"text": None, **message}}]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"a part of the answer is not a completion: {_one_line(data)[:120]}") from error


def _text_of(body: Any) -> str:
    try:
        return body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    except (RecursionError, ValueError):  # nested deeply, or an integer of 5,000 digits
        return "an error that can't be read"


def _one_line(text: str) -> str:
    text = clean(text)
    return text if len(text) <= 300 else text[:297] + "..."


def _said(error: Any) -> str:
    """Returns the server's words in one line."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return _one_line(_text_of(body or error.message)).rstrip(".")


def _cause(error: Any) -> str:
    """Says why a connection failed; the last cause in the chain is the most telling."""
    cause, further = error, error
    while further is not None and not isinstance(further, asyncio.CancelledError):  # how a time limit is kept
        cause, further = further, further.__cause__ or further.__context__
    return _one_line(
        f"{error.message.rstrip('.')} ({str(cause) or type(cause).__name__})" if cause is not error else str(error)
    )


def _room_for_an_answer(message: str, asked: int) -> Lesson:
    """Reads from a refusal how many tokens an answer may have; where it doesn't say, tries fewer.

    Args:
        message: The refusal of too many tokens for the model's context.
        asked: The tokens that were asked for.
    """
    context, prompt = (
        next((int(number) for number in found.groups() if number), None) if (found := pattern.search(message)) else None
        for pattern in (_CONTEXT, _PROMPT)
    )
    room = int(asked * 0.8)  # the original's step
    if context is not None and (prompt is not None or context < asked):
        room = context - (prompt or 0)
    if room >= asked or (room > 0 and "at least" in message):  # vLLM counts the prompt only as far as it would fit
        room = min(room, int(asked * 0.8))
    return Lesson(max_tokens=room) if room >= _SMALLEST_MAX_TOKENS else Lesson(prompt_too_long=True)


def _speaks_no_chat(error: Any, message: str) -> bool:
    unknown = error.status_code in (405, 501) or (error.status_code == 404 and "model" not in message.lower())
    return unknown or bool(re.search(r"not a chat model|chat.?template", message, re.IGNORECASE))


def _refused_parameter(error: Any, message: str, sent: dict[str, Any]) -> str | None:
    """Returns the name of the sent parameter that the server says it doesn't accept, None if it says no such thing."""
    if not (error.code in ("unsupported_parameter", "unsupported_value") or _REFUSAL.search(message)):
        return None
    optional = [name for name in sent if name not in ("model", "messages", "prompt")]
    if error.param in optional:
        return error.param
    places = {name: found.start() for name in optional if (found := re.search(rf"\b{name}\b", message))}
    return min(places, key=places.get) if places else None


def _is_transient(error: Any) -> bool:
    if error.status_code == 429:
        return error.code not in _NO_QUOTA and error.type not in _NO_QUOTA
    return error.status_code in (408, 409) or error.status_code >= 500


def _retry_after(headers: Any) -> float | None:
    """Returns the seconds that the server asks to wait, None if it doesn't.

    Retry-After is a number of seconds or a date (RFC 9110, 10.2.3); OpenAI and Azure also send milliseconds.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    parsed = email.utils.parsedate_tz(headers.get("retry-after", ""))
    try:
        return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else None
    except (ValueError, OverflowError):  # a date beyond the calendar, like the year 99999
        return math.inf


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")


async def complete_all(
    prompts: list[str | list[dict]], model: str | None, concurrency: int, parameters: dict[str, Any]
) -> list[Completion]:
    """Completes prompts with `concurrency` requests in flight, at the server that the environment names."""
    async with Client() as client:
        slots, model = asyncio.Semaphore(concurrency), model or await client.only_model()

        async def complete(prompt: str | list[dict]) -> Completion:
            async with slots:
                return await client.complete(prompt, model, **parameters)

        return await asyncio.gather(*map(complete, prompts))
