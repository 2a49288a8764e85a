"""The model card of a run: README.md in the output folder, with the front matter that the Hugging Face Hub reads."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from alpaca.files import atomic_write, read_text
from alpaca.prompts import PROMPT_DICT
from alpaca.ranks import announce

_SEAL = "<!-- written by train.py; sha256 of the text above: {} -->\n"
_SHOWN = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "num_train_epochs")
_SHOWN += ("max_grad_norm", "model_max_length", "loss_reduction", "prompt_boundary", "bf16", "fp16", "seed")


def write_card(folder: str, record: Mapping[str, Any], state: Any, merged: bool = False) -> None:
    """Writes a run's model card, unless a README.md is there that is not an unchanged card of an earlier run.

    Args:
        folder: The run's output folder.
        record: What resuming.run_record says of the run.
        state: The Trainer's state, or what its trainer_state.json holds.
        merged: Whether the folder holds the base model with the run's adapter merged into it.
    """
    path = os.path.join(folder, "README.md")
    if os.path.lexists(path) and not _is_ours(path):
        announce(f"{path} is there already and stays as it is; no model card was written")
        return
    state = state if isinstance(state, Mapping) else vars(state)
    text = _card(folder, record, state["log_history"], state["global_step"], merged)
    with atomic_write(path) as file:
        file.write(text + _SEAL.format(hashlib.sha256(text.encode()).hexdigest()))


def serving_command(base: str, adapter_dir: str) -> str:
    """Writes the command that serves an adapter with vLLM.

    Without --chat-template vLLM takes the base model's template, and the adapter gets prompts that it never saw.
    """
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"alpaca={adapter_dir}", "--chat-template"]
    return shlex.join([*words, os.path.join(adapter_dir, "chat_template.jinja")])


def _is_ours(path: str) -> bool:
    """Tells whether a card is one of ours, and nobody has changed a letter of it."""
    text, _, seal = read_text(path).rpartition("<!--")
    return "<!--" + seal == _SEAL.format(hashlib.sha256(text.encode()).hexdigest())


def _card(folder: str, record: Mapping[str, Any], history: list[dict], steps: int, merged: bool) -> str:
    is_adapter = bool(record["settings"]["lora_r"]) and not merged
    parts = [
        _front_matter(record, is_adapter),
        _summary(folder, record, is_adapter, merged),
        _hyperparameters(record["settings"], steps),
        _losses(history),
        _format(),
        _serving(record, folder, is_adapter),
        _licence(),
    ]
    return "\n".join(parts)


def _public_name(path: str) -> str:
    """Names a model or a file without the folders of the machine that it was on; a Hub id stays as it is."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and not os.path.exists(path)
    return path if is_hub_id else os.path.basename(os.path.abspath(path))


def _front_matter(record: Mapping[str, Any], is_adapter: bool) -> str:
    data = record["data"]
    lines = {
        "base_model": [json.dumps(_public_name(record["base_model"]), ensure_ascii=False)],
        "base_model_relation": ["adapter" if is_adapter else "finetune"],
        "library_name": ["peft" if is_adapter else "transformers"],
        "pipeline_tag": ["text-generation"],
        "license": ["other"],
        "license_name": ["of-base-model-and-data"],
    }
    text = "".join(f"{name}: {value}\n" for name, [value] in lines.items())
    if data["sha256"] is None:  # a data set on the Hub
        text += f"datasets:\n- {data['path']}\n"
    return f"---\n{text}tags:\n- alpaca\n- instruction-tuning\n---\n"


def _summary(folder: str, record: Mapping[str, Any], is_adapter: bool, merged: bool) -> str:
    base, data, held_out = _public_name(record["base_model"]), record["data"], record["eval_data"]
    what = "A LoRA adapter for" if is_adapter else "A LoRA adapter merged into" if merged else "A fine-tune of"
    source = f"{data['examples']:,} examples of `{_public_name(data['path'])}`"
    if data["sha256"]:
        source += f", sha256 `{data['sha256']}`"
    if held_out["examples"]:
        source += f"; {held_out['examples']:,} examples were held out"
    return (
        f"# {_public_name(folder)}\n\n{what} `{base}` that follows instructions, trained with Stanford Alpaca's recipe."
        f"\n\nTraining data: {source}.\n"
    )


def _hyperparameters(settings: Mapping[str, Any], steps: int) -> str:
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * settings["world_size"]
    rows = {"steps": steps, "examples per step": batch, **{name: settings[name] for name in _SHOWN}}
    rows |= {name: value for name, value in settings.items() if name.startswith("lora_") and settings["lora_r"]}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)
    return f"## Hyperparameters\n\n| | |\n|---|---|\n{table}"


def _losses(history: list[dict]) -> str:
    rows = []
    for name, label in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        found = [(entry["step"], entry[name]) for entry in history if name in entry]
        rows += [f"| {label} | {step} | {loss:.4f} |\n" for step, loss in dict([*found[:1], *found[-1:]]).items()]
    return (
        f"## Losses\n\n| | step | loss |\n|---|---|---|\n{''.join(rows)}" if rows else "## Losses\n\nNone was logged.\n"
    )


def _format() -> str:
    with_input, without = PROMPT_DICT["prompt_input"], PROMPT_DICT["prompt_no_input"]
    return (
        "## Prompt format\n\nOne instruction a conversation; a system message or a second turn was never trained. "
        f"Without an input:\n\n```text\n{without}\n```\n\nWith an input:\n\n```text\n{with_input}\n```\n\n"
        "The answer follows the last colon directly and ends with the EOS token. `chat_template.jinja` writes both: "
        "the user message is the instruction, or instruction, `\\n\\n### Input:\\n` and input.\n"
    )


def _serving(record: Mapping[str, Any], folder: str, is_adapter: bool) -> str:
    name = _public_name(folder)
    if is_adapter:
        command = serving_command(_public_name(record["base_model"]), name)
        note = "\nWithout `--chat-template` the server prompts the adapter with the base model's template.\n"
        return f"## Serving\n\n```bash\n{command}\n```\n{note}"
    return f"## Serving\n\n```bash\nvllm serve {name}\n```\n"


def _licence() -> str:
    return (
        "## Licence\n\nThese weights are bound by the licence of the base model and by that of the training data; read "
        "both before you share or sell anything. Text written by a large model may also be bound by its provider's "
        "terms. The model states falsehoods confidently and has had no safety training.\n"
    )
