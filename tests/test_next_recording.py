"""recordings/next: completions of the pipeline's own prompts, every task well-formed, everything that can run does."""

import hashlib
import os
import subprocess
import sys

import pytest

from alpaca.generation.config import Config
from alpaca.generation.inputs import Prompts
from alpaca.generation.parser import ParsedTask, parse_tasks
from alpaca.records import load_records
from benchmarks import data_quality
from generate_instruction import encode_prompt, find_objection


@pytest.fixture(scope="module")
def folder(root) -> str:
    return os.path.join(root, "recordings", "next")


@pytest.fixture(scope="module")
def recording(folder) -> list[dict]:
    return [record for _, record in load_records(os.path.join(folder, "completions.jsonl"))]


def test_each_completion_answers_the_prompt_of_its_request(folder, recording):
    paths = {
        name: os.path.join(folder, path)
        for name, path in (("prompt_path", "prompt.txt"), ("seed_tasks_path", "seed_tasks.jsonl"))
    }
    prompts = Prompts(Config(**paths), encode_prompt)
    assert [record["request_index"] for record in recording] == list(range(len(recording)))
    for record in recording:
        prompt = prompts.of(record["request_index"])
        assert record["prompt_sha256"] == hashlib.sha256(prompt.encode()).hexdigest()


def test_every_completion_holds_nine_tasks_that_pass_the_filters(recording):
    for record in recording:
        tasks = parse_tasks(record["text"], 4)
        assert len(tasks) == 9
        assert not [
            task.problem or find_objection(task.instruction, task.output, Config())
            for task in tasks
            if task.problem or find_objection(task.instruction, task.output, Config())
        ]


def test_no_two_tasks_have_the_same_instruction(recording):
    instructions = [task.instruction for record in recording for task in parse_tasks(record["text"], 4)]
    assert len(set(instructions)) == len(instructions) >= 324


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
