"""benchmarks/data_quality.py: numbers worked out by hand; the bundled data's datasheet says what is measured."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from alpaca.cli import UserError
from benchmarks import data_quality
from generate_instruction import load_seed_tasks

EXAMPLES = [
    {"instruction": "Write a short poem about rain.", "input": "", "output": "Drip drop."},
    {"instruction": "Write a short poem about snow.", "input": "one two three", "output": "White."},
    {"instruction": "Explain why rain falls.", "input": "", "output": "It is heavy."},
    {"instruction": "Describe the picture of rain.", "input": "x", "output": "a b c d"},
    {"instruction": "Explain why rain falls.", "input": "", "output": "Clouds."},
]


def _run(root, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.data_quality", "measure", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def _dump(path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def test_numbers_are_those_worked_out_by_hand():
    found = data_quality.measure_quality(EXAMPLES)
    assert found["count"] == 5
    assert found["unique_instructions"] == 4
    assert found["with_input"] == 2
    assert found["words"]["output"] == {"min": 1, "p5": 1, "p25": 1, "p50": 2, "p75": 3, "p95": 4, "max": 4}
    assert found["words"]["input"] == {"min": 1, "p5": 1, "p25": 1, "p50": 1, "p75": 3, "p95": 3, "max": 3}
    assert (found["root_verb_parsed"], found["root_verbs"]) == (5, 3)
    assert (found["direct_object_parsed"], found["verb_object_pairs"]) == (3, 2)  # write poem, describe picture
    assert found["keyword_hits"] == 1
    # Poems share 5 of 6 words; the two about rain falling are one; "describe the picture of rain" (5 words) shares
    # "rain" with "write a short poem about rain" (6 words) and with "explain why rain falls" (4): F = 2/9.
    assert found["mean_nearest_rouge_l"] == pytest.approx((5 / 6 + 5 / 6 + 1 + 2 / 9 + 1) / 5)


def test_nearest_scores_equal_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["a b c d", "b c d e f", "D, C; b a!", "x", "", "a b c d e f g h"]
    scorer = RougeScorer(["rougeL"])
    pairs = [
        [scorer.score(b, a)["rougeL"].fmeasure for j, b in enumerate(texts) if i != j] for i, a in enumerate(texts)
    ]
    assert list(data_quality.RougePool(texts).nearest_scores()) == [max(row) for row in pairs]
    assert list(data_quality.RougePool(["alone"]).nearest_scores()) == [0.0]


def test_larger_set_is_sampled_down_to_equal_size():
    twice = EXAMPLES * 3
    assert data_quality.measure_at_size(twice, 5)["samples"] == data_quality.SAMPLES
    assert data_quality.measure_at_size(twice, 5) == data_quality.measure_at_size(twice, 5)
    alone = data_quality.measure_at_size(EXAMPLES, 5)
    assert alone["samples"] == 1
    assert alone["verb_object_pairs"] == 2


def test_the_mix_is_what_was_counted_by_hand():
    code = "Run it:\n\n```python\ndef f():\n    return 1\n\n\nassert f() == 1\n```\n"
    examples = [
        {"instruction": "Fix my code: it hangs.", "input": "", "output": code},
        {"instruction": "Sum it up.", "input": "word " * 101, "output": "one; two " * 80},
        {"instruction": "As a table, please.", "input": "", "output": "| a | b |\n| --- | --- |\n| 1 | 2 |"},
        {"instruction": "How many?", "input": "", "output": "Two; no more."},
    ]
    found = data_quality.measure_mix(examples, {"How many?": "math", "Sum it up.": "document", "other": "code"})
    assert found["bands"] == {1: 3, 151: 1}
    assert [found[name] for name in data_quality.MIX] == [1, 1, 1, 1, 1, 1, 1]
    assert found["kinds"] == {"document": 1, "math": 1}
    assert found["semicolons_per_1000_words"] == pytest.approx(1000 * 81 / (2 + 160 + 15 + 3))
    assert found["output_words"] == {"p50": 12, "p90": 160, "max": 160}


def test_command_compares_updates_tables_and_writes_the_numbers(root, tmp_path):
    ours, other = _dump(tmp_path / "ours.json", EXAMPLES * 2), _dump(tmp_path / "other.json", EXAMPLES[:4])
    sheet = tmp_path / "sheet.md"
    sheet.write_text(
        "Before.\n<!-- figures -->\nold\n<!-- end of figures -->\nAfter.\n<!-- comparison --><!-- no -->\n"
    )
    arguments = [
        "--data_path",
        ours,
        "--compare",
        other,
        "--update",
        str(sheet),
        "--result_path",
        str(tmp_path / "r.json"),
    ]
    done = _run(root, *arguments)
    assert done.returncode == 0, done.stderr
    assert "| records | 10 | 4 |" in done.stdout
    assert "| at 4 records | `ours.json` | `other.json` |" in done.stdout
    text = sheet.read_text()
    assert text.startswith("Before.\n<!-- figures -->\n\n|  | `ours.json` |\n")
    assert text.endswith("|\n\n<!-- end of figures -->\nAfter.\n<!-- comparison --><!-- no -->\n")
    assert "| with an input | 4 (40.0%) |" in text
    data_quality.measure(ours, update=str(sheet))
    assert sheet.read_text() == text
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"device", "versions", "commit", "data", "mix", "at_equal_size"} == set(result)
    assert result["at_equal_size"]["ours.json"]["size"] == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data_path", "bad.json"], "bad.json, record 1: no 'output'; found the fields 'instruction'"),
        (["--data_path", "good.json", "--compare", "good.json", "--size", "6"], "--size 6: the data sets have 5 and 5"),
        (["--data_path", "good.json", "--update", "none.md"], "cannot read none.md: No such file or directory"),
        (
            ["--data_path", "good.json", "--update", "plain.md"],
            "plain.md has no place for a table; expected the lines <!-- NAME",
        ),
        (["--data_path", "good.json", "--recordings", "good.json"], "good.json, record 0: not a recorded completion"),
        (["--data_path", "good.json", "--recordings", "a,b"], "--recordings names 2 files and --seed_tasks_paths 1; "),
    ],
)
def test_wrong_input_is_refused_in_one_line(arguments, complaint, root, tmp_path, monkeypatch, capsys):
    _dump(tmp_path / "bad.json", [EXAMPLES[0], {"instruction": "x"}])
    _dump(tmp_path / "good.json", EXAMPLES)
    (tmp_path / "plain.md").write_text("plain")
    monkeypatch.chdir(tmp_path)
    seeds = ["--seed_tasks_paths", os.path.join(root, "seed_tasks.jsonl")]
    with pytest.raises(SystemExit) as stop:
        data_quality.run_cli({"measure": data_quality.measure}, ["measure", *arguments, *seeds])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {complaint}")
    assert err.count("\n") == 1
    assert (tmp_path / "plain.md").read_text() == "plain"


def test_tables_of_the_datasheet_are_what_is_measured(root, tmp_path, monkeypatch):
    """Without the other data set the comparison stays as it is; the next test has it."""
    monkeypatch.chdir(root)
    sheet = tmp_path / "DATA.md"
    shutil.copy("DATA.md", sheet)
    data_quality.measure(
        "alpaca_data.json",
        recordings="recordings/paper/completions.jsonl,recordings/completions.jsonl",
        seed_tasks_paths="recordings/paper/seed_tasks.jsonl,seed_tasks.jsonl",
        checks="recordings/checks.jsonl",
        update=str(sheet),
    )
    with open("DATA.md", encoding="utf-8") as file:
        assert sheet.read_text(encoding="utf-8") == file.read()
    with open(os.path.join(root, "benchmarks", "results", "data_quality.json")) as file:
        comparison = data_quality.comparison_table(*zip(*json.load(file)["at_equal_size"].items(), strict=True))
    assert f"<!-- comparison -->\n\n{comparison}\n\n<!-- end of comparison -->" in sheet.read_text(encoding="utf-8")


def test_bundled_data_repeat_themselves_less_than_as_many_of_another_set(root, reference_dir):
    data_sets = [os.path.join(root, "alpaca_data.json"), os.path.join(reference_dir, "data", "alpaca_en_demo.json")]
    ours, other = (data_quality.measure_at_size(data_quality.load_examples(path), 999) for path in data_sets)
    assert ours["root_verbs"] > other["root_verbs"]
    assert ours["mean_nearest_rouge_l"] < other["mean_nearest_rouge_l"]
    with open(os.path.join(root, "benchmarks", "results", "data_quality.json")) as file:
        assert json.load(file)["at_equal_size"] == {"alpaca_data.json": ours, "alpaca_en_demo.json": other}


TASK = {"id": "a", "name": "n", "instruction": "Name a river.", "instances": [{"input": "", "output": "Rhine"}]}


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (TASK, "line 2: duplicate id 'a', first used at {path}, line 1"),
        ({"id": "b", "instruction": "x"}, "line 2: 'instances' must be a list .*, found the fields id, instruction"),
        (
            {**TASK, "id": "b", "instances": []},
            "line 2: 'instances' must be a list with an input and an output, found ..$",
        ),
        ({**TASK, "id": "b", "instruction": 7}, "line 2: 'instruction' must be text, found 7"),
        ({**TASK, "id": "b", "instances": [{"input": ""}]}, "line 2: 'output' must be text, found null"),
    ],
)
def test_malformed_seed_tasks_are_refused_with_their_line(second, complaint, tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text(f"{json.dumps(TASK)}\n{json.dumps(second)}\n")
    with pytest.raises(UserError, match=f"^{path}, {complaint.format(path=path)}"):
        load_seed_tasks(str(path))
