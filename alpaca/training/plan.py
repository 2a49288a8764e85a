"""Every decision of a run, taken once from its flags and its model, and written into the Trainer's arguments once.

`flag_settings` decides what the Trainer's arguments must know before transformers checks them: the types that this
machine computes in, and the sharding. `make_plan` decides the rest once the model's shape is known. `write` is the
only function that assigns to the arguments.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_liger_kernel_available

from alpaca.cli import UserError
from alpaca.files import size_text
from alpaca.ranks import announce
from alpaca.training import memory, saving, sharding
from alpaca.training.data import check_labels
from alpaca.training.memory import ModelShape, Workload, estimate
from alpaca.training.packing.passes import check_pass
from alpaca.training.resuming import steps_done

# Decoder-only families whose layers all hand their keyword arguments down to the attention function, and whose loss is
# only the cross-entropy of lm_head's output. tests/training/packing/test_model.py compares each with padded batches.
FAMILIES = ("llama", "opt", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Plan:
    """How a run will train.

    Attributes:
        work: Sharding, ranks, types, checkpointing and resharding, as the memory estimate reads them.
        shape: The model in numbers.
        dtype: Type of the weights in memory, the frozen ones if there is an adapter.
        lora_r: Rank of the LoRA adapter; 0 trains all weights.
        sends_weights: Whether rank 0 alone loads the weights and FSDP2 sends every rank its shard.
        padding_free: Whether steps are padding-free passes.
        shared_prefix: Whether a pass computes the prompts' common prefixes once.
        tokens_per_pass: Tokens of a padding-free pass at most.
        compile_layers: Whether torch.compile compiles the decoder layers.
        notes: The choices that need a reason, one a line.
        settings: What `write` assigns to the Trainer's arguments.
    """

    work: Workload
    shape: ModelShape
    dtype: torch.dtype
    lora_r: int
    sends_weights: bool
    padding_free: bool
    shared_prefix: bool
    tokens_per_pass: int
    compile_layers: bool
    notes: tuple[str, ...]
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        """Describes the plan in a few lines."""
        names = {"none": "data-parallel", "fsdp": "FSDP2", "offload": "FSDP2 with offload"}
        where = f"{names.get(self.work.sharding, 'DeepSpeed')} on {self.work.world} process(es)"
        types = "16-bit compute, float32 training" if self.work.half else "float32"
        types = "pure bfloat16" if self.work.weight_bytes == 2 else types
        trained = f"LoRA of rank {self.lora_r}" if self.lora_r else "all weights trained"
        batches = f"passes of at most {self.tokens_per_pass:,} tokens" if self.padding_free else "padded batches"
        shared = " with shared prefixes" if self.shared_prefix else ""
        saved = "activations recomputed" if self.work.checkpointing else "activations saved"
        layers = "layers compiled" if self.compile_layers else "layers not compiled"
        summary = f"plan: {where}, {types}, {trained},\n      {batches}{shared}, {saved}, {layers}"
        return "\n".join([summary, *self.notes])


def write(args, settings: Mapping[str, Any]) -> None:
    """Assigns settings to the Trainer's arguments. Nothing else does (tests/training/test_plan.py)."""
    for name, value in settings.items():
        setattr(args, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# From the flags alone


def flag_settings(args) -> dict[str, Any]:
    """Decides what the Trainer's arguments must know before transformers checks them.

    Legacy flags become today's, types that this machine lacks are switched off, and --fsdp and --deepspeed become
    settings that accelerate takes.
    """
    settings: dict[str, Any] = {}
    if args.evaluation_strategy is not None:
        settings["eval_strategy"] = args.evaluation_strategy
    if args.warmup_ratio is not None and not args.warmup_steps:
        settings["warmup_steps"] = args.warmup_ratio
    if args.ddp_find_unused_parameters is None:
        settings["ddp_find_unused_parameters"] = False
    return {**settings, **sharding.compute_types(args), **sharding.read_sharding(args)}


# ---------------------------------------------------------------------------------------------------------------------
# From the flags and the model


def make_plan(model_args, data_args, args, skeleton) -> Plan:
    """Decides how to train.

    Args:
        model_args: A ModelArguments of alpaca/training/arguments.py.
        data_args: A DataArguments.
        args: A TrainingArguments.
        skeleton: The model on the meta device.

    Raises:
        UserError: The flags ask for what this model or this machine cannot do; the message names what it can.
    """
    dropout = model_args.lora_dropout if model_args.lora_r else 0.0
    packing = choose_packing(skeleton.config, args.padding_free, args.shared_prefix, dropout, args.n_gpu)
    settings, notes = _evaluation(data_args, args)
    if args.fsdp:
        fsdp_settings, note = _fsdp(args, skeleton)
        settings.update(fsdp_settings)
        notes.append(note)
    work = workload(args)
    shape, lora = _shapes(model_args, work, skeleton)
    if _must_recompute(shape, work, args.device):
        work = replace(work, checkpointing=True)
        # transformers 5.23 reads the second name, 5.17 knows only the first
        settings.update(gradient_checkpointing=True, activation_checkpointing=True)
        notes.append("activations don't fit beside the weights: going on as with --gradient_checkpointing True")
    notes += [note for note in (packing.why_not, memory.check_memory(shape, lora, work, args.device)) if note]
    if args.fsdp and "reshard_after_forward" not in args.fsdp_config:
        resharding = choose_resharding(shape, work, args, packing.padding_free)
        work = replace(work, reshards=resharding.reshards)
        settings["fsdp_plugin_args"]["reshard_after_forward"] = resharding.reshards
        notes.append(resharding.reason)
    kernels = choose_kernels(args, packing.padding_free)
    return Plan(
        work=work,
        shape=shape,
        dtype=torch.bfloat16 if (model_args.lora_r and args.bf16) or args.pure_bf16 else torch.float32,
        lora_r=model_args.lora_r,
        sends_weights=bool(args.fsdp) and settings["fsdp_plugin_args"]["cpu_ram_efficient_loading"],
        padding_free=packing.padding_free,
        shared_prefix=packing.shared_prefix,
        tokens_per_pass=args.max_tokens_per_pass or tokens_per_pass(shape, work, args.device),
        compile_layers=kernels.compile_layers,
        notes=tuple(notes),
        settings={**settings, **kernels.settings},
    )


def _evaluation(data_args, args) -> tuple[dict[str, Any], list[str]]:
    """Switches off an evaluation that has no data."""
    asked = args.eval_strategy != "no" or args.eval_on_start
    if not asked or data_args.eval_data_path or data_args.eval_fraction:
        return {}, []
    settings = {"eval_strategy": IntervalStrategy.NO, "do_eval": False, "eval_on_start": False}
    strategy = IntervalStrategy(args.eval_strategy).value
    return settings, [f"--eval_strategy {strategy}: no --eval_data_path or --eval_fraction; not evaluating"]


def _fsdp(args, skeleton) -> tuple[dict[str, Any], str]:
    """Tells FSDP2 which layers to wrap, who loads the weights, and in which types to compute and exchange."""
    layers, why = sharding.fsdp_layers(args, skeleton)
    settings = sharding.fsdp_precision(args)
    settings["fsdp_config"] = {**args.fsdp_config, "transformer_layer_cls_to_wrap": list(layers)}
    settings["fsdp_plugin_args"]["transformer_cls_names_to_wrap"] = ",".join(layers)
    settings["fsdp_plugin_args"]["cpu_ram_efficient_loading"] = sharding.sends_weights(skeleton)
    return settings, f"FSDP2 wraps {', '.join(layers)} ({why})"


def workload(args) -> Workload:
    """Reads from the Trainer's arguments how a run is spread over devices."""
    way = "zero3_offload" if args.deepspeed else "none" if not args.fsdp else "fsdp"
    if args.fsdp and args.fsdp_config.get("cpu_offload"):
        way = "offload"
    weight_bytes = 2 if args.pure_bf16 else 4
    return Workload(
        sharding=way,
        world=args.world_size,
        local=memory.local_world_size(),
        batch=args.per_device_train_batch_size,
        length=args.model_max_length,
        half=args.bf16 or args.fp16,
        checkpointing=bool(args.gradient_checkpointing),
        weight_bytes=weight_bytes,
        reshards=not args.fsdp or args.fsdp_plugin_args["reshard_after_forward"],
        # On a GPU torch.optim.AdamW takes the roots of all second moments at once, unless it is fused.
        scratch=weight_bytes if args.device.type == "cuda" and args.optim == "adamw_torch" else 0,
    )


def _shapes(model_args, work: Workload, skeleton) -> tuple[ModelShape, ModelShape]:
    """Measures the model as it will be trained, and with a LoRA adapter, which the advice may recommend."""
    if model_args.lora_r:
        with torch.device("meta"):
            adapted = model_args.adapt(copy.deepcopy(skeleton))
        shape = memory.model_shape(adapted, work)
        return shape, shape
    shape = memory.model_shape(skeleton, work)
    head = skeleton.get_output_embeddings()
    linear = [m for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    adapter = sum((m.in_features + m.out_features) * 16 for m in linear)
    # An adapter saves at most its inputs, after dropout, on top.
    return shape, replace(shape, trainable=adapter, saved=2 * shape.saved)


def _must_recompute(shape: ModelShape, work: Workload, device) -> bool:
    """True if the run fits only with gradient checkpointing."""
    if work.checkpointing or memory.fits(shape, work, device):
        return False
    return memory.fits(shape, replace(work, checkpointing=True), device)


# ---------------------------------------------------------------------------------------------------------------------
# Padding-free passes


class Packing(NamedTuple):
    """Whether steps are padding-free, whether they share prefixes, and why something is off ("" if nothing is)."""

    padding_free: bool
    shared_prefix: bool
    why_not: str = ""


def choose_packing(
    config: Any, padding_free: str, shared_prefix: str, lora_dropout: float = 0.0, gpus: int = 1
) -> Packing:
    """Decides between padded batches, padding-free passes, and passes with shared prefixes.

    Args:
        config: The model's transformers configuration.
        padding_free: "true", "false", or "auto", which switches on what leaves every loss as it was.
        shared_prefix: Likewise.
        lora_dropout: Dropout of the adapter, 0 without one.
        gpus: GPUs that this process drives.

    Raises:
        UserError: "true" was asked for and cannot be.
    """
    padding_free, shared_prefix = str(padding_free).lower(), str(shared_prefix).lower()
    dropout = {
        name: p for name, p in {**config.to_dict(), "lora_dropout": lora_dropout}.items() if _is_dropout(name, p)
    }
    noise = ", ".join(f"{name} is {p}" for name, p in dropout.items())
    misfit = _misfit(config, dropout, gpus)
    if padding_free == "false" and shared_prefix == "true":
        raise UserError("--shared_prefix true needs --padding_free auto or true, found --padding_free false")
    if padding_free == "true" and misfit:
        raise UserError(f"--padding_free true: {misfit}; give --padding_free false")
    if shared_prefix == "true" and (misfit or noise):
        raise UserError(f"--shared_prefix true: {misfit or noise + ', so no two prefixes are alike'}; give false")

    if padding_free == "false":
        return Packing(padding_free=False, shared_prefix=False)
    if misfit:
        return Packing(padding_free=False, shared_prefix=False, why_not=f"padding-free batches are off: {misfit}")
    if noise and padding_free == "auto":
        why_not = f"padding-free batches are off: {noise}, which would fall on other tokens than in a padded batch "
        why_not += "(--padding_free true trains so all the same)"
        return Packing(padding_free=False, shared_prefix=False, why_not=why_not)
    if noise:
        why_not = f"the shared prefix is off: {noise}, so no two prefixes are alike"
        return Packing(padding_free=True, shared_prefix=False, why_not=why_not)
    return Packing(padding_free=True, shared_prefix=shared_prefix != "false")


def _is_dropout(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _misfit(config: Any, dropout: dict[str, float], gpus: int) -> str:
    """Says why a model cannot be trained padding-free; "" if it can."""
    if gpus > 1:
        return f"one process drives {gpus} GPUs; torchrun --nproc_per_node={gpus} starts one for each"
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among the tested architectures ({', '.join(FAMILIES)})"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) and config.model_type == "mistral"):
        return "its attention has a sliding window"
    if dropout.keys() & {"attention_dropout", "layerdrop"}:
        return f"{' and '.join(sorted(dropout.keys() & {'attention_dropout', 'layerdrop'}))} cannot be done in passes"
    return ""


def longest_useful_pass(device) -> int:
    """Gets the number of tokens beyond which a padding-free pass gains nothing.

    More than 16,384 tokens make no matmul faster on a GPU; a CPU is fastest while activations stay in its caches.
    """
    return 16384 if device.type == "cuda" else 2048


def tokens_per_pass(shape: ModelShape, work: Workload, device) -> int:
    """Finds how many tokens a padding-free pass may have by the estimate.

    Nine tenths of the memory that the weights leave free go to activations. A pass holds at least one example.
    """
    work = replace(work, scratch=0)  # taken in the optimizer's step, when no pass is running
    empty, one = (estimate(shape, replace(work, batch=tokens, length=1))[0] for tokens in (0, 1))
    there, _ = memory.free_memory(device)
    return max(work.length, min(longest_useful_pass(device), int(0.9 * (there - empty) / (one - empty))))


# ---------------------------------------------------------------------------------------------------------------------
# Resharding and kernels


class Resharding(NamedTuple):
    """Whether FSDP2 gathers weights again for the backward pass, and why."""

    reshards: bool
    reason: str


def choose_resharding(shape: ModelShape, work: Workload, args, padding_free: bool) -> Resharding:
    """Decides whether FSDP2 keeps gathered weights for the backward pass, where the command line has not decided it.

    Losses are the same either way. Weights that are kept need no second gathering. They are kept if a tenth of the
    free memory remains beside them and the longest pass.
    """
    tokens = work.batch * work.length
    if padding_free:
        step = tokens * args.gradient_accumulation_steps
        tokens = args.max_tokens_per_pass or max(work.length, min(longest_useful_pass(args.device), step))
    work = replace(work, batch=tokens, length=1, scratch=0)  # the optimizer's step finds gathered weights freed
    keeping, freeing = (estimate(shape, replace(work, reshards=reshards))[0] for reshards in (False, True))
    more = size_text(keeping - freeing)
    if keeping > 0.9 * memory.free_memory(args.device)[0]:
        detail = f"reshard_after_forward; keeping takes {more} more"
        return Resharding(True, f"FSDP2 gathers weights for forward and backward each ({detail})")
    reason = f"FSDP2 keeps gathered weights for the backward pass (no reshard_after_forward; {more} per device)"
    return Resharding(False, reason)


class Kernels(NamedTuple):
    """Whether to compile the layers, and the settings for Liger's kernels."""

    compile_layers: bool
    settings: dict[str, Any]


def choose_kernels(args, padding_free: bool) -> Kernels:
    """Decides what fuses the small operations of a layer: torch.compile, or Liger's kernels where installed.

    Liger's own loss stays off under padding-free passes: it would replace the packed forward pass.
    """
    on_gpu = args.device.type == "cuda"
    wanted = str(args.compile_layers).lower()
    compiles = wanted == "true" or (wanted == "auto" and on_gpu and padding_free and not args.use_liger_kernel)
    liger = args.use_liger_kernel or (on_gpu and padding_free and not compiles and is_liger_kernel_available())
    settings: dict[str, Any] = {"use_liger_kernel": liger}
    if liger and padding_free:
        settings["liger_kernel_config"] = {**(args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
    return Kernels(compiles, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Does the plan work for these examples?


def check_data(plan: Plan, args, data: Mapping[str, Any], steps: int, resume: str | None) -> None:
    """Checks data and disk against the plan, and says what the run will write.

    Args:
        plan: The plan.
        args: The Trainer's arguments.
        data: What train.py's make_supervised_data_module returned.
        steps: Steps of the run.
        resume: The checkpoint to continue from, if there is one.

    Raises:
        UserError: A batch would have nothing to learn, the longest example exceeds a pass, or the disk is too small.
    """
    check_labels(data["train_dataset"], args.per_device_train_batch_size)
    check_labels(data["eval_dataset"], args.per_device_eval_batch_size)
    if plan.padding_free:
        check_pass(args.max_tokens_per_pass, data["train_dataset"])
    announce(saving.check_disk(args, plan.shape.trainable, steps, steps_done(resume)))


def total_steps(args, examples: int) -> int:
    """Counts the optimizer steps of a run.

    Raises:
        UserError: There are too few examples for a single batch.
    """
    batches = examples / (args.per_device_train_batch_size * args.world_size)
    if args.dataloader_drop_last and batches < 1:
        raise UserError(f"--dataloader_drop_last True drops all of the {examples} example(s): a batch takes more")
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
