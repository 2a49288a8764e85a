"""What the project ships: seed tasks, prompt, recorded completions, and the data that the pipeline makes of them."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from documented import read

from alpaca.generation.parser import ParsedTask
from alpaca.records import load_examples, load_records
from benchmarks import data_checks

KEYWORDS = r"(?ix)\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go[ ]to|video|audio|music|flowchart|diagram)\b"


@pytest.fixture(scope="module")
def seed_tasks(root) -> list[dict]:
    return [task for _, task in load_records(os.path.join(root, "seed_tasks.jsonl"))]


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


def test_about_half_of_the_seed_tasks_have_an_input_and_one_in_ten_classifies(seed_tasks):
    assert 80 <= sum(bool(task["instances"][0]["input"]) for task in seed_tasks) <= 95
    assert 15 <= sum(task["is_classification"] for task in seed_tasks) <= 25


def test_some_seed_tasks_are_about_documents_and_some_have_long_answers(seed_tasks):
    assert sum(len(task["instances"][0]["input"].split()) > 100 for task in seed_tasks) >= 15
    assert sum(len(task["instances"][0]["output"].split()) > 100 for task in seed_tasks) >= 40


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


@pytest.mark.parametrize(("path", "tasks"), [("prompt.txt", 12), ("configs/prompt_paper.txt", 20)])
def test_a_prompt_numbers_its_requirements_from_1_to_8_and_ends_where_the_list_begins(root, path, tasks):
    with open(os.path.join(root, path), encoding="utf-8") as file:
        prompt = file.read()
    numbers = [int(found) for found in re.findall(r"^(\d+)\. ", prompt, re.MULTILINE)]
    assert numbers == list(range(1, 9))
    assert prompt.startswith(f"Write {tasks} different tasks ")
    assert prompt.endswith(f"\nList of {tasks} tasks:\n")
    assert '"<noinput>"' in prompt


@dataclasses.dataclass(frozen=True)
class Recording:
    """Completions, and what they answer."""

    name: str
    seed: int = 0
    prompt: str = "prompt.txt"
    seed_tasks: str = "seed_tasks.jsonl"

    @property
    def path(self) -> str:
        return os.path.join("recordings", self.name, "completions.jsonl")

    def read(self, root) -> list[dict]:
        return [record for _, record in load_records(os.path.join(root, self.path))]


PAPER = Recording("paper", 0, "configs/prompt_paper.txt", "recordings/paper/seed_tasks.jsonl")
MAIN = Recording("")
EVAL = Recording("eval", seed=1)


@pytest.fixture(scope="module")
def examples(root) -> list[dict]:
    return load_examples(os.path.join(root, "alpaca_data.json"))


@pytest.fixture(scope="module")
def eval_examples(root) -> list[dict]:
    return load_examples(os.path.join(root, "eval_data.json"))


@pytest.fixture(scope="module")
def regenerated(root, tmp_path_factory):
    """The folders that DATA.md's commands write, run against the replayed recordings over HTTP."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("paper", "all", "eval")}
    generate(root, PAPER, folders["paper"])
    shutil.copy(folders["paper"] / "regen.json", folders["all"])
    generate(root, MAIN, folders["all"])
    generate(root, EVAL, folders["eval"])
    return folders


def generate(root, recording, folder):
    replay = [sys.executable, "-m", "demo.replay", "--port", "0", "--recording", recording.path]
    with subprocess.Popen(replay, cwd=root, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            command = f"-m generate_instruction generate_instruction_following_data --seed {recording.seed}"
            flags = ["--max_requests", str(len(recording.read(root))), "--num_instructions_to_generate", "10000"]
            flags += ["--prompt_path", recording.prompt, "--seed_tasks_path", recording.seed_tasks]
            flags += ["--base_url", url, "--output_dir", str(folder)]
            subprocess.run([sys.executable, *command.split(), *flags], cwd=root, check=True, capture_output=True)
        finally:
            server.terminate()


def prompt_of_request(recording: Recording, index: int, root) -> str:
    """Written down apart from the script: the recording answers exactly these prompts."""
    with open(os.path.join(root, recording.prompt), encoding="utf-8") as file:
        text = file.read()
    seed_tasks = [task for _, task in load_records(os.path.join(root, recording.seed_tasks))]
    for i, task in enumerate(random.Random(f"{recording.seed}-{index}").sample(seed_tasks, 3), start=1):
        instance = task["instances"][0]
        text += f"###\n{i}. Instruction: {task['instruction']}\n{i}. Input:\n{instance['input'] or '<noinput>'}\n"
        text += f"{i}. Output:\n{instance['output']}\n"
    return text + "###\n4. Instruction:"


@pytest.mark.parametrize("recording", [PAPER, MAIN, EVAL], ids=lambda recording: recording.name or "main")
def test_each_recorded_completion_answers_the_prompt_of_its_request(root, recording):
    records = recording.read(root)
    assert [record["request_index"] for record in records] == list(range(len(records)))
    for record in records:
        text = prompt_of_request(recording, record["request_index"], root)
        assert record["prompt_sha256"] == hashlib.sha256(text.encode("utf-8")).hexdigest()
        usage = record["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [record["finish_reason"] for record in records].count("length") == (recording is PAPER)


@pytest.mark.parametrize(("name", "path"), [("all", "alpaca_data.json"), ("eval", "eval_data.json")])
def test_the_pipeline_makes_the_bundled_data_of_the_recordings_to_the_byte(root, regenerated, name, path):
    with open(os.path.join(root, path), "rb") as file:
        assert (regenerated[name] / "alpaca_data.json").read_bytes() == file.read()


def test_the_papers_recording_has_blemishes_that_are_rejected_each_with_its_reason(regenerated):
    lines = (regenerated["paper"] / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"keyword", "similar", "too_short", "truncated"}


def test_the_bundled_data_are_3000_tasks_in_three_fields_no_instruction_twice(examples):
    assert len(examples) >= 3000
    assert all(list(example) == ["instruction", "input", "output"] for example in examples)
    assert len({example["instruction"] for example in examples}) == len(examples)
    assert not any(trips_a_filter(example["instruction"]) for example in examples)


def test_the_held_out_set_holds_200_tasks_that_are_not_trained_on(examples, eval_examples):
    from alpaca.generation.dedup import RougePool

    assert len(eval_examples) >= 200
    pool = RougePool([example["instruction"] for example in examples])
    verdicts = pool.screen([example["instruction"] for example in eval_examples], 0.7, limit=0)
    assert max(verdict.score for verdict in verdicts) <= 0.7
    theirs = [text for example in examples for text in example.values()]
    tasks = [ParsedTask(**example) for example in eval_examples]
    assert [task.instruction for task, _ in data_checks.overlaps(tasks, theirs)] == []


def test_answers_go_from_a_word_to_hundreds(examples):
    lengths = [len(example["output"].split()) for example in examples]
    assert min(lengths) == 1
    assert max(lengths) >= 400
    assert sum(n > 150 for n in lengths) / len(lengths) >= 0.14
    assert max(collections.Counter((n - 1) // 15 for n in lengths).values()) / len(lengths) <= 0.12
    assert sum(len(example["input"].split()) > 100 for example in examples) / len(examples) >= 0.09


def test_the_counts_in_the_text_are_those_of_the_data(root, examples, eval_examples, seed_tasks):
    sheet = read("DATA.md")
    share = sum(bool(example["input"]) for example in examples) / len(examples)
    inputs = sum(bool(task["instances"][0]["input"]) for task in seed_tasks)
    classify = sum(task["is_classification"] for task in seed_tasks)
    assert f"{len(examples):,} instruction-following tasks, {share:.0%}".replace("%", " %") in sheet
    assert f"{len(seed_tasks)} tasks in Self-Instruct's schema; {inputs} have an input, {classify} classify" in sheet
    for recording in (PAPER, MAIN, EVAL):
        assert f"{len(recording.read(root))} completions" in sheet
    assert f"{len(eval_examples)} more tasks" in sheet
    assert f"| {len(examples):,} of our own" in read("DIFFERENCES.md")
    assert f"{len(examples):,} tasks" in read("README.md")
