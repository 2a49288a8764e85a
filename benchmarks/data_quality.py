"""Measures instruction data: size, lengths, root verbs, similarity of instructions. Writes the tables of DATA.md.

    python -m benchmarks.data_quality measure --data_path alpaca_data.json
    python -m benchmarks.data_quality measure --data_path alpaca_data.json --compare OTHER.json
    python -m benchmarks.data_quality measure --data_path alpaca_data.json --checks recordings/checks.jsonl \
        --update DATA.md
    python -m benchmarks.data_quality check --recording recordings/completions.jsonl --checks recordings/checks.jsonl

Two data sets are compared at equal size, because a larger one has more pairs and closer neighbours by its size alone:
20 random samples of the larger set, each as large as the smaller one, are measured and averaged.
"""

import collections
import concurrent.futures
import functools
import operator
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator

from alpaca.analysis.root_verbs import parse_by_rules
from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write, jdump, parse_json, read_text
from alpaca.generation.config import Config
from alpaca.generation.dedup import RougePool
from alpaca.generation.parser import ParsedTask, parse_tasks
from alpaca.records import load_examples, load_records
from benchmarks import data_checks
from benchmarks.provenance import provenance
from generate_instruction import find_objection, load_seed_tasks, start_harvest

FIELDS = ("instruction", "input", "output")
PERCENTILES = (5, 25, 50, 75, 95)
SAMPLES = 20
BAND = 15  # words
MIX = {  # measure_mix's counts, with the words for them
    "long_outputs": "outputs above 150 words",
    "long_inputs": "inputs above 100 words",
    "code": "outputs with a fenced code block",
    "code_of_5_to_60_lines": "... of 5 to 60 lines",
    "code_with_tests": "... with tests",
    "tabular": "outputs with a table, JSON or CSV",
    "colon_openers": "instructions that open with one to five words and a colon",
}
# Those of MIX that two data sets are compared by.
COMPARED = ("long_outputs", "long_inputs", "code", "tabular")

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
    return {"min": lengths[0], **{f"p{p}": _rank(lengths, p) for p in PERCENTILES}, "max": lengths[-1]}


def _rank(lengths: list[int], percent: int) -> int:
    return lengths[max(0, -(-len(lengths) * percent // 100) - 1)]


def measure_at_size(examples: list[dict[str, str]], size: int) -> dict[str, float]:
    """Measures diversity as the mean over random samples of `size` records, or once if there are no more than that."""
    draws = [random.Random(i).sample(examples, size) for i in range(SAMPLES)] if len(examples) > size else [examples]
    found = [{**measure_mix(draw, {}), **measure_quality(draw)} for draw in draws]
    names = ("root_verbs", "verb_object_pairs", "mean_nearest_rouge_l", *COMPARED)
    return {"size": size, "samples": len(draws)} | {name: statistics.mean(f[name] for f in found) for name in names}


def measure_collection(recordings: list[str], seed_tasks_paths: list[str]) -> list[dict]:
    """Counts what becomes of recorded completions in the pipeline's own parser, filters and de-duplication.

    Each recording goes on from the tasks kept of those before it, like a run that finds a regen.json.
    """
    found, earlier = [], []
    for path, seeds in zip(recordings, seed_tasks_paths, strict=True):
        harvest = start_harvest(Config(num_instructions_to_generate=None), load_seed_tasks(seeds), earlier)
        records = []
        for where, record in load_records(path):
            if missing := [name for name in ("request_index", "text", "finish_reason", "usage") if name not in record]:
                raise UserError(f"{where}: not a recorded completion; it lacks {', '.join(missing)}")
            records.append(record)
        for record in sorted(records, key=lambda record: record["request_index"]):
            harvest.add(record)
        found.append(
            {
                "completions": len(records),
                "cut_by_length": sum(record["finish_reason"] == "length" for record in records),
                "tasks_parsed": harvest.parsed,
                "kept": len(harvest.kept) - len(earlier),
                "rejected": dict(sorted(harvest.reasons.items())),
            }
        )
        earlier = harvest.kept
    return found


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
        *([MIX[name], *(f"{q[name] / q['size']:.1%}" for q in found)] for name in COMPARED),
    ]
    return _table([f"at {found[0]['size']:,} records", *(f"`{name}`" for name in names)], rows)


def collection_table(names: list[str], found: list[dict]) -> str:
    """Formats the way from completions to records, one column a recording."""
    reasons = sorted({reason for counts in found for reason in counts["rejected"]})
    rows = [
        ["completions", *(f"{counts['completions']:,}" for counts in found)],
        ["of these cut by length", *(f"{counts['cut_by_length']:,}" for counts in found)],
        ["tasks parsed", *(f"{counts['tasks_parsed']:,}" for counts in found)],
        *([f"dropped: {r.replace('_', ' ')}", *(f"{c['rejected'].get(r, 0):,}" for c in found)] for r in reasons),
        ["kept", *(f"{counts['kept']:,}" for counts in found)],
    ]
    return _table(["", *(f"`{name}`" for name in names)], rows)


def measure_mix(examples: list[dict[str, str]], kinds: dict[str, str]) -> dict:
    """Measures what the tasks are like: lengths of answers, long inputs, code, kinds, style.

    Args:
        examples: Alpaca-format records.
        kinds: Instruction -> kind ("code", "math", "document", ...), for the records that have one.

    Returns:
        Counts of records by property; words of outputs, and how many have 1 to 15, 16 to 30, ... (by the first number;
        `fullest` has the three of the most); semicolons per 1,000 words outside code.
    """
    outputs = [example["output"] for example in examples]
    words = sorted(len(output.split()) for output in outputs)
    bands = collections.Counter((n - 1) // BAND * BAND + 1 for n in words)
    code = [[text for name, text in data_checks.fenced_blocks(o) if name in data_checks.CODE] for o in outputs]
    prose = [data_checks.prose(output) for output in outputs]
    labelled = (kinds.get(example["instruction"]) for example in examples)
    return {
        "count": len(examples),
        "output_words": {"p50": _rank(words, 50), "p90": _rank(words, 90), "max": words[-1]},
        "bands": dict(sorted(bands.items())),
        "fullest": [first for first, _ in bands.most_common(3)],
        "long_outputs": sum(n > 150 for n in words),
        "long_inputs": sum(len(example["input"].split()) > 100 for example in examples),
        "code": sum(map(bool, code)),
        "code_of_5_to_60_lines": sum(any(5 <= len(c.splitlines()) <= 60 for c in blocks) for blocks in code),
        "code_with_tests": sum(any("assert" in c for c in blocks) for blocks in code),
        "tabular": sum(map(data_checks.is_tabular, outputs)),
        "colon_openers": sum(data_checks.opens_with_colon(example["instruction"]) for example in examples),
        "semicolons_per_1000_words": 1000 * sum(p.count(";") for p in prose) / sum(len(p.split()) for p in prose),
        "kinds": dict(sorted(collections.Counter(filter(None, labelled)).items())),
    }


def mix_table(names: list[str], found: list[dict]) -> str:
    """Formats what the tasks are like, one column a data set."""

    def share(title: str, count: Callable[[dict], int]) -> list[str]:
        return [title, *(_share(count(m), m["count"]) for m in found)]

    rows = [
        ["words of outputs: p50 / p90 / max", *(" / ".join(map(str, m["output_words"].values())) for m in found)],
        *(share(f"outputs of {b} to {b + 14} words", lambda m, b=b: m["bands"].get(b, 0)) for b in found[0]["fullest"]),
        *(share(title, operator.itemgetter(name)) for name, title in MIX.items()),
        ["semicolons per 1,000 words of prose", *(f"{m['semicolons_per_1000_words']:.1f}" for m in found)],
        *(share(f"kind: {kind}", lambda m, kind=kind: m["kinds"].get(kind, 0)) for kind in found[0]["kinds"]),
    ]
    return _table(["", *(f"`{name}`" for name in names)], rows)


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
    recordings: str | None = None,
    seed_tasks_paths: str = "seed_tasks.jsonl",
    checks: str | None = None,
    update: str | None = None,
    result_path: str | None = None,
) -> None:
    """Measures a data set, compares it with a second one at equal size, and prints tables.

    Args:
        data_path: Alpaca-format data, JSON or JSON Lines.
        compare: A second data set to compare with.
        size: Number of records to compare at. By default the size of the smaller set.
        recordings: Recorded completions that the data was made from, in order, separated by commas; counts what was
            dropped and why.
        seed_tasks_paths: For each recording, the seed tasks that it was made with, separated by commas.
        checks: JSON Lines with the `kind` of each `instruction`; several files are separated by commas.
        update: Markdown file whose tables to replace: those between `<!-- figures -->` and `<!-- end of figures -->`,
            and likewise lengths, mix, comparison and collection.
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
    notes = [record for path in checks.split(",") for _, record in load_records(path)] if checks else []
    kinds = {note["instruction"]: note["kind"] for note in notes}
    mix = [measure_mix(examples, kinds) for examples in data_sets]
    result["mix"] = dict(zip(names, mix, strict=True))
    tables = {"figures": figures_table(names[:1], whole[:1]), "lengths": lengths_table(whole[0])}
    tables["mix"] = mix_table(names[:1], mix[:1])
    shown = [figures_table(names, whole), *(lengths_table(found) for found in whole), mix_table(names, mix)]
    if compare:
        size = size or min(map(len, data_sets))
        if not 0 < size <= min(map(len, data_sets)):
            raise UserError(f"--size {size}: the data sets have {' and '.join(str(len(d)) for d in data_sets)} records")
        equal = [measure_at_size(examples, size) for examples in data_sets]
        result["at_equal_size"] = dict(zip(names, equal, strict=True))
        tables["comparison"] = comparison_table(names, equal)
        shown.append(tables["comparison"])
    if recordings:
        paths, seeds = recordings.split(","), seed_tasks_paths.split(",")
        if len(paths) != len(seeds):
            raise UserError(f"--recordings names {len(paths)} files and --seed_tasks_paths {len(seeds)}; name as many")
        result["collection"] = measure_collection(paths, seeds)
        tables["collection"] = collection_table(paths, result["collection"])
        shown.append(tables["collection"])
    print("\n\n".join(shown))
    if result_path:
        jdump(result, result_path)
    if update:
        update_tables(update, tables)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of single answers


def check(recording: str, checks: str, against: str = "") -> None:
    """Checks what a program can check in the answers of a recording, and says what it couldn't.

    Code blocks run, JSON, CSV and tables parse, lengths are those asked for, numbers and names in answers to documents
    stand in the document, and no task has 13 words in a row in common with another data set.

    Args:
        recording: Recorded completions.
        checks: JSON Lines with `instruction`, `kind` and perhaps `check`, a Python program that fails if the answer is
            wrong. It sees the strings INSTRUCTION, INPUT and OUTPUT.
        against: Data sets that no task may share 13 words in a row with, separated by commas; JSON, JSON Lines or text.
    """
    notes = {record["instruction"]: record for _, record in load_records(checks)}
    tasks = [task for _, record in load_records(recording) for task in parse_tasks(record["text"], 4)]
    problems, counts = [], collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for its programs
        results = list(pool.map(lambda task: check_task(task, notes.get(task.instruction, {})), tasks))
    for task, (found, checked) in zip(tasks, results, strict=True):
        problems += [f"{task.instruction[:60]!r}, {problem}" for problem in found]
        counts.update(checked)
        counts["unchecked"] += not checked
    for path in filter(None, against.split(",")):
        common = list(data_checks.overlaps(tasks, _texts(path)))
        problems += [f"{task.instruction[:60]!r}, in {path}: {words!r}" for task, words in common]
        print(f"{path}: {len(common)} tasks have 13 words in a row in common with it")
    print(
        f"{len(tasks)} answers: {counts['programs']} programs and code blocks ran, {counts['tables']} tables parsed, "
        f"{counts['lengths']} conditions on length and {counts['documents']} answers to documents were checked, "
        f"{len(problems)} problem(s)"
    )
    print(f"{counts['unchecked']} answers have nothing that a program can check; readers alone have checked them")
    if problems:
        raise UserError("; ".join(problems))


def check_task(task: ParsedTask, notes: dict) -> tuple[list[str], collections.Counter]:
    """Checks one task; gives what went wrong, and how many things of each kind were checked.

    Args:
        task: The task.
        notes: Its line of the file of checks.
    """
    program = notes.get("check")
    problems, ran = data_checks.run_blocks(task, program)
    problems += [f"is {task.problem}"] if task.problem else []
    problems += data_checks.table_problems(task.output)
    counts = {"programs": ran, "tables": len(data_checks.tables(task.output))}
    if not program:  # which knows better whether a limit is for each part, and where a number comes from
        counts["lengths"] = len(data_checks.length_conditions(task.instruction))
        problems += data_checks.length_problems(task)
        if notes.get("kind") == "document":
            counts["documents"] = 1
            problems += data_checks.document_problems(task)
    return problems, +collections.Counter(counts)


def _texts(path: str) -> Iterator[str]:
    text = read_text(path)
    if path.endswith((".json", ".jsonl")):
        lines = [text] if path.endswith(".json") else filter(str.strip, text.split("\n"))
        return data_checks.texts_in([parse_json(line, path) for line in lines])
    return iter([text])


if __name__ == "__main__":
    run_cli({"measure": measure, "check": check})
