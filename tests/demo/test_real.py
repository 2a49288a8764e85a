"""`make real`'s own parts: what it holds out, what it measures, and the report that it writes."""

import json
import os

import pytest

from alpaca.cli import UserError
from demo import real


def task(instruction: str, output: str, **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


SHORT = [task(f"What is {i} + {i}?", str(2 * i)) for i in range(60)]
LONG = [task(f"Explain {i}.", "It is a number with a story of its own.") for i in range(200)]


def hold_out(tmp_path, examples) -> list[dict]:
    (tmp_path / "data.json").write_text(json.dumps(examples))
    real.hold_out(str(tmp_path / "data.json"), str(tmp_path / "out"))
    return json.loads((tmp_path / "out" / "held_out.json").read_text())


def test_32_tasks_of_few_words_and_64_others_are_held_out(tmp_path):
    held_out = hold_out(tmp_path, SHORT + LONG)
    assert sum(map(real.has_few_words, held_out)) == 32
    assert len(held_out) == 96


def test_what_is_held_out_does_not_depend_on_the_order_of_the_data(tmp_path):
    assert hold_out(tmp_path, SHORT + LONG) == hold_out(tmp_path, [*reversed(SHORT + LONG)])[::-1]


def test_measures_count_what_they_say():
    held_out = [task("Capital of Peru?", "Lima"), task("2 + 2?", "4."), task("Explain.", "It is what it is.")]
    answers = ["lima.", "5", "word " * real.MAX_NEW_TOKENS]
    found = real.measure(held_out, answers, lambda text: len(text.split()))
    assert found == {"ended": 2 / 3, "empty": 0.0, "words": (1 + 1 + real.MAX_NEW_TOKENS) / 3, "exact": 1 / 2}
    assert real.changes(held_out, ["Rome", "4", ""], ["Lima", "5", ""]) == (["Capital of Peru?"], ["2 + 2?"])


def test_rows_are_chosen_by_place_and_not_by_answers():
    rows = real.side_by_side([task(str(i), "") for i in range(96)], ["x"] * 96, ["y"] * 96)
    assert [int(row[0]["instruction"]) for row in rows] == [0, 12, 24, 36, 48, 60, 72, 84]
    assert len(real.side_by_side([task("one", "")], ["x"], ["y"])) == 1


def test_report_shows_failures_like_successes_and_what_it_cost(tmp_path, capsys):
    """From files like those that the other steps leave."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    held_out = [task("Capital of Peru?", "Lima"), task("2 | 2?", "4"), task("Explain.", "It is what it is.")]
    files = {
        "held_out.json": held_out,
        "base_answers.json": [{"output": text} for text in ("Peru is\na country.", "4", "")],
        "tuned_answers.json": [{"output": text} for text in ("Lima", "5", "It <is>.")],
        "costs.json": {"fine-tune": {"seconds": 90.0, "memory_gib": 6.3}},
        "tuned/trainer_state.json": {
            "log_history": [
                {"step": 0, "eval_loss": 3.5},
                {"step": 1, "loss": 3.4, "useful_tokens_per_s": 300.0},
                {"step": 1, "eval_loss": 3.25},
            ]
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    real.report(str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "| loss | 3.500 | 3.250 |  |" in text
    assert "| empty answers | 33% | 0% |  |" in text
    assert "| exact answers, of the 2 with at most 3 words | 50% | 50% |  |" in text
    assert "| Capital of Peru? | Lima | Peru is<br>a country. | Lima |" in text
    assert r"| 2 \| 2? | 4 | 4 | 5 |" in text
    assert r"| Explain. | It is what it is. | (nothing) | It \<is\>. |" in text
    assert "Right only before, and lost by it (1):\n\n- 2 | 2?" in text
    assert "| fine-tune | 90 s | 6.3 GiB |" in text
    assert "300 useful tokens/s" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| loss | 3.500 | 3.250 |" in capsys.readouterr().out


def test_publishing_replaces_what_stood_between_the_marks_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "ROOT", str(tmp_path))
    for folder in ("docs", "assets", "run"):
        (tmp_path / folder).mkdir()
    for page in ("README.md", "docs/real_model.md"):
        (tmp_path / page).write_text("# Title\n\n<!-- report -->\nold\n<!-- end of report -->\n\nThe end.\n")
    table = "| on 96 held-out tasks | base |\n|---|---:|\n| loss | 3.5 |"
    report = f"# Title\n\n`make real` · CPU · commit 1\n\n![It](report.png)\n\n{table}\n\n## Side by side\n\nrows\n"
    (tmp_path / "run" / "report.md").write_text(report)
    (tmp_path / "run" / "report.png").write_bytes(b"a picture")
    for _ in range(2):
        real.publish(str(tmp_path / "run"))
    picture = "![Losses of the run, and the lengths of the answers](assets/real_report.png)"
    shown = f"{picture}\n\n{table}\n\n`make real` · CPU · commit 1"
    expected = f"# Title\n\n<!-- report -->\n\n{shown}\n\n<!-- end of report -->\n\nThe end.\n"
    assert (tmp_path / "README.md").read_text() == expected
    page = (tmp_path / "docs" / "real_model.md").read_text()
    assert "![It](../assets/real_report.png)" in page
    assert "\n### Side by side\n" in page
    assert (tmp_path / "assets" / "real_report.png").read_bytes() == b"a picture"


def test_a_step_that_fails_ends_the_story_with_its_status():
    with pytest.raises(UserError, match="ended with exit status 2; the story stops here"):
        real.run("python -m demo.real hold_out --data_path nothing.json")
    cost = real.run("python -c pass")
    assert cost["seconds"] > 0
    assert cost["memory_gib"] > 0


def test_too_little_memory_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "host_memory", lambda: 2**30)
    monkeypatch.setattr(real, "run", lambda command: pytest.fail(command))
    with pytest.raises(UserError, match=r"1.0 GiB of memory free, 7.0 GiB needed to train"):
        real.story(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []
