"""Instructions to answer, and the journal that a batch run keeps."""

import json

import pytest

from alpaca.cli import UserError
from alpaca.inference.batch import AnswerJournal, fold, load_instances, warn_of_shared_instructions


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
        journal.begin(RUN, 3)
        journal.append([{"rows": [2, 0], "outputs": ["b\u2028", "a"]}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN, 3)
        assert journal.answers == {0: "a", 2: "b\u2028"}
        assert path.read_bytes() == whole


def test_a_torn_first_line_is_begun_again(tmp_path):
    (tmp_path / "out.json.partial.jsonl").write_text('{"rows": [], "run": {"mod')
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN, 3)
        assert journal.answers == {}


def test_a_journal_of_other_settings_is_refused(tmp_path):
    output = str(tmp_path / "out.json")
    with AnswerJournal(output) as journal:
        journal.begin(RUN, 3)
    with AnswerJournal(output) as journal, pytest.raises(UserError, match="begun with another prompts and seed"):
        journal.begin({**RUN, "prompts": "cd34", "seed": 1}, 3)


@pytest.mark.parametrize(
    "text",
    [
        "notes\n",
        '{"instruction": "x"}\n',
        '{"rows": [1], "outputs": []}\n',
        '{"rows": [1], "outputs": [2]}\n',
        '{"rows": ["1"], "outputs": ["a"]}\n',
        '{"rows": 1, "outputs": "a"}\n',
        '{"rows": [true], "outputs": ["a"]}\n',
        "[" * 100_000 + "]" * 100_000 + "\n",
        '{"rows": [' + "9" * 5_000 + '], "outputs": ["a"]}\n',
        "[1",
    ],
)
def test_a_file_that_is_no_journal_is_left_alone(text, tmp_path):
    path = tmp_path / "out.json.partial.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line 1: not a batch of answers; .* or name another --output"):
        AnswerJournal(str(tmp_path / "out.json"))
    assert path.read_text() == text


@pytest.mark.parametrize("rows", [[0, 0], [3], [-1]], ids=["twice", "beyond the data", "negative"])
def test_an_answer_to_no_record_of_the_data_is_refused(rows, tmp_path):
    with AnswerJournal(str(tmp_path / "out.json")) as journal:
        journal.begin(RUN, 3)
        journal.append([{"rows": rows, "outputs": ["a"] * len(rows)}])
        with pytest.raises(UserError, match="has an answer twice, or to no record"):
            journal.begin(RUN, 3)


def test_a_journal_that_does_not_say_what_its_answers_depend_on_is_refused(tmp_path):
    (tmp_path / "out.json.partial.jsonl").write_text('{"rows": [0], "outputs": ["a"]}\n')
    wanted = pytest.raises(UserError, match="doesn't say what its answers depend on")
    with AnswerJournal(str(tmp_path / "out.json")) as journal, wanted:
        journal.begin(RUN, 3)


def test_folding_puts_the_input_after_the_instruction_as_alpacaeval_has_it():
    assert fold({"instruction": "Add.", "input": "1, 2"}) == {"instruction": "Add.\n\n1, 2", "input": ""}
    assert fold({"instruction": "Sing.", "input": ""}) == {"instruction": "Sing.", "input": ""}


def test_shared_instructions_are_told_with_the_flag_that_helps(capsys):
    records = [{"instruction": "Add.", "input": text} for text in ("1, 2", "3, 4")]
    warn_of_shared_instructions([*records, {"instruction": "Sing.", "input": ""}])
    assert "2 records share their instruction with another, such as 'Add.'" in (said := capsys.readouterr().err)
    assert "--fold_input tells them apart" in said
    warn_of_shared_instructions([*map(fold, records)])
    assert capsys.readouterr().err == ""
    warn_of_shared_instructions([records[0]] * 2)
    assert "--fold_input" not in capsys.readouterr().err
