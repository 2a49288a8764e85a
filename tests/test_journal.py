"""alpaca/journal.py: what a crash, a full disk, a second run and somebody else's file do to a journal."""

import os
import resource

import pytest

from alpaca.cli import UserError
from alpaca.journal import Format, Journal, check_settings, read_journal

FORMAT = Format("key", lambda record: record["key"], "a record of a test", "--output")
LINES = b'{"key": "a", "text": "\xc3\xa9"}\n{"key": "b"}\n'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_appended_records_are_one_line_each_and_are_found_again(path):
    with Journal(path, FORMAT) as journal:
        journal.append([{"key": "a", "text": "é"}])
        journal.append([{"key": "b"}])
        assert path.read_bytes() == LINES
    with Journal(path, FORMAT) as journal:
        assert journal.records == {"a": {"key": "a", "text": "é"}, "b": {"key": "b"}}


def test_records_are_synced_before_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with Journal(path, FORMAT) as journal:
        journal.append([{"key": "a", "text": "é"}, {"key": "b"}])
    assert synced == [LINES]


@pytest.mark.parametrize("torn", [b"{", b'{"ke', b'{"key": "c", "te'])
def test_torn_last_line_is_cut_off(path, torn):
    path.write_bytes(LINES + torn)
    assert read_journal(path, FORMAT)[1] == len(LINES)
    with Journal(path, FORMAT) as journal:
        journal.append([{"key": "c"}])
        assert path.read_bytes() == LINES + b'{"key": "c"}\n'


def test_last_record_without_its_newline_is_whole(path):
    path.write_bytes(LINES[:-1])
    with Journal(path, FORMAT) as journal:
        assert list(journal.records) == ["a", "b"]
    assert path.read_bytes() == LINES


@pytest.mark.parametrize(
    "text",
    [
        b"[1, 2",
        b"Dear diary",
        b'{"name": 1}\n',
        b'{"key": "a"}\nDear diary\n',
        b"\xff\n",
        b"[" * 5000 + b"\n",
        b'{"key": ' + b"1" * 5000 + b"}\n",
    ],
)
def test_foreign_file_is_left_byte_for_byte(path, text):
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"line \d: not a record of a test; restore or remove it, .* another --output"):
        Journal(path, FORMAT)
    assert path.read_bytes() == text


def test_second_run_is_refused_until_the_first_has_ended(path):
    with Journal(path, FORMAT) as journal:
        journal.append([{"key": "a"}])
        with pytest.raises(UserError, match=r"another run is writing .*journal.jsonl; wait for it, .* --output"):
            Journal(path, FORMAT)
        journal.append([{"key": "b"}])
    with Journal(path, FORMAT) as journal:
        assert list(journal.records) == ["a", "b"]


def test_full_disk_in_the_middle_of_an_append_leaves_the_file_as_it_was(path):
    with Journal(path, FORMAT) as journal:
        journal.append([{"key": "a"}])
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                journal.append([{"key": "b", "text": "x" * 100}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert list(journal.records) == ["a"]
        journal.append([{"key": "c"}])
    assert list(read_journal(path, FORMAT)[0]) == ["a", "c"]


def test_duplicate_key_is_refused_with_its_line(path):
    path.write_bytes(LINES + b'\n{"key": "a"}\n')
    with pytest.raises(UserError, match="line 4: duplicate key a"):
        Journal(path, FORMAT)


def test_empty_file_is_removed_at_close(path):
    Journal(path, FORMAT).close()
    assert not path.exists()


def test_missing_file_is_one_line_for_a_reader(path):
    with pytest.raises(UserError, match=r"cannot read .*journal.jsonl: No such file"):
        read_journal(path, FORMAT)


def test_settings_that_differ_are_named_and_long_ones_not_printed():
    check_settings("f", {"seed": 0}, {"seed": 0})
    with pytest.raises(UserError, match="f was written with seed 0, this run has seed 1; use the same"):
        check_settings("f", {"seed": 0, "text": "x"}, {"seed": 1, "text": "y"})
    with pytest.raises(UserError, match="f was written with another prompt_file; use the same"):
        check_settings("f", {"prompt_file": "a" * 64}, {"prompt_file": "b" * 64})
