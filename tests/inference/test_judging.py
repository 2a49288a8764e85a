"""Judging is blind, every verdict is kept, and none is counted for another pair."""

import json
import os

import judged_pairs
import pytest
from judged_pairs import compare

from alpaca.cli import UserError
from alpaca.files import jdump, jload
from alpaca.inference import judging


@pytest.fixture
def outputs(tmp_path):
    return judged_pairs.write_outputs(tmp_path)


def test_compare_is_blind_resumable_and_counts(root, outputs):
    first = compare(root, outputs, ["1", "x", "t", "q"])
    assert "model-" not in first.split("\nmodel-a")[0]
    assert "(to go: 6)" in first
    with open(outputs[2], "a") as file:
        file.write('{"key": "half a li')
    second = compare(root, outputs, "1" * 6)
    lines = judged_pairs.read_verdicts(outputs)
    assert len(lines) == 8
    assert sorted(line["instruction"] for line in lines) == [f"Task {i}" for i in range(8)]
    assert {line["shown_first"] for line in lines} == {"a", "b"}
    assert [line["instruction"] for line in lines] != sorted(line["instruction"] for line in lines)
    wins, losses = (sum(line["better"] == side for line in lines) for side in "ab")
    assert all(line["better"] in ("tie", line["shown_first"]) for line in lines)
    assert f"model-a against model-b: {wins} wins, 1 ties, {losses} losses (to go: 0)" in second
    assert compare(root, outputs, []).strip() == second[second.index("model-a against") :].strip()


def test_the_last_verdict_can_be_taken_back_even_after_a_break(root, outputs):
    compare(root, outputs, ["1", "2", "q"])
    kept = judged_pairs.read_verdicts(outputs)
    compare(root, outputs, ["u", "3", "q"])
    lines = judged_pairs.read_verdicts(outputs)
    assert lines[0] == kept[0]
    assert lines[1] == {**kept[1], "better": "tie"}
    assert "(to go: 8)" in compare(root, outputs, ["u", "u", "u", "q"])
    assert not os.path.exists(outputs[2])


def test_space_around_an_answer_does_not_tell_who_wrote_it():
    pair = judging.Pair("Q", "", "\n\n  Yes.\n\nNo. \n", "Maybe.", first="a", key="k")
    assert pair.shown == ("Yes.\n\nNo.", "Maybe.")
    assert pair.a == "\n\n  Yes.\n\nNo. \n"


def test_quitting_before_the_first_verdict_leaves_no_file(root, outputs):
    assert "(to go: 8)\nno pair has been decided yet" in compare(root, outputs, ["q"])
    assert not os.path.exists(outputs[2])


def test_verdicts_on_other_answers_are_refused(root, outputs, tmp_path):
    compare(root, outputs, "1" * 8)
    pairs, names = judging.load_pairs(outputs[1], outputs[0], seed=42)
    with pytest.raises(UserError, match="line 1: not a verdict on these answers"):
        judging.Verdicts(outputs[2], pairs, names)
    for kind, text in (
        ("list", json.dumps([{"key": 1}], indent=1)),
        ("line", '{"instruction": 1}'),
        ("text", "a\nb\n"),
    ):
        (tmp_path / kind).write_text(text)
        with pytest.raises(UserError, match="name another --output"):
            judging.Verdicts(str(tmp_path / kind), pairs, names)
        assert (tmp_path / kind).read_text() == text
    jdump([{"instruction": "q", "output": "\ud83d"}], str(tmp_path / "half.json"))
    with pytest.raises(UserError, match="record 0: 'output' is no text"):
        judging.load_pairs(str(tmp_path / "half.json"), outputs[0], seed=42)
    jdump(jload(outputs[0])[:-1], str(tmp_path / "short.json"))
    with pytest.raises(UserError, match=r"has 8 answers and .* has 7"):
        judging.load_pairs(outputs[0], str(tmp_path / "short.json"), seed=42)
    jdump(jload(outputs[0])[::-1], str(tmp_path / "turned.json"))
    with pytest.raises(UserError, match=r"record 0 and .* answer different instructions"):
        judging.load_pairs(outputs[0], str(tmp_path / "turned.json"), seed=42)


def test_wilson_interval_gives_the_known_values():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for successes, trials, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert judging.wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)
