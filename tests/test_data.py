"""The seed tasks and the prompt that ship with the project."""

import itertools
import json
import os
import re

import pytest

from utils import load_records

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
