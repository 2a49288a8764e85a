"""What a run computes on, and how it is sharded: FSDP2 and DeepSpeed's ZeRO-3, asked for in the words of 2023."""

import importlib.util
import io
import os
import socket
import warnings

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from alpaca.cli import UserError
from alpaca.files import jload
from alpaca.ranks import announce, is_main


def can_shard() -> bool:
    """Whether accelerate applies FSDP and DeepSpeed here: up to 1.15 it leaves processes on a CPU data-parallel.

    A single process joins a world of one, as under torchrun. There is nothing to shard, but FSDP2's mixed precision
    is worth it: it computes in 16 bits from float32 masters one layer at a time, in 16 bytes per parameter, where
    autocast keeps a 16-bit copy of all weights besides.
    """
    able = has_accelerator() and not torch.backends.mps.is_available()
    if able and "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return able


def has_accelerator() -> bool:
    """Whether this machine has a GPU or its like."""
    return torch.accelerator.is_available()


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16, and isn't only made to."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device_name() -> str:
    """Names what this machine computes on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine (no GPU)"


def fit_machine(args) -> None:
    """Asks for no more arithmetic than the machine has, and says what that leaves out.

    Raises:
        UserError: two 16-bit types are asked for.
    """
    if not has_accelerator():
        args.use_cpu = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, warns at its import
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 are two types to compute in; give one")
    if args.bf16 and not has_bfloat16():
        args.bf16 = False
        announce(f"--bf16: {device_name()} has no bfloat16 arithmetic; going on in float32")
    if args.fp16 and not has_accelerator():
        args.fp16 = False
        announce(f"--fp16: {device_name()} has no float16 arithmetic; going on in float32")
    if args.tf32 and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8):
        args.tf32 = None
        announce(f"--tf32: {device_name()} has no TF32 arithmetic; going on without")


def _say_going_on(reason: str) -> None:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    announce(f"{reason}; going on " + ("without" if alone else "data-parallel"))


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


def read_fsdp(args) -> None:
    """Turns 2023's words into today's settings: FSDP2, wrapped by layer."""
    words = str(args.fsdp).split()
    known = {"full_shard", "shard_grad_op", "auto_wrap", "offload", "True"}
    if unknown := [word for word in words if word not in known]:
        raise UserError(f"--fsdp {unknown[0]}: FSDP2 knows full_shard, shard_grad_op, auto_wrap and offload")
    config = _read_config("--fsdp_config", args.fsdp_config or {})
    if not can_shard():
        _say_going_on("--fsdp: accelerate shards only across GPUs")
        args.fsdp = None
        return
    args.fsdp_config = {
        "cpu_offload": "offload" in words,
        # full_shard leaves it to resources.choose_resharding
        **({"reshard_after_forward": False} if "shard_grad_op" in words else {}),
        **{name.removeprefix("fsdp_"): value for name, value in config.items()},
    }
    args.fsdp = True


def spare_accuracy(args) -> None:
    """Corrects two decisions of accelerate's that would cost digits under FSDP2, and memory.

    Ranks exchange their gradients after every pass of a step, unless --accelerator_config says otherwise. Else FSDP2
    holds whole ones on every device between passes, and adds them up there in the compute type: with --bf16 True
    2 bytes per parameter, in bfloat16. Exchanged, they are sharded and added up in float32.

    Only weights are cast, and gradients to be exchanged, as the original's FSDP did. accelerate's policy also rounds
    what goes into the model and comes out of it: the loss, and in padding-free passes the weights of tokens.
    """
    config = args.accelerator_config
    config.gradient_accumulation_kwargs = {"sync_each_batch": True, **(config.gradient_accumulation_kwargs or {})}
    if args.bf16 or args.fp16:
        half = torch.bfloat16 if args.bf16 else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, cast_forward_inputs=False)
        args.fsdp_plugin_args["mixed_precision_policy"] = policy


def read_deepspeed(args) -> None:
    """Reads DeepSpeed's config and mends what lost models and learning rates in 2023."""
    config = _read_config("--deepspeed", args.deepspeed)
    if not can_shard():
        _say_going_on("--deepspeed: accelerate starts it only on GPUs")
        args.deepspeed = None
        return
    if not importlib.util.find_spec("deepspeed"):
        raise UserError("--deepspeed: not installed; pip install deepspeed, or use --fsdp")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, which warns dozens of times in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if scheduler := config.pop("scheduler", None):
        announce(f"--deepspeed: its {scheduler['type']} gives way to --lr_scheduler_type {args.lr_scheduler_type}")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        announce("--deepspeed: stage3_gather_16bit_weights_on_model_save set to true, or no model would be saved")
    args.deepspeed = config


def fit_fsdp(args, skeleton) -> None:
    """Tells FSDP what it has to know of a model.

    It wraps the layer class asked for, or the model's own where that isn't in it. Rank 0 alone loads the weights, and
    each rank gets its part of them, so that the host's memory holds one copy and not one for each rank. accelerate
    sends parameters only: a model whose checkpoint holds buffers too is loaded by all ranks.
    """
    own = sorted(skeleton._no_split_modules or ())
    asked = args.fsdp_transformer_layer_cls_to_wrap
    classes = {type(module).__name__ for module in skeleton.modules()}
    chosen = [asked] if asked in classes else own
    if not chosen:
        raise UserError("this model does not say which layers FSDP may wrap; pass --fsdp_transformer_layer_cls_to_wrap")
    why = "as asked" if asked in classes else f"{asked} is not in this model" if asked else "the model's own layer"
    announce(f"FSDP2 wraps {', '.join(chosen)} ({why})")
    args.fsdp_config["transformer_layer_cls_to_wrap"] = chosen
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(chosen)
    only_parameters = skeleton.state_dict().keys() <= dict(skeleton.named_parameters(remove_duplicate=False)).keys()
    args.fsdp_plugin_args["cpu_ram_efficient_loading"] = only_parameters


def gets_weights_sent(args) -> bool:
    """Whether FSDP sends this rank its part of the weights, so that it needs to load none."""
    return bool(args.fsdp) and args.fsdp_plugin_args["cpu_ram_efficient_loading"] and not is_main()


def empty_model(config, dtype: torch.dtype):
    """Makes a causal language model of uninitialized weights: memory that nobody writes to is never taken.

    Buffers outside the checkpoint, such as rotary frequencies, are right. (With `cpu_ram_efficient_loading`
    transformers 5.17 to 5.23 would leave out the values of missing weights only, and load all others on all ranks.)
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model
