"""A mistake on several ranks is one printable line."""

import json

import pytest

from alpaca import ranks
from alpaca.cli import UserError


def test_a_refusal_is_escaped_on_stderr_and_in_torchruns_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "report.json"))
    with pytest.raises(SystemExit) as stop:
        ranks.refuse(UserError("\x1b[2J is no model"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: \\x1b[2J is no model\n"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["message"]["message"] == "error: \\x1b[2J is no model"


def test_only_the_first_rank_prints_a_refusal(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        ranks.refuse(UserError("no model"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""
