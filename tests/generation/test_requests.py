"""alpaca/generation/requests.py: journals that are torn, edited, locked or of other settings."""

import re

import pytest
from generation_runs import fails, generate, journal, outputs

from alpaca.generation.requests import RequestJournal


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_torn_last_line_is_asked_for_again(folder, server, cut):
    generate(server)
    before, path = outputs(folder / "out"), folder / "out" / "requests.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    server.requests.clear()
    generate(server)
    assert len(server.requests) == (0 if cut == 1 else 1)  # without its newline a record is whole
    assert outputs(folder / "out") == before
    assert len(journal(folder / "out")) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_name": "other"}, "model tiny, this run has model other"),
        ({"seed": 1}, "seed 0, this run has seed 1"),
        ({"temperature": 0.5}, "temperature 1.0, this run has temperature 0.5"),
        ({"num_prompt_instructions": 2}, "num_prompt_instructions 3"),
        ({"prompt_path": "other.txt"}, "another prompt_file"),
        ({"seed_tasks_path": "fewer.jsonl"}, "another seed_tasks"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_journal_of_other_settings_is_refused_with_the_difference(folder, server, capsys, change, named):
    generate(server)
    (folder / "other.txt").write_text("Other rules:\n")
    (folder / "fewer.jsonl").write_text("".join((folder / "seed_tasks.jsonl").read_text().splitlines(True)[:4]))
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    server.requests.clear()
    assert named in fails(capsys, server, **change)
    assert not server.requests
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [lines[0], "{nonsense", *lines[1:]], "line 2: not a record"),
        (lambda lines: [*lines, lines[0]], "line 4: duplicate request_index 0"),
        (lambda lines: ["[1]", *lines], "line 1: not a record"),
        (lambda lines: [*lines[:2], lines[2].replace('"request_index": 2', '"request_index": "2"')], "line 3: not a"),
        (lambda lines: [re.sub('"text": ".*", "fin', '"text": null, "fin', line) for line in lines], "line 1: not a"),
        (lambda lines: [line.replace("prompt_tokens", "tokens") for line in lines], "line 1: not a record"),
        *(
            (
                lambda lines, cost=cost: [line.replace('"cost": null', f'"cost": {cost}') for line in lines],
                "line 1: not a",
            )
            for cost in ('"1"', "NaN", "1e400", "-1")
        ),
        (
            lambda lines: [re.sub('"prompt_tokens": ', '"prompt_tokens": 9' + "0" * 999, lines[0])],
            "line 1: not a record",
        ),
    ],
    ids=["garbage", "twice", "list", "index", "text", "usage", "cost", "nan", "infinite", "negative", "absurd"],
)
def test_a_damaged_journal_is_refused_by_line(folder, server, capsys, damage, said):
    generate(server, request_batch_size=1)
    path = folder / "out" / "requests.jsonl"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    assert said in fails(capsys, server)


def test_two_runs_do_not_write_one_journal(folder, server, capsys):
    with RequestJournal("out"):
        assert "another run is writing" in fails(capsys, server)
