"""The original's small shared module: the prompt templates, JSON in and out, and completions from a server.

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
    """How to sample, by OpenAI's names; what stands at its default here isn't sent, the first three aside."""

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
    """Completes prompts at the server that OPENAI_BASE_URL names, or at OpenAI, with one request for each completion.

    Args:
        prompts: a text, a chat message (a dict with role and content), or a list of texts, messages or conversations
            (lists of messages).
        decoding_args: `stream` isn't supported; `n` completions take n requests.
        model_name: the model at the server; the served one, where there is just one, when None.
        sleep_time: unused; waits are what the server asks for.
        batch_size: requests in flight together.
        max_instances: prompts after that many are left out.
        max_batches: likewise after `max_batches * batch_size` prompts.
        return_text: texts instead of completions.
        decoding_kwargs: further parameters of the request, `logit_bias` for instance.

    Returns:
        For each prompt a completion (`.text` or `["text"]`, `finish_reason`, `usage`) or its text; a list of `n` such
        where n > 1. For a single prompt its own, without a list around.

    Raises:
        UserError: in one line, why the server gives no answer.
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
    default, always = OpenAIDecodingArguments(), ("max_tokens", "temperature", "top_p")
    parameters = {name: value for name, value in vars(decoding_args).items() if name not in ("n", "stream")}
    parameters = {k: v for k, v in parameters.items() if k in always or v != getattr(default, k)} | decoding_kwargs
    with ThreadPoolExecutor(1) as thread:  # asyncio.run needs a thread without a loop; a notebook's has one
        completions = thread.submit(asyncio.run, complete_all(asked, model_name, batch_size, parameters)).result()
    if return_text:
        completions = [completion.text for completion in completions]
    if n > 1:
        completions = [completions[i : i + n] for i in range(0, len(completions), n)]
    return completions[0] if single else completions
