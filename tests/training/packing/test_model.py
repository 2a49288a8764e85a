"""The packed forward pass: the padded batch's loss and gradients, without padding and with shared prefixes."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from packing_models import (
    CONFIGS,
    collate,
    gradients,
    make_model,
    micro_batches,
    packed_loss,
    worst,
)

from alpaca.training import plan
from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes as packing_passes

ALL_WAYS = list(itertools.product(("micro_batch", "global"), (False, True), (100_000, 600)))
CASES = [(name, *way) for name in CONFIGS for way in (ALL_WAYS if name in ("llama", "opt") else ALL_WAYS[1:3])]


@pytest.mark.parametrize(("name", "reduction", "shared", "max_tokens"), CASES)
def test_loss_and_every_gradient_equal_the_padded_batches(examples, reference, name, reduction, shared, max_tokens):
    expected_loss, expected = reference(name, reduction)
    model = make_model(name)
    packed_model.install(model)
    loss, passes = packed_loss(model, micro_batches(examples, 4), reduction, shared, max_tokens)
    assert (len(passes) == 1) == (max_tokens == 100_000)
    assert shared == any(one.layout.copies for one in passes)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_two_ranks_under_fsdp2_get_the_padded_gradients(tmp_path, root):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python"]
    command += [sys.executable, os.path.join(root, "tests", "packing_ranks.py"), str(tmp_path / "errors.json")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "errors.json").read_text())
    assert {errors["passes"] > 1 for errors in results.values()} == {True, False}
    for case, errors in results.items():
        assert errors["loss"] < 1e-7, case
        assert errors["gradient"] < 1e-7, case


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("shared", [False, True], ids=["padding-free", "shared-prefix"])
def test_changing_one_document_changes_no_others_logits(examples, name, shared):
    model = make_model(name)
    packed_model.install(model)
    prefixes = packing_passes.find_prefixes(examples, 16) if shared else []
    changed = {**examples[5], "input_ids": examples[5]["input_ids"].clone()}
    changed["input_ids"][60:] = 7
    logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for batch in (examples, [*examples[:5], changed, *examples[6:]]):
        documents = packing_passes.documents_of(collate(batch), 1.0, prefixes)
        documents[5] = dataclasses.replace(documents[5], weight=5.0)
        (one,) = packing_passes.make_passes(documents, 10**6)
        model(packed=one)
    others = one.weights != 5.0
    assert torch.equal(logits[0][others], logits[1][others])
    assert not torch.equal(logits[0][~others], logits[1][~others])


def test_chunked_logits_give_the_same_loss_and_gradients(examples, reference, monkeypatch):
    monkeypatch.setattr(packed_model, "CHUNK_LOGITS", 512 * 50)
    expected_loss, expected = reference("llama", "global")
    model = make_model()
    packed_model.install(model)
    loss, _ = packed_loss(model, micro_batches(examples, 4), "global", True, 100_000)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_gradient_checkpointing_gives_the_same_gradients(examples, reference):
    expected_loss, expected = reference("llama", "micro_batch")
    model = make_model()
    packed_model.install(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_a_padded_batch_gets_the_same_logits_as_before(examples):
    batch = collate(examples[:4])
    model = make_model()
    before = model(**batch)
    packed_model.install(model)
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_a_saved_config_names_no_attention_of_ours(tmp_path):
    model = make_model()
    packed_model.install(model)
    model.save_pretrained(tmp_path)
    assert packed_model.ATTENTION not in (tmp_path / "config.json").read_text()


def test_flex_attentions_mask_is_the_same_rule(examples):
    from torch.nn.attention.flex_attention import flex_attention

    documents = packing_passes.documents_of(collate(examples[:6]), 1.0, packing_passes.find_prefixes(examples, 16))
    (one,) = packing_passes.make_passes(documents, 10**6)
    states = [torch.randn(1, 4, one.input_ids.shape[1], 16) for _ in range(3)]
    expected = packed_model._per_document(*states, one.layout, None)
    found = flex_attention(*states, block_mask=one.layout.block_mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_gathered_keys_give_the_gradient_of_index_select(examples):
    documents = packing_passes.documents_of(collate(examples), 1.0, packing_passes.find_prefixes(examples, 16))
    layout = packing_passes.make_passes(documents, 10**6)[0].layout
    states = torch.randn(int(layout.cu_seqlens_q[-1]), 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(int(layout.cu_seqlens_k[-1]), 2, 4, dtype=torch.float64)
    gathered = packed_model._Gather.apply(states, layout.kv_index, layout.first_copy, layout.copies)
    (found,) = torch.autograd.grad((gathered * weights).sum(), states)
    (expected,) = torch.autograd.grad((states[layout.kv_index] * weights).sum(), states)
    torch.testing.assert_close(found, expected)


def test_compiled_layers_give_the_same_gradients_from_few_graphs(examples, monkeypatch):
    from torch._dynamo.utils import counters

    def stand_in(query, key, value, *seqlens, scale, window_size):
        """Same shapes as varlen_attn, which no CPU runs; what it computes does not matter here."""
        return query + key.mean(0) + value.sum(0) / seqlens[-1]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(packed_model, "_per_document", packed_model._varlen)
    prefixes = packing_passes.find_prefixes(examples, 16)
    plain, compiled = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    packed_model.install(plain)
    packed_model.install(compiled)
    torch._dynamo.reset()
    counters.clear()
    packed_model.compile_layers(compiled, backend="aot_eager")
    for chosen in (examples, examples[:7], examples[3:9], examples[1:], examples[4:]):
        (one,) = packing_passes.make_passes(packing_passes.documents_of(collate(chosen), 0.01, prefixes), 10**6)
        plain(packed=one).backward()
        compiled(packed=one).backward()
    assert worst(gradients(compiled), gradients(plain)) < 1e-6
    assert counters["graph_break"] == {}
    assert 1 <= counters["stats"]["unique_graphs"] <= 3  # not one per pass, and not one per layer


def test_varlen_attentions_arguments_mean_the_same_documents(examples, reference, monkeypatch):
    kinds = set()

    def varlen_by_definition(query, key, value, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, -1)):
        """What PyTorch documents, document by document: (-1, 0) is causal, the last query at the last key."""
        assert window_size == (-1, 0)
        kinds.update((query.dtype, key.dtype, value.dtype))
        outputs = []
        for i in range(len(cu_q) - 1):
            q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
            k, v = (states[cu_k[i] : cu_k[i + 1]].transpose(0, 1) for states in (key, value))
            assert q.shape[1] <= max_q
            assert k.shape[1] <= max_k
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
        return torch.cat(outputs, 1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    monkeypatch.setattr(packed_model, "_per_document", packed_model._varlen)
    for name in ("llama", "llama, grouped queries", "opt"):
        expected_loss, expected = reference(name, "micro_batch")
        model = make_model(name)
        packed_model.install(model)
        loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
        assert worst(gradients(model), expected) < 1e-7
    assert kinds == {torch.float64}
    kinds.clear()
    model = make_model(dtype=torch.float32)
    packed_model.install(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
    assert kinds == {torch.bfloat16}
    assert loss.item() == pytest.approx(reference("llama", "micro_batch")[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["_varlen", "_flex"])
def test_attention_on_a_gpu_agrees_with_float64_on_the_cpu(examples, attention):
    documents = packing_passes.documents_of(collate(examples), 1.0, packing_passes.find_prefixes(examples, 16))
    layout = packing_passes.make_passes(documents, 10**6)[0].layout
    torch.manual_seed(0)
    states = [torch.randn(1, 4, int(layout.cu_seqlens_q[-1]), 64, dtype=torch.float64) for _ in range(3)]
    upstream = torch.randn(1, states[0].shape[2], 4, 64, dtype=torch.float64)
    dtype = torch.bfloat16 if attention == "_varlen" else torch.float32
    results = []
    for attend, kind, device in ((packed_model._per_document, torch.float64, "cpu"), (attention, dtype, "cuda")):
        attend = getattr(packed_model, attend) if isinstance(attend, str) else attend
        inputs = [one.to(device, kind).requires_grad_() for one in states]
        output = attend(*inputs, packed_model.to_device(layout, device), None)
        found = torch.autograd.grad(output, inputs, upstream.to(device, kind))
        results.append([one.detach().double().cpu() for one in (output, *found)])
    for expected, found in zip(*results, strict=True):
        assert float((found - expected).norm() / expected.norm()) < (1e-2 if attention == "_varlen" else 2e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_liger_itself_replaces_the_layers_parts_only(monkeypatch, name):
    """The real package, where it can be imported (it needs triton): no kernel runs here."""
    pytest.importorskip("liger_kernel.transformers")
    from transformers.integrations.liger import apply_liger_kernel

    model = make_model(name, dtype=torch.float32)
    modeling = sys.modules[type(model).__module__]
    for part in vars(modeling).copy():  # Liger replaces functions and classes of the module for good
        monkeypatch.setattr(modeling, part, getattr(modeling, part))
    rotate = modeling.apply_rotary_pos_emb
    packed_model.install(model)
    forward, args = model.forward, SimpleNamespace(compile_layers="false", use_liger_kernel=True)
    args.device, args.liger_kernel_config = torch.device("cpu"), None
    apply_liger_kernel(model, plan.choose_kernels(args, padding_free=True).settings["liger_kernel_config"])
    assert model.forward == forward
    layer = model.model.layers[0]
    assert modeling.apply_rotary_pos_emb is not rotate
    for module, kernel in ((layer.mlp, "LigerSwiGLUMLP"), (layer.input_layernorm, "LigerRMSNorm")):
        assert module.forward.__func__.__qualname__ == f"{kernel}.forward"


@pytest.mark.gpu
def test_ligers_kernels_give_the_same_gradients_on_a_gpu(examples, monkeypatch):
    pytest.importorskip("liger_kernel.transformers")
    from transformers.integrations.liger import apply_liger_kernel

    plain, liger = (make_model(dtype=torch.float32).cuda() for _ in range(2))
    modeling = sys.modules[type(plain).__module__]
    for part in vars(modeling).copy():
        monkeypatch.setattr(modeling, part, getattr(modeling, part))
    (one,) = packing_passes.make_passes(
        packing_passes.documents_of(collate(examples), 0.01, packing_passes.find_prefixes(examples, 16)), 10**6
    )
    one = packed_model.to_device(one, torch.device("cuda"))
    for model in (plain, liger):
        packed_model.install(model)
        if model is liger:
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        model(packed=one).backward()
    assert worst(gradients(liger), gradients(plain)) < 1e-3
