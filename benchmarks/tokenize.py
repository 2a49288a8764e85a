"""Records tokenized per second: in one batch, and one at a time as the original's train.py did, in the same run.

    python -m benchmarks.tokenize

"One at a time" calls today's tokenizer the way the original called its own: for each record once with prompt + answer
+ EOS and once more with the prompt alone, each call padded, truncated and returned as tensors. (The original's slow
tokenizer took longer still.) Both ways must give the same tensors. Writes benchmarks/results/tokenize.json.
"""

import os
import sys
import tempfile
import time

from alpaca import tokenizers
from alpaca.cli import UserError, run_cli
from alpaca.files import jdump
from alpaca.prompts import format_prompt
from alpaca.records import load_examples
from benchmarks.provenance import RESULTS, ROOT, provenance

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def one_at_a_time(sources: list[str], targets: list[str], tokenizer) -> list:
    """Tokenizes like the original's `_tokenize_fn` and `preprocess`; returns (ids, labels) for each record."""

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


def load_tokenizer(folder: str | None, examples: list[dict[str, str]]):
    """Loads a tokenizer, or trains one of LLaMA's kind with 4,096 tokens on the examples."""
    from demo import tiny_model

    with tempfile.TemporaryDirectory() as trained:
        if folder is None:
            texts = [text for example in examples for text in (example["instruction"], example["output"])]
            tiny_model._train_sentencepiece(texts, 4096, trained)
        tokenizer, _ = tokenizers.load_tokenizer(folder or trained, 512)
    tokenizer.add_special_tokens(tokenizers.special_tokens_to_add(tokenizer))
    return tokenizer


def measure(
    data_path: str = os.path.join(ROOT, "alpaca_data.json"), tokenizer_dir: str | None = None, records: int = 10_000
) -> None:
    """Measures both ways, prints the figures and writes the result.

    Args:
        data_path: Alpaca-format data.
        tokenizer_dir: Folder of a tokenizer. By default one of LLaMA's kind is trained on the data.
        records: Number of records to tokenize in a batch; the data is repeated to get there. A tenth of them are
            tokenized one at a time.
    """
    import train

    if records < 10:
        raise UserError(f"--records must be 10 or more, found {records}")
    examples = load_examples(data_path)
    tokenizer = load_tokenizer(tokenizer_dir, examples)
    examples = (examples * (records // len(examples) + 1))[:records]
    sources, targets = [format_prompt(e) for e in examples], [e["output"] for e in examples]
    few = records // 10
    train.preprocess(sources[:few], targets[:few], tokenizer)  # warm up both ways
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
        **provenance("tokenizers", "transformers"),
    }
    jdump(result, os.path.join(RESULTS, "tokenize.json"))
    print(f"{fast:,.0f} records/s in a batch, {slow:,.0f} one at a time: {result['ratio']} times as many")


if __name__ == "__main__":
    run_cli({"measure": measure}, ["measure", *sys.argv[1:]])
