"""alpaca/generation/inputs.py: seed tasks, and the prompts made from them."""

import random

import pytest
from generation_runs import fails

import generate_instruction
from alpaca.generation.config import Config


def test_prompt_of_a_request_depends_on_seed_and_index_alone(folder):
    seeds = generate_instruction.load_seed_tasks("seed_tasks.jsonl")
    prompts = generate_instruction.Prompts(Config(seed=7), generate_instruction.encode_prompt)
    expected = random.Random("7-12").sample(seeds, 3)
    assert prompts.of(12) == generate_instruction.encode_prompt(expected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2, column 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"instruction": "x"}', "line 2: 'instances' must be a list"),
        ('{"instruction": "x", "instances": [{"input": ""}]}', "line 2: 'output' must be text, found null"),
        (
            '{"instruction": 3, "instances": [{"input": "", "output": "y"}]}',
            "line 2: 'instruction' must be text, found 3",
        ),
        ('{"instruction": "x", "instances": [{"input": 1, "output": "y"}]}', "line 2: 'input' must be text, found 1"),
        (r'{"instruction": "x \ud83d", "instances": [{"output": "y"}]}', "line 2: 'instruction' is no text"),
    ],
)
def test_malformed_seed_file_is_refused_with_its_line(folder, server, capsys, line, said):
    lines = (folder / "seed_tasks.jsonl").read_text().splitlines()
    (folder / "seed_tasks.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]))
    assert said in fails(capsys, server)
    assert not server.requests
