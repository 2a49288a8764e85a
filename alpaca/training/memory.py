"""Estimates the memory that a run takes, before it loads any weights."""

import contextlib
import copy
import logging
import os
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alpaca.cli import UserError
from alpaca.files import size_text
from alpaca.models import host_memory


@dataclass(frozen=True)
class Workload:
    """How a run is spread over devices, and what each of them computes at once.

    Attributes:
        sharding: "none" (every rank holds everything), "fsdp", "offload" (FSDP with the optimizer states on the host)
            or "zero3_offload".
        world: Ranks on all machines.
        local: Ranks on this machine.
        batch: Examples per rank and micro-batch.
        length: Tokens per example at most.
        half: Whether it computes in 16 bits.
        checkpointing: Whether the backward pass recomputes activations.
        weight_bytes: Bytes of a trained weight; its gradient and Adam's two moments take as many each.
        reshards: Whether FSDP frees a layer's gathered weights after the forward pass and gathers them again.
        scratch: Bytes per trained weight that the optimizer allocates during its step.
    """

    sharding: str
    world: int
    local: int
    batch: int
    length: int
    half: bool
    checkpointing: bool = False
    weight_bytes: int = 4
    reshards: bool = True
    scratch: int = 0

    @property
    def autocast(self) -> bool:
        """True if autocast casts the weights; FSDP and DeepSpeed cast them themselves."""
        return self.half and self.sharding == "none"


# ---------------------------------------------------------------------------------------------------------------------
# The model in numbers


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that its memory and speed follow from.

    Attributes:
        parameters: All parameters, tied ones counted once.
        trainable: Parameters that get gradients.
        matmul_parameters: Parameters that a token is multiplied with, so without the embedding lookup.
        largest_unit: Parameters of the largest part that FSDP or ZeRO-3 gathers at once.
        hidden: Hidden size.
        layers: Number of decoder layers.
        vocabulary: Rows of the embedding.
        saved: Bytes per token that one layer saves in its forward pass for its backward pass.
    """

    parameters: int
    trainable: int
    matmul_parameters: int
    largest_unit: int
    hidden: int
    layers: int
    vocabulary: int
    saved: float


def model_shape(model, work: Workload) -> ModelShape:
    """Measures a model, which may be on the meta device.

    Args:
        model: A causal language model, with its adapter if it has one.
        work: How it will be trained; decides the type that it computes in.
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
        saved=saved_bytes_per_token(model, work),
    )


def saved_bytes_per_token(model, work: Workload) -> float:
    """Counts the bytes per token that one decoder layer saves for its backward pass.

    The count runs the model on fake tensors, which have shapes and no data. It depends on the architecture, the type
    and the adapter: in bfloat16 LLaMA saves 46 bytes per hidden unit, OPT 28. So a layer of LLaMA 7B saves
    46 * 4,096 = 188 kB per token.

    Four counts isolate one layer. Say the embedding, the norms and the logits save E per example, a layer saves L per
    example, and autocast makes copies of weights once per pass: W for a layer, V for the rest. Then

        (2 layers, 2 examples) = V + 2W + 2E + 4L        (1 layer, 2 examples) = V + W + 2E + 2L
        (2 layers, 1 example)  = V + 2W +  E + 2L        (1 layer, 1 example)  = V + W +  E +  L

    and the first minus the second minus the third plus the fourth is L.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")  # explains in twenty lines what it cannot run
    log.disabled = True
    try:
        both, one_layer = _saved_bytes(model, work, 2, 2), _saved_bytes(model, work, 1, 2)
        return (both - one_layer - _saved_bytes(model, work, 2, 1) + _saved_bytes(model, work, 1, 1)) / work.length
    except Exception:  # an operator that needs data: Korthikanti et al. 2022 for a GPT with fused attention
        return 17 * (2 if work.half else 4) * model.config.hidden_size
    finally:
        log.disabled = False


def _saved_bytes(model, work: Workload, layers: int, examples: int) -> int:
    """Counts what the first `layers` layers and the rest of the model save for `examples` examples."""
    part, saved = _first_layers(model, layers), {}
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    if work.half and (frozen or work.weight_bytes == 2 or not work.autocast):
        for parameter in part.parameters():
            if not (work.autocast and parameter.requires_grad):
                parameter.data = parameter.data.to(torch.bfloat16)

    def save(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        part.to_empty(device="cpu")
        ids = torch.zeros(examples, work.length, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
            part(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


def _first_layers(model, layers: int):
    """Copies a model with its first decoder layers only. They alone are in training mode: OPT draws which to skip."""
    names = set(model._no_split_modules or ())
    part = copy.deepcopy(model).eval()
    for module in list(part.modules()):
        for name, children in list(module.named_children()):
            if isinstance(children, torch.nn.ModuleList) and names & {type(child).__name__ for child in children}:
                setattr(module, name, children[:layers].train())
    return part


# ---------------------------------------------------------------------------------------------------------------------
# The estimate


def estimate(shape: ModelShape, work: Workload) -> tuple[float, float]:
    """Estimates the memory of a run.

    LLaMA 7B on four GPUs with `--fsdp "full_shard auto_wrap"`, bfloat16 and 4 x 512 tokens takes about 38 GiB each:

        states       float32 weight, gradient and two moments, sharded:   6.74e9 x 16 / 4            25.1 GiB
        gathered     the embedding and one layer, in bfloat16:            2 x (0.20e9 + 0.20e9)       0.8 GiB
        activations  of 2,048 tokens in 32 layers:                        2,048 x 188e3 x 32         11.5 GiB
        logits       in bfloat16, and float32 with softmax and gradient:  2,048 x 32,001 x (2 + 12)   0.9 GiB

    In pure bfloat16 each state takes 2 bytes. Data-parallel ranks exchange gradients through a second copy. Where FSDP
    doesn't reshard, the forward pass ends with all weights gathered: a whole copy in the compute type on every device,
    even in a world of one, where gathering is a cast. The optimizer's scratch memory is taken once activations are
    freed. `benchmarks/memory.py` compares the sum with a count of all tensors.

    Returns:
        Bytes on each device, and bytes in the memory of this machine (on a CPU both are the host's).
    """
    compute = 2 if work.half else 4
    frozen = shape.parameters - shape.trainable
    weights = work.weight_bytes * shape.trainable + compute * frozen
    states = weights + 3 * work.weight_bytes * shape.trainable
    tokens = work.batch * work.length
    activations = tokens * shape.saved * (1 if work.checkpointing else shape.layers)
    activations += tokens * shape.hidden * compute * shape.layers if work.checkpointing else 0
    activations += tokens * shape.vocabulary * (compute + 12)
    gathered = compute * (shape.largest_unit + (shape.largest_unit if work.reshards else shape.parameters))
    scratch = work.scratch * shape.trainable
    if work.sharding == "none":
        autocast = 2 * shape.trainable if work.half and work.weight_bytes == 4 else 0
        exchanged = work.weight_bytes * shape.trainable if work.world > 1 else 0
        return states + exchanged + max(autocast + activations, scratch), work.local * weights
    if work.sharding == "fsdp":  # rank 0 alone loads the weights and sends each rank its shard
        return states / work.world + max(gathered + activations, scratch / work.world), weights
    if work.sharding == "offload":  # the same, and the shards then lie beside what rank 0 loaded
        host = max(weights + work.local * weights / work.world, work.local * states / work.world)
    else:  # ZeRO-3 keeps 16-bit weights beside the float32 ones
        host = work.local * (states + (2 * shape.parameters if work.half else 0)) / work.world + 4 * shape.parameters
    return gathered + activations, host


def free_memory(device) -> tuple[float, float]:
    """Gets the free bytes of each device and of each machine: the smallest of all ranks, so that they decide alike."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Does it fit?

RECIPES = (  # flags that change the sharding, the fastest first
    ("fsdp", '--fsdp "full_shard auto_wrap"'),
    ("offload", '--fsdp "full_shard auto_wrap offload"'),
    ("zero3_offload", '--deepspeed "./configs/default_offload_opt_param.json"'),
)


def fitting_recipe(shape: ModelShape, lora: ModelShape, work: Workload, device_bytes: float, host_bytes: float) -> str:
    """Names the first recipe that fits into the free memory, or says that none does."""
    work = replace(work, reshards=True)
    one = {"batch": 1, "checkpointing": True}
    smaller = " --per_device_train_batch_size 1 --gradient_checkpointing True (with more --gradient_accumulation_steps)"
    trials = []
    for changes, extra in ({}, ""), (one, smaller):
        trials += [(shape, replace(work, sharding=name, **changes), flags + extra) for name, flags in RECIPES]
    for changes, extra in ({}, ""), (one, smaller):
        trials += [
            (lora, replace(work, sharding=name, **changes), f"--lora_r 16{flags}{extra}")
            for name, flags in (("none", ""), ("fsdp", ' --fsdp "full_shard auto_wrap"'))
        ]
    for its_shape, its_work, flags in trials:
        device, host = estimate(its_shape, its_work)
        if device <= device_bytes and host <= host_bytes:
            return f"{flags} fits (about {size_text(device)} per device, {size_text(host)} of host memory)"
    return "no recipe fits this machine; use more or larger devices, or a smaller model"


def check_memory(shape: ModelShape, lora: ModelShape, work: Workload, device) -> str:
    """Compares the estimate with the free memory.

    Args:
        shape: The model as it will be trained.
        lora: The same model with a LoRA adapter, for the advice.
        work: How it will be trained.
        device: The device of this rank.

    Returns:
        A line with both figures.

    Raises:
        UserError: It doesn't fit; the message names a recipe that does.
    """
    need, host_need = estimate(shape, work)
    there, host = free_memory(device)
    if device.type == "cuda":
        line = f"memory: about {size_text(need)} per GPU of {size_text(there)} free"
        line += f", {size_text(host_need)} on the host of {size_text(host)} free"
    else:  # loading and training share the host's memory
        host_need = max(host_need, work.local * need)
        line = f"memory: about {size_text(host_need)} for {work.local} process(es), {size_text(host)} free"
    if need > there or host_need > host:
        raise UserError(f"{line}: too little. {fitting_recipe(shape, lora, work, there, host)}")
    return line


def fits(shape: ModelShape, work: Workload, device) -> bool:
    """True if the estimate is within the free memory."""
    with contextlib.suppress(UserError):
        return bool(check_memory(shape, shape, work, device))
    return False
