"""The training templates, to the byte: for data, for inference, and for chat servers."""

import json
from collections.abc import Mapping
from typing import Any

# The format that Alpaca models were trained on. A byte changed here changes every model trained with it.
PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


def format_prompt(example: Mapping[str, Any]) -> str:
    """Puts an example into the training template that fits it.

    Args:
        example: has `instruction` and may have `input`; an empty, null or absent input selects the no-input template.

    Returns:
        The prompt up to and including `### Response:`, to which the model adds its answer.
    """
    # str.replace, not str.format: braces in the data are data.
    template = PROMPT_DICT["prompt_input" if example.get("input") else "prompt_no_input"]
    head, _, tail = template.partition("{instruction}")
    return head + example["instruction"] + tail.replace("{input}", example.get("input") or "")


def alpaca_chat_template(adds_bos: bool) -> str:
    r"""Writes the training templates as a chat template: chat servers then prompt an Alpaca model as it was trained.

    One user turn, optionally answered. Content "X" takes the template without an input, and content
    "X\n\n### Input:\nY" the one with it.

    Args:
        adds_bos: whether the tokenizer starts a text with BOS. Templates render special tokens themselves.

    Returns:
        A Jinja template.
    """
    with_input, without = (
        json.dumps(PROMPT_DICT[name].partition("### Instruction:")[0]) for name in ("prompt_input", "prompt_no_input")
    )
    return (
        ("{{ bos_token }}" if adds_bos else "")
        + "{%- set first = messages[0] -%}"
        + "{%- if first.role != 'user' or messages | length > 2 -%}"
        + "{{- raise_exception('Alpaca takes one user message: it was trained on single instructions') -}}{%- endif -%}"
        + "{%- set text = first.content if first.content is string "
        + "else first.content | map(attribute='text') | join('') -%}"
        + f"{{{{- {with_input} if '\\n\\n### Input:\\n' in text else {without} -}}}}"
        + "{{- '### Instruction:\\n' + text + '\\n\\n### Response:' -}}"
        + "{%- if messages | length > 1 -%}{{- messages[1].content + eos_token -}}{%- endif -%}"
    )
