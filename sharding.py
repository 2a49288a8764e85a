"""How a run is sharded: FSDP2 and DeepSpeed's ZeRO-3, asked for in the words of 2023."""

import importlib.util
import os

import torch

from checkpoint import read_json
from utils import UserError, jload, say


def can_shard() -> bool:
    """Whether accelerate applies FSDP and DeepSpeed here: up to 1.15 it leaves processes on a CPU data-parallel."""
    return has_accelerator() and not single_process()


def has_accelerator() -> bool:
    """Whether this machine has a GPU or its like."""
    return torch.accelerator.is_available()


def single_process() -> bool:
    """Whether torchrun didn't start us, or started one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def read_fsdp(args) -> None:
    """Turns 2023's words into today's settings: FSDP2, wrapped by layer."""
    if not can_shard():
        why = "one process has nothing to shard" if single_process() else "accelerate shards only across GPUs"
        say(f"--fsdp: {why}; going on " + ("without" if single_process() else "data-parallel"))
        args.fsdp = None
        return
    words = str(args.fsdp).split()
    known = {"full_shard": True, "shard_grad_op": False, "auto_wrap": None, "offload": None, "True": None}
    if unknown := [word for word in words if word not in known]:
        raise UserError(f"--fsdp {unknown[0]}: FSDP2 knows full_shard, shard_grad_op, auto_wrap and offload")
    config = read_json(args.fsdp_config) if isinstance(args.fsdp_config, str) else args.fsdp_config
    args.fsdp_config = {
        "reshard_after_forward": "shard_grad_op" not in words,
        "cpu_offload": "offload" in words,
        **{name.removeprefix("fsdp_"): value for name, value in (config or {}).items()},
    }
    args.fsdp = True


def read_deepspeed(args) -> None:
    """Reads DeepSpeed's config and mends what lost models and learning rates in 2023."""
    if not can_shard():
        why = "one process has nothing to shard" if single_process() else "accelerate starts it only on GPUs"
        say(f"--deepspeed: {why}; going on " + ("without" if single_process() else "data-parallel"))
        args.deepspeed = None
        return
    if not importlib.util.find_spec("deepspeed"):
        raise UserError("--deepspeed: not installed; pip install deepspeed, or use --fsdp")
    config = jload(args.deepspeed) if isinstance(args.deepspeed, str) else args.deepspeed
    if scheduler := config.pop("scheduler", None):
        say(f"--deepspeed: its {scheduler['type']} gives way to --lr_scheduler_type {args.lr_scheduler_type}")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        say("--deepspeed: stage3_gather_16bit_weights_on_model_save set to true, or no model would be saved")
    args.deepspeed = config


def choose_wrapped_layer(args, skeleton) -> None:
    """Sets the layer class that FSDP wraps: the one asked for, or the model's own where that isn't in it."""
    own = sorted(skeleton._no_split_modules or ())
    asked = args.fsdp_transformer_layer_cls_to_wrap
    classes = {type(module).__name__ for module in skeleton.modules()}
    chosen = [asked] if asked in classes else own
    if not chosen:
        raise UserError("this model does not say which layers FSDP may wrap; pass --fsdp_transformer_layer_cls_to_wrap")
    why = "as asked" if asked in classes else f"{asked} is not in this model" if asked else "the model's own layer"
    say(f"FSDP2 wraps {', '.join(chosen)} ({why})")
    args.fsdp_config["transformer_layer_cls_to_wrap"] = chosen
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(chosen)
