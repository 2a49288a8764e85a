"""What a run takes: an estimate of its memory and disk, before it starts."""

import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from alpaca.cli import UserError
from alpaca.files import size_text
from alpaca.models import host_memory
from alpaca.ranks import announce
from alpaca.training import saving


@dataclass
class ModelShape:
    """Numbers of a model that memory and speed follow from.

    Attributes:
        parameters: all of them, tied ones once.
        trainable: those that get gradients.
        matmul_parameters: those that a token is multiplied with (no embedding lookup).
        largest_unit: parameters of the largest part that FSDP or ZeRO-3 gathers at once.
        hidden, layers, vocabulary: sizes.
        kept: bytes per token that a layer keeps from its forward pass for its backward pass.
    """

    parameters: int
    trainable: int
    matmul_parameters: int
    largest_unit: int
    hidden: int
    layers: int
    vocabulary: int
    kept: float


def model_shape(model, plan: "Plan") -> ModelShape:
    """Measures a model, which may be on the meta device.

    Args:
        model: a causal language model, with its adapter if it has one.
        plan: how it will be trained; decides the type that it computes in.
    """
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    lookup = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is lookup
    names = set(model._no_split_modules or ())
    units = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    return ModelShape(
        parameters=total,
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        matmul_parameters=total - (0 if tied else lookup.numel()),
        largest_unit=max([*units, lookup.numel()]),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=lookup.shape[0],
        kept=bytes_kept(model, plan),
    )


def bytes_kept(model, plan: "Plan") -> float:
    """Counts what a decoder layer keeps from its forward pass for its backward pass, in bytes per token.

    Copies of the model with one layer and with two compute one example and two, on tensors that have shapes and no
    data. The difference of the differences is a layer's, without the weights that autocast copies. It depends on the
    architecture, the type and the adapter: LLaMA keeps 46 bytes per hidden unit in bfloat16, OPT 28.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = set(model._no_split_modules or ())
    autocast = plan.half and plan.sharding == "none"
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    halves = plan.half and (frozen or plan.masters == 2 or not autocast)

    def count(layers: int, examples: int) -> int:
        part, storages = copy.deepcopy(model).eval(), {}  # layers train: OPT's decoder would draw which to leave out
        for module in list(part.modules()):
            for name, children in list(module.named_children()):
                if isinstance(children, torch.nn.ModuleList) and names & {type(child).__name__ for child in children}:
                    setattr(module, name, children[:layers].train())
        for parameter in part.parameters():
            if halves and not (autocast and parameter.requires_grad):
                parameter.data = parameter.data.to(torch.bfloat16)

        def keep(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device="cpu")
            ids = torch.zeros(examples, plan.length, dtype=torch.int64)
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                part(input_ids=ids, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    log = logging.getLogger("torch._subclasses.fake_tensor")  # would tell of such an operator in twenty lines
    log.disabled = True
    try:
        return (count(2, 2) - count(1, 2) - count(2, 1) + count(1, 1)) / plan.length
    except Exception:  # an operator without shapes alone: Korthikanti et al.'s figure for a GPT, with fused attention
        return 17 * (2 if plan.half else 4) * model.config.hidden_size
    finally:
        log.disabled = False


@dataclass
class Plan:
    """How a run is spread over devices.

    Attributes:
        sharding: "none" (every rank holds everything), "fsdp", "offload" (FSDP, states on the host) or
            "zero3_offload".
        world: ranks of all machines.
        local: ranks of this machine.
        batch: examples per rank and micro-batch.
        length: tokens per example at most.
        half: whether it computes in 16 bits.
        checkpointing: whether activations are recomputed.
        masters: bytes of a trained weight; its gradient and Adam's two moments take as many each.
        reshards: whether FSDP frees the weights it gathered for a layer's forward pass, to gather them again.
        scratch: bytes per trained weight that the optimizer takes during its step.
    """

    sharding: str
    world: int
    local: int
    batch: int
    length: int
    half: bool
    checkpointing: bool = False
    masters: int = 4
    reshards: bool = True
    scratch: int = 0


def estimate(shape: ModelShape, plan: Plan) -> tuple[float, float]:
    """Estimates the memory of a run.

    Weights, gradients and Adam's two moments take 4 bytes each (2 in pure bfloat16); data-parallel ranks exchange
    gradients through a second copy. A sharded run gathers one layer at a time and the embedding, or, where FSDP
    doesn't reshard, ends its forward pass with all of them: a whole copy in the compute type on every device, a world
    of one included, where gathering is a cast. Activations are what layers keep; logits are held in the compute type
    and, with their softmax and gradient, in float32. The optimizer's scratch memory is taken when those have been
    freed. `benchmarks/memory.py` compares the sum with a count of all tensors.

    Returns:
        Bytes on each device, and bytes in the memory of this machine (on a CPU both are the host's).
    """
    compute = 2 if plan.half else 4
    frozen = shape.parameters - shape.trainable
    weights = plan.masters * shape.trainable + compute * frozen
    states = weights + 3 * plan.masters * shape.trainable
    tokens = plan.batch * plan.length
    activations = tokens * shape.kept * (1 if plan.checkpointing else shape.layers)
    activations += tokens * shape.hidden * compute * shape.layers if plan.checkpointing else 0
    activations += tokens * shape.vocabulary * (compute + 12)
    gathered = compute * (shape.largest_unit + (shape.largest_unit if plan.reshards else shape.parameters))
    scratch = plan.scratch * shape.trainable
    if plan.sharding == "none":
        autocast = 2 * shape.trainable if plan.half and plan.masters == 4 else 0
        exchanged = plan.masters * shape.trainable if plan.world > 1 else 0
        return states + exchanged + max(autocast + activations, scratch), plan.local * weights
    if plan.sharding == "fsdp":  # rank 0 alone loads the weights and sends each rank its part
        return states / plan.world + max(gathered + activations, scratch / plan.world), weights
    if plan.sharding == "offload":  # likewise, and the parts come to lie beside what rank 0 loaded
        host = max(weights + plan.local * weights / plan.world, plan.local * states / plan.world)
    else:  # ZeRO-3 keeps 16-bit weights beside the float32 ones
        host = plan.local * (states + (2 * shape.parameters if plan.half else 0)) / plan.world + 4 * shape.parameters
    return gathered + activations, host


RECIPES = (  # flags that change the plan, the fastest first
    ("fsdp", '--fsdp "full_shard auto_wrap"'),
    ("offload", '--fsdp "full_shard auto_wrap offload"'),
    ("zero3_offload", '--deepspeed "./configs/default_offload_opt_param.json"'),
)


def fitting_recipe(shape: ModelShape, lora: ModelShape, plan: Plan, device_bytes: float, host_bytes: float) -> str:
    """Names the first recipe that fits the memory that is there, or says that none does."""
    plan = replace(plan, reshards=True)
    one = {"batch": 1, "checkpointing": True}
    smaller = " --per_device_train_batch_size 1 --gradient_checkpointing True (with more --gradient_accumulation_steps)"
    trials = []
    for changes, extra in ({}, ""), (one, smaller):
        trials += [(shape, replace(plan, sharding=name, **changes), flags + extra) for name, flags in RECIPES]
    for changes, extra in ({}, ""), (one, smaller):
        trials += [
            (lora, replace(plan, sharding=s, **changes), f"--lora_r 16{f}{extra}")
            for s, f in (("none", ""), ("fsdp", ' --fsdp "full_shard auto_wrap"'))
        ]
    for its_shape, its_plan, flags in trials:
        device, host = estimate(its_shape, its_plan)
        if device <= device_bytes and host <= host_bytes:
            return f"{flags} fits (about {size_text(device)} per device, {size_text(host)} of host memory)"
    return "no recipe fits this machine; use more or larger devices, or a smaller model"


def check_memory(shape: ModelShape, lora: ModelShape, plan: Plan, device) -> str:
    """Compares the estimate with what is there.

    Args:
        shape: the model as it will be trained.
        lora: the same model with a LoRA adapter, for advice.
        plan: how it will be trained.
        device: of this rank.

    Returns:
        A line that says both.

    Raises:
        UserError: it doesn't fit; the message names a recipe that does.
    """
    need, host_need = estimate(shape, plan)
    there, host = free_memory(device)
    if device.type == "cuda":
        line = f"memory: about {size_text(need)} per GPU of {size_text(there)} free"
        line += f", {size_text(host_need)} on the host of {size_text(host)} free"
    else:  # loading and training share the host's memory
        host_need = max(host_need, plan.local * need)
        line = f"memory: about {size_text(host_need)} for {plan.local} process(es), {size_text(host)} free"
    if need > there or host_need > host:
        raise UserError(f"{line}: too little. {fitting_recipe(shape, lora, plan, there, host)}")
    return line


def plan_of(args) -> Plan:
    """Reads from the training arguments how a run is spread over devices."""
    sharding = "zero3_offload" if args.deepspeed else "none" if not args.fsdp else "fsdp"
    if args.fsdp and args.fsdp_config.get("cpu_offload"):
        sharding = "offload"
    return Plan(
        sharding=sharding,
        world=args.world_size,
        local=local_world_size(),
        batch=args.per_device_train_batch_size,
        length=args.model_max_length,
        half=args.bf16 or args.fp16,
        checkpointing=bool(args.gradient_checkpointing),
        masters=2 if args.pure_bf16 else 4,
        reshards=not args.fsdp or args.fsdp_plugin_args["reshard_after_forward"],
        # On a GPU torch.optim.AdamW takes the roots of all second moments at once, unless it is fused.
        scratch=(2 if args.pure_bf16 else 4) if args.device.type == "cuda" and args.optim == "adamw_torch" else 0,
    )


def fits(shape: ModelShape, plan: Plan, device) -> bool:
    """Whether the estimate is within the memory that is there."""
    try:
        check_memory(shape, shape, plan, device)
    except UserError:
        return False
    return True


def most_tokens(args) -> int:
    """Gets the length beyond which a padding-free pass gains nothing.

    More than 16,384 tokens make no matmul faster on a GPU; a CPU is fastest while activations stay in its caches.
    """
    return 16384 if args.device.type == "cuda" else 2048


def tokens_per_pass(shape: ModelShape, args) -> int:
    """Finds how many tokens a padding-free pass may have by the estimate.

    Nine tenths of what is left beside the weights go to activations. Fewer than one example's tokens are of no use.
    """
    plan = replace(plan_of(args), scratch=0)  # the step's: no pass is under way then
    empty, one = (estimate(shape, replace(plan, batch=tokens, length=1))[0] for tokens in (0, 1))
    there, _ = free_memory(args.device)
    return max(args.model_max_length, min(most_tokens(args), int(0.9 * (there - empty) / (one - empty))))


def choose_resharding(shape: ModelShape, args, packed: bool) -> str:
    """Decides whether FSDP2 keeps gathered weights for the backward pass, unless the command line has decided it.

    Losses are the same either way. What is kept needs no second gathering; it is kept where a tenth of the free memory
    still remains beside it and the longest pass.

    Args:
        shape: the model.
        args: train.py's; `reshard_after_forward` is set in the arguments of accelerate's FSDP plugin.
        packed: whether passes are padding-free.

    Returns:
        A line that says what was decided, "" where nothing was.
    """
    if not args.fsdp or "reshard_after_forward" in args.fsdp_config:
        return ""
    tokens = args.per_device_train_batch_size * args.model_max_length
    if packed:
        step = tokens * args.gradient_accumulation_steps
        tokens = args.max_tokens_per_pass or max(args.model_max_length, min(most_tokens(args), step))
    plan = replace(plan_of(args), batch=tokens, length=1, scratch=0)  # the step finds gathered weights freed
    keeping, freeing = (replace(plan, reshards=reshards) for reshards in (False, True))
    need, there = estimate(shape, keeping)[0], free_memory(args.device)[0]
    more = size_text(need - estimate(shape, freeing)[0])
    args.fsdp_plugin_args["reshard_after_forward"] = reshards = need > 0.9 * there
    if reshards:
        return f"FSDP2 gathers weights for forward and backward each (reshard_after_forward; keeping takes {more} more)"
    return f"FSDP2 keeps gathered weights for the backward pass (no reshard_after_forward; {more} per device)"


def check(args, skeleton, adapt: Callable | None, examples: int) -> ModelShape:
    """Says what the run takes beside what there is, and refuses what cannot fit.

    Args:
        args: train.py's.
        skeleton: the model on the meta device.
        adapt: puts a LoRA adapter into it; None trains all weights.
        examples: to train on.

    Raises:
        UserError: memory or disk is short; the message names what fits.
    """
    import torch

    plan = plan_of(args)
    if adapt:
        with torch.device("meta"):
            adapted = adapt(copy.deepcopy(skeleton))
        shape = lora = model_shape(adapted, plan)
    else:
        shape = model_shape(skeleton, plan)
        head = skeleton.get_output_embeddings()
        linear = [m for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        adapter = sum((m.in_features + m.out_features) * 16 for m in linear)
        lora = replace(shape, trainable=adapter, kept=2 * shape.kept)  # at most: its inputs, after dropout
    if not plan.checkpointing and not fits(shape, plan, args.device):
        recomputing = replace(plan, checkpointing=True)
        if fits(shape, recomputing, args.device):
            announce("activations don't fit beside the weights: going on as with --gradient_checkpointing True")
            args.gradient_checkpointing, plan = True, recomputing
            args.activation_checkpointing = True  # what transformers 5.23 reads, and 5.17 doesn't know
    announce(check_memory(shape, lora, plan, args.device))
    steps = total_steps(args, examples)
    kept = saving.saves_kept(steps, args.save_strategy, args.save_steps, args.num_train_epochs, args.save_total_limit)
    weights = 4 * shape.trainable
    states = (
        0 if args.save_only_model else 8 * shape.trainable + (4 * shape.trainable if args.fsdp or args.deepspeed else 0)
    )
    announce(saving.check_disk(args.output_dir, weights, weights + states, kept))
    return shape


def total_steps(args, examples: int) -> int:
    """Counts the optimizer steps of a run.

    Raises:
        UserError: there are too few examples for a single batch.
    """
    batches = examples / (args.per_device_train_batch_size * args.world_size)
    if args.dataloader_drop_last and batches < 1:
        raise UserError(f"--dataloader_drop_last True drops all of the {examples} example(s): a batch takes more")
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)


def free_memory(device) -> tuple[float, float]:
    """Gets the memory that each device and each machine has free, in bytes: the least of all ranks, to decide alike."""
    import torch

    host = host_memory()
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host / local_world_size()
    least = torch.tensor([there, host], dtype=torch.float64)
    if torch.distributed.is_initialized():
        least = least.to(device)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    there, host = least.tolist()
    return there, host


def local_world_size() -> int:
    """Counts the ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
