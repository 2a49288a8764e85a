"""Toy tokenizers of LLaMA's and OPT's kind, trained on the seed tasks, and what the original did with a tokenizer."""

import json
import os
import shutil

import pytest
from sentencepiece import sentencepiece_model_pb2

from alpaca import tokenizers
from alpaca.prompts import format_prompt
from demo import tiny_model

IGNORE = -100
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


# The traps: runs of spaces, a first character that joins the prompt's last colon, special tokens, no ASCII.
OUTPUTS = [
    "def f(x):\n    return  x  +  1" + " " * 19 + "# done",
    "- first\n- second",
    "//example.org/a?b=c",
    "Γειά σου κόσμε 🙂 日本",
    "{'a': 1,  'b':   2}\t\tend",
]


def records(root: str) -> list[dict]:
    """The seed tasks and the traps, with and without an input."""
    with open(os.path.join(root, "recordings", "paper", "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    found = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    return found + [{"instruction": "Do it:", "input": i, "output": o} for o in OUTPUTS for i in ("", "this  one:")]


@pytest.fixture(scope="session")
def traps(root) -> list[dict]:
    """The records, as a fixture."""
    return records(root)


@pytest.fixture(scope="session")
def llama_dir(root, tmp_path_factory) -> str:
    """LLaMA's kind of sentencepiece model: runs of spaces score lowest although their ids are low."""
    folder = str(tmp_path_factory.mktemp("llama"))
    texts = [format_prompt(example) + example["output"] for example in records(root)]
    tiny_model._train_sentencepiece([*texts, *[":- a :// b"] * 200, "a" + " " * 16] * 2, 900, folder)
    path = os.path.join(folder, "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    pieces = [piece for piece in proto.pieces if piece.type == 1]
    for length in range(2, 17):  # LLaMA has a piece for every run of up to 16 spaces
        if "▁" * length not in {piece.piece for piece in pieces}:
            pieces[-length].piece = "▁" * length
    for piece in pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "llama"}, file)
    return folder


@pytest.fixture(scope="session")
def opt_dir(root, tmp_path_factory) -> str:
    """OPT's kind: byte-level BPE, `</s>` in front."""
    folder = str(tmp_path_factory.mktemp("opt"))
    tiny_model._train_byte_level_bpe([example["output"] for example in records(root)], 600, folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "opt"}, file)
    return folder


def variant(source: str, target, **changes) -> str:
    """A copy of a tokenizer's folder with another tokenizer_config.json; None removes a key."""
    shutil.copytree(source, target)
    os.unlink(os.path.join(target, "special_tokens_map.json"))
    path = os.path.join(target, "tokenizer_config.json")
    with open(path) as file:
        config = {**json.load(file), **changes}
    with open(path, "w") as file:
        json.dump({key: value for key, value in config.items() if value is not None}, file)
    return str(target)


def load(folder: str, limit: int = 512):
    tokenizer, notes = tokenizers.load_tokenizer(folder, limit)
    tokenizer.add_special_tokens(tokenizers.special_tokens_to_add(tokenizer))
    return tokenizer, notes


def original_preprocess(sources, targets, encode, limit=512) -> list[tuple[list[int], list[int]]]:
    """What the original did: whole text and prompt tokenized apart, one at a time, the prompt's length masked."""
    found = []
    for source, target in zip(sources, targets, strict=True):
        ids, prompt = encode(source + target)[:limit], encode(source)[:limit]
        found.append((ids, [IGNORE] * len(prompt) + ids[len(prompt) :]))
    return found


def ours(fields: dict) -> list[tuple[list[int], list[int]]]:
    """What train.preprocess returned, in original_preprocess's form."""
    pairs = zip(fields["input_ids"], fields["labels"], strict=True)
    return [(ids.tolist(), labels.tolist()) for ids, labels in pairs]
