"""Continuing a run: from which checkpoint, whether it is whole, and whether it belongs to the same run.

Every checkpoint carries a record of its run (`alpaca_run.json`): hashes of the data, the seed and the settings. A run
that is continued with others would give a model that neither command describes, so it is refused.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from alpaca.cli import UserError
from alpaca.files import jload
from alpaca.ranks import announce
from alpaca.training import saving

RECORD = "alpaca_run.json"

# Settings that decide the weights. The Trainer reads those of the second line from the checkpoint and ignores the flag.
_SETTINGS = (
    "seed",
    "data_seed",
    "model_max_length",
    "loss_reduction",
    "train_sampling_strategy",
    "optim",
    "optim_args",
)
_IGNORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_SETTINGS += (*_IGNORED, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "pure_bf16")
_SETTINGS += ("label_smoothing_factor", "neftune_noise_alpha")
_LORA = ("lora_alpha", "lora_dropout", "lora_target_modules")
# Settings that people change for good reason, between machines for example; a change is said.
_TOLD = ("bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


# ---------------------------------------------------------------------------------------------------------------------
# Where to continue


def find_resume_point(output_dir: str, resume: str | None) -> str | None:
    """Finds the checkpoint to continue from.

    Args:
        output_dir: The run's folder.
        resume: The value of `--resume_from_checkpoint`: None or a false word, a true word (the last checkpoint in
            `output_dir`), or a checkpoint's folder.

    Returns:
        The checkpoint's folder, or None to start from the beginning.

    Raises:
        UserError: There is nothing to continue from, or it is not whole.
    """
    word = (resume or "no").lower()
    if word in ("false", "no", "0"):
        return None
    last = saving.last_checkpoint(output_dir)
    if word in ("true", "yes", "1"):
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint: {output_dir} holds no complete checkpoint; drop the flag to start over"
            )
        resume = last
    elif not os.path.isfile(os.path.join(resume, saving.STATE)):
        hint = f"the last complete one is {last}" if last else f"{output_dir} holds none"
        raise UserError(f"--resume_from_checkpoint {resume}: no checkpoint of a run there; {hint}")
    check_complete(resume)
    return resume


def steps_done(folder: str | None) -> int:
    """Reads how many steps a checkpoint has behind it; 0 without one."""
    return jload(os.path.join(folder, saving.STATE))["global_step"] if folder else 0


def check_complete(folder: str) -> None:
    """Checks that a checkpoint holds all that a run needs to continue exactly, and that no file is cut off.

    Raises:
        UserError: A run cannot continue exactly from there; names the file.
    """
    hint = "continue from an earlier one: --resume_from_checkpoint FOLDER"
    paths = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    for path in sorted(paths):
        if problem := _damage(path):
            raise UserError(f"{path} is damaged or cut off ({problem}); {hint}")
    names = set(os.listdir(folder))
    if not any("optim" in os.path.basename(path) for path in paths):
        raise UserError(
            f"{folder} holds no optimizer state (--save_only_model saves none), so no run continues exactly from it; "
            f"{hint}, or start a new run with --model_name_or_path {folder}"
        )
    sharded = any(name.startswith(("pytorch_model_fsdp", "global_step")) for name in names)
    weights = {"model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    parts = {
        "weights": bool(weights & names) or sharded,
        "scheduler.pt": "scheduler.pt" in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    if "model.safetensors.index.json" in names:
        index = jload(os.path.join(folder, "model.safetensors.index.json"))
        parts |= {name: name in names for name in sorted(set(index.get("weight_map", {}).values()))}
    for part, there in parts.items():
        if not there:
            raise UserError(f"{folder} holds no {part}, so no run continues exactly from it; {hint}")


def _damage(path: str) -> str:
    """Says what is wrong with a file of a checkpoint; "" if nothing is. Reads no tensor's bytes."""
    name = os.path.basename(path)
    try:
        if name == saving.STATE:
            state = jload(path)
            if not isinstance(state, dict) or not {"global_step", "max_steps", "num_train_epochs"} <= state.keys():
                return "it is no trainer state: global_step, max_steps or num_train_epochs is missing"
        elif name.endswith(".safetensors"):
            from safetensors import safe_open

            safe_open(path, "pt").__exit__(None, None, None)
        elif name in ("optimizer.pt", "scheduler.pt"):
            state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            needed = {"optimizer.pt": "param_groups", "scheduler.pt": "last_epoch"}[name]
            return "" if needed in state else f"{needed} is missing"
        elif name.endswith((".pt", ".pth", ".bin")) and not zipfile.is_zipfile(path):  # torch.save writes zips
            return "no zip file"
    except Exception as error:  # whatever a damaged pickle raises
        return " ".join(str(error).split())[:100] or type(error).__name__
    return ""


@contextlib.contextmanager
def damage_in_one_line(folder: str | None) -> Iterator[None]:
    """Turns whatever the Trainer raises while it reads a checkpoint into one line.

    Raises:
        UserError: The checkpoint doesn't fit the model, the optimizer or the schedule, or is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"cannot continue from {folder} ({reason}); continue from an earlier checkpoint: "
            "--resume_from_checkpoint FOLDER"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Whether it is the same run


def run_record(model_args, data_args, args, data: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Records what decides a run's weights: hashes of its data, the seed, the settings.

    Args:
        model_args: A ModelArguments of alpaca/training/arguments.py.
        data_args: A DataArguments.
        args: The Trainer's arguments, with the plan written into them.
        data: What train.py's make_supervised_data_module returned.
        steps: Steps of the run.
    """
    settings = {name: getattr(args, name) for name in (*_SETTINGS, *_TOLD, "num_train_epochs")}
    settings |= {"prompt_boundary": data_args.prompt_boundary, "eval_fraction": data_args.eval_fraction}
    settings |= {name: getattr(model_args, name) for name in ("lora_r", *(_LORA if model_args.lora_r else ()))}
    record = {
        "base_model": model_args.model_name_or_path,
        "data": {
            "path": data_args.data_path,
            "sha256": _file_hash(data_args.data_path),
            "examples": len(data["train_dataset"]),
            "tokens": _token_hash(data["train_dataset"]),
        },
        "eval_data": {
            "path": data_args.eval_data_path,
            "examples": len(data["eval_dataset"] or ()),
            "tokens": _token_hash(data["eval_dataset"]),
        },
        "settings": settings,
        "steps": steps,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
    return json.loads(json.dumps(record, default=lambda value: getattr(value, "value", str(value))))


def _file_hash(path: str) -> str | None:
    """Hashes a file; None for a data set on the Hub."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _token_hash(dataset) -> str | None:
    """Hashes the tokens, labels and order of a data set's examples."""
    if not dataset:
        return None
    digest = hashlib.sha256(np.array(dataset.records, dtype=np.int64).tobytes())
    for rows in (dataset.input_ids, dataset.labels):
        digest.update(np.array([len(row) for row in rows], dtype=np.int64).tobytes())
        digest.update(torch.cat(list(rows)).numpy().astype(np.int32).tobytes())
    return digest.hexdigest()


def check_same_run(folder: str, config, record: Mapping[str, Any]) -> None:
    """Checks that a checkpoint belongs to the run that is to be continued, and says what else has changed.

    Args:
        folder: The checkpoint.
        config: The model's configuration.
        record: What run_record says of this run.

    Raises:
        UserError: Model, data, seed or settings differ; names the first difference.
    """
    ours = {**config.to_dict(), "lora_r": record["settings"]["lora_r"]}
    found = {"lora_r": 0}
    if os.path.isfile(path := os.path.join(folder, "adapter_config.json")):
        found["lora_r"] = jload(path)["r"]
    elif os.path.isfile(path := os.path.join(folder, "config.json")):
        found |= jload(path)
    for name in ("lora_r", "model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if name in found and found[name] != ours.get(name):
            raise _other(folder, name, found[name], ours.get(name))
    if not os.path.isfile(path := os.path.join(folder, RECORD)):
        announce(f"{folder} holds no {RECORD}: whether data, seed and settings are the same cannot be checked")
        return
    saved = jload(path)
    _compare(folder, saved, record)


def _compare(folder: str, saved: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    theirs, ours = saved["settings"], record["settings"]
    for name in ours:
        if name in theirs and theirs[name] != ours[name] and name not in (*_TOLD, "num_train_epochs"):
            raise _other(folder, name, theirs[name], ours[name])
    if saved["data"]["tokens"] != record["data"]["tokens"]:
        both = [
            f"{one['data']['path']}, {one['data']['examples']:,} examples, sha256 {(one['data']['sha256'] or '?')[:12]}"
            for one in (saved, record)
        ]
        raise _other(folder, "data", both[0], both[1])
    if saved["eval_data"]["tokens"] != record["eval_data"]["tokens"]:
        announce(f"{folder}: the data to evaluate on has changed; earlier evaluation losses don't compare")
    for name in _TOLD:
        if theirs.get(name) != ours[name]:
            announce(f"{folder}: --{name} was {theirs.get(name)}, now it is {ours[name]}; going on, not step for step")
    if saved["steps"] == record["steps"]:
        return
    if theirs["num_train_epochs"] == ours["num_train_epochs"] and any(theirs.get(name) != ours[name] for name in _TOLD):
        announce(
            f"{folder} comes from a run of {saved['steps']} steps, this one has {record['steps']}: data, batch or "
            "number of processes differ, and some examples will be seen twice or not at all"
        )
    announce(
        f"{folder}: the learning rate's schedule spanned {saved['steps']} steps, now it spans {record['steps']}; "
        "the rate continues from the new curve"
    )


def _other(folder: str, name: str, theirs: Any, ours: Any) -> UserError:
    ignored = " (the Trainer would ignore the flag and go on with the checkpoint's)" if name in _IGNORED else ""
    return UserError(
        f"--resume_from_checkpoint {folder}: its {name} is {theirs}, this run's {ours}{ignored}; continue with the "
        "flags that started the run"
    )
