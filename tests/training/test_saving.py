"""Checkpoints are complete or absent, and a run continues only from one of its own."""

import errno
import os
import re
import resource
import shutil
import signal

import pytest
from training_runs import run

import train
from alpaca.cli import UserError
from alpaca.training import saving
from alpaca.training.trainer import AlpacaTrainer

pytest_plugins = ["training_runs"]


def test_checkpoint_that_is_not_whole_is_not_continued_from(models, data, tmp_path, monkeypatch):
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "2")
    run(monkeypatch, models["llama"], data, out, *saves)
    whole = out / "checkpoint-4"
    saving.check_complete(str(whole))
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


def test_full_disk_is_told_in_one_line_and_leaves_the_last_good_checkpoint(models, data, tmp_path, monkeypatch):
    """A limit on the size of files, which the second save meets: once in the weights, once in the optimizer's state."""
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "2")
    no_more = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = AlpacaTrainer._save_checkpoint
    for name, size in (("weights", 500_000), ("optimizer", 1_000_000)):

        def save_until_full(self, *args, size=size):
            if self.state.global_step > 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            return save(self, *args)

        monkeypatch.setattr(AlpacaTrainer, "_save_checkpoint", save_until_full)
        try:
            with pytest.raises(UserError, match=rf"cannot save .* free \(.*\)\. The last good .*{name}/checkpoint-2$"):
                run(monkeypatch, models["llama"], data, out / name, *saves)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saving.check_complete(str(out / name / "checkpoint-2"))
    signal.signal(signal.SIGXFSZ, no_more)


def test_earlier_run_is_not_written_over(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(models["llama"], out)
    with pytest.raises(
        UserError, match=r"already holds model.safetensors; continue that run with .*--overwrite_output"
    ):
        run(monkeypatch, models["llama"], data, out)


def test_folder_of_a_run_at_work_is_left_alone(models, data, tmp_path, monkeypatch):
    out, train_it = tmp_path / "out", AlpacaTrainer.train

    def start_another(self, **kwargs):
        (out / saving.STAGING).mkdir()
        monkeypatch.setattr(AlpacaTrainer, "train", train_it)
        with pytest.raises(UserError, match=r"another run is writing .*out; wait for it, or"):
            run(monkeypatch, models["llama"], data, out, "--overwrite_output_dir", "True")
        assert (out / saving.STAGING).is_dir(), "the other run's save goes on"
        return train_it(self, **kwargs)

    monkeypatch.setattr(AlpacaTrainer, "train", start_another)
    run(monkeypatch, models["llama"], data, out)
    run(monkeypatch, models["llama"], data, out, "--overwrite_output_dir", "True")


def test_too_little_disk_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_for_training", None)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    with pytest.raises(UserError, match=r"has 1.0 MiB free and this run needs .*2 checkpoint\(s\) of .*lower --save"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *saves)


def test_folder_that_cannot_be_written_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_for_training", None)
    (tmp_path / "out").mkdir()

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(UserError, match=r"cannot write into .*out: Permission denied; name another --output_dir"):
        run(monkeypatch, models["llama"], data, tmp_path / "out")
