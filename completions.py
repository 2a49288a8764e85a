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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from utils import UserError

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


@dataclass
class Completion:
    """One answer.

    Attributes:
        text: the model's text, "" where it gave none.
        finish_reason: "stop", "length", "content_filter" or what else the server calls it.
        usage: the server's `prompt_tokens` and `completion_tokens`, None where it doesn't count.
    """

    text: str
    finish_reason: str | None
    usage: dict[str, int] | None


class _Malformed(Exception):
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
    _not_before: float = field(default=0.0, init=False)
    _given_up: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.api not in ("auto", "chat", "completions"):
            raise UserError(f"--api must be auto, chat or completions, found {self.api!r}")
        self._openai = _connect(self.base_url, self.timeout)
        self.url = str(self._openai.base_url).rstrip("/")

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    def give_up(self) -> None:
        """From now on a failure is final: requests in flight may end well but aren't sent again."""
        self._given_up = True

    async def served_models(self) -> list[str]:
        """The ids that the server lists under /models.

        Raises:
            UserError: it doesn't answer, or refuses the key.
        """
        import openai

        try:
            raw = await self._openai.models.with_raw_response.list()
            return [model["id"] for model in json.loads(raw.text)["data"]]
        except openai.APIError as error:
            if getattr(error, "status_code", None) in (404, 405, 501):
                return []
            raise self._explained(error, None) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url}/models gave no list of models; is this an OpenAI-compatible server?"
            ) from error

    async def only_model(self) -> str:
        """The served model, where there is exactly one.

        Raises:
            UserError: there are none or several; the message lists them.
        """
        served = await self.served_models()
        if len(served) == 1:
            return served[0]
        found = f"serves {_shortened(served)}" if served else "lists no model"
        raise UserError(f"{self.url} {found}; say which one with --model_name")

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

        failures = 0
        while True:
            await self._wait_for_server()
            sent = self._adapted(parameters)
            api = self.api
            try:
                completion = await self._send(prompt, model, sent)
                self._answered = True
                return completion
            except openai.APIStatusError as error:
                if self._learnt(error, sent, api):
                    continue
                if _code(error) == "content_filter":  # Azure refuses such a prompt; asking again changes nothing
                    return Completion("", "content_filter", None)
                if error.status_code == 404:
                    raise await self._not_found(error, model) from error
                if not _is_transient(error) or failures >= self.max_retries or self._given_up:
                    raise self._explained(error, failures) from error
                trouble, wait = f"{error.status_code} {_said(error)}".strip(), _retry_after(error.response.headers)
            except openai.APIConnectionError as error:
                refused = not self._answered and "ConnectError" in type(error.__cause__).__name__
                if refused or failures >= self.max_retries or self._given_up:
                    raise self._explained(error, failures) from error
                trouble, wait = _cause(error), None
            except _Malformed as error:
                if failures >= self.max_retries or self._given_up:
                    raise UserError(f"{self.url} gave no completion in {failures + 1} tries: {error}") from error
                trouble, wait = str(error), None
            failures += 1
            await self._back_off(trouble, wait, failures)

    async def _send(self, prompt: str | list[dict], model: str, parameters: dict[str, Any]) -> Completion:
        if self.api == "completions":
            text = prompt if isinstance(prompt, str) else _as_text(prompt)
            create, content = self._openai.completions.with_raw_response.create, {"prompt": text}
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            create, content = self._openai.chat.completions.with_raw_response.create, {"messages": messages}
        known = {name: parameters.pop(name) for name in list(parameters) if name in _KNOWN_TO_OPENAI}
        raw = await create(model=model, **content, **known, extra_body=parameters or None)
        return read_completion(raw.text)

    def _adapted(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters under the names that the server takes."""
        sent = {self._renamed.get(name, name): value for name, value in parameters.items() if value is not None}
        sent.pop(None, None)
        for name in _NEW_NAMES:
            if name in sent and self.max_tokens is not None:
                sent[name] = min(sent[name], self.max_tokens)
        return sent

    def _learnt(self, error: Any, sent: dict[str, Any], api: str) -> bool:
        """Whether the refusal taught something that lets the request be sent again in another form."""
        if self.api != api:  # another request has found it out in the meantime
            return True
        message = _body_text(error)
        if self.api == "auto" and not self._answered and _speaks_no_chat(error, message):
            self.api = "completions"
            self.log("The server has no chat for this model; using /completions.")
            return True
        if error.status_code not in (400, 422):
            return False
        limit = next((name for name in _NEW_NAMES if name in sent), None)
        if limit and (_code(error) == "context_length_exceeded" or _TOO_LONG.search(message)):
            return self._lower_max_tokens(limit, sent[limit])
        name = _refused_parameter(error, message, sent)
        if name is None:
            return False
        original = next((old for old, new in self._renamed.items() if new == name), name)
        if name not in self._renamed:
            new = _NEW_NAMES.get(name) if original == name else None
            self._renamed[original] = new
            self.log(f"The server refuses {name}; " + (f"sending {new} instead." if new else "leaving it out."))
        return True

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
            await asyncio.sleep(pause)

    async def _back_off(self, trouble: str, wait: float | None, failures: int) -> None:
        """Waits before the next try: as long as the server asked, else exponentially with jitter."""
        if wait is not None:
            wait += random.uniform(0, min(1.0, 0.1 * wait))
            self._not_before = max(self._not_before, time.monotonic() + wait)  # one limit, shared by all requests
        else:
            wait = min(60.0, 0.5 * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        self.log(f"{_one_line(trouble)}; try {failures} of {self.max_retries} again in {wait:.1f} s.")
        await asyncio.sleep(wait)

    async def _not_found(self, error: Any, model: str) -> UserError:
        """A 404: an unknown model, where the server lists others, or what the server says."""
        try:
            served = await self.served_models()
        except UserError:
            served = []
        if served and model not in served:
            return UserError(f"{self.url} serves no model {model!r}; it serves {_shortened(served)}")
        hint = "" if self.url.endswith("/v1") else "; an OpenAI-compatible --base_url mostly ends in /v1"
        return UserError(f"{self.url} answered 404: {_said(error)}{hint}")

    def _explained(self, error: Any, failures: int | None) -> UserError:
        """One line for a failure that ends the run."""
        status = getattr(error, "status_code", None)
        said = _said(error)
        if status is None:
            start = "start the server (transformers serve MODEL, say) or mend --base_url"
            return UserError(f"cannot reach {self.url}: {_cause(error)}; {start}")
        if status in (401, 403):
            found = "the key was refused" if os.environ.get("OPENAI_API_KEY") else "a key is needed and none is set"
            return UserError(f"{self.url} answered {status}: {said}; {found}: set OPENAI_API_KEY")
        if status == 402 or (status == 429 and {_code(error), getattr(error, "type", None)} & _NO_QUOTA):
            return UserError(
                f"{self.url} answered {status}: no quota or credit left ({said}); mend the account's billing"
            )
        after = f" after {failures} retries" if failures else ""
        return UserError(f"{self.url} answered {status}{after}: {said}")


# What openai's client has as named arguments for both APIs; anything else travels in `extra_body`.
_KNOWN_TO_OPENAI = {
    *("frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop"),
    *("temperature", "top_p", "user"),
}


def _connect(base_url: str | None, timeout: float) -> Any:
    """The openai client for the given or configured server.

    Raises:
        UserError: neither a key nor a server is known.
    """
    import openai

    azure = None if base_url else os.environ.get("AZURE_OPENAI_ENDPOINT")
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    key = os.environ.get("AZURE_OPENAI_API_KEY") if azure else None
    key = key or os.environ.get("OPENAI_API_KEY")
    if not key and (azure or not base_url):
        raise UserError(
            "no API key and no server: set OPENAI_API_KEY (Azure: AZURE_OPENAI_API_KEY), or start a local server "
            "(transformers serve MODEL --port 8000) and give --base_url http://127.0.0.1:8000/v1"
        )
    settings = {"api_key": key or "none", "timeout": timeout, "max_retries": 0}
    try:
        if azure and os.environ.get("OPENAI_API_VERSION"):
            return openai.AsyncAzureOpenAI(azure_endpoint=azure, **settings)
        return openai.AsyncOpenAI(base_url=azure.rstrip("/") + "/openai/v1" if azure else base_url, **settings)
    except Exception as error:  # an unusable URL fails in httpx in several ways
        raise UserError(f"--base_url {base_url or azure!r} cannot be used: {_one_line(str(error))}") from error


def read_completion(body: str | dict) -> Completion:
    """Reads the body of a chat or text completion.

    Raises:
        _Malformed: it is no completion.
    """
    try:
        answer = json.loads(body) if isinstance(body, str) else body
        choice = answer["choices"][0]
        message = choice.get("message") or choice
        text = message["content"] if "content" in message else message["text"]
        if text is not None and not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Malformed(f"the answer is no completion: {_one_line(str(body))[:120] or 'it is empty'}") from error
    usage = answer.get("usage") or {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    counted = all(isinstance(count, int) for count in counts.values())
    return Completion(text or "", choice.get("finish_reason"), counts if counted else None)


def _as_text(messages: list[dict]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _body_text(error: Any) -> str:
    return error.body if isinstance(error.body, str) else json.dumps(error.body, ensure_ascii=False)


def _code(error: Any) -> str | None:
    return getattr(error, "code", None)


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
    if re.search(r"not a chat model|chat.?template", message, re.IGNORECASE):
        return True
    return error.status_code in (405, 501) or (error.status_code == 404 and "model" not in message.lower())


def _refused_parameter(error: Any, message: str, sent: dict[str, Any]) -> str | None:
    """The name of the sent parameter that the server says it doesn't take."""
    if not (_code(error) in ("unsupported_parameter", "unsupported_value") or _REFUSAL.search(message)):
        return None
    if getattr(error, "param", None) in sent:
        return error.param
    places = {name: found.start() for name in sent if (found := re.search(rf"\b{name}\b", message))}
    return min(places, key=places.get) if places else None


def _is_transient(error: Any) -> bool:
    if error.status_code == 429:
        return not {_code(error), getattr(error, "type", None)} & _NO_QUOTA
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


def _shortened(names: list[str], most: int = 40) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
