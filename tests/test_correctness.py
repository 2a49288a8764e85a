"""The table of silent errors: its verdicts, its page, and what becomes of a peer that doesn't install or run."""

import dataclasses
import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from alpaca.cli import UserError
from alpaca.files import jload
from benchmarks.correctness import __main__ as command
from benchmarks.correctness import report, running, verdicts
from benchmarks.correctness.columns import COLUMNS, PEERS
from benchmarks.correctness.verdicts import CHECKS, Cell

TITLES = {column.title: column for column in COLUMNS}
GOOD = {check.name: Cell("0", "right", value=0.0) for check in CHECKS}


def entry(title: str, cells: dict[str, Cell]) -> dict:
    """A column of a result."""
    column = TITLES[title]
    return {
        "title": title,
        "peer": column.peer,
        "settings": column.settings,
        "versions": {"torch": "2.13.0"},
        "cells": {name: dataclasses.asdict(cell) for name, cell in cells.items()},
        "speed": {"error": "left out"},
    }


def result(*columns: dict) -> dict:
    return {"device": "a CPU", "commit": "abc1234", "versions": {"python": "3.11"}, "columns": list(columns)}


@pytest.fixture
def runner(tmp_path) -> running.Runner:
    """A runner of TRL's whose jobs have found nothing yet."""
    return running.Runner(TITLES["TRL"], sys.executable, {}, str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize(
    ("value", "output", "verdict"),
    [
        (1e-9, "", "right"),
        (0.0, "", "right"),
        (0.3, "{'loss': 8.3}", "silent"),
        (0.3, "warning: packing may cause contamination of examples", "told"),
        (0.3, "Checking contamination: 100%|####| 8/8", "silent"),
    ],
)
def test_a_number_beyond_its_bound_is_silent_unless_a_line_warns_of_it(value, output, verdict):
    assert verdicts.bounded(value, 1e-5, output, "contaminat").verdict == verdict


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("3 examples are longer than 80 tokens and are cut", "right"),
        ("some examples were truncated", "told"),
        ("Truncating train dataset: 100%|####| 3/3", "silent"),
        ("", "silent"),
    ],
)
def test_truncation_must_be_told_with_its_count(runner, said, verdict):
    whole, cut = {"labels": [-100, 5, 2]}, {"labels": [-100, 5, 5]}
    special = {"eos": 2}
    runner.facts["limit 512"] = {"tokens": [whole] * 8, "special": special}
    runner.facts["limit 80"] = {"tokens": [whole] * 5 + [cut] * 3, "special": special}
    runner.output = {"limit 512": "loading", "limit 80": f"loading\n{said}"}
    assert verdicts.judge_cut(runner, runner).verdict == verdict


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        (["record 7: is empty", "line 8: not text", "row 7 is no text"], "right"),
        (["record 7: is empty", "something went wrong", "row 7 is no text"], "told"),
        (["record 7: is empty", None, "row 7 is no text"], "silent"),
    ],
)
def test_a_bad_record_must_be_told_with_its_place(runner, errors, verdict):
    runner.inputs["bad"] = ["a", "b", "c"]
    for name, error in zip("abc", errors, strict=True):
        runner.facts[f"bad: {name}"] = {"error": error} if error else {"tokens": [{}] * 12}
        runner.output[f"bad: {name}"] = ""
    assert verdicts.judge_bad(runner, runner).verdict == verdict


def add_split(runner: running.Runner, scale: dict[bool, float]) -> None:
    """Gives every split the same gradient, but those of one process in halves `scale` times as much."""
    for cured, factor in scale.items():
        for processes, found in running.SPLITS.items():
            for batch, accumulation in found:
                name = running.split_name(processes, batch, accumulation, cured)
                os.makedirs(os.path.join(runner.folder, name))
                gradient = torch.ones(3) * (factor if batch == "half" and processes == 1 else 1.0)
                save_file({"w": gradient}, os.path.join(runner.folder, name, "gradient.safetensors"))
                runner.facts[name] = {"split": [4, 2], "losses": [1.0]}


def test_a_split_that_changes_the_gradient_is_silent(runner):
    add_split(runner, {False: 1.0 + 1e-7})
    assert verdicts.judge_splits(runner, runner).verdict == "right"


@pytest.mark.parametrize(("cured", "verdict"), [(1.0, "option"), (2.0, "silent")])
def test_an_option_counts_only_if_it_cures(tmp_path, cured, verdict):
    ours = running.Runner(TITLES["ours"], sys.executable, {}, str(tmp_path))
    add_split(ours, {False: 1.5, True: cured})
    cell = verdicts.judge_splits(ours, ours)
    assert cell.verdict == verdict
    assert "loss_reduction global" in cell.note


def test_a_run_that_stops_on_resuming_tells_and_one_that_goes_wrong_is_silent(runner):
    for name, value in (("whole", 1.0), ("resumed", 1.5), ("resumed by hand", 1.0)):
        os.makedirs(os.path.join(runner.folder, name, "model"))
        save_file({"w": torch.full((3,), value)}, os.path.join(runner.folder, name, "model", "model.safetensors"))
        runner.facts[name] = {"tokens": []}
    assert verdicts.judge_killed(runner, runner).verdict == "silent"
    runner.facts["resumed"] = {"error": "RuntimeError: half a file"}
    cell = verdicts.judge_killed(runner, runner)
    assert (cell.text, cell.verdict) == ("stops", "told")
    assert "half a file" in cell.note


def test_a_failed_run_is_not_run_with_its_error(runner):
    runner.facts["step"] = {"error": "OSError: no such\n  tokenizer"}
    check = next(check for check in CHECKS if check.name == "leak")
    assert verdicts.judge(check, runner, runner) == Cell("", "not run", "OSError: no such tokenizer")


def test_packing_leaves_some_checks_to_the_base_column(runner, tmp_path):
    packed = running.Runner(TITLES["TRL packing"], sys.executable, {}, str(tmp_path))
    same = [check.name for check in CHECKS if verdicts.judge(check, packed, runner).verdict == "same"]
    assert same == ["tokens", "killed", "chat", "bad"]


def test_every_test_that_a_check_points_at_is_there(root):
    pointed = [check.ours for check in CHECKS if check.ours]
    assert len(pointed) == 4
    for path, _, test in (one.partition(": ") for one in pointed):
        with open(os.path.join(root, path), encoding="utf-8") as file:
            assert f"def {test}(" in file.read()


# ---------------------------------------------------------------------------------------------------------------------
# Peers, status and page


def test_a_peer_that_fails_to_install_is_not_run_with_pips_line(tmp_path, monkeypatch, capsys):
    program = "import sys; print('ERROR: No matching distribution found for trl==1.16.0', file=sys.stderr); sys.exit(1)"
    run = running.subprocess.run
    monkeypatch.setattr(running.subprocess, "run", lambda words, **more: run([sys.executable, "-c", program], **more))
    monkeypatch.setattr(command, "make_inputs", lambda folder: {})
    chosen = command.choose("TRL,TRL packing, wrapped")
    assert [column.title for column in chosen] == ["TRL", "TRL packing, wrapped"]
    found = command.measure(chosen, str(tmp_path), str(tmp_path), quick=True)
    for column in found:
        assert {cell["verdict"] for cell in column["cells"].values()} == {"not run"}
        assert {cell["note"] for cell in column["cells"].values()} == {
            "ERROR: No matching distribution found for trl==1.16.0"
        }
    page = report.page(result(entry("ours", GOOD), *found))
    assert "ERROR: No matching distribution found" in page


def test_a_driver_that_does_not_start_is_not_run_with_its_last_line(runner):
    runner.peer = dataclasses.replace(PEERS["TRL"], driver="no_such_driver.py")
    with pytest.raises(running.NotRun, match="no_such_driver"):
        runner.run([])


@pytest.mark.parametrize(
    ("ours", "peer", "status"),
    [
        ({}, {"leak": Cell("1", "silent")}, 0),
        ({"splits": Cell("0.1; 0", "option")}, {}, 0),
        ({"leak": Cell("1", "silent")}, {}, 1),
        ({"leak": Cell("1", "told")}, {}, 1),
        ({"leak": Cell("", "not run")}, {}, 1),
    ],
)
def test_the_exit_status_is_about_our_own_column(ours, peer, status):
    both = result(entry("ours", {**GOOD, **ours}), entry("TRL", {**GOOD, **peer}))
    assert command.exit_status(both) == status


def test_without_our_column_the_status_is_not_zero():
    assert command.exit_status(result(entry("TRL", GOOD))) == 1


def test_reuse_needs_the_folder_of_an_earlier_run(tmp_path):
    with pytest.raises(UserError, match=r"--reuse: no --work_dir holds no earlier run"):
        command.run(reuse=True)
    with pytest.raises(UserError, match=rf"--reuse: {tmp_path} holds no earlier run"):
        command.run(reuse=True, work_dir=str(tmp_path))


def test_an_unknown_column_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"--columns unsloth: no such column; there are ours; TRL; "):
        command.choose("ours,unsloth")


def test_the_page_names_setting_and_version_of_every_verdict():
    packed = entry("TRL packing", {**GOOD, "leak": Cell("3e-1", "silent", "a | b <pad> `code`")})
    page = report.page(result(entry("ours", GOOD), packed))
    rows = page.splitlines()
    assert '| TRL packing | {"packing": true} | 128 | SFT Trainer: ' in page
    assert "torch 2.13.0 |" in page
    assert "| TRL packing | 3e-1 | **silent** | a \\| b &lt;pad> 'code' |" in rows
    heads = next(row for row in rows if row.startswith("|  | ours"))
    assert all(row.count("|") == heads.count("|") for row in rows if row.startswith(("| 1. ", "| 10. ")))


def test_the_picture_is_drawn(tmp_path):
    report.draw(result(entry("ours", GOOD), entry("TRL", GOOD)), str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"


def test_the_committed_page_is_that_of_the_committed_result(root):
    path = os.path.join(root, "benchmarks", "results", "correctness.json")
    if not os.path.exists(path):
        pytest.skip("no result is committed yet: python -m benchmarks.correctness makes it")
    found = jload(path)
    with open(os.path.join(root, "docs", "correctness.md"), encoding="utf-8") as file:
        assert file.read() == report.page(found)
    assert [column["title"] for column in found["columns"]] == [column.title for column in COLUMNS]


def test_our_driver_runs_train_py_and_writes_what_it_saw(tmp_path, root):
    """One job, whole: the driver's process, train.py's own command line, facts and gradient."""
    from benchmarks.correctness import inputs

    records = inputs.uneven_records()
    model = inputs.make_model(str(tmp_path / "model"), [*records, *inputs.load_examples(inputs.DATA)[:200]])
    paths = {"model": model, "uneven": inputs.write_records(str(tmp_path), "uneven", records)}
    ours = running.Runner(TITLES["ours"], sys.executable, paths, str(tmp_path / "ours"))
    bad = ours.job("bad", steps=0, settings={"padding_free": "never"})
    ours.run([running.group(ours.job("step", float64=True, gradient=True, leak=True)), running.group(bad)])
    facts = ours.facts["step"]
    assert "error" not in facts, ours.output["step"]
    assert len(facts["tokens"]) == 8
    assert facts["leak"]["others"] == 0.0
    assert verdicts.judge_gradient(ours, ours).verdict == "right"
    assert "padding-free: passes of" in ours.output["step"]
    assert "padding_free" in ours.facts["bad"]["error"]
    assert json.loads((tmp_path / "ours" / "jobs.json").read_text())[0]["processes"] == 1
