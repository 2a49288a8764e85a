"""What all columns get: the same tiny LLaMA, the same records, the same texts."""

import json
import os
import random

from alpaca.files import jdump
from alpaca.prompts import alpaca_chat_template, format_prompt
from alpaca.records import load_examples
from benchmarks.provenance import ROOT
from demo import tiny_model

DATA = os.path.join(ROOT, "alpaca_data.json")
# Two models of LLaMA's architecture. The tokenizer has 4,096 tokens in both.
SMALL = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "max_position_embeddings": 1024, "initializer_range": 0.06}
JOINS = ["x:- a:// b"] * 300  # LLaMA's tokenizer joins a colon with what follows it; so must this one
# LLaMA's pieces of so many spaces, and their ids; the last ids are lower here, for want of as many tokens.
LLAMA_RUNS = {2: 259, 4: 268, 8: 308, 5: 418, 16: 462, 6: 539, 12: 632, 13: 795, 10: 965, 14: 1669, 3: 1678}
LLAMA_RUNS |= {9: 1986, 7: 2006, 11: 2051, 15: 2084}
BAD = {"empty answer": "", "wrong type": 7, "half a surrogate": "a \ud83d b"}
BAD_RECORD = 7
UNEVEN = (4, 60, 9, 31, 5, 18, 44, 12)  # words in an answer: examples of unequal length


def make_model(folder: str, records: list[dict], config: dict | None = None) -> str:
    """Makes a tiny LLaMA with a tokenizer of LLaMA's kind, in `tokenizer.model` alone (no `tokenizer.json`).

    As in LLaMA's own file, the pieces of two and more spaces have the lowest scores although their ids are low, and a
    colon joins with what follows it.
    """
    from sentencepiece import sentencepiece_model_pb2

    source, settings = f"{folder}.json", f"{folder}.config.json"
    texts = [*records, *({"instruction": join, "output": join} for join in JOINS)]
    texts += [{"instruction": "x" + " " * 16, "output": "x" + " " * 16}] * 2
    jdump(texts, source)
    base = {"model_type": "llama", "vocab_size": 4096, "tie_word_embeddings": False, "bos_token_id": 1}
    jdump({**base, "eos_token_id": 2, **(config or SMALL)}, settings)
    tiny_model.make(settings, source, folder)
    path = os.path.join(folder, "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    pieces, runs = list(proto.pieces), []
    for length in LLAMA_RUNS:
        text = "▁" * length
        # A piece merged last is part of no other, and can go.
        old = next((p for p in pieces if p.piece == text), None) or [p for p in pieces if len(p.piece) > 1][-1]
        pieces.remove(old)
        runs.append(type(old)(piece=text, score=-1e9))
    for place, run in zip(LLAMA_RUNS.values(), runs, strict=True):
        pieces.insert(place, run)
    for piece in pieces:
        if piece.piece == "▁":
            piece.score = -1e9
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
    return folder


def uneven_records() -> list[dict]:
    """Eight records without an input and with answers of 4 to 60 words; one begins with a dash."""
    words = ["the", "model", "reads", "a", "short", "task", "and", "writes", "one", "plain", "answer", "then", "stops"]
    draw = random.Random(0)
    records = []
    for number, length in enumerate(UNEVEN):
        answer = " ".join(draw.choice(words) for _ in range(length))
        records.append({"instruction": f"Say the words of line {number}.", "input": "", "output": f"{answer}."})
    records[2]["output"] = "- " + records[2]["output"]
    return records


def texts(count: int = 2000) -> list[str]:
    """Draws texts with double spaces, code and non-Latin script."""
    draw = random.Random(1)
    plain = [record["instruction"] for record in load_examples(DATA)]
    code = ["def f(x):\n    return  x  +  1", "if (a  ==  b) {\n\t\tgo();   // now\n}", "SELECT  *  FROM t;    -- all"]
    other = ["Γειά σου κόσμε", "日本語の文章です。", "привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया", "🙂 ok 👍"]
    found = []
    for number in range(count):
        words = draw.choice(plain).split(" ")
        if number % 4 == 0:
            text = " ".join(word + " " * (draw.random() < 0.3) * draw.randint(1, 20) for word in words)
        elif number % 4 == 1:
            text = f"{' '.join(words[:6])}\n{draw.choice(code)}{' ' * draw.randint(0, 9)}# {number}"
        elif number % 4 == 2:
            text = f"{' '.join(words[:4])} {draw.choice(other)} {draw.choice(other)}"
        else:
            text = " ".join(words)
        found.append(text)
    return found


def write_records(folder: str, name: str, records: list[dict]) -> dict[str, str]:
    """Writes records in Alpaca's format, and as prompts and completions.

    Returns:
        The path of each, by its format: "alpaca" and "prompt-completion".
    """
    paths = {"alpaca": os.path.join(folder, f"{name}.json"), "prompt-completion": os.path.join(folder, f"{name}.jsonl")}
    with open(paths["alpaca"], "w", encoding="utf-8") as file:
        json.dump(records, file)  # ASCII: a lone surrogate stays an escape, as a scraper would write it
    with open(paths["prompt-completion"], "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"prompt": format_prompt(record), "completion": record["output"]}) + "\n")
    return paths


def write_chat(folder: str, records: list[dict], template_path: str) -> dict[str, str]:
    """Writes records as conversations, which TRL formats by a chat template, and Alpaca's template beside them.

    Returns:
        The path of each format, as `write_records` does; in Alpaca's format they are plain records.
    """
    with open(template_path, "w", encoding="utf-8") as file:
        file.write(alpaca_chat_template(adds_bos=True))
    paths = write_records(folder, "chat", records)
    with open(paths["prompt-completion"], "w", encoding="utf-8") as file:
        for record in records:
            prompt = [{"role": "user", "content": record["instruction"]}]
            completion = [{"role": "assistant", "content": record["output"]}]
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return paths


def bad_records() -> dict[str, list[dict]]:
    """Twelve good records each, of which record 7 is bad in one way."""
    good = (uneven_records() * 2)[:12]
    found = {}
    for name, value in BAD.items():
        records = [dict(record) for record in good]
        records[BAD_RECORD]["output"] = value
        found[name] = records
    return found
