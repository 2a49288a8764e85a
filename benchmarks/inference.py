"""Measures tokens/s of `inference.py batch`: 16 prompts at once beside one at a time, in one run.

    python benchmarks/inference.py measure

The model is a LLaMA with random weights, so nothing is downloaded; the prompts are the seed tasks. Its answers are
first all of the same length, then of random lengths (an EOS of fixed probability at each token), as real ones are: a
batch then waits for its longest answer. Writes benchmarks/results/inference.json.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import generation  # noqa: E402
import inference  # noqa: E402
import tiny_model  # noqa: E402
from utils import jdump, jload, run_cli  # noqa: E402

PROMPTS = 48
BATCH_SIZE = 16
NEW_TOKENS = 64
SIZE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
SIZE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000}


def measure() -> None:
    """Measures, prints and writes the result."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = inference.load_instances(os.path.join(ROOT, "seed_tasks.jsonl"))[:PROMPTS]
        jdump({**jload(os.path.join(ROOT, "configs/tiny_llama.json")), **SIZE}, f"{folder}/config.json")
        jdump([{**task, "output": "-"} for task in tasks], f"{folder}/data.json")
        tiny_model.make(f"{folder}/config.json", f"{folder}/data.json", f"{folder}/model")
        alpaca = generation.load(f"{folder}/model", device="cpu", dtype="float32")
    prompts = sorted((alpaca.encode(task, NEW_TOKENS)[0] for task in tasks), key=len, reverse=True)
    greedy = alpaca.settings(NEW_TOKENS, 0.0, 1.0)
    varied = alpaca.settings(NEW_TOKENS, 1.0, 1.0)
    # Uniform logits over 32,000 tokens: this gives EOS a probability of about 1/32 at each token.
    varied.sequence_bias = [[[alpaca.tokenizer.eos_token_id], 6.9]]
    alpaca.generate(prompts[:2], greedy)  # warm up
    result = {
        "what": f"{PROMPTS} seed tasks, at most {NEW_TOKENS} new tokens, batches of {BATCH_SIZE} beside one at a time",
        "parameters": alpaca.model.num_parameters(),
        "dtype": str(alpaca.model.dtype),
        "equal_lengths": compare(alpaca, prompts, greedy),
        "varied_lengths": compare(alpaca, prompts, varied),
        "largest_logit_difference": logit_difference(alpaca, prompts[:BATCH_SIZE]),
        "tie_threshold": generation.TIE,
        **environment(),
    }
    os.makedirs(os.path.join(ROOT, "benchmarks/results"), exist_ok=True)
    jdump(result, os.path.join(ROOT, "benchmarks/results/inference.json"))
    for name in ("equal_lengths", "varied_lengths"):
        print(f"{name}: {' '.join(f'{key} {value}' for key, value in result[name].items())}")
    print(f"largest logit difference between batch and alone: {result['largest_logit_difference']:.1e}")


def compare(alpaca: generation.Alpaca, prompts: list[list[int]], settings: object) -> dict:
    """Times both ways; only tokens up to each answer's EOS count."""
    alone, alone_answers = timed(alpaca, prompts, settings, 1)
    batched, batched_answers = timed(alpaca, prompts, settings, BATCH_SIZE)
    return {
        "one_at_a_time_tokens_per_s": round(alone, 1),
        "batched_tokens_per_s": round(batched, 1),
        "ratio": round(batched / alone, 2),
        "same_answers": alone_answers == batched_answers if not settings.do_sample else None,
    }


def timed(alpaca: generation.Alpaca, prompts: list[list[int]], settings: object, size: int) -> tuple[float, list]:
    """Generates all answers in batches of `size`; gives tokens/s and the answers."""
    start = time.perf_counter()
    answers = []
    for first in range(0, len(prompts), size):
        answers += alpaca.generate(prompts[first : first + size], settings, seed=first)
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


def logit_difference(alpaca: generation.Alpaca, prompts: list[list[int]]) -> float:
    """Gives the largest difference between a prompt's next-token logits alone and in a left-padded batch."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[alpaca.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        batched = alpaca.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        alone = torch.cat([alpaca.model(input_ids=torch.tensor([p])).logits[:, -1] for p in prompts])
    return (batched - alone).abs().max().item()


def environment() -> dict:
    """Names the machine, the versions and the commit of a measurement."""
    packages = ("torch", "transformers", "tokenizers")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "commit": git.stdout.strip() or None,
    }


if __name__ == "__main__":
    run_cli({"measure": measure})
