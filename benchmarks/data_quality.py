"""Measures instruction data: sizes, lengths, root verbs, likeness of the instructions. Writes the tables of DATA.md.

    python benchmarks/data_quality.py measure --data_path alpaca_data.json
    python benchmarks/data_quality.py measure --data_path alpaca_data.json --compare OTHER.json
    python benchmarks/data_quality.py measure --data_path alpaca_data.json --recording recordings/completions.jsonl \
        --update DATA.md

Two data sets are compared at equal size, for a larger one has more pairs and nearer neighbours by its size alone: of
the larger, 20 random samples of the smaller's size are measured and averaged.
"""

import functools
import os
import random
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from alpaca.analysis.root_verbs import parse_by_rules
from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write, jdump
from alpaca.generation.config import Config
from alpaca.generation.dedup import RougePool
from alpaca.records import load_examples, load_records
from benchmarks.provenance import provenance
from generate_instruction import find_objection, load_seed_tasks, start_harvest

FIELDS = ("instruction", "input", "output")
PERCENTILES = (5, 25, 50, 75, 95)
SAMPLES = 20

_parse = functools.cache(parse_by_rules)  # the samples overlap


def measure_quality(examples: list[dict[str, str]]) -> dict:
    """Measures Alpaca-format records.

    Returns:
        Plain numbers under plain names: counts; for each field the percentiles of its length in words (of `input`
        only where there is one); `mean_nearest_rouge_l`, the mean over instructions of the ROUGE-L F measure with the
        nearest other one, in 0 to 1.
    """
    parses = [_parse(example["instruction"]) for example in examples]
    any_length = Config(min_words=0, max_words=sys.maxsize)
    lengths = {name: sorted(len(e[name].split()) for e in examples if e[name]) for name in FIELDS}
    return {
        "count": len(examples),
        "unique_instructions": len({example["instruction"] for example in examples}),
        "with_input": sum(bool(example["input"]) for example in examples),
        "words": {name: _percentiles(values) for name, values in lengths.items()},
        "root_verb_parsed": sum(parse.verb is not None for parse in parses),
        "direct_object_parsed": sum(parse.object is not None for parse in parses),
        "root_verbs": len({parse.verb for parse in parses if parse.verb}),
        "verb_object_pairs": len({parse for parse in parses if parse.object}),
        "mean_nearest_rouge_l": float(RougePool([e["instruction"] for e in examples]).nearest_scores().mean()),
        "keyword_hits": sum(find_objection(e["instruction"], "x", any_length) == "keyword" for e in examples),
    }


def _percentiles(lengths: list[int]) -> dict[str, int]:
    """The nearest-rank percentiles: each is a length that occurs."""
    if not lengths:
        return {}
    ranks = {f"p{p}": lengths[max(0, -(-len(lengths) * p // 100) - 1)] for p in PERCENTILES}
    return {"min": lengths[0], **ranks, "max": lengths[-1]}


def measure_at_size(examples: list[dict[str, str]], size: int) -> dict[str, float]:
    """Measures diversity at a given size, as the mean over random samples (all records, where there are no more)."""
    draws = [random.Random(i).sample(examples, size) for i in range(SAMPLES)] if len(examples) > size else [examples]
    found = [measure_quality(draw) for draw in draws]
    names = ("root_verbs", "verb_object_pairs", "mean_nearest_rouge_l")
    return {"size": size, "samples": len(draws)} | {name: statistics.mean(f[name] for f in found) for name in names}


def measure_collection(recording: str, seed_tasks_path: str) -> dict:
    """Counts what became of the recorded completions: the pipeline's own parser, filters and de-duplication."""
    harvest = start_harvest(Config(num_instructions_to_generate=None), load_seed_tasks(seed_tasks_path))
    records = []
    for where, record in load_records(recording):
        if missing := [name for name in ("request_index", "text", "finish_reason", "usage") if name not in record]:
            raise UserError(f"{where}: no recorded completion; it lacks {', '.join(missing)}")
        records.append(record)
    for record in sorted(records, key=lambda record: record["request_index"]):
        harvest.add(record)
    return {
        "completions": len(records),
        "cut_by_length": sum(record["finish_reason"] == "length" for record in records),
        "completion_tokens": sum(record["usage"]["completion_tokens"] for record in records),
        "tasks_parsed": harvest.parsed,
        "kept": len(harvest.kept),
        "rejected": dict(sorted(harvest.reasons.items())),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def figures_table(names: list[str], found: list[dict]) -> str:
    """Counts and lengths, a column for each data set."""
    rows = [
        ["records", *(f"{q['count']:,}" for q in found)],
        ["distinct instructions", *(f"{q['unique_instructions']:,}" for q in found)],
        ["with an input", *(_share(q["with_input"], q["count"]) for q in found)],
        ["instructions that the keyword filter would drop", *(f"{q['keyword_hits']:,}" for q in found)],
        ["with a root verb", *(_share(q["root_verb_parsed"], q["count"]) for q in found)],
        ["with a direct object too", *(_share(q["direct_object_parsed"], q["count"]) for q in found)],
        ["distinct root verbs", *(f"{q['root_verbs']:,}" for q in found)],
        ["distinct verb-object pairs", *(f"{q['verb_object_pairs']:,}" for q in found)],
        ["mean ROUGE-L F to the nearest other instruction", *(f"{q['mean_nearest_rouge_l']:.3f}" for q in found)],
    ]
    return _table(["", *(f"`{name}`" for name in names)], rows)


def lengths_table(found: dict) -> str:
    """Percentiles of the fields' lengths."""
    columns = ["min", *(f"p{p}" for p in PERCENTILES), "max"]
    rows = [[f"`{field}`", *(str(found["words"][field].get(c, "")) for c in columns)] for field in FIELDS]
    return _table(["words", *columns], rows)


def comparison_table(names: list[str], found: list[dict]) -> str:
    """Diversity at equal size."""
    rows = [
        ["distinct root verbs", *(f"{q['root_verbs']:.0f}" for q in found)],
        ["distinct verb-object pairs", *(f"{q['verb_object_pairs']:.0f}" for q in found)],
        ["mean ROUGE-L F to the nearest other instruction", *(f"{q['mean_nearest_rouge_l']:.3f}" for q in found)],
    ]
    return _table([f"at {found[0]['size']:,} records", *(f"`{name}`" for name in names)], rows)


def collection_table(found: dict) -> str:
    """From completions to records."""
    rows = [
        ["completions", f"{found['completions']:,}"],
        ["of these cut by length", f"{found['cut_by_length']:,}"],
        ["tasks parsed", f"{found['tasks_parsed']:,}"],
        *([f"dropped: {reason.replace('_', ' ')}", f"{count:,}"] for reason, count in found["rejected"].items()),
        ["kept", f"{found['kept']:,}"],
    ]
    return _table(["", "count"], rows)


def update_tables(path: str, tables: dict[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- end of NAME -->` for each table that the file has."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    replaced = 0
    for name, table in tables.items():
        head, found, rest = text.partition(f"<!-- {name} -->\n")
        _, closed, tail = rest.partition(f"<!-- end of {name} -->")
        if found and closed:
            text = f"{head}{found}\n{table}\n\n{closed}{tail}"
            replaced += 1
    if not replaced:
        raise UserError(
            f"{path} has no place for a table; expected <!-- NAME --> and <!-- end of NAME --> lines around "
            f"one, NAME being {', '.join(tables)}"
        )
    with atomic_write(path) as file:
        file.write(text)


def measure(
    data_path: str,
    compare: str | None = None,
    size: int | None = None,
    recording: str | None = None,
    seed_tasks_path: str = "seed_tasks.jsonl",
    update: str | None = None,
    result_path: str | None = None,
) -> None:
    """Measures one data set, or two at equal size too, and prints tables.

    Args:
        data_path: Alpaca-format data, JSON or JSON Lines.
        compare: a second data set.
        size: the equal size; that of the smaller set when not given.
        recording: recorded completions that the data was made from, to count what was dropped and why.
        seed_tasks_path: the seed tasks that the recording was made with.
        update: a Markdown file whose tables (between `<!-- figures -->` and `<!-- end of figures -->`; likewise
            lengths, comparison, collection) are replaced.
        result_path: a JSON file for all numbers, with versions and commit.
    """
    paths = [data_path, compare] if compare else [data_path]
    data_sets = [load_examples(path) for path in paths]
    names = [os.path.basename(path) for path in paths]
    whole = [measure_quality(examples) for examples in data_sets]
    result = {
        **provenance("lemminflect", "numpy", "rapidfuzz", "rouge_score"),
        "data": dict(zip(names, whole, strict=True)),
    }
    tables = {"figures": figures_table(names[:1], whole[:1]), "lengths": lengths_table(whole[0])}
    shown = [figures_table(names, whole), *(lengths_table(found) for found in whole)]
    if compare:
        size = size or min(map(len, data_sets))
        if not 0 < size <= min(map(len, data_sets)):
            raise UserError(f"--size {size}: the data sets have {' and '.join(str(len(d)) for d in data_sets)} records")
        equal = [measure_at_size(examples, size) for examples in data_sets]
        result["at_equal_size"] = dict(zip(names, equal, strict=True))
        tables["comparison"] = comparison_table(names, equal)
        shown.append(tables["comparison"])
    if recording:
        result["collection"] = measure_collection(recording, seed_tasks_path)
        tables["collection"] = collection_table(result["collection"])
        shown.append(tables["collection"])
    print("\n\n".join(shown))
    if result_path:
        jdump(result, result_path)
    if update:
        update_tables(update, tables)


if __name__ == "__main__":
    run_cli({"measure": measure})
