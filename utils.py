"""The original's small shared module: prompt templates, JSON in and out, completions from an OpenAI-compatible server.

Importing it loads neither torch, transformers nor openai.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from alpaca.files import jdump, jload
from alpaca.prompts import PROMPT_DICT

__all__ = ["PROMPT_DICT", "OpenAIDecodingArguments", "jdump", "jload", "openai_completion"]


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """Sampling parameters under OpenAI's names. The first three are always sent, the others only if changed."""

    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


def openai_completion(
    prompts: str | dict | Sequence,
    decoding_args: OpenAIDecodingArguments,
    model_name: str | None = None,
    sleep_time: int = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    **decoding_kwargs: Any,
) -> Any:
    """Completes prompts at the server named by OPENAI_BASE_URL, or else at OpenAI, with one request per completion.

    Args:
        prompts: A text, a chat message (a dict with role and content), or a list of texts, messages or conversations
            (lists of messages).
        decoding_args: How to sample. `stream` is not supported; `n` completions take n requests.
        model_name: The model to ask for. When None, the server must serve exactly one.
        sleep_time: Unused: the waits between retries are those the server asks for.
        batch_size: How many requests may be in flight at once.
        max_instances: Only this many prompts are completed.
        max_batches: Only `max_batches * batch_size` prompts are completed.
        return_text: Whether to return texts instead of completions.
        decoding_kwargs: More parameters of the request, such as `logit_bias`.

    Returns:
        One entry per prompt, or just the entry if `prompts` is a single prompt: a completion with `.text` (or
        `["text"]`), `finish_reason` and `usage`, or its text; for n > 1, a list of n of these.

    Raises:
        UserError: Says in one line why the server gave no answer.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from alpaca.client import complete_all

    if decoding_args.stream:
        raise ValueError("openai_completion gives whole completions; stream must be False")
    single = isinstance(prompts, (str, dict))
    chosen = [prompts] if single else list(prompts)[: min(max_instances, max_batches * batch_size)]
    n = decoding_args.n
    asked = [[prompt] if isinstance(prompt, dict) else prompt for prompt in chosen for _ in range(n)]
    parameters = _request_parameters(decoding_args) | decoding_kwargs
    with ThreadPoolExecutor(1) as thread:  # asyncio.run fails in a thread that runs a loop, such as a notebook's
        completions = thread.submit(asyncio.run, complete_all(asked, model_name, batch_size, parameters)).result()
    if return_text:
        completions = [completion.text for completion in completions]
    if n > 1:
        completions = [completions[i : i + n] for i in range(0, len(completions), n)]
    return completions[0] if single else completions


def _request_parameters(decoding_args: OpenAIDecodingArguments) -> dict[str, Any]:
    default, always = OpenAIDecodingArguments(), ("max_tokens", "temperature", "top_p")
    chosen = {name: value for name, value in vars(decoding_args).items() if name not in ("n", "stream")}
    return {name: value for name, value in chosen.items() if name in always or value != getattr(default, name)}
