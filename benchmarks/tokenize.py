"""Records tokenized per second: in batches, beside one at a time as the original's train.py did, in one run.

    python benchmarks/tokenize.py

One at a time means today's tokenizer called as the original called its own: for each record once with prompt + answer
+ EOS and once more with the prompt, each call padded and truncated, to tensors. The original's tokenizer was slower
still. Both ways end in the same tensors, which is checked. Writes benchmarks/results/tokenize.json.
"""

# ruff: noqa: E402  (the search path is set before anything else is imported)
import os
import sys

if __name__ == "tokenize":  # a benchmark beside this one asked for the standard module of that name
    import importlib.util

    path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    spec = importlib.util.spec_from_file_location("tokenize", path)
    sys.modules["tokenize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == "__main__":
    sys.path[0] = ROOT  # not this folder: this file's name is a standard module's, which others import

import platform
import subprocess
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def one_at_a_time(sources: list[str], targets: list[str], tokenizer) -> list:
    """Tokenizes as the original's `_tokenize_fn` and `preprocess`."""

    def tokenize(text: str):
        return tokenizer(
            text, return_tensors="pt", padding="longest", max_length=tokenizer.model_max_length, truncation=True
        ).input_ids[0]

    found = []
    for source, target in zip(sources, targets, strict=True):
        ids, prompt = tokenize(source + target + tokenizer.eos_token), tokenize(source)
        labels = ids.clone()
        labels[: len(prompt)] = -100
        found.append((ids, labels))
    return found


def main(data_path: str | None = None, tokenizer_dir: str | None = None, records: int = 10_000) -> None:
    """Measures and writes the result.

    Args:
        data_path: Alpaca-format data; the bundled data when None.
        tokenizer_dir: a tokenizer; one of LLaMA's kind with 4,096 tokens, trained on the data, when None.
        records: how many are tokenized in batches (the data is repeated); a tenth of them one at a time.
    """
    import tokenizers
    import transformers

    import train
    from alpaca.files import jdump
    from alpaca.prompts import format_prompt
    from alpaca.records import load_examples
    from demo import tiny_model

    data_path = data_path or os.path.join(ROOT, "alpaca_data.json")
    examples = load_examples(data_path)
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer_dir is None:
            tokenizer_dir = folder
            texts = [text for example in examples for text in (example["instruction"], example["output"])]
            tiny_model._train_sentencepiece(texts, 4096, folder)
        tokenizer, _ = train.tokenization.load_tokenizer(tokenizer_dir, 512)
    tokenizer.add_special_tokens(train.tokenization.special_tokens_to_add(tokenizer))
    examples = (examples * (records // len(examples) + 1))[:records]
    sources, targets = [format_prompt(e) for e in examples], [e["output"] for e in examples]
    few = records // 10
    train.preprocess(sources[:few], targets[:few], tokenizer)  # both ways warm
    start = time.perf_counter()
    expected = one_at_a_time(sources[:few], targets[:few], tokenizer)
    slow = few / (time.perf_counter() - start)
    start = time.perf_counter()
    found = train.preprocess(sources, targets, tokenizer)
    fast = records / (time.perf_counter() - start)
    for (ids, labels), our_ids, our_labels in zip(expected, found["input_ids"], found["labels"], strict=False):
        assert ids.tolist() == our_ids.tolist()
        assert labels.tolist() == our_labels.tolist()
    result = {
        "records_per_s_in_batches": round(fast),
        "records_per_s_one_at_a_time": round(slow),
        "ratio": round(fast / slow, 1),
        "records": records,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }
    jdump(result, os.path.join(ROOT, "benchmarks", "results", "tokenize.json"))
    print(f"{fast:,.0f} records/s in batches, {slow:,.0f} one at a time: {result['ratio']} times")


if __name__ == "__main__":
    from alpaca.cli import run_cli

    run_cli({"main": main}, ["main", *sys.argv[1:]])
