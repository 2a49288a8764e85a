"""A run continues only from a whole checkpoint, and only from one of its own."""

import json
import os
import re
import shutil

import pytest
import torch
from training_runs import run

import train
from alpaca.cli import UserError
from alpaca.training import resuming

pytest_plugins = ["training_runs"]


def test_checkpoint_that_is_not_whole_is_not_continued_from(models, data, tmp_path, monkeypatch):
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "2")
    run(monkeypatch, models["llama"], data, out, *saves)
    whole = out / "checkpoint-4"
    resuming.check_complete(str(whole))
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        cut = tmp_path / f"cut-{name}"
        shutil.copytree(whole, cut)
        os.truncate(cut / name, os.path.getsize(cut / name) - 9)
        with pytest.raises(UserError, match=re.escape(name)):
            run(monkeypatch, models["llama"], data, tmp_path / "new", "--resume_from_checkpoint", cut)
    os.remove(whole / "optimizer.pt")
    with pytest.raises(UserError, match="checkpoint-4 holds no optimizer state"):
        run(monkeypatch, models["llama"], data, out, "--resume_from_checkpoint", "True")


def test_checkpoint_of_another_run_is_refused_or_told(models, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, models["llama"], data, out, "--save_strategy", "steps", "--save_steps", "2")
    resume = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert "processes differ" not in capsys.readouterr().out
    run(monkeypatch, models["llama"], data, tmp_path / "again", *resume)
    run(monkeypatch, models["llama"], data, tmp_path / "longer", *resume, "--num_train_epochs", "2")
    assert "processes differ" not in capsys.readouterr().out
    run(monkeypatch, models["llama"], data, tmp_path / "smaller", *resume, batch=2)
    assert (
        "comes from a run of 4 steps, this one has 8: data, batch or number of processes differ"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match="its lora_r is 0, this run's 4; continue with the flags that started the run"):
        run(monkeypatch, models["llama"], data, tmp_path / "lora", *resume, "--lora_r", "4")
    with pytest.raises(UserError, match="its model_type is llama, this run's opt; "):
        run(monkeypatch, models["opt"], data, tmp_path / "opt", *resume)


@pytest.fixture(scope="module")
def checkpoint(models, data, tmp_path_factory):
    """The checkpoint after 2 of 4 steps, and the losses of all 4."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        losses = run(patch, models["llama"], data, out, "--save_strategy", "steps", "--save_steps", "2")
    return out / "checkpoint-2", losses


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "7"), "its seed is 42, this run's 7"),
        (("--learning_rate", "2e-3"), "its learning_rate is 0.001, this run's 0.002 (the Trainer would ignore the fl"),
        (("--optim", "adafactor"), "its optim is adamw_torch, this run's adafactor"),
        (("--adam_beta2", "0.95"), "its adam_beta2 is 0.999, this run's 0.95 (the Trainer would ignore the flag"),
        (("--lr_scheduler_type", "linear"), "its lr_scheduler_type is cosine, this run's linear"),
        (("--warmup_ratio", "0.5"), "its warmup_steps is 0.03, this run's 0.5"),
        (("--loss_reduction", "global"), "its loss_reduction is micro_batch, this run's global"),
        (("--prompt_boundary", "separate"), "its prompt_boundary is joint, this run's separate"),
        (("--eval_fraction", "0.25"), "its eval_fraction is 0.0, this run's 0.25"),
        (("--model_max_length", "300"), "its model_max_length is 512, this run's 300"),
    ],
)
def test_run_with_other_settings_is_not_continued(models, data, tmp_path, monkeypatch, checkpoint, flags, words):
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "o", "--resume_from_checkpoint", checkpoint[0], *flags)
    assert "continue with the flags that started the run" in str(refusal.value)


def test_run_with_other_data_of_equal_length_is_not_continued(models, data, tmp_path, monkeypatch, checkpoint):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)
    examples[5]["output"] = "Something else."
    (tmp_path / "other.json").write_text(json.dumps(examples))
    monkeypatch.setattr(train, "load_for_training", None)
    words = r"its data is .*data.json, 32 examples, sha256 \w{12}, this run's .*other.json, 32 examples, sha256 \w{12};"
    resume = ("--resume_from_checkpoint", checkpoint[0])
    with pytest.raises(UserError, match=words):
        run(monkeypatch, models["llama"], str(tmp_path / "other.json"), tmp_path / "out", *resume)


def test_what_does_not_decide_the_weights_may_change(models, data, tmp_path, monkeypatch, checkpoint, capsys):
    shutil.copy(data, tmp_path / "moved.json")
    shutil.move(shutil.copytree(checkpoint[0], tmp_path / "copy"), tmp_path / "moved")
    more = ("--resume_from_checkpoint", tmp_path / "moved", "--logging_steps", "1", "--eval_data_path", data)
    assert run(monkeypatch, models["llama"], str(tmp_path / "moved.json"), tmp_path / "out", *more) == checkpoint[1]
    assert "the data to evaluate on has changed" in capsys.readouterr().out


def test_longer_schedule_is_said(models, data, tmp_path, monkeypatch, checkpoint, capsys):
    more = ("--resume_from_checkpoint", checkpoint[0], "--num_train_epochs", "2")
    run(monkeypatch, models["llama"], data, tmp_path / "out", *more)
    assert "the learning rate's schedule spanned 4 steps, now it spans 8" in capsys.readouterr().out


def without(name):
    return lambda folder: os.remove(folder / name)


def holding(name, content):
    return lambda folder: (folder / name).write_text(content)


def saved(name, value):
    return lambda folder: torch.save(value, folder / name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("scheduler.pt"), "holds no scheduler.pt, so no run continues exactly from it"),
        (without("rng_state.pth"), "holds no rng_state.pth, so no run"),
        (without("model.safetensors"), "holds no weights, so no run"),
        (holding("trainer_state.json", "{}"), "trainer_state.json is damaged or cut off (it is no trainer state"),
        (holding("trainer_state.json", "[]"), "trainer_state.json is damaged or cut off (it is no trainer state"),
        (holding("trainer_state.json", '{"a": ' + "[" * 5000), "trainer_state.json is damaged"),
        (holding("optimizer.pt", "garbage"), "optimizer.pt is damaged or cut off"),
        (saved("optimizer.pt", {"state": {}}), "optimizer.pt is damaged or cut off (param_groups is missing)"),
        (saved("optimizer.pt", [1]), "optimizer.pt is damaged or cut off (param_groups is missing)"),
        (saved("scheduler.pt", {}), "scheduler.pt is damaged or cut off (last_epoch is missing)"),
        (holding("rng_state.pth", ""), "rng_state.pth is damaged or cut off"),
        (holding("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'), "holds no b.safetensors"),
    ],
)
def test_damaged_checkpoint_is_named_before_weights_load(
    models, data, tmp_path, monkeypatch, checkpoint, damage, words
):
    damage(shutil.copytree(checkpoint[0], tmp_path / "broken"))
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "o", "--resume_from_checkpoint", tmp_path / "broken")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer.pt", {"state": {}, "param_groups": [{"params": [0]}]}), ("rng_state.pth", {"python": 1})],
)
def test_checkpoint_that_does_not_fit_ends_in_one_line(models, data, tmp_path, monkeypatch, checkpoint, name, value):
    torch.save(value, shutil.copytree(checkpoint[0], tmp_path / "broken") / name)
    with pytest.raises(
        UserError, match=r"cannot continue from .*broken \(\w+: .*\); continue from an earlier"
    ) as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "o", "--resume_from_checkpoint", tmp_path / "broken")
    assert "\n" not in str(refusal.value)
