"""Counts the memory of a full-size training step, tensor by tensor, to check train.py's estimate. It needs no GPU.

    python -m benchmarks.memory count

Steps run on PyTorch's fake tensors, which have shapes but no data, as rank 0 of a fake process group: the model's own
layers, FSDP2 gathering and freeing weights, two passes of accumulation, AdamW. Not counted is what a GPU needs on top:
its context (about half a GiB), the buffers of collectives and kernels, and the allocator's fragmentation.
"""

import contextlib
import gc
import os
import time
import warnings
import weakref
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alpaca.cli import run_cli
from alpaca.files import jdump
from alpaca.training import memory
from benchmarks.provenance import RESULTS, provenance
from benchmarks.train_throughput import LLAMA_7B

# Touvron et al. 2023, table 2; Zhang et al. 2022, table 1.
LLAMA_13B = {**LLAMA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LLAMA_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40}
OPT_67B = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "word_embed_proj_dim": 4096}
OPT_67B |= {"ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32}
RUNS = {  # name: model, sharding, ranks, changes to the plan
    "LLaMA 7B, fsdp": (LLAMA_7B, "fsdp", 4, {}),
    "LLaMA 7B, fsdp, weights kept": (LLAMA_7B, "fsdp", 4, {"reshards": False}),
    "LLaMA 7B, fsdp, checkpointing": (LLAMA_7B, "fsdp", 4, {"checkpointing": True}),
    "LLaMA 7B, fsdp, padding-free, 8,192 tokens": (LLAMA_7B, "fsdp", 4, {"batch": 1, "length": 8192, "packed": True}),
    "LLaMA 7B, offload": (LLAMA_7B, "offload", 4, {}),
    "LLaMA 7B, one GPU": (LLAMA_7B, "none", 1, {}),
    "LLaMA 7B, LoRA": (LLAMA_7B, "none", 1, {"lora_r": 16}),
    "OPT 6.7B, fsdp": (OPT_67B, "fsdp", 4, {}),
    "LLaMA 13B, 8 GPUs, fsdp": (LLAMA_13B, "fsdp", 8, {}),
}


class Meter(TorchDispatchMode):
    """Adds up the storages of all tensors created while it is active, for as long as anything refers to them.

    Attributes:
        live: Bytes held now.
        peak: Most bytes held since it was last set to 0.
    """

    def __init__(self):
        """Starts at zero bytes."""
        super().__init__()
        self.live = self.peak = 0
        self._sizes = weakref.WeakKeyDictionary()

    def track(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage not in self._sizes:
            size = self._sizes[storage] = [0]
            self.resize(storage, storage.nbytes())
            weakref.finalize(storage, self._forget, size)

    def resize(self, storage, nbytes: int) -> None:
        """Records a storage's new size."""
        if storage in self._sizes:
            size = self._sizes[storage]
            self.live, size[0] = self.live + nbytes - size[0], nbytes
            self.peak = max(self.peak, self.live)

    def _forget(self, size: list[int]) -> None:
        self.live, size[0] = self.live - size[0], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Runs an operator and tracks the tensors it returns."""
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # PyTorch calls again with the local tensors
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.track(one)
        return result

    @contextlib.contextmanager
    def seeing_resizes(self):
        """Also tracks storages that are resized in place, as FSDP2 does to gathered weights."""
        original = torch.UntypedStorage.resize_

        def resize(storage, nbytes):
            result = original(storage, nbytes)
            self.resize(storage, nbytes)
            return result

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original


@contextlib.contextmanager
def fake_world(ranks: int):
    """Makes this process rank 0 of a fake process group whose collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def make_model(config: dict, half: bool, lora_r: int):
    """Makes a model on the meta device, in the types that train.py uses."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from alpaca.training import lora

    dtype = torch.bfloat16 if half and lora_r else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    return lora.add_adapter(model, lora_r, 16.0, 0.05, None) if lora_r else model


def count_step(config: dict, plan: memory.Workload, lora_r: int = 0, packed: bool = False) -> float:
    """Counts the most bytes that a step holds at once on a device.

    Args:
        config: Model configuration, as transformers takes it.
        plan: How the model is trained; its sharding is none (with one rank), fsdp or offload.
        lora_r: Rank of a LoRA adapter; 0 trains all weights.
        packed: Whether passes are padding-free; the plan's batch must then be 1.
    """
    model = make_model(config, plan.half, lora_r)
    meter, step = Meter(), (_packed_step if packed else _padded_step)(model, plan)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(fake_world(plan.world))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu").eval()
        for layer in _layers(model):
            layer.train()  # the layers alone: OPT's LayerDrop draws a number in training mode, which needs data
        model.tie_weights()
        if plan.checkpointing:
            model.gradient_checkpointing_enable()
        if plan.sharding != "none":
            _shard(model, mesh, plan)
        for tensor in (*model.parameters(), *model.buffers()):
            meter.track(_local(tensor))
        # AdamW gets this rank's shards: for a DTensor, sharding rules are worked out on tensors of the full shape.
        trained = {p: torch.nn.Parameter(_local(p).detach()) for p in model.parameters() if p.requires_grad}
        fused = {"foreach": plan.scratch > 0, "fused": plan.scratch == 0}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, **fused)
        stack.enter_context(meter.seeing_resizes())
        stack.enter_context(meter)
        for _ in range(2):  # the first step creates Adam's moments
            meter.peak = 0
            step()
            step()
            passes = meter.peak
            for parameter, part in trained.items():
                part.grad, parameter.grad = _local(parameter.grad), None
            optimizer.step()
            states = meter.live
            optimizer.zero_grad()
    # With offload, master weights, gradients and moments are on the host, and AdamW runs there.
    return passes - states if plan.sharding == "offload" else meter.peak


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _layers(model) -> list:
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def _shard(model, mesh, plan: memory.Workload) -> None:
    """Wraps a model as accelerate does for train.py, in the same precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if plan.half else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, cast_forward_inputs=False)
    for module in (*_layers(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=plan.reshards)


def _padded_step(model, plan: memory.Workload):
    def step() -> None:
        ids = torch.zeros(plan.batch, plan.length, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.half and plan.sharding == "none"):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()

    return step


def _packed_step(model, plan: memory.Workload):
    """Runs one document as long as a pass: attention then saves what variable-length attention saves on a GPU."""
    from alpaca.training.packing import model as packed_model
    from alpaca.training.packing import passes as packing_passes

    packed_model.install(model)
    ids = torch.zeros(plan.length, dtype=torch.int64)
    (one,) = packing_passes.make_passes([packing_passes.Document(ids, ids, 1.0)], plan.length)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.half and plan.sharding == "none"):
            loss = model(packed=one)
        loss.backward()

    return step


def count(output: str = os.path.join(RESULTS, "memory.json")) -> None:
    """Counts each recipe of RUNS, prints it beside train.py's estimate and writes the result.

    Args:
        output: JSON file to write.
    """
    warnings.simplefilter("ignore")  # transformers' about renamed names, and FSDP2's about views; neither matters here
    rows = {}
    for name, (config, sharding, ranks, changes) in RUNS.items():
        start = time.perf_counter()
        settings = {"batch": 4, "length": 512, "half": True, "scratch": 4, **changes}
        lora_r, packed = settings.pop("lora_r", 0), settings.pop("packed", False)
        plan = memory.Workload(sharding, ranks, ranks, **settings)
        counted = count_step(config, plan, lora_r, packed)
        padded = replace(plan, length=min(plan.length, 512))  # the length at which train.py counts a layer
        shape = memory.model_shape(make_model(config, plan.half, lora_r), padded)
        estimated = memory.estimate(shape, plan)[0]
        rows[name] = {"counted_gib": round(counted / 2**30, 2), "estimated_gib": round(estimated / 2**30, 2)}
        rows[name]["estimate_over_count"] = round(estimated / counted, 3)
        print(
            f"{name:45} counted {counted / 2**30:6.1f} GiB, estimated {estimated / 2**30:6.1f} GiB, "
            f"{estimated / counted:.2f} ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        gc.collect()
    jdump({**provenance("torch", "transformers", "peft"), "runs": rows}, output)
    print(f"written to {os.path.relpath(output)}")


if __name__ == "__main__":
    run_cli({"count": count})
