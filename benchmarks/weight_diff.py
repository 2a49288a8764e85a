"""Time and peak memory of make_diff and recover, beside `cp` and beside a reference that loads two whole models.

    python -m benchmarks.weight_diff run --sizes 0.3B,1.1B --work_dir weight_diff_benchmark

Writes pairs of random float32 LLaMA checkpoints, measures and removes them. All figures of one size come from one run.
It takes 20 GB of disk, and 10 GB of memory for the reference. Writes benchmarks/results/weight_diff.json.
"""

import contextlib
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from statistics import median

import numpy as np

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump
from alpaca.weight_diff.checkpoint_files import plan_output
from alpaca.weight_diff.stream import Sink
from benchmarks.provenance import RESULTS, ROOT, provenance

# Hidden size, intermediate size, layers, attention heads, key-value heads; 1.1B has TinyLlama's shape.
SHAPES = {"0.3B": (1024, 2816, 18, 16, 16), "1.1B": (2048, 5632, 22, 32, 4)}
VOCABULARY = 32000
REFERENCE = """
import sys, torch, transformers
command, raw, other, out = sys.argv[1:]
load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
with torch.inference_mode():
    model, base = load(other), load(raw)
    if model.config.vocab_size != base.config.vocab_size:
        base.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
        for embedding in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
            embedding[-1:] = embedding[:-1].mean(dim=0, keepdim=True)
    state, base_state = model.state_dict(), base.state_dict()
    for name in state:
        state[name].add_(base_state[name], alpha=-1 if command == "make_diff" else 1)
    if command == "recover":
        print(sum(state[name].sum() for name in state))
    model.save_pretrained(out)
"""


def write_pair(size: str, raw: str, tuned: str) -> None:
    """Writes a base model and a tuned one: the base plus noise added in float64, with one more row of vocabulary."""
    hidden, inner, layers, heads, groups = SHAPES[size]
    keys = hidden // heads * groups
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (keys, hidden) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{layer}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    grown = {n: (s[0] + 1, s[1]) if s[0] == VOCABULARY else s for n, s in shapes.items()}
    outputs = []
    for folder, these in ((raw, shapes), (tuned, grown)):
        os.makedirs(folder)
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": groups, "vocab_size": these["lm_head.weight"][0], "tie_word_embeddings": False,
        }  # fmt: skip
        jdump(config, os.path.join(folder, "config.json"))
        outputs.append(plan_output(folder, {n: ("F32", s) for n, s in these.items()}, {}, {}))
        outputs[-1].create()
    generator = np.random.default_rng(0)
    for name, tensor in outputs[0].tensors.items():
        with Sink(tensor) as base, Sink(outputs[1].tensors[name]) as other:
            for start in range(0, outputs[1].tensors[name].numel, 1 << 20):
                count = min(1 << 20, outputs[1].tensors[name].numel - start)
                values = generator.standard_normal(count, np.float32) * np.float32(0.02)
                own = max(0, min(count, tensor.numel - start))
                base.write(values[:own])
                other.write((values + generator.standard_normal(count) * 1e-3).astype(np.float32))


def measure(command: list[str], target: str) -> dict:
    """Runs a process and measures it.

    Args:
        command: The process to run.
        target: Folder that the process writes.

    Returns:
        `seconds` of wall time; `synced_seconds`, the same until `target` is on the disk; `cpu_seconds`; `peak_mb`, the
        peak resident memory.
    """
    before, start = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    peak = 0
    while process.poll() is None:
        # Not rusage: it would count this process's memory too, because the child starts as its fork.
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status") as status:
            peak = max([peak, *(int(line.split()[1]) for line in status if line.startswith("VmHWM"))])
        time.sleep(0.01)
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
    for entry in os.scandir(target):
        with open(entry, "rb") as file:
            os.fsync(file.fileno())
    synced = time.perf_counter() - start
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    figures = {"seconds": seconds, "synced_seconds": synced, "cpu_seconds": cpu, "peak_mb": peak / 1024}
    return {name: round(figure, 2) for name, figure in figures.items()}


def run_size(size: str, folder: str, rounds: int, reference: bool, cold: bool) -> dict:
    """Measures one size: the medians over rounds in which all commands take turns."""
    raw, tuned, diff, out, plain_diff = (os.path.join(folder, n) for n in ("raw", "tuned", "diff", "out", "plain_diff"))
    write_pair(size, raw, tuned)
    commands = _commands(folder, reference)
    runs: dict[str, list[dict]] = {}
    for _ in range(rounds):
        for name, (command, inputs, target) in commands.items():
            _level_the_field(inputs, cold)
            runs.setdefault(name, []).append(measure(command, target))
            if name == "recover":
                same = all(filecmp.cmp(os.path.join(tuned, n), os.path.join(out, n), False) for n in os.listdir(tuned))
            if not name.endswith("make_diff"):
                shutil.rmtree(target)
        shutil.rmtree(diff)
        shutil.rmtree(plain_diff, ignore_errors=True)
    result: dict = {"output_gb": round(sum(e.stat().st_size for e in os.scandir(tuned)) / 1e9, 3), "identical": same}
    for name, found in runs.items():
        result[name] = {figure: round(median(one[figure] for one in found), 2) for figure in found[0]}
        ours = name.removeprefix("two models: ")
        result[name] |= {
            "times_cp": _ratio(found, runs["cp"], "seconds"),
            "times_cp_synced": _ratio(found, runs["cp"], "synced_seconds"),
            **({"times_ours": _ratio(found, runs[ours], "seconds")} if ours != name else {}),
            "all_seconds": [one["seconds"] for one in found],
        }
    return result


def _commands(folder: str, reference: bool) -> dict[str, tuple[list[str], list[str], str]]:
    """Lists what a round runs: name -> (command, folders it reads, folder it writes)."""
    names = ("raw", "tuned", "diff", "out", "copy", "plain_diff", "plain_out")
    raw, tuned, diff, out, copy, plain_diff, plain_out = (os.path.join(folder, name) for name in names)
    script, ends = [sys.executable, os.path.join(ROOT, "weight_diff.py")], ["--path_raw", raw, "--path_diff", diff]
    recover = [*script, "recover", *ends, "--path_tuned", out, "--test_inference=False"]
    commands = {
        "cp": (["cp", "-r", tuned, copy], [tuned], copy),
        "make_diff": ([*script, "make_diff", *ends, "--path_tuned", tuned], [raw, tuned], diff),
        "recover": (recover, [raw, diff], out),
    }
    if reference:
        two = [sys.executable, "-c", REFERENCE]
        commands["two models: make_diff"] = ([*two, "make_diff", raw, tuned, plain_diff], [raw, tuned], plain_diff)
        commands["two models: recover"] = ([*two, "recover", raw, plain_diff, plain_out], [raw, plain_diff], plain_out)
    return commands


def _level_the_field(inputs: list[str], cold: bool) -> None:
    """Gives every command the same start: no dirty pages left by the previous one; inputs cached, or (cold) not."""
    os.sync()
    for path in [os.path.join(folder, name) for folder in inputs for name in os.listdir(folder)]:
        if cold:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def _ratio(ours: list[dict], others: list[dict], figure: str) -> float:
    """Returns the median of the rounds' ratios: each compares commands that ran within the same minute."""
    return round(median(a[figure] / b[figure] for a, b in zip(ours, others, strict=True)), 2)


def run(
    sizes: str = "0.3B,1.1B",
    work_dir: str = "/tmp/weight_diff_benchmark",
    rounds: int = 5,
    reference: bool = True,
    cold: bool = False,
    output: str = os.path.join(RESULTS, "weight_diff.json"),
) -> None:
    """Measures each size and writes the result.

    Args:
        sizes: Comma-separated sizes to measure: 0.3B, 1.1B.
        work_dir: New folder on the disk to measure; it is removed at the end.
        rounds: Number of rounds; the medians count.
        reference: Also measure the reference, which loads two whole models.
        cold: Read inputs from the disk rather than from the page cache.
        output: JSON file to write.
    """
    work_dir = os.path.abspath(work_dir)
    if os.path.exists(work_dir):
        raise UserError(f"--work_dir {work_dir} exists; name a new folder")
    result: dict = {
        **provenance("numpy", "torch", "transformers"),
        "cold": cold,
        "sizes": {},
    }
    for size in sizes.split(","):
        if size not in SHAPES:
            raise UserError(f"--sizes takes {', '.join(SHAPES)}, found {size}")
        try:
            result["sizes"][size] = run_size(size, os.path.join(work_dir, size), rounds, reference, cold)
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)
        print(size, json.dumps(result["sizes"][size], indent=1))
    jdump(result, output)


if __name__ == "__main__":
    run_cli({"run": run})
