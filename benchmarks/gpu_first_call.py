"""Measures what the speed of padding-free training depends on, on one GPU and in about two minutes.

    python -m benchmarks.gpu_first_call measure

- Attention: the error of `varlen_attn` with shared prefixes against float64, in output and gradients. (Its causal
  mask must align the last query with the last key.)
- A decoder layer of LLaMA-7B, eager and compiled: time, and bytes saved for the backward pass per token.
- The matmuls of that layer with 6,144 and 12,288 rows: TFLOP/s in bfloat16.
- An AdamW step on float32 weights and states: time for 6.7 billion parameters, scaled up from as many as fit.
"""

import os
import statistics
import traceback

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump
from benchmarks.provenance import RESULTS, provenance
from benchmarks.train_throughput import LLAMA_7B, PACKAGES, drawn_examples

PARAMETERS_7B = 6_738_423_808


def measure(output: str = os.path.join(RESULTS, "gpu_first_call.json")) -> None:
    """Measures all of it, prints each figure and writes the result.

    Args:
        output: JSON file to write.

    Raises:
        UserError: There is no GPU, or some figures could not be measured; the others are written all the same.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("no GPU found; this benchmark measures one (train_throughput measures a CPU too)")
    result, failed = provenance(*PACKAGES, gpu=torch.cuda.get_device_name()), []
    for name, figures in (
        ("attention_error", attention_error),
        ("decoder_layer", decoder_layer),
        ("matmul_tflops", matmul_tflops),
        ("adamw_step", adamw_step),
    ):
        try:
            result[name] = figures()
        except Exception as error:  # whatever it was, the other figures are worth having
            traceback.print_exc()
            result[name] = {"failed": f"{type(error).__name__}: {error}"}
            failed.append(name)
        print(f"{name}: {result[name]}", flush=True)
        torch.cuda.empty_cache()
    jdump(result, output)
    print(f"written to {os.path.relpath(output)}")
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; the errors are above and in the file")


def one_pass(examples: int):
    """Lays out examples of Alpaca's lengths as one pass, on the GPU."""
    import torch

    from alpaca.training.packing import model as packed_model
    from alpaca.training.packing import passes

    data = drawn_examples(examples, LLAMA_7B["vocab_size"])
    prefixes = passes.find_prefixes(data, examples)
    documents = []
    for example in data:
        batch = {"input_ids": example["input_ids"][None], "labels": example["labels"][None]}
        batch["attention_mask"] = batch["input_ids"].new_ones(batch["input_ids"].shape)
        documents += passes.documents_of(batch, 1.0, prefixes)
    (found,) = passes.make_passes(documents, 10**9)
    return packed_model.to_device(found, torch.device("cuda"))


def attention_error() -> dict[str, float]:
    """Computes the relative errors of output and gradients against float64 on the CPU."""
    import torch

    from alpaca.training.packing import model as packed_model

    layout = one_pass(32).layout
    tokens = int(layout.cu_seqlens_q[-1])
    torch.manual_seed(0)
    states = [torch.randn(1, 4, tokens, 128, dtype=torch.float64) for _ in range(3)]
    upstream = torch.randn(1, tokens, 4, 128, dtype=torch.float64)
    found = {}
    for name, attend, device, dtype in (
        ("float64", packed_model._per_document, "cpu", torch.float64),
        ("varlen", packed_model._varlen, "cuda", torch.bfloat16),
        ("flex", packed_model._flex, "cuda", torch.bfloat16),
    ):
        inputs = [one.to(device, dtype).requires_grad_() for one in states]
        output = attend(*inputs, packed_model.to_device(layout, device), None)
        gradients = torch.autograd.grad(output, inputs, upstream.to(device, dtype))
        found[name] = [one.detach().double().cpu() for one in (output, *gradients)]
    exact = found.pop("float64")
    return {
        f"{name} {what}": float((ours - right).norm() / right.norm())
        for name, results in found.items()
        for what, ours, right in zip(("output", "dq", "dk", "dv"), results, exact, strict=True)
    }


def decoder_layer() -> dict:
    """Measures one layer, forward and backward, in a pass of about 6K tokens: bytes saved per token, and time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from alpaca.training.packing import model as packed_model

    batch = one_pass(64)
    found = {"tokens": batch.input_ids.numel()}
    for compiled in (False, True):
        settings = {**LLAMA_7B, "num_hidden_layers": 1}
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16).train()
        packed_model.install(model)
        if compiled:
            packed_model.compile_layers(model)
        (layer,) = model.model.layers
        states = torch.randn(1, found["tokens"], LLAMA_7B["hidden_size"], device="cuda", dtype=torch.bfloat16)
        states.requires_grad_()
        rotary = model.model.rotary_emb(states, batch.position_ids)
        more = {"attention_mask": None, "position_embeddings": rotary, "packed_layout": batch.layout}
        layer(states, **more).sum().backward()  # warms up and allocates the gradients
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = layer(states, **more)
        kept = torch.cuda.memory_allocated() - before
        del output
        seconds = _seconds(lambda layer=layer, states=states, more=more: layer(states, **more).sum().backward())
        kind = "compiled" if compiled else "eager"
        found[f"{kind} bytes kept per token"] = round(kept / found["tokens"])
        found[f"{kind} ms"] = round(seconds * 1e3, 3)
        found[f"{kind} TFLOP/s in matmuls"] = round(
            6 * sum(p.numel() for p in layer.parameters()) * found["tokens"] / seconds / 1e12, 1
        )
        del model, layer, states
    return found


def matmul_tflops() -> dict[str, float]:
    """Times bfloat16 matmuls of the layer's three shapes."""
    import torch

    found = {}
    for rows in (6144, 12288):
        for inner, outer in ((4096, 4096), (4096, 11008), (11008, 4096)):
            a, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((rows, inner), (outer, inner)))
            seconds = _seconds(lambda a=a, b=b: torch.nn.functional.linear(a, b))
            found[f"{rows} x {inner} x {outer}"] = round(2 * rows * inner * outer / seconds / 1e12, 1)
    return found


def adamw_step() -> dict[str, float]:
    """Times torch.optim.AdamW, fused and default, scaled to LLaMA-7B's parameters."""
    import torch

    count = min(PARAMETERS_7B, torch.cuda.mem_get_info()[0] // 24) // 10
    found = {"parameters": count * 10}
    for fused in (True, False):
        weights = [torch.nn.Parameter(torch.randn(count, device="cuda")) for _ in range(10)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=2e-5, fused=fused, foreach=False if fused else None)
        seconds = _seconds(optimizer.step, repeats=5)
        found[f"{'fused' if fused else 'default'} ms for 6.7B"] = round(seconds / (count * 10) * PARAMETERS_7B * 1e3, 1)
        del optimizer, weights
        torch.cuda.empty_cache()
    return found


def _seconds(work, repeats: int = 20) -> float:
    """Returns the median time of a call, by device events, after three calls to warm up."""
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    run_cli({"measure": measure})
