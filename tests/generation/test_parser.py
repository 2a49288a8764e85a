"""alpaca/generation/parser.py: what the original's rules find in well-formed answers, and most of what others hold."""

import json
import random
import re

import pytest
from openai_server import WORDS, completion_for

from alpaca.generation.parser import parse_tasks

GOOD = " Name a prime.\n4. Input:\n<noinput>\n4. Output:\n7\n###\n5. Instruction: Add.\n5. Input:\n1 2\n5. Output:\n3"


def parsed(text: str, truncated: bool = False) -> list[tuple[str, str, str]]:
    """The tasks without a problem."""
    tasks = parse_tasks(text, 4, truncated)
    return [(task.instruction, task.input, task.output) for task in tasks if not task.problem]


def original_rules(text: str, truncated: bool) -> list[tuple[str, str, str]]:
    """The original's rules in a few words: cut at ###, count up, three headings by that number."""
    blocks = f"4. Instruction:{text}".split("###")
    tasks = []
    for number, block in enumerate(blocks[:-1] if truncated else blocks, start=4):
        pieces = re.split(rf"{number}\.\s+(?:Instruction|Input|Output):", block)
        if len(pieces) == 4:
            instruction, given, output = (piece.strip() for piece in pieces[1:])
            tasks.append((instruction, "" if given.lower() == "<noinput>" else given, output))
    return tasks


@pytest.mark.parametrize("seed", range(40))
def test_well_formed_completions_give_what_the_original_rules_give(seed):
    rng = random.Random(seed)
    tasks = []
    for _ in range(rng.randint(1, 17)):
        output = "\n".join(
            rng.choice(["- ", "1) ", "", "**b** "]) + " ".join(rng.choices(WORDS, k=4)) for _ in range(3)
        )
        tasks.append((f"Do {rng.choice(WORDS)}:  {rng.choice(WORDS)}", rng.choice(["<noinput>", "x\ny"]), output))
    text = completion_for("###\n4. Instruction:", tasks) + rng.choice(["", "\n###", "\n###\n", "\n###\n20", "\n\n"])
    for truncated in (False, True):
        assert parsed(text, truncated) == original_rules(text, truncated)


def test_well_formed_task_is_read():
    assert parsed(GOOD) == [("Name a prime.", "", "7"), ("Add.", "1 2", "3")]


@pytest.mark.parametrize(
    "text",
    [
        "4. Instruction:" + GOOD,
        "###\n4. Instruction:" + GOOD,
        "Sure! Here are the tasks:\n\n###\n4. Instruction:" + GOOD,
        "Here they are.\n\n4. Instruction:" + GOOD,
        "<think>4. Instruction: drafts\n4. Output: x</think>\n4. Instruction:" + GOOD,
    ],
    ids=["echo", "echo_after_separator", "preamble", "preamble_without_separator", "thought"],
)
def test_an_answer_that_repeats_the_heading_is_understood(text):
    assert parsed(text) == [("Name a prime.", "", "7"), ("Add.", "1 2", "3")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(\d)\. (\w+):", r"**\1. \2:**"),
        (r"(\d)\. (\w+):", r"**\1. \2**:"),
        (r"(\d)\. (\w+):", r"\1. **\2:**"),
        (r"(\d)\. (\w+):", r"\1) \2:"),
        (r"(\d)\. (\w+):", r"### \1. \2:"),
        (r"(\d)\. (\w+):", r"Task \1 - \2:"),
        (r"(\d)\. (\w+):", r"\2:"),
        (r"###\n", "\n"),
        (r"###\n", "\n---\n"),
        (r"5\.", "4."),
        (r"5\.", "9."),
        (r"5\.", "1."),
        (r"(?<!#)###\n5\.", "\n1."),
        (r"4\. Input:\n<noinput>\n", ""),
        (r"5\. Input(.*)\n5\. Output", r"6. Input\1\n7. Output"),
        (r"\d\. (Input|Output):", r"\1:"),
        (r"\d\. (Input|Output):", r"**\1:**"),
        (r"\d\. (Input|Output):", r"- \1:"),
        (r"(\d)\. (\w+):", r"- \1. \2:"),
        (r"(\d\. )Output:", r"\1Response:"),
        (r"\d\. (Input|Output):", lambda match: f"* **{match[1].replace('Output', 'Response')}:**"),
    ],
)
def test_headings_may_be_written_and_numbered_otherwise(old, new):
    text = re.sub(old, new, "4. Instruction:" + GOOD, flags=re.DOTALL if "(.*)" in old else 0)
    assert parsed(text) == [("Name a prime.", "", "7"), ("Add.", "1 2", "3")]


def test_the_first_bare_output_line_below_a_numbered_instruction_begins_the_output():
    text = (
        " Explain the form.\nInput:\nA form.\nOutput:\nIt has two boxes:\nInput: what goes in\nOutput: what comes out"
    )
    output = "It has two boxes:\nInput: what goes in\nOutput: what comes out"
    assert parsed(text + "\n###\n5. Instruction: Add.\nOutput:\n3") == [
        ("Explain the form.", "A form.", output),
        ("Add.", "", "3"),
    ]


def test_a_response_line_inside_an_output_is_text():
    assert parsed(GOOD.replace("\n7\n", "\nCall:\n4. Response: none\n"))[0][2] == "Call:\n4. Response: none"


TASKS = [{"instruction": "Name a prime.", "input": "<noinput>", "output": "7"}]
TASKS += [{"instruction": "Add.", "input": "1 2", "output": "3"}]


@pytest.mark.parametrize("form", ["{}", "\n```json\n{}\n```\n", "\n```\n{}```"])
def test_a_json_list_of_tasks_is_read(form):
    assert parsed(form.format(json.dumps(TASKS, indent=1))) == [("Name a prime.", "", "7"), ("Add.", "1 2", "3")]


def test_a_json_list_that_was_cut_gives_its_whole_tasks():
    text = json.dumps(TASKS)
    for cut in range(text.index("}") + 1, len(text) - 3):
        assert parsed(text[:cut], truncated=True) == [("Name a prime.", "", "7")]
    assert [task.problem for task in parse_tasks(text[:-9], 4, truncated=True)] == [None, "truncated"]


@pytest.mark.parametrize("start", ['[{"a": 1}] is JSON. What is a?', "[1, 2, 3] and [4]: which is longer?"])
def test_an_instruction_that_begins_with_json_is_an_instruction(start):
    assert parsed(f" {start}\n4. Input:\n<noinput>\n4. Output:\n7") == [(start, "", "7")]


def test_headings_are_matched_at_line_starts_only():
    text = " Say 14. Input: and 4. Output: at once.\n4. Input:\n<noinput>\n4. Output:\nIn 14. Output: 1920."
    assert parsed(text) == [("Say 14. Input: and 4. Output: at once.", "", "In 14. Output: 1920.")]


def test_headings_without_numbers_are_matched_at_line_starts_only():
    text = (
        "Instruction: Explain the form.\nInput:\n<noinput>\nOutput:\nIt asks for an Input: and an Output: in two boxes."
        "\n###\nInstruction: Add.\nInput:\n1 2\nOutput:\n3"
    )
    first = ("Explain the form.", "", "It asks for an Input: and an Output: in two boxes.")
    assert parsed(text) == [first, ("Add.", "1 2", "3")]


def test_an_output_may_hold_markdown_headings_rules_and_numbered_examples():
    output = "### Title\ntext\n---\n1. Instruction: an example\n1. Input: a\n1. Output: b\n#### End"
    text = GOOD.replace("\n7\n", f"\n{output}\n")
    assert parsed(text) == [("Name a prime.", "", output), ("Add.", "1 2", "3")]


def test_number_in_an_answer_is_not_cut():
    assert parsed(GOOD.replace("\n7\n", "\nIn 1920.\n20. is next\n"))[0][2] == "In 1920.\n20. is next"


@pytest.mark.parametrize("word", ["<noinput>", "<NoInput>", "No input", "no input.", "N/A", "n/a", "None", "(none)"])
def test_no_input_is_understood_in_many_words(word):
    assert parsed(GOOD.replace("<noinput>", word))[0][1] == ""


@pytest.mark.parametrize("given", ["None of them", "No input device works", "n/a/b", "a\nNone"])
def test_inputs_that_merely_begin_like_no_input_stay(given):
    assert parsed(GOOD.replace("<noinput>", given))[0][1] == given


@pytest.mark.parametrize("cut", range(1, len(GOOD)))
def test_a_cut_answer_gives_whole_tasks_only(cut):
    assert parsed(GOOD[:cut], truncated=True) in ([], [("Name a prime.", "", "7")])


def test_truncated_last_task_is_dropped_and_the_one_before_it_kept():
    for tail in ("", "\n", "\n###\n", "\n###\n5", "\n###\n5. Instr", "\n###\n5. Instruction: Add th"):
        whole = GOOD.split("\n###")[0] + tail
        assert parsed(whole, truncated=True) == ([("Name a prime.", "", "7")] if "###" in tail else [])


def test_text_after_the_last_separator_is_no_part_of_an_output():
    assert parsed(GOOD + "\n###\n\nI hope that these help!")[-1] == ("Add.", "1 2", "3")


def test_problems_are_told_apart():
    assert [task.problem for task in parse_tasks("I cannot help.", 4)] == ["malformed"]
    assert [task.problem for task in parse_tasks(GOOD, 4, truncated=True)] == [None, "truncated"]
    assert [task.problem for task in parse_tasks(GOOD.replace("5. Output", "5. Answer"), 4)] == [None, "malformed"]
    assert parse_tasks(" \n", 4) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["\n" * 50_000, "#" * 50_000, "4. " * 20_000, "- - " * 20_000, "4. Input:\n" * 5_000])
def test_garbage_is_read_in_no_time(text):
    assert not parsed(text)
