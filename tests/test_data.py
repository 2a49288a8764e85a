"""What the project ships: seed tasks, prompt, recorded completions, and the data that the pipeline makes of them."""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys

import pytest
from documented import read

from alpaca.records import load_examples, load_records

KEYWORDS = r"(?ix)\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go[ ]to|video|audio|music|flowchart|diagram)\b"


@pytest.fixture(scope="module")
def seed_tasks(root) -> list[dict]:
    return [task for _, task in load_records(os.path.join(root, "seed_tasks.jsonl"))]


@pytest.fixture(scope="module")
def prompt(root) -> str:
    with open(os.path.join(root, "prompt.txt"), encoding="utf-8") as file:
        return file.read()


def trips_a_filter(instruction: str) -> bool:
    """The original's rules, written down a second time on purpose: the data must not depend on the script's."""
    return (
        not 4 <= len(instruction.split()) <= 150
        or re.search(KEYWORDS, instruction) is not None
        or instruction.startswith("Write a program")
        or not (instruction[0].isascii() and instruction[0].isalnum())
    )


def test_the_seed_file_holds_175_tasks_in_self_instructs_schema(seed_tasks):
    assert [task["id"] for task in seed_tasks] == [f"seed_task_{i}" for i in range(175)]
    for task in seed_tasks:
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        assert isinstance(task["is_classification"], bool)
        (instance,) = task["instances"]
        assert list(instance) == ["input", "output"]
        texts = [task["name"], task["instruction"], *instance.values()]
        assert all(isinstance(text, str) and text == text.strip() for text in texts[:-1])
        assert task["name"]
        assert task["instruction"] == " ".join(task["instruction"].split())
        assert not task["instruction"].endswith(":")
        assert instance["output"].strip()
        assert "###" not in json.dumps(task)
    assert len({task["name"] for task in seed_tasks}) == 175


def test_about_half_of_the_seed_tasks_have_an_input_and_about_25_classify(seed_tasks):
    assert 80 <= sum(bool(task["instances"][0]["input"]) for task in seed_tasks) <= 95
    assert 22 <= sum(task["is_classification"] for task in seed_tasks) <= 28


def test_inputs_and_answers_of_the_seed_tasks_keep_to_100_words(seed_tasks):
    for task in seed_tasks:
        assert len(task["instances"][0]["input"].split()) <= 100, task["id"]
        assert len(task["instances"][0]["output"].split()) <= 100, task["id"]


def test_no_seed_task_trips_the_filters(seed_tasks):
    assert [task["id"] for task in seed_tasks if trips_a_filter(task["instruction"])] == []


def test_no_two_seed_tasks_are_alike(seed_tasks):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = itertools.combinations([task["instruction"] for task in seed_tasks], 2)
    scores = [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert max(scores) <= 0.7
    assert sum(score > 0.4 for score in scores) <= 3


def test_the_first_words_of_the_seed_tasks_vary(seed_tasks):
    assert len({task["instruction"].split()[0].lower() for task in seed_tasks}) >= 100


def test_the_prompt_numbers_its_requirements_from_1_to_8_and_ends_where_the_list_begins(prompt):
    numbers = [int(found) for found in re.findall(r"^(\d+)\. ", prompt, re.MULTILINE)]
    assert numbers == list(range(1, 9))
    assert prompt.endswith("\nList of 20 tasks:\n")
    assert '"<noinput>"' in prompt


@pytest.fixture(scope="module")
def recording(root) -> list[dict]:
    return [record for _, record in load_records(os.path.join(root, "recordings", "completions.jsonl"))]


@pytest.fixture(scope="module")
def examples(root) -> list[dict]:
    return load_examples(os.path.join(root, "alpaca_data.json"))


@pytest.fixture(scope="module")
def regenerated(root, tmp_path_factory):
    """The folder that DATA.md's command writes, run against the replayed recording over HTTP."""
    folder = tmp_path_factory.mktemp("regenerated")
    replay = [sys.executable, "-m", "demo.replay", "--port", "0"]
    with subprocess.Popen(replay, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            command = "-m generate_instruction generate_instruction_following_data --seed 0 --max_requests 78"
            flags = ["--num_instructions_to_generate", "10000", "--base_url", url, "--output_dir", str(folder)]
            subprocess.run([sys.executable, *command.split(), *flags], cwd=root, check=True, capture_output=True)
        finally:
            server.terminate()
    return folder


def prompt_of_request(index: int, seed_tasks: list[dict], prompt: str) -> str:
    """Written down apart from the script: the recording answers exactly these prompts."""
    text = prompt
    for i, task in enumerate(random.Random(f"0-{index}").sample(seed_tasks, 3), start=1):
        instance = task["instances"][0]
        text += f"###\n{i}. Instruction: {task['instruction']}\n{i}. Input:\n{instance['input'] or '<noinput>'}\n"
        text += f"{i}. Output:\n{instance['output']}\n"
    return text + "###\n4. Instruction:"


def test_each_recorded_completion_answers_the_prompt_of_its_request(recording, seed_tasks, prompt):
    assert [record["request_index"] for record in recording] == list(range(78))
    for record in recording:
        text = prompt_of_request(record["request_index"], seed_tasks, prompt)
        assert record["prompt_sha256"] == hashlib.sha256(text.encode("utf-8")).hexdigest()
        usage = record["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [record["finish_reason"] for record in recording].count("length") == 1


def test_the_pipeline_makes_the_bundled_data_of_the_recording_to_the_byte(root, regenerated):
    with open(os.path.join(root, "alpaca_data.json"), "rb") as file:
        assert (regenerated / "alpaca_data.json").read_bytes() == file.read()


def test_the_recordings_blemishes_are_rejected_each_with_its_reason(regenerated):
    rejected = [json.loads(line) for line in (regenerated / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["reason"] for record in rejected} == {"keyword", "similar", "too_short", "truncated"}


def test_the_bundled_data_are_over_1000_tasks_in_three_fields_no_instruction_twice(examples):
    assert len(examples) >= 1000
    assert all(list(example) == ["instruction", "input", "output"] for example in examples)
    assert len({example["instruction"] for example in examples}) == len(examples)
    assert not any(trips_a_filter(example["instruction"]) for example in examples)


def test_four_in_ten_bundled_tasks_have_an_input_and_answers_go_from_a_word_to_100(examples):
    assert 0.38 <= sum(bool(example["input"]) for example in examples) / len(examples) <= 0.46
    assert max(len(example["input"].split()) for example in examples) <= 100
    lengths = [len(example["output"].split()) for example in examples]
    assert min(lengths) == 1
    assert max(lengths) <= 100


def test_the_counts_in_the_text_are_those_of_the_data(examples, seed_tasks, recording):
    sheet = read("DATA.md")
    share = sum(bool(example["input"]) for example in examples) / len(examples)
    inputs = sum(bool(task["instances"][0]["input"]) for task in seed_tasks)
    classify = sum(task["is_classification"] for task in seed_tasks)
    assert f"{len(examples):,} instruction-following tasks, {share:.0%}".replace("%", " %") in sheet
    assert f"{len(seed_tasks)} tasks in Self-Instruct's schema; {inputs} have an input, {classify} classify" in sheet
    assert f"{len(recording)} completions" in sheet
    assert f"| {len(examples):,} of our own" in read("DIFFERENCES.md")
    assert f"{len(examples):,} tasks" in read("README.md")
