"""The training templates, byte for byte: for training data, for inference, and for chat servers."""

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
    r"""Fills in the training template that fits the example.

    Args:
        example: Has `instruction` and may have `input`. Without an input, or with an empty or null one, the no-input
            template is used.

    Returns:
        The prompt, which ends with `### Response:`; the model continues from there.

    Example:
        {"instruction": "Add.", "input": "1, 2"} -> "Below is ... ### Instruction:\nAdd.\n\n### Input:\n1, 2 ..."
    """
    # str.replace and not str.format, because the data may contain braces: "Fill in {name}." must stay as it is.
    template = PROMPT_DICT["prompt_input" if example.get("input") else "prompt_no_input"]
    head, _, tail = template.partition("{instruction}")
    return head + example["instruction"] + tail.replace("{input}", example.get("input") or "")


def alpaca_chat_template(adds_bos: bool) -> str:
    r"""Writes the training templates as a chat template, so that chat servers prompt an Alpaca model as in training.

    The template takes one user message and, optionally, its answer. The message "X" gets the template without an
    input; "X\n\n### Input:\nY" gets the one with input Y.

    Args:
        adds_bos: Whether the tokenizer starts a text with BOS. If so, the template must write BOS itself.

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
