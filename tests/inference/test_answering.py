"""Answers as streams and in batches: always the text the model was taught; prompts that are too long are cut."""

import pytest
from taught_model import LESSONS, UNTAUGHT

from alpaca.files import jdump
from alpaca.inference import answering, loading
from alpaca.prompts import format_prompt
from demo import tiny_model


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson["output"][:10])
def test_streamed_pieces_are_the_taught_answer(alpaca, lesson):
    ids, notice = alpaca.encode(lesson, 600)
    pieces = list(alpaca.stream(ids, alpaca.settings(600, 0.0, 1.0)))
    assert "".join(pieces) == lesson["output"]
    assert len(pieces) > 2
    assert notice is None


def test_same_seed_samples_the_same_answer(alpaca):
    ids, _ = alpaca.encode(UNTAUGHT[0], 30)
    settings = alpaca.settings(30, 2.0, 1.0)
    once, again, other = ("".join(alpaca.stream(ids, settings, seed)) for seed in (1, 1, 2))
    assert once == again != other


def test_closing_the_stream_stops_the_model(alpaca):
    forwards = []
    hook = alpaca.model.register_forward_hook(lambda *_: forwards.append(1))
    ids, _ = alpaca.encode(LESSONS[5], 600)
    pieces = alpaca.stream(ids, alpaca.settings(600, 0.0, 1.0))
    next(pieces)
    pieces.close()
    hook.remove()
    whole = len(alpaca.tokenizer(LESSONS[5]["output"]).input_ids)
    assert len(forwards) < whole


def test_an_error_while_generating_reaches_the_caller(alpaca, monkeypatch):
    monkeypatch.setattr(alpaca.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(alpaca.stream([1], alpaca.settings(5, 0.0, 1.0)))


def test_batches_of_opt_equal_one_at_a_time(root, tmp_path):
    jdump(LESSONS, str(tmp_path / "lessons.json"))
    tiny_model.make(
        f"{root}/configs/tiny_opt.json", str(tmp_path / "lessons.json"), str(tmp_path / "opt"), vocab_size=420
    )
    alpaca = loading.load(str(tmp_path / "opt"))
    prompts = [alpaca.encode(example, 30)[0] for example in [*LESSONS, *UNTAUGHT]]
    settings = alpaca.settings(30, 0.0, 1.0)
    assert alpaca.generate(prompts, settings) == [alpaca.generate([ids], settings)[0] for ids in prompts]


def test_answers_that_have_ended_leave_the_batch(alpaca):
    prompts = [alpaca.encode(example, 600)[0] for example in LESSONS]
    settings, rows = alpaca.settings(600, 0.0, 1.0), []
    hook = alpaca.model.register_forward_hook(
        lambda _, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True
    )
    try:
        answers = alpaca.generate(prompts, settings)
    finally:
        hook.remove()
    lengths = sorted(len(ids) + 1 for ids in answers)  # with EOS
    assert [alpaca.decode(ids) for ids in answers] == [lesson["output"] for lesson in LESSONS]
    assert rows[0] == 6
    assert rows[-1] == 1
    assert sum(rows) < 0.6 * 6 * lengths[-1]  # what a batch that waits for its longest would compute


def test_rows_with_near_ties_are_asked_again_alone(alpaca, monkeypatch):
    prompts = [alpaca.encode(example, 20)[0] for example in LESSONS[:3]]
    settings = alpaca.settings(20, 0.0, 1.0)
    shapes = []
    generate = alpaca.model.generate
    monkeypatch.setattr(alpaca.model, "generate", lambda **k: shapes.append(len(k["input_ids"])) or generate(**k))
    expected = alpaca.generate(prompts, settings)
    assert shapes == [3, 1]  # two of the three have ended by then
    monkeypatch.setattr(answering, "TIE", 1e9)
    assert alpaca.generate(prompts, settings) == expected
    assert shapes == [3, 1, 3, 1, 1, 1]


def test_overlong_input_is_cut_before_the_templates_tail_and_said(alpaca):
    example = {"instruction": "Translate to French.", "input": "Good morning, " * 500}
    ids, notice = alpaca.encode(example, 600)
    available = alpaca.context - 600
    assert available - 3 <= len(ids) <= available  # the most that fits
    kept = alpaca.decode(ids).partition("### Input:\n")[2].removesuffix("\n\n### Response:")
    assert example["input"].startswith(kept)
    whole = len(alpaca.tokenizer(format_prompt(example)).input_ids)
    assert notice == (
        f"the prompt has {whole:,} tokens but only {available} fit beside the answer's 600: "
        f"cut the last {7000 - len(kept):,} of 7,000 characters of the input"
    )


def test_overlong_instruction_is_cut_and_said(alpaca):
    ids, notice = alpaca.encode({"instruction": "Sing. " * 1000, "input": ""}, 600)
    assert "of 6,000 characters of the instruction" in notice
    assert alpaca.decode(ids).endswith("\n\n### Response:")
    ids, notice = alpaca.encode({"instruction": "Sing. " * 1000, "input": "x" * 50}, 600)
    assert "49 of 50 characters of the input and" in notice
    assert alpaca.decode(ids).endswith("\n\n### Input:\nx\n\n### Response:")
