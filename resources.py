"""What a run takes: an estimate of its memory and disk before it starts, its speed while it runs."""

import contextlib
import math
import os
import resource
import sys
import time
from dataclasses import dataclass, replace

import checkpoint
from checkpoint import gib
from utils import UserError, say

# Dense matmul peaks in FLOP/s, from the makers' data sheets: bfloat16 with float32 accumulation.
PEAK_BF16 = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


@dataclass
class ModelShape:
    """Numbers of a model that memory and speed follow from.

    Attributes:
        parameters: all of them, tied ones once.
        trainable: those that get gradients.
        matmul_parameters: those that a token is multiplied with (no embedding lookup).
        largest_unit: parameters of the largest part that FSDP or ZeRO-3 gathers at once.
        hidden, layers, vocabulary: sizes.
    """

    parameters: int
    trainable: int
    matmul_parameters: int
    largest_unit: int
    hidden: int
    layers: int
    vocabulary: int


def model_shape(model, trainable: int | None = None) -> ModelShape:
    """Measures a model, which may be on the meta device.

    Args:
        model: a causal language model.
        trainable: parameters that get gradients; all when None.
    """
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    lookup = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is lookup
    names = set(model._no_split_modules or ())
    units = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
    return ModelShape(
        parameters=total,
        trainable=total if trainable is None else trainable,
        matmul_parameters=total - (0 if tied else lookup.numel()),
        largest_unit=max([*units, lookup.numel()]),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=lookup.shape[0],
    )


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

    Weights, gradients and Adam's two moments take 4 bytes each (2 in pure bfloat16). A sharded run gathers one layer
    at a time and the embedding, or, where FSDP doesn't reshard, ends its forward pass with all of them: a whole copy
    in the compute type on every device, a world of one included, where gathering is a cast. Activations are 34 bytes
    per token, hidden unit and layer in 16 bits (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
    Transformer Models", without the attention matrix, which fused kernels don't store), twice that in 32; logits are
    held in the compute type and, with their softmax and gradient, in float32. The optimizer's scratch memory is taken
    when those have been freed.

    Returns:
        Bytes on each device, and bytes in the memory of this machine (on a CPU both are the host's).
    """
    compute = 2 if plan.half else 4
    frozen = shape.parameters - shape.trainable
    weights = plan.masters * shape.trainable + compute * frozen
    states = weights + 3 * plan.masters * shape.trainable
    tokens = plan.batch * plan.length
    per_layer = tokens * shape.hidden * (17 * compute)
    activations = per_layer * (1 if plan.checkpointing else shape.layers)
    activations += tokens * shape.hidden * compute * shape.layers if plan.checkpointing else 0
    activations += tokens * shape.vocabulary * (compute + 12)
    gathered = compute * (shape.largest_unit + (shape.largest_unit if plan.reshards else shape.parameters))
    scratch = plan.scratch * shape.trainable
    if plan.sharding == "none":
        autocast = 2 * shape.trainable if plan.half and plan.masters == 4 else 0
        return states + max(autocast + activations, scratch), plan.local * weights
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
            return f"{flags} fits (about {gib(device)} per device, {gib(host)} of host memory)"
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
        line = (
            f"memory: about {gib(need)} per GPU of {gib(there)} free, {gib(host_need)} on the host of {gib(host)} free"
        )
    else:  # loading and training share the host's memory
        host_need = max(host_need, plan.local * need)
        line = f"memory: about {gib(host_need)} for {plan.local} process(es), {gib(host)} free"
    if need > there or host_need > host:
        raise UserError(f"{line}: too little. {fitting_recipe(shape, lora, plan, there, host)}")
    return line


def closing_table(state, throughput: "Throughput") -> str:
    """Lays out what a run did.

    Args:
        state: the Trainer's state.
        throughput: what it counted.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    rates, total = throughput.summary(), throughput.total
    rows = [
        ("steps", f"{state.global_step:,}"),
        ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "-"),
        ("time", f"{total['seconds']:,.1f} s, without evaluations and saves"),
        ("tokens", f"{total['tokens']:,.0f} computed, {total['useful']:,.0f} useful (without padding)"),
        ("tokens/s", f"{rates['tokens_per_s']:,} computed, {rates['useful_tokens_per_s']:,} useful"),
        ("MFU", f"{rates['mfu']:.1%}, of the hardware's work {rates['hardware_mfu']:.1%}"),
        ("peak", f"{throughput.peak / 1e12:,.2f} TFLOP/s per device ({throughput.peak_source})"),
        ("peak memory", f"{rates['peak_memory_gib']} GiB in this process"),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


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
    more = gib(need - estimate(shape, freeing)[0])
    args.fsdp_plugin_args["reshard_after_forward"] = reshards = need > 0.9 * there
    if reshards:
        return f"FSDP2 gathers weights for forward and backward each (reshard_after_forward; keeping takes {more} more)"
    return f"FSDP2 keeps gathered weights for the backward pass (no reshard_after_forward; {more} per device)"


def check(args, lora_r: int, skeleton, examples: int) -> ModelShape:
    """Says what the run takes beside what there is, and refuses what cannot fit.

    Raises:
        UserError: memory or disk is short; the message names what fits.
    """
    from torch import nn

    linear = [m for m in skeleton.modules() if isinstance(m, nn.Linear) and m is not skeleton.get_output_embeddings()]
    adapter = sum((m.in_features + m.out_features) * (lora_r or 16) for m in linear)
    full, lora = model_shape(skeleton), model_shape(skeleton, adapter)
    shape = lora if lora_r else full
    plan = plan_of(args)
    if not plan.checkpointing and not fits(shape, plan, args.device):
        recomputing = replace(plan, checkpointing=True)
        if fits(shape, recomputing, args.device):
            say("activations don't fit beside the weights: going on as with --gradient_checkpointing True")
            args.gradient_checkpointing, plan = True, recomputing
            args.activation_checkpointing = True  # what transformers 5.23 reads, and 5.17 doesn't know
    say(check_memory(shape, lora, plan, args.device))
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(examples / step) * args.num_train_epochs)
    kept = checkpoint.saves_kept(
        steps, args.save_strategy, args.save_steps, args.num_train_epochs, args.save_total_limit
    )
    weights = 4 * shape.trainable
    states = (
        0 if args.save_only_model else 8 * shape.trainable + (4 * shape.trainable if args.fsdp or args.deepspeed else 0)
    )
    say(checkpoint.check_disk(args.output_dir, weights, weights + states, kept))
    return shape


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


def host_memory() -> int:
    """Gets the memory that this machine still has for us, in bytes; a container's limit counts."""
    import psutil

    available = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            return available if text == "max" else min(available, int(text) - int(current.read()))
    except (OSError, ValueError):
        return available


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def peak_flops(device) -> tuple[float, str]:
    """Finds the FLOP/s that a device can reach in matmuls.

    Returns:
        The number, and where it comes from: the data sheet, or a matmul timed here.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_BF16.items():
            if part in name:
                return peak, f"{name}'s data sheet, bfloat16"
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "a float32 matmul timed here"


class Throughput:
    """Counts tokens and time, and puts them in words.

    `tokens` are positions that were computed, padding included; `useful` ones belong to examples. MFU is the share of
    the devices' peak that the useful tokens' arithmetic makes up: 6 FLOPs per parameter and token (4 where the weights
    are frozen) and 6 * layers * hidden * length^2 per causal sequence (PaLM, appendix B, halved for causality).
    Hardware MFU counts what was computed instead: padding and recomputed layers, shared prefixes once, and only those
    logits that were wanted (attention as before, so padding's is left out).
    """

    def __init__(self, shape: ModelShape, device, world: int, recomputes: bool = False):
        """Starts counting for a model on `world` devices like `device`, with gradient checkpointing or without."""
        self.shape, self.device, self.world, self.recomputes = shape, device, world, recomputes
        self.peak, self.peak_source = peak_flops(device)
        self.total = {"tokens": 0.0, "useful": 0.0, "flops": 0.0, "executed": 0.0, "seconds": 0.0}
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted since the last report."""
        self.tokens = self.logits = 0
        self.useful = self.squares = 0.0
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """Leaves out the time of what is no training: an evaluation, a save."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, computed: int, logits: int, lengths) -> None:
        """Counts a pass.

        Args:
            computed: positions computed, padding included.
            logits: positions whose logits were computed.
            lengths: true lengths of its sequences, a tensor on any device.
        """
        self.tokens += computed
        self.logits += logits
        self.useful = self.useful + lengths.sum()
        self.squares = self.squares + (lengths.double() ** 2).sum()

    def report(self, gather) -> dict[str, float]:
        """Sums up since the last report.

        Args:
            gather: adds a float64 tensor up over all ranks.

        Returns:
            What the log line shows.
        """
        import torch

        counts = (self.tokens, self.logits, self.useful, self.squares)
        counts = torch.stack([torch.as_tensor(x).double().cpu() for x in counts])
        tokens, logits, useful, squares = gather(counts).tolist()
        seconds = time.perf_counter() - self.since
        frozen = self.shape.parameters - self.shape.trainable
        attention = 6 * self.shape.layers * self.shape.hidden * squares
        head = self.shape.vocabulary * self.shape.hidden
        body = self.shape.matmul_parameters - head
        flops = (6 * (body + head) - 2 * frozen) * useful + attention
        passes = 4 / 3 if self.recomputes else 1  # a third forward-sized part again
        executed = ((6 * body - 2 * frozen) * tokens + attention) * passes + 6 * head * logits
        for name, value in zip(self.total, (tokens, useful, flops, executed, seconds), strict=True):
            self.total[name] += value
        self.restart()
        return self._rates(tokens, useful, flops, executed, seconds)

    def summary(self) -> dict[str, float]:
        """Sums up all reports."""
        return self._rates(*self.total.values())

    def _rates(self, tokens: float, useful: float, flops: float, executed: float, seconds: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "useful_tokens_per_s": round(useful / seconds, 1),
            "mfu": round(flops / seconds / (self.world * self.peak), 4),
            "hardware_mfu": round(executed / seconds / (self.world * self.peak), 4),
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }


def peak_memory(device) -> int:
    """Gets the most memory that this process has used so far, in bytes: the device's, or on a CPU the host's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def local_world_size() -> int:
    """Counts the ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
