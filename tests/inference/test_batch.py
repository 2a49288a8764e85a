"""Instructions to answer, and the journal that a batch run keeps."""

import json

import pytest

from alpaca.cli import UserError
from alpaca.inference.batch import AnswerJournal, load_instances


def test_self_instruct_tasks_give_one_answer_an_instance(tmp_path):
    task = {"id": "user_oriented_task_0", "motivation_app": "Mail", "instruction": "Shorten."}
    task["instances"] = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n" + json.dumps({"instruction": "Hi"}) + "\n")
    expected = [("Shorten.", "a"), ("Shorten.", ""), ("Hi", "")]
    assert [tuple(e.values()) for e in load_instances(str(tmp_path / "tasks.jsonl"))] == expected
    for instances, said in (
        ("none", "'instances' must be a list"),
        ([], "'instances' must be a list"),
        ([{"input": "\ud83d"}], "'input' is no text"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({**task, "instances": instances}))
        with pytest.raises(UserError, match=said):
            load_instances(str(tmp_path / "bad.jsonl"))


RUN = {"model": "/m", "dtype": "torch.float32", "settings": {"eos_token_id": [2]}, "prompts": "ab12"}


@pytest.mark.parametrize("torn", [b"", b'{"ro', b'{"rows": [1], "outpu'])
def test_journal_gives_the_answers_back_and_cuts_off_a_torn_line(torn, tmp_path):
    path = tmp_path / "out.json.partial.jsonl"
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN)
        journal.append([{"rows": [2, 0], "outputs": ["b\u2028", "a"]}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN)
        assert journal.answers == {0: "a", 2: "b\u2028"}
        assert path.read_bytes() == whole


def test_a_torn_first_line_is_begun_again(tmp_path):
    (tmp_path / "out.json.partial.jsonl").write_text('{"rows": [], "run": {"mod')
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN)
        assert journal.answers == {}


def test_a_journal_of_other_settings_is_refused(tmp_path):
    output = str(tmp_path / "out.json")
    with AnswerJournal(output) as journal:
        journal.begin(RUN)
    with AnswerJournal(output) as journal, pytest.raises(UserError, match="begun with other data or settings"):
        journal.begin({**RUN, "seed": 1})


@pytest.mark.parametrize(
    "text",
    [
        "notes\n",
        '{"instruction": "x"}\n',
        '{"rows": [1], "outputs": []}\n',
        '{"rows": [1], "outputs": [2]}\n',
        '{"rows": ["1"], "outputs": ["a"]}\n',
        '{"rows": 1, "outputs": "a"}\n',
        "[1",
    ],
)
def test_a_file_that_is_no_journal_is_left_alone(text, tmp_path):
    path = tmp_path / "out.json.partial.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line 1: not a batch of answers; .* or name another --output"):
        AnswerJournal(str(tmp_path / "out.json"))
    assert path.read_text() == text
