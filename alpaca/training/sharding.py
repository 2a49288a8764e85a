"""What a run computes on and how it is sharded: FSDP2 or DeepSpeed's ZeRO-3, asked for with the flags of 2023.

Nothing here changes the Trainer's arguments. Each function returns settings, name -> value, for `plan.write`.
"""

import copy
import importlib.util
import io
import os
import socket
import warnings
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from alpaca.cli import UserError
from alpaca.files import jload
from alpaca.ranks import announce

# ---------------------------------------------------------------------------------------------------------------------
# The machine


def has_accelerator() -> bool:
    """True if this machine has a GPU or another accelerator."""
    return torch.accelerator.is_available()


def has_bfloat16() -> bool:
    """True if this machine computes in bfloat16 without emulating it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def can_shard() -> bool:
    """True if accelerate applies FSDP and DeepSpeed here; up to 1.15 it leaves processes on a CPU data-parallel."""
    return has_accelerator() and not torch.backends.mps.is_available()


def device_name() -> str:
    """Names what this machine computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine (no GPU)"


def compute_types(args) -> dict[str, Any]:
    """Switches off the arithmetic that this machine lacks, and says so.

    Raises:
        UserError: Both 16-bit types are asked for.
    """
    settings: dict[str, Any] = {}
    if not has_accelerator():
        settings["use_cpu"] = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, an installed DeepSpeed warns when imported
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 are two types to compute in; give one")
    if args.bf16 and not has_bfloat16():
        settings["bf16"] = False
        announce(f"--bf16: {device_name()} has no bfloat16 arithmetic; going on in float32")
    if args.fp16 and not has_accelerator():
        settings["fp16"] = False
        announce(f"--fp16: {device_name()} has no float16 arithmetic; going on in float32")
    if args.tf32 and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8):
        settings["tf32"] = None
        announce(f"--tf32: {device_name()} has no TF32 arithmetic; going on without")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# The flags


def read_sharding(args) -> dict[str, Any]:
    """Reads `--fsdp` and `--deepspeed`.

    Raises:
        UserError: Both are given, or one of them cannot be read.
    """
    if args.fsdp and args.deepspeed:
        raise UserError("--fsdp and --deepspeed both shard the model; give one")
    if args.fsdp:
        return _read_fsdp(args)
    return _read_deepspeed(args) if args.deepspeed else {}


def _read_fsdp(args) -> dict[str, Any]:
    """Translates the words of 2023 into FSDP2's settings.

    "full_shard auto_wrap offload" becomes {"fsdp": True, "fsdp_config": {"cpu_offload": True}}. Whether weights are
    gathered a second time for the backward pass is then the plan's choice; "shard_grad_op" decides that they are not.
    """
    words = str(args.fsdp).split()
    known = {"full_shard", "shard_grad_op", "auto_wrap", "offload", "True"}
    if unknown := [word for word in words if word not in known]:
        raise UserError(f"--fsdp {unknown[0]}: FSDP2 knows full_shard, shard_grad_op, auto_wrap and offload")
    config = _read_config("--fsdp_config", args.fsdp_config or {})
    if not can_shard():
        _announce_going_on("--fsdp: accelerate shards only across GPUs")
        return {"fsdp": None}
    _join_world()
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    gathered_once = {"reshard_after_forward": False} if "shard_grad_op" in words else {}
    return {"fsdp": True, "fsdp_config": {"cpu_offload": "offload" in words, **gathered_once, **config}}


def _read_deepspeed(args) -> dict[str, Any]:
    """Reads DeepSpeed's config and fixes what lost models and learning rates in 2023."""
    config = _read_config("--deepspeed", args.deepspeed)
    if not can_shard():
        _announce_going_on("--deepspeed: accelerate starts it only on GPUs")
        return {"deepspeed": None}
    if not importlib.util.find_spec("deepspeed"):
        raise UserError("--deepspeed: not installed; pip install deepspeed, or use --fsdp")
    _join_world()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates: dozens of warnings in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if scheduler := config.pop("scheduler", None):
        announce(f"--deepspeed: its {scheduler['type']} gives way to --lr_scheduler_type {args.lr_scheduler_type}")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        announce("--deepspeed: stage3_gather_16bit_weights_on_model_save set to true, or no model would be saved")
    return {"deepspeed": config}


def _read_config(flag: str, value: str | dict) -> dict:
    """Reads what the Trainer takes: a JSON file's path, JSON itself, or a dictionary."""
    name = value if isinstance(value, str) else flag
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = io.StringIO(value)
        value.name = name = flag
    config = value if isinstance(value, dict) else jload(value)
    if not isinstance(config, dict):
        raise UserError(f"{name} holds a {type(config).__name__}; expected a JSON object of settings")
    return config


def _announce_going_on(reason: str) -> None:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    announce(f"{reason}; going on " + ("without" if alone else "data-parallel"))


def _join_world() -> None:
    """Makes a process that torchrun did not start a world of one.

    There is nothing to shard, but FSDP2's mixed precision is worth having: it computes in 16 bits from float32 master
    weights one layer at a time, in 16 bytes per parameter. Autocast keeps a 16-bit copy of all weights on top.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2's settings for a model


def fsdp_layers(args, skeleton) -> tuple[tuple[str, ...], str]:
    """Chooses the layer classes that FSDP2 wraps: the one asked for, or the model's own if that isn't in it.

    Returns:
        The names of the classes, and why these.

    Raises:
        UserError: The model names no such classes.
    """
    own = tuple(sorted(skeleton._no_split_modules or ()))
    asked = args.fsdp_transformer_layer_cls_to_wrap
    if asked in {type(module).__name__ for module in skeleton.modules()}:
        return (asked,), "as asked"
    if not own:
        raise UserError("this model does not say which layers FSDP may wrap; pass --fsdp_transformer_layer_cls_to_wrap")
    return own, f"{asked} is not in this model" if asked else "the model's own layer"


def sends_weights(skeleton) -> bool:
    """True if rank 0 alone may load the weights and FSDP2 sends every rank its shard.

    The host's memory then holds one copy, not one for each rank. accelerate sends parameters only, so all ranks load
    a model whose checkpoint holds buffers too.
    """
    return skeleton.state_dict().keys() <= dict(skeleton.named_parameters(remove_duplicate=False)).keys()


def fsdp_precision(args) -> dict[str, Any]:
    """Overrules two decisions of accelerate that would cost digits, and memory, under FSDP2.

    Ranks exchange their gradients after every pass of a step, unless --accelerator_config says otherwise. By default
    FSDP2 holds whole gradients on every device between passes and sums them in the compute type: 2 bytes per parameter
    with --bf16 True. Exchanged gradients are sharded, and summed in float32.

    Only weights are cast, and gradients for the exchange, as the original's FSDP did. accelerate's policy also rounds
    the model's inputs and outputs: the loss, and in padding-free passes the weights of tokens.
    """
    config = copy.copy(args.accelerator_config)
    config.gradient_accumulation_kwargs = {"sync_each_batch": True, **(config.gradient_accumulation_kwargs or {})}
    settings: dict[str, Any] = {"accelerator_config": config, "fsdp_plugin_args": dict(args.fsdp_plugin_args)}
    if args.bf16 or args.fp16:
        half = torch.bfloat16 if args.bf16 else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, cast_forward_inputs=False)
        settings["fsdp_plugin_args"]["mixed_precision_policy"] = policy
    return settings
