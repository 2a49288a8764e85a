"""Measures instruction data: size, lengths, root verbs, similarity of instructions. Writes the tables of DATA.md.

    python -m benchmarks.data_quality measure --data_path alpaca_data.json
    python -m benchmarks.data_quality measure --data_path alpaca_data.json --compare OTHER.json
    python -m benchmarks.data_quality measure --data_path alpaca_data.json --recording recordings/completions.jsonl \
        --update DATA.md
    python -m benchmarks.data_quality check --recording recordings/next/completions.jsonl \
        --checks recordings/next/checks.jsonl

Two data sets are compared at equal size, because a larger one has more pairs and closer neighbours by its size alone:
20 random samples of the larger set, each as large as the smaller one, are measured and averaged.
"""

import functools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

from alpaca.analysis.root_verbs import parse_by_rules
from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write, jdump
from alpaca.generation.config import Config
from alpaca.generation.dedup import RougePool
from alpaca.generation.parser import ParsedTask, parse_tasks
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
        Counts; `words`, for each field the percentiles of its length in words (empty inputs left out);
        `mean_nearest_rouge_l`, the mean over instructions of the ROUGE-L F measure, 0 to 1, with the nearest other
        instruction.
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
    """Nearest-rank percentiles of sorted lengths: each one is a length that occurs."""
    if not lengths:
        return {}
    ranks = {f"p{p}": lengths[max(0, -(-len(lengths) * p // 100) - 1)] for p in PERCENTILES}
    return {"min": lengths[0], **ranks, "max": lengths[-1]}


def measure_at_size(examples: list[dict[str, str]], size: int) -> dict[str, float]:
    """Measures diversity as the mean over random samples of `size` records, or once if there are no more than that."""
    draws = [random.Random(i).sample(examples, size) for i in range(SAMPLES)] if len(examples) > size else [examples]
    found = [measure_quality(draw) for draw in draws]
    names = ("root_verbs", "verb_object_pairs", "mean_nearest_rouge_l")
    return {"size": size, "samples": len(draws)} | {name: statistics.mean(f[name] for f in found) for name in names}


def measure_collection(recording: str, seed_tasks_path: str) -> dict:
    """Counts what becomes of recorded completions in the pipeline's own parser, filters and de-duplication."""
    harvest = start_harvest(Config(num_instructions_to_generate=None), load_seed_tasks(seed_tasks_path))
    records = []
    for where, record in load_records(recording):
        if missing := [name for name in ("request_index", "text", "finish_reason", "usage") if name not in record]:
            raise UserError(f"{where}: not a recorded completion; it lacks {', '.join(missing)}")
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
    """Formats the counts, one column a data set."""
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
    """Formats the percentiles of the fields' lengths."""
    columns = ["min", *(f"p{p}" for p in PERCENTILES), "max"]
    rows = [[f"`{field}`", *(str(found["words"][field].get(c, "")) for c in columns)] for field in FIELDS]
    return _table(["words", *columns], rows)


def comparison_table(names: list[str], found: list[dict]) -> str:
    """Formats the comparison at equal size."""
    rows = [
        ["distinct root verbs", *(f"{q['root_verbs']:.0f}" for q in found)],
        ["distinct verb-object pairs", *(f"{q['verb_object_pairs']:.0f}" for q in found)],
        ["mean ROUGE-L F to the nearest other instruction", *(f"{q['mean_nearest_rouge_l']:.3f}" for q in found)],
    ]
    return _table([f"at {found[0]['size']:,} records", *(f"`{name}`" for name in names)], rows)


def collection_table(found: dict) -> str:
    """Formats the way from completions to records."""
    rows = [
        ["completions", f"{found['completions']:,}"],
        ["of these cut by length", f"{found['cut_by_length']:,}"],
        ["tasks parsed", f"{found['tasks_parsed']:,}"],
        *([f"dropped: {reason.replace('_', ' ')}", f"{count:,}"] for reason, count in found["rejected"].items()),
        ["kept", f"{found['kept']:,}"],
    ]
    return _table(["", "count"], rows)


def update_tables(path: str, tables: dict[str, str]) -> None:
    """Replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->` for each table that the file has."""
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
            f"{path} has no place for a table; expected the lines <!-- NAME --> and <!-- end of NAME --> around one, "
            f"where NAME is {', '.join(tables)}"
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
    """Measures a data set, compares it with a second one at equal size, and prints tables.

    Args:
        data_path: Alpaca-format data, JSON or JSON Lines.
        compare: A second data set to compare with.
        size: Number of records to compare at. By default the size of the smaller set.
        recording: Recorded completions that the data was made from; counts what was dropped and why.
        seed_tasks_path: Seed tasks that the recording was made with.
        update: Markdown file whose tables to replace: those between `<!-- figures -->` and `<!-- end of figures -->`,
            and likewise lengths, comparison and collection.
        result_path: JSON file to write all numbers to, with device, versions and commit.
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


# ---------------------------------------------------------------------------------------------------------------------
# Checks of single answers

RUNNERS = {"python": [sys.executable, "-"], "javascript": ["node", "-"], "bash": ["bash", "-n"]}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def check(recording: str, checks: str) -> None:
    """Runs what can be run in the answers of a recording: their code blocks, and the program written to check each one.

    Args:
        recording: Recorded completions.
        checks: JSON Lines with `instruction`, `kind` and perhaps `check`, a Python program that fails if the answer is
            wrong. It sees the strings INSTRUCTION, INPUT and OUTPUT.
    """
    programs = {record["instruction"]: record for _, record in load_records(checks)}
    tasks = [task for _, record in load_records(recording) for task in parse_tasks(record["text"], 4)]
    problems, ran, unchecked = [], 0, 0
    for task in tasks:
        found, runs = check_task(task, programs.get(task.instruction, {}).get("check"))
        problems += found
        ran += runs
        unchecked += not runs
    print(f"{len(tasks)} answers: {ran} programs and code blocks ran, {len(problems)} problem(s)")
    print(f"{unchecked} answers have nothing to run; a reader alone has checked them")
    if problems:
        raise UserError("; ".join(problems[:5]))


def check_task(task: ParsedTask, program: str | None) -> tuple[list[str], int]:
    """Runs the code blocks of one answer and its check; gives what went wrong, and how many ran.

    Python and JavaScript run to their end, bash is only parsed, JSON is read.
    """
    problems = [f"{task.instruction[:60]!r} is {task.problem}"] if task.problem else []
    names = {"INSTRUCTION": task.instruction, "INPUT": task.input, "OUTPUT": task.output}
    jobs = [("python", "".join(f"{k} = {v!r}\n" for k, v in names.items()) + program)] if program else []
    jobs += [(language, code) for language, code in _FENCED.findall(task.output) if language in (*RUNNERS, "json")]
    jobs = [(language, code) for language, code in jobs if language == "json" or shutil.which(RUNNERS[language][0])]
    for language, code in jobs:
        if complaint := _run_block(language, code):
            problems.append(f"{task.instruction[:60]!r}, {language}: {complaint}")
    return problems, len(jobs)


def _run_block(language: str, code: str) -> str:
    if language == "json":
        try:
            json.loads(code)
        except ValueError as error:
            return str(error)
        return ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(RUNNERS[language], input=code, cwd=folder, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return "still running after 60 s"
    return done.stderr.strip().splitlines()[-1] if done.returncode and done.stderr.strip() else ""


if __name__ == "__main__":
    run_cli({"measure": measure, "check": check})
