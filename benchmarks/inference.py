"""Tokens per second of `inference.py batch`: 16 prompts at once, and one at a time in the same run.

    python -m benchmarks.inference measure
    python -m benchmarks.inference engine --base_url http://127.0.0.1:8000/v1 --model_path DIR

`measure`: the models are LLaMAs with random weights, so nothing is downloaded. The prompts are the seed tasks. First
all answers have the same length; then their lengths vary like real ones (EOS has a fixed probability at each token),
and a batch waits for its longest answer. Writes benchmarks/results/inference.json.

`engine`: `batch --base_url` against a client that does nothing but send and read, on a server that has the model of
DIR, and against `batch --model_path` in this process. Writes benchmarks/results/inference_engine.json.
"""

import asyncio
import json
import math
import os
import tempfile
import time

import inference
from alpaca.cli import run_cli
from alpaca.client import Client
from alpaca.files import jdump, jload
from alpaca.inference import answering, loading
from alpaca.inference.engine import NEUTRAL
from alpaca.prompts import format_prompt
from benchmarks.provenance import RESULTS, ROOT, provenance
from demo import tiny_model

PROMPTS = 32
ALONE = 4  # prompts to answer one at a time, spread over all lengths
BATCH_SIZE = 16
NEW_TOKENS = 96
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 8000}
MODELS = {
    "configs/tiny_llama.json": {},
    "30 M parameters": {**SHAPE, "num_attention_heads": 8, "num_key_value_heads": 8},
}


def measure() -> None:
    """Measures both models, prints the figures and writes the result."""
    result = {
        "what": f"{PROMPTS} seed tasks in batches of {BATCH_SIZE}, and one at a time; up to {NEW_TOKENS} new tokens",
        "models": {name: measure_model(shape) for name, shape in MODELS.items()},
        "tie_threshold": answering.TIE,
        **provenance("torch", "transformers", "tokenizers"),
    }
    jdump(result, os.path.join(RESULTS, "inference.json"))
    for name, figures in result["models"].items():
        print(f"{name}: {figures}")


def measure_model(shape: dict) -> dict:
    """Times both ways with a LLaMA of random weights, in float32 on the CPU.

    Args:
        shape: Settings that replace those of configs/tiny_llama.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        tasks = inference.load_instances(os.path.join(ROOT, "seed_tasks.jsonl"))[:PROMPTS]
        jdump({**jload(os.path.join(ROOT, "configs/tiny_llama.json")), **shape}, f"{folder}/config.json")
        jdump([{**task, "output": "-"} for task in tasks], f"{folder}/data.json")
        tiny_model.make(f"{folder}/config.json", f"{folder}/data.json", f"{folder}/model")
        alpaca = loading.load(f"{folder}/model", device="cpu", dtype="float32")
    prompts = sorted((alpaca.encode(task, NEW_TOKENS)[0] for task in tasks), key=len, reverse=True)
    greedy = alpaca.settings(NEW_TOKENS, 0.0, 1.0)
    varied = alpaca.settings(NEW_TOKENS, 1.0, 1.0)
    # A random model finds all tokens about equally likely; this bias makes EOS one in 48.
    varied.sequence_bias = [[[alpaca.tokenizer.eos_token_id], math.log(alpaca.model.config.vocab_size / 48)]]
    alpaca.generate(prompts[:2], alpaca.settings(8, 0.0, 1.0))  # warm up
    return {
        "parameters": alpaca.model.num_parameters(),
        "mean_prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "equal_lengths": compare(alpaca, prompts, greedy),
        "varied_lengths": compare(alpaca, prompts, varied),
        "rounding": rounding(alpaca, prompts[:BATCH_SIZE]),
    }


def engine(base_url: str, model_path: str, prompts: int = 64, new_tokens: int = 200, rounds: int = 3) -> None:
    """Times a bare client, `batch --base_url` and `batch --model_path` on the same prompts, greedy and in float32.

    Args:
        base_url: A server that has the model of `model_path`, in float32, and nothing else to do.
        model_path: The model's folder.
        prompts: The number of seed tasks to answer.
        new_tokens: The most tokens of an answer.
        rounds: How often both clients of the server are timed, in turns; the fastest time counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        tasks, data = inference.load_instances(os.path.join(ROOT, "seed_tasks.jsonl"))[:prompts], f"{folder}/data.json"
        jdump(tasks, data)
        name = asyncio.run(only_model(base_url))
        asyncio.run(bare(base_url, name, tasks, new_tokens))  # fills the server's prefix cache for everybody
        times: dict[str, list[float]] = {"bare_client": [], "batch_base_url": [], "batch_model_path": []}
        for number in range(rounds):
            start = time.perf_counter()
            texts = asyncio.run(bare(base_url, name, tasks, new_tokens))
            times["bare_client"].append(time.perf_counter() - start)
            start = time.perf_counter()
            inference.batch(data, f"{folder}/{number}.json", base_url=base_url, max_new_tokens=new_tokens)
            times["batch_base_url"].append(time.perf_counter() - start)
        start = time.perf_counter()
        flags = {"max_new_tokens": new_tokens, "device": "cpu", "dtype": "float32"}
        inference.batch(data, f"{folder}/process.json", model_path, **flags)
        times["batch_model_path"].append(time.perf_counter() - start)
        outputs = [[record["output"] for record in jload(f"{folder}/{n}.json")] for n in (rounds - 1, "process")]
    best = {way: round(min(seconds), 2) for way, seconds in times.items()}
    result = {
        "what": f"{prompts} seed tasks, greedy, at most {new_tokens} new tokens; seconds, the best of {rounds} rounds",
        "model": os.path.basename(os.path.normpath(model_path)),
        "seconds": best,
        "batch_over_bare": round(best["batch_base_url"] / best["bare_client"], 3),
        "answers_equal_to_bare": sum(map(str.__eq__, outputs[0], texts)),
        "answers_equal_to_model_path": sum(map(str.__eq__, *outputs)),
        **provenance("torch", "transformers", "openai"),
    }
    jdump(result, os.path.join(RESULTS, "inference_engine.json"))
    print(json.dumps(result, indent=1))


async def only_model(base_url: str) -> str:
    """Asks a server which model it has."""
    async with Client(base_url, api="completions") as client:
        return await client.only_model()


async def bare(base_url: str, model: str, tasks: list[dict], new_tokens: int) -> list[str]:
    """Sends all prompts at once and returns the texts: no retries, no journal, no files."""
    import httpx

    fixed = {"model": model, "max_tokens": new_tokens, "temperature": 0.0, **NEUTRAL}
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=64)) as client:

        async def ask(task: dict) -> str:
            answer = await client.post(f"{base_url}/completions", json={"prompt": format_prompt(task), **fixed})
            return answer.json()["choices"][0]["text"]

        return await asyncio.gather(*map(ask, tasks))


def compare(alpaca: answering.Alpaca, prompts: list[list[int]], settings: object) -> dict:
    """Times both ways, counting tokens up to each answer's EOS."""
    step = len(prompts) // ALONE
    alone, alone_answers = timed(alpaca, prompts[::step], settings, 1)
    batched, batched_answers = timed(alpaca, prompts, settings, BATCH_SIZE)
    figures = {"one_at_a_time": round(alone, 1), "batched": round(batched, 1), "ratio": round(batched / alone, 2)}
    if not settings.do_sample:
        figures["same_answers"] = alone_answers == batched_answers[::step]
    return figures


def timed(alpaca: answering.Alpaca, prompts: list[list[int]], settings: object, size: int) -> tuple[float, list]:
    """Generates all answers in batches of `size`; returns tokens per second and the answers."""
    start = time.perf_counter()
    answers = []
    for first in range(0, len(prompts), size):
        answers += alpaca.generate(prompts[first : first + size], settings, seed=first)
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


def rounding(alpaca: answering.Alpaca, prompts: list[list[int]]) -> float:
    """Measures how far a left-padded batch moves the best token's lead: at most, as a share of the largest logit."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[alpaca.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        batched = alpaca.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        alone = torch.cat([alpaca.model(input_ids=torch.tensor([p])).logits[:, -1] for p in prompts])
    best = alone.topk(2).indices
    leads = [logits.gather(1, best).diff().squeeze(1) for logits in (batched, alone)]
    return ((leads[0] - leads[1]).abs() / alone.abs().amax(dim=1)).max().item()


if __name__ == "__main__":
    run_cli({"measure": measure, "engine": engine})
