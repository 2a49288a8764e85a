"""The recordings of longer tasks: every task is well-formed, and what a program can check is right."""

import os
import subprocess
import sys

import pytest

from alpaca.generation.config import Config
from alpaca.generation.parser import ParsedTask, parse_tasks
from alpaca.records import load_records
from benchmarks import data_checks, data_quality
from generate_instruction import find_objection


@pytest.fixture(scope="module", params=["", "eval"], ids=["main", "eval"])
def folder(root, request) -> str:
    return os.path.join(root, "recordings", request.param)


@pytest.fixture(scope="module")
def completions(folder) -> list[list[ParsedTask]]:
    records = load_records(os.path.join(folder, "completions.jsonl"))
    return [parse_tasks(record["text"], 4) for _, record in records]


def test_every_completion_holds_nine_tasks_that_pass_the_filters(completions):
    assert {len(tasks) for tasks in completions} == {9}
    tasks = [task for tasks in completions for task in tasks]
    assert not any(task.problem or find_objection(task.instruction, task.output, Config()) for task in tasks)


def test_every_task_has_a_kind_and_every_calculation_a_program(folder, completions):
    notes = {record["instruction"]: record for _, record in load_records(os.path.join(folder, "checks.jsonl"))}
    assert set(notes) == {task.instruction for tasks in completions for task in tasks}
    kinds = {note["kind"] for note in notes.values()}
    assert kinds == {"boundary", "code", "document", "letter", "math", "other", "table"}
    assert all("check" in note for note in notes.values() if note["kind"] == "math")


def test_every_program_and_code_block_runs(folder, root):
    command = [sys.executable, "-m", "benchmarks.data_quality", "check"]
    for flag, name in (("recording", "completions.jsonl"), ("checks", "checks.jsonl")):
        command += [f"--{flag}", os.path.join(folder, name)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " 0 problem(s)" in done.stdout


@pytest.mark.parametrize(
    ("output", "program", "complaint"),
    [
        ("```python\nassert 1 + 1 == 3\n```", None, "AssertionError"),
        ('```json\n{"a": 1,}\n```', None, "json"),
        ("The sum is 12.", "assert str(5 + 6) in OUTPUT", "AssertionError"),
        ("The sum is 11.", "assert str(5 + 6) in OUTPUT", None),
    ],
)
def test_a_wrong_answer_is_found(output, program, complaint):
    problems, ran = data_quality.check_task(ParsedTask("What is 5 + 6?", "", output), {"check": program})
    assert ran["programs"] == 1
    assert (complaint in problems[0]) if complaint else not problems


DOCUMENT = "Notice: from 3 May to 9 May the Ostrava pool is closed. Ring Jana on 555 0142."


@pytest.mark.parametrize(
    ("instruction", "output", "kind", "complaint"),
    [
        (
            "Summarize it in under 10 words.",
            "The pool in Ostrava is closed from 3 May to 9 May.",
            "",
            "12 words, asked",
        ),
        ("Summarize it in at most 12 words.", "The pool in Ostrava is closed from 3 May to 9 May.", "", None),
        ("Give me exactly three words on it.", "Pool closed, sorry", "", None),
        ("Give me exactly three words on it.", "Pool closed", "", "2 words, asked for exactly 3"),
        ("Two slogans, under 5 words each.", "Stay dry, dear swimmers. The pool will be back.", "", None),
        ("When is it closed?", "From 3 May to 10 May.", "document", "numbers that the document doesn't have: 10"),
        (
            "Who answers calls?",
            "You can ring Jana, not Petra.",
            "document",
            "names that the document doesn't have: Petra",
        ),
        ("Who answers calls?", "1. Ring Jana on a Monday.", "document", None),
        ("As a table, please.", "| from | to |\n| --- | --- |\n| 3 May |\n", "", "a table with rows of [1, 2] cells"),
        ("As CSV, please.", "```csv\nfrom,to\n3 May\n```", "", "csv: rows of [1, 2] fields"),
    ],
)
def test_what_a_condition_a_document_or_a_table_rules_out_is_found(instruction, output, kind, complaint):
    problems, _ = data_quality.check_task(ParsedTask(instruction, DOCUMENT, output), {"kind": kind})
    assert (complaint in problems[0]) if complaint else not problems


def test_thirteen_words_in_common_are_an_overlap_and_twelve_are_none(tmp_path, capsys):
    words = "natalia sold clips to forty eight of her friends in april and then half"
    task = ParsedTask("Work it out.", words.replace("sold", "Sold").replace("april", "april,"), "72")
    assert [words for _, words in data_checks.overlaps([task], [words])] == [" ".join(words.split()[:13])]
    assert list(data_checks.overlaps([task], [" ".join(words.split()[:12])])) == []
