"""Loads complete models, and reloads saved ones to check them."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from alpaca.cli import UserError

DIFF_MARK = "alpaca_weight_diff"  # in config.json: the folder holds a weight diff, not a model


@contextlib.contextmanager
def one_line_load_errors(name_or_path: str) -> Iterator[None]:
    """Turns what transformers raises for a model that it can't load into a UserError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{name_or_path} brings code of its own (auto_map in its config), and such code is never run here; "
                "name a model of an architecture that transformers knows"
            ) from error
        asked = "" if os.path.exists(name_or_path) else "there is no such folder, and the Hub was asked in vain; "
        raise UserError(f"cannot load {name_or_path}: {asked}{' '.join(str(error).split())[:300]}") from error


def load_model(name_or_path: str, dtype: Any, cache_dir: str | None = None, device: str | None = None):
    """Loads a causal language model and refuses an incomplete one; transformers would initialize missing weights.

    Args:
        name_or_path: A folder or a Hub id.
        dtype: Type of the weights in memory; "auto" takes the checkpoint's.
        cache_dir: Folder for downloads.
        device: Where the weights go; the host's memory if None.

    Raises:
        UserError: There is no such model, a file is missing or damaged, a tensor is missing, or a tensor's shape
            contradicts the config.
    """
    from transformers import AutoModelForCausalLM

    placement = {"device_map": {"": device}} if device else {}
    with one_line_load_errors(name_or_path):
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            cache_dir=cache_dir,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,  # None would ask a person in a terminal
            **placement,
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(f"{name_or_path}: {name} has shape {tuple(found)}, its config.json says {tuple(expected)}")
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{name_or_path} lacks {len(missing)} tensor(s) that its config.json asks for: {names}")
    return model


def host_memory(total: bool = False) -> int:
    """Gets the free memory of this machine or container in bytes, or with `total` all of it."""
    import psutil

    memory = psutil.virtual_memory()
    found = memory.total if total else memory.available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            return found if text == "max" else min(found, int(text) - (0 if total else int(current.read())))
    except (OSError, ValueError):
        return found


def tensor_shapes(model) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Lists a model's tensors by the names in its files. In memory transformers renames some and merges experts'.

    GPT-NeoX's output layer, for example, is lm_head in memory and embed_out in files.

    Returns:
        Name -> shape, and for tensors that share memory, name -> name of the first.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    def in_files(tensors: dict) -> dict[str, tuple[int, ...]]:
        shaped = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
        return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, shaped).items()}

    aliases, first = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (shared := first.setdefault(id(parameter), name)) != name:
            [alias], [original] = in_files({name: parameter}), in_files({shared: parameter})
            aliases[alias] = original
    return in_files(model.state_dict()), aliases


def check_saved(folder: str, shapes: dict[str, tuple[int, ...]], aliases: dict[str, str]) -> int:
    """Reloads a saved model and checks it: every tensor present, right shape, finite.

    Args:
        folder: Holds safetensors, in one file or in shards with an index.
        shapes: Name -> shape of every tensor of the model.
        aliases: Name -> name of the tensor that it shares memory with; one of the two must be present.

    Returns:
        The number of tensors checked.

    Raises:
        RuntimeError: A tensor is missing, unknown, not finite, or has the wrong shape.
    """
    from safetensors import safe_open

    found = {}
    for path in sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open objects aren't mappings)
                tensor = file.get_tensor(name)
                found[name] = tuple(tensor.shape)
                if not tensor.isfinite().all():
                    raise RuntimeError(f"{path}: {name} is not finite; the last good checkpoint is untouched")
    present = set(found) | {alias for alias, name in aliases.items() if name in found}
    present |= {name for alias, name in aliases.items() if alias in found}
    if missing := sorted(set(shapes) - present):
        raise RuntimeError(f"{folder} lacks {len(missing)} of {len(shapes)} tensors, {missing[0]} first")
    for name, shape in found.items():
        if name not in shapes:
            raise RuntimeError(f"{folder} holds {name}, which the model does not have")
        if shape != tuple(shapes[name]):
            raise RuntimeError(f"{folder}: {name} has shape {shape}, the model {tuple(shapes[name])}")
    return len(found)
