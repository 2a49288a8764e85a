"""Tiny models and seed tasks for the tests of padding-free passes, with the padded loss as the reference."""

import io
import json
import os

import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.prompts import format_prompt
from alpaca.training.packing import passes as packing_passes

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "llama": {**LLAMA_LIKE, "num_key_value_heads": 4},
    "llama, grouped queries": LLAMA_LIKE,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512, "dropout": 0.0},
    "mistral": {**LLAMA_LIKE, "sliding_window": None},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
}


def make_model(name: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.partition(",")[0], pad_token_id=1, **CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    for parameter in model.parameters():  # biases and norms that start at 0 and 1 hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def load_examples(root: str, count: int = 16) -> list[dict]:
    with open(os.path.join(root, "recordings", "paper", "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file][:count]
    records = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    texts = [(format_prompt(record), record["output"]) for record in records]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([p + o for p, o in texts]), model_writer=model, vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = []
    for prompt, output in texts:
        prompt, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + output)
        ids = torch.tensor([1, *whole, 2])[:200]
        labels = ids.clone()
        labels[: len(prompt) + 1] = packing_passes.IGNORE_INDEX
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(examples: list[dict]) -> dict:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=1),
        "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
    }


def micro_batches(examples: list[dict], size: int) -> list[dict]:
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def padded_loss(model, batches: list[dict], reduction: str) -> torch.Tensor:
    """The reference: the model's own padded forward pass and cross-entropy in float64."""
    sums, counts = [], []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        sums.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
        counts.append((labels != packing_passes.IGNORE_INDEX).sum())
    if reduction == "global":
        return torch.stack(sums).sum() / torch.stack(counts).sum()
    return (torch.stack(sums) / torch.stack(counts)).mean()


def packed_loss(model, batches: list[dict], reduction: str, shared: bool, max_tokens: int, world_size: int = 1, **more):
    """Runs the passes of a step, each with its backward pass.

    `agree` goes to make_passes, `step_supervised` counts all ranks' tokens, `before(last)` is called before each pass.
    """
    before = more.pop("before", None)
    counts = [int((batch["labels"][:, 1:] != packing_passes.IGNORE_INDEX).sum()) for batch in batches]
    total = more.pop("step_supervised", sum(counts))
    flat = [example for batch in batches for example in unpadded(batch)]
    prefixes = packing_passes.find_prefixes(flat, len(flat)) if shared else []
    documents = []
    for batch, count in zip(batches, counts, strict=True):
        weight = packing_passes.token_weight(reduction, count, len(batches), total, world_size)
        documents += packing_passes.documents_of(batch, weight, prefixes)
    passes = packing_passes.make_passes(documents, max_tokens, **more)
    loss = 0.0
    for one in passes:
        if before:
            before(one is passes[-1])
        part = model(packed=one)
        part.backward()
        loss += part.detach()
    return loss, passes


def unpadded(batch: dict) -> list[dict]:
    return [{"input_ids": d.input_ids, "labels": d.labels} for d in packing_passes.documents_of(batch, 1.0)]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(found: dict, expected: dict) -> float:
    """The largest relative error among all parameters' gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)
