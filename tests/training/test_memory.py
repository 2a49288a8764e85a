"""The memory estimate: against the original's machines, against a count of all tensors, against FSDP2."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from packing_models import (
    collate,
    make_model,
)
from training_runs import run

import train
from alpaca.cli import UserError
from alpaca.training import memory
from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes as packing_passes

pytest_plugins = ["training_runs"]

LLAMA_7B = memory.ModelShape(6_738e6, 6_738e6, 6_607e6, 202e6, 4096, 32, 32001, 46 * 4096)
LLAMA_7B_LORA = memory.replace(LLAMA_7B, trainable=40e6, saved=67 * 4096)


def test_7b_needs_what_the_original_needed():
    plan = memory.Workload("fsdp", world=4, local=4, batch=4, length=512, half=True)
    device, host = memory.estimate(LLAMA_7B, plan)
    assert 25 < (6738e6 * 16 / 4) / 2**30 < device / 2**30 < 40, "4 A100s of 80 GB held it, with room"
    assert host == 4 * 6738e6, "one rank loads the float32 weights"
    alone, _ = memory.estimate(LLAMA_7B, memory.Workload("none", 1, 1, 4, 512, half=True))
    assert alone / 2**30 > 100
    stepping, _ = memory.estimate(LLAMA_7B, memory.Workload("none", 1, 1, 4, 512, half=True, scratch=4))
    assert stepping == 6738e6 * (16 + 4), "the roots of the second moments outweigh the activations, freed by then"


@pytest.fixture
def memory_benchmark(root, monkeypatch):
    """benchmarks/memory.py."""
    monkeypatch.syspath_prepend(os.path.join(root, "benchmarks"))
    return importlib.import_module("memory")


def test_memory_table_of_the_readme_is_the_estimate(root, memory_benchmark):
    with open(os.path.join(root, "README.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| (.+) \| (\d+) GiB \| (\d+) GiB \|$", file.read(), re.M)
    ways = ("none", "fsdp", "offload", "zero3_offload", "none")
    found = []
    for (label, *_), way in zip(rows, ways, strict=True):
        plan = memory.Workload(way, 4, 4, 4, 512, half=True, scratch=4)
        model = memory_benchmark.make_model(memory_benchmark.LLAMA_7B, True, 16 if "lora" in label else 0)
        found.append(memory.estimate(memory.model_shape(model, plan), plan))
    assert [(int(a), int(b)) for _, a, b in rows] == [(round(a / 2**30), round(b / 2**30)) for a, b in found]


@pytest.mark.parametrize(
    ("model", "sharding", "world", "changes"),
    [
        ("LLAMA_7B", "fsdp", 4, {}),
        ("LLAMA_7B", "fsdp", 4, {"reshards": False}),
        ("LLAMA_7B", "fsdp", 4, {"checkpointing": True}),
        ("LLAMA_7B", "offload", 4, {}),
        ("LLAMA_7B", "none", 1, {}),
        ("LLAMA_7B", "none", 1, {"half": False}),
        ("LLAMA_7B", "none", 1, {"lora_r": 16}),
        ("OPT_67B", "fsdp", 4, {}),
    ],
)
def test_estimate_is_what_a_step_holds_at_most(memory_benchmark, model, sharding, world, changes):
    """Against a count of all tensors of two passes and a step: layers as wide as 7B's, but four."""
    config = {**getattr(memory_benchmark, model), "num_hidden_layers": 4}
    settings = {"batch": 8, "length": 512, "half": True, "scratch": 4, **changes}
    lora_r = settings.pop("lora_r", 0)
    plan = memory.Workload(sharding, world, world, **settings)
    shape = memory.model_shape(memory_benchmark.make_model(config, plan.half, lora_r), plan)
    assert 0.95 < memory.estimate(shape, plan)[0] / memory_benchmark.count_step(config, plan, lora_r) < 1.1


def test_layer_that_cannot_be_counted_is_estimated_in_silence(memory_benchmark, caplog):
    """Experts' grouped matmuls know no float32 on tensors without data."""
    experts = {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    experts |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    plan = memory.Workload("none", 1, 1, 4, 512, half=False)
    kept = memory.saved_bytes_per_token(memory_benchmark.make_model(experts, False, 0), plan)
    assert 34 * 32 < kept < 200 * 32
    assert not caplog.records


def test_recipe_that_fits_is_named():
    gib, plan = 2**30, memory.Workload("none", world=4, local=4, batch=4, length=512, half=True)

    def advice(device: int, host: int) -> str:
        return memory.fitting_recipe(LLAMA_7B, LLAMA_7B_LORA, plan, device * gib, host * gib)

    assert advice(80, 500).startswith('--fsdp "full_shard auto_wrap" fits')
    assert advice(16, 500).startswith('--fsdp "full_shard auto_wrap offload" fits')
    assert "--lora_r 16" in advice(24, 60)
    assert advice(1, 1).startswith("no recipe fits this machine")


def test_too_little_memory_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_for_training", None)
    monkeypatch.setattr(memory, "host_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"memory: about .* MiB for 1 process\(es\), 1.0 MiB free: too little\. "):
        run(monkeypatch, models["llama"], data, tmp_path / "out")


def test_two_ranks_see_the_same_least_free_memory(tmp_path, root):
    """Each rank has another figure; both decide by the smallest."""
    script = """
import os, torch
from alpaca.training import memory
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
memory.host_memory = lambda: [2**34, 2**33][rank]
there, host = memory.free_memory(torch.device("cpu"))
assert (there, host) == (2**32, 2**33), (there, host)
torch.distributed.destroy_process_group()
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("reshards", [True, False])
def test_fsdp2_keeps_what_the_estimate_says_between_forward_and_backward(examples, reshards):
    """In a world of one as well: there, gathering is a copy of the float32 master weights in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_model(dtype=torch.float32)
        packed_model.install(model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
            fully_shard(part, mp_policy=policy, reshard_after_forward=reshards)
        (one,) = packing_passes.make_passes(packing_passes.documents_of(collate(examples[:2]), 0.1), 10**6)
        model(packed=one)
        kept = [p for p in model.parameters() if not isinstance(p, DTensor)]
        copies = sum(p.numel() * p.element_size() for p in kept)
        assert copies == (0 if reshards else 2 * sum(p.numel() for p in model.parameters()))
    finally:
        torch.distributed.destroy_process_group()
