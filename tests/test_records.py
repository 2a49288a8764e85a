"""Records are read from JSON and JSON Lines; malformed ones are refused with their place."""

import pytest

from alpaca.cli import UserError
from alpaca.files import jdump
from alpaca.records import load_examples, load_records


def test_records_come_from_json_and_from_json_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"n": 1}, {"n": 2}]')
    (tmp_path / "b.jsonl").write_text('{"n": "\u2028"}\r\n\n{"n": 2}', encoding="utf-8")
    places, records = zip(*load_records(tmp_path / "a.json"), strict=True)
    assert places == (f"{tmp_path}/a.json, record 0", f"{tmp_path}/a.json, record 1")
    assert records == ({"n": 1}, {"n": 2})
    places, records = zip(*load_records(tmp_path / "b.jsonl"), strict=True)
    assert places == (f"{tmp_path}/b.jsonl, line 1", f"{tmp_path}/b.jsonl, line 3")
    assert records == ({"n": "\u2028"}, {"n": 2})


def test_examples_keep_further_fields_and_a_missing_or_null_input_is_empty(tmp_path):
    jdump(
        [{"instruction": "i", "output": "o", "id": 7}, {"instruction": "j", "input": None, "output": "p"}],
        tmp_path / "d",
    )
    assert load_examples(tmp_path / "d") == [
        {"instruction": "i", "output": "o", "id": 7, "input": ""},
        {"instruction": "j", "input": "", "output": "p"},
    ]
    jdump([{"instruction": "i", "output": ""}], tmp_path / "e")
    assert load_examples(tmp_path / "e", require_output=False)[0]["instruction"] == "i"


GOOD = '{"instruction": "i", "output": "o"}'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", " holds no records"),
        ("[]", " holds no records"),
        (f"[{GOOD},\n{GOOD},]", ", line 2, column 3[67]: not JSON"),
        (f"{GOOD}\n{GOOD[:-9]}", ", line 2, column [0-9]+: not JSON"),
        ('{"a":\n [1]}', " holds one JSON object; expected a list or one a line"),
        (f"[{GOOD}, 5]", ", record 1: expected an object with named fields, found int"),
        (f'{GOOD}\n"text"', ", line 2: expected an object with named fields, found str"),
        (
            f'[{GOOD}, {{"prompt": "x", "output": "o"}}]',
            ", record 1: no 'instruction'; found the fields 'prompt', 'output'",
        ),
        (f'{GOOD}\n\n{{"instruction": "i"}}', ", line 3: no 'output'; found the fields 'instruction'"),
        ('[{"instruction": 7, "output": "o"}]', ", record 0: 'instruction' must be text, found int 7"),
        (
            '[{"instruction": "i", "input": ["x"], "output": "o"}]',
            r", record 0: 'input' must be text, found list \['x'\]",
        ),
        ('[{"instruction": "i", "output": null}]', ", record 0: 'output' must be text, found NoneType None"),
        ('[{"instruction": " ", "output": "o"}]', ", record 0: 'instruction' is empty"),
        ('[{"instruction": "i", "output": "\\n"}]', ", record 0: 'output' is empty"),
        (GOOD + "\n" + "[" * 10**5, ", line 2: JSON nested more than 100 levels deep"),
        (f'{GOOD}\n{{"n": {"9" * 5000}}}', ", line 2: an integer of more than 4,300 digits"),
        (r'[{"instruction": "i", "output": "a \ud83d"}]', r", record 0: 'output' is no text: character 2 is '.ud83d'"),
    ],
)
def test_malformed_examples_are_refused_with_their_place(content, complaint, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}{complaint}"):
        load_examples(path)
