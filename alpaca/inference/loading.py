"""Loads a checkpoint, or a LoRA adapter with its base model, and chooses the device and the dtype."""

import contextlib
import fnmatch
import hashlib
import json
import os
import sys
import warnings
from typing import Any

from alpaca.cli import UserError, say
from alpaca.files import jload
from alpaca.inference.answering import Alpaca, context_length
from alpaca.models import DIFF_MARK, host_memory, load_model, one_line_load_errors
from alpaca.tokenizers import load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
# The files that decide what a model answers, and which of them are too large to be read once more.
MODEL_FILES = ("*config.json", "*token*", "vocab.json", "merges.txt", "*.index.json")
WEIGHT_FILES = ("*.safetensors", "*.bin")


def load(model_path: str, device: str | None = None, dtype: str | None = None) -> Alpaca:
    """Loads a checkpoint, or a LoRA adapter with its base model, and checks that nothing is missing.

    Args:
        model_path: A folder with a model, a folder with an adapter whose config names its base model, or a Hub id.
        device: cpu, cuda, cuda:1 or mps; the best one available when None.
        dtype: float32, bfloat16 or float16; chosen to suit the device and its memory when None.

    Raises:
        UserError: The folder holds no model, tensors are missing, or the tokenizer doesn't fit the model.
    """
    check_model_folder(model_path)
    adapter = os.path.join(model_path, "adapter_config.json")
    has_adapter = os.path.exists(adapter)
    base = _base_of_adapter(adapter) if has_adapter else model_path
    with one_line_load_errors(base):
        with contextlib.redirect_stdout(sys.stderr):  # some libraries log to stdout when they are first imported
            model = _load_quietly(base, device, dtype)
        has_tokenizer = os.path.exists(os.path.join(model_path, "tokenizer_config.json"))
        source = model_path if has_tokenizer else base
        tokenizer, _ = load_tokenizer(source, model_max_length=context_length(model.config))
    if has_adapter:
        model = _with_adapter(model, model_path, len(tokenizer))
    files = fingerprint(model_path) + (fingerprint(base) if has_adapter else "")
    alpaca = Alpaca(model.eval(), tokenizer, model_path, files)
    say(f"{alpaca.name}: {model.num_parameters():,} parameters, {str(model.dtype)[6:]} on {model.device}")
    return alpaca


def fingerprint(model_path: str) -> str:
    """Tells whether a folder, or a Hub id in the cache, still holds the model that it held before.

    Small files count with their content, weights with their size and the time of their last change.
    """
    from transformers.utils.hub import cached_file

    folder = model_path if os.path.isdir(model_path) else os.path.dirname(cached_file(model_path, "config.json"))
    found: dict[str, Any] = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHT_FILES):
            found[name] = [os.stat(path).st_size, os.stat(path).st_mtime_ns]
        elif any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES) and os.path.isfile(path):
            with open(path, "rb") as file:
                found[name] = hashlib.sha256(file.read()).hexdigest()
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def check_model_folder(model_path: str) -> None:
    """Refuses a path that holds no model, before torch is imported.

    Raises:
        UserError: There is no such folder, it has no config.json, or it is a weight diff.
    """
    if not os.path.isdir(model_path):
        if os.path.exists(model_path) or model_path.count("/") != 1 or model_path.startswith((".", "/", "~")):
            raise UserError(f"{model_path} is not a folder; --model_path takes the folder that train.py wrote")
        return  # "owner/name" may be a model on the Hub
    if os.path.exists(os.path.join(model_path, "adapter_config.json")):
        return
    config = os.path.join(model_path, "config.json")
    if not os.path.exists(config):
        inner = sorted(name for name in os.listdir(model_path) if name.startswith("checkpoint-"))
        hint = f"did you mean {os.path.join(model_path, inner[-1])}?" if inner else "expected a model's folder"
        raise UserError(f"{model_path} has no config.json; {hint}")
    if jload(config).get(DIFF_MARK):
        raise UserError(
            f"{model_path} is a weight diff, not a model; recover the model first: python weight_diff.py recover "
            f"--path_raw RAW --path_diff {model_path} --path_tuned OUT"
        )


def pick_device(device: str | None) -> str:
    """Returns the device asked for, or else a GPU, Apple's GPU or the CPU, whichever is found first.

    Raises:
        UserError: The device asked for doesn't work here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()  # "meta" makes tensors, but none that hold a number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def pick_dtype(dtype: str | None, device: str, model_path: str) -> Any:
    """Returns the torch dtype to compute in: the one asked for, or one that suits the device.

    A GPU gets bfloat16 if it computes in it, else float16. A CPU gets float32, which is exact and fast there, unless
    the weights would take more than 90 % of the machine's memory: a 7B model takes 27 GB in float32, 13.5 in bfloat16.

    Raises:
        UserError: There is no such dtype.
    """
    import torch

    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype must be {', '.join(DTYPES)}, found {dtype!r}")
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device != "cpu":
        return torch.float16
    return torch.float32 if 4 * _count_parameters(model_path) < 0.9 * host_memory(total=True) else torch.bfloat16


def _count_parameters(model_path: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _load_quietly(model_path: str, device: str | None, dtype: str | None) -> Any:
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = pick_device(device)
    model = load_model(model_path, pick_dtype(dtype, device, model_path), device=device)
    # Keep only the checkpoint's EOS tokens. generate() would take every sampling parameter that a command leaves open
    # from the checkpoint's generation_config.json.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def _base_of_adapter(adapter_config: str) -> str:
    base = jload(adapter_config).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter_config} names no base model (base_model_name_or_path)")
    try:
        check_model_folder(base)
    except UserError as error:
        raise UserError(f"{adapter_config} names a base model that cannot be used: {error}") from error
    return base


def _with_adapter(model: Any, adapter_path: str, tokens: int) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{adapter_path} is a LoRA adapter, which needs peft: pip install peft") from error
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens)  # for the padding token train.py added; no position ever attends to it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from peft's use of transformers
        return PeftModel.from_pretrained(model, adapter_path)
