"""packing.py: the padded batch's loss and gradients, from passes without padding and with shared prefixes."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import packing

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


@pytest.fixture(scope="module")
def examples(root) -> list[dict]:
    """16 seed tasks as tokens of 512 kinds: words, with their first letter merged into the space before."""
    return load_examples(root)


def load_examples(root: str, count: int = 16) -> list[dict]:
    import sentencepiece

    from utils import format_prompt

    with open(os.path.join(root, "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file][:count]
    records = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    texts = [(format_prompt(record), record["output"]) for record in records]
    import io

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
        labels[: len(prompt) + 1] = packing.IGNORE_INDEX
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
        counts.append((labels != packing.IGNORE_INDEX).sum())
    if reduction == "global":
        return torch.stack(sums).sum() / torch.stack(counts).sum()
    return (torch.stack(sums) / torch.stack(counts)).mean()


def packed_loss(model, batches: list[dict], reduction: str, shared: bool, max_tokens: int, world_size: int = 1, **more):
    """Runs the passes of a step, each with its backward pass; `more` goes to make_passes."""
    counts = [int((batch["labels"][:, 1:] != packing.IGNORE_INDEX).sum()) for batch in batches]
    total = more.pop("step_supervised", sum(counts))
    flat = [example for batch in batches for example in unpadded(batch)]
    prefixes = packing.find_prefixes(flat, len(flat)) if shared else []
    documents = []
    for batch, count in zip(batches, counts, strict=True):
        weight = packing.token_weight(reduction, count, len(batches), total, world_size)
        documents += packing.documents_of(batch, weight, prefixes)
    passes = packing.make_passes(documents, max_tokens, **more)
    loss = 0.0
    for one in passes:
        part = model(packed=one)
        part.backward()
        loss += part.detach()
    return loss, passes


def unpadded(batch: dict) -> list[dict]:
    return [{"input_ids": d.input_ids, "labels": d.labels} for d in packing.documents_of(batch, 1.0)]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(found: dict, expected: dict) -> float:
    """The largest relative error among all parameters' gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)


@pytest.fixture(scope="module")
def reference(examples):
    """The padded path's loss and gradients, computed once for each model and reduction."""
    known = {}

    def compute(name: str, reduction: str):
        if (name, reduction) not in known:
            model = make_model(name)
            loss = padded_loss(model, micro_batches(examples, 4), reduction)
            loss.backward()
            known[name, reduction] = loss.item(), gradients(model)
        return known[name, reduction]

    return compute


@pytest.mark.parametrize("max_tokens", [100_000, 600])
@pytest.mark.parametrize("reduction", ["micro_batch", "global"])
@pytest.mark.parametrize("shared", [False, True], ids=["padding-free", "shared-prefix"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_the_padded_batches(examples, reference, name, shared, reduction, max_tokens):
    expected_loss, expected = reference(name, reduction)
    model = make_model(name)
    packing.install(model)
    loss, passes = packed_loss(model, micro_batches(examples, 4), reduction, shared, max_tokens)
    assert (len(passes) == 1) == (max_tokens == 100_000)
    assert shared == any(one.layout.copies for one in passes)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7
