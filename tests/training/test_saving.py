"""Checkpoints are complete or absent, and a run continues only from one of its own."""

import errno
import os
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
from training_runs import run

import train
from alpaca.cli import UserError
from alpaca.training import resuming, saving
from alpaca.training.trainer import AlpacaTrainer

pytest_plugins = ["training_runs"]


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
        resuming.check_complete(str(out / name / "checkpoint-2"))
    signal.signal(signal.SIGXFSZ, no_more)


def small_run(monkeypatch, models, data, out, *more):
    """A run of 4 steps that saves at 2 and 4."""
    return run(monkeypatch, models["llama"], data, out, "--save_strategy", "steps", "--save_steps", "2", *more)


def contents(folder) -> dict[str, float]:
    """Every file below a folder, and when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_earlier_run_is_replaced_only_if_asked(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_run(monkeypatch, models, data, out)
    before = contents(out)
    with pytest.raises(UserError, match=r"already holds checkpoint-4; continue that run with .*--overwrite_output"):
        run(monkeypatch, models["llama"], data, out)
    assert contents(out) == before
    (out / "mine.safetensors").write_text("mine")
    (out / "checkpoint-best-of-paper").mkdir()
    (out / "checkpoint-best-of-paper" / "trainer_state.json").write_text("{}")
    (out / "checkpoint-notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("of the earlier run, which had shards")
    run(monkeypatch, models["llama"], data, out, "--overwrite_output_dir", "True")
    assert not (out / "checkpoint-4").exists()
    assert not (out / "model-00001-of-00002.safetensors").exists()
    for name in ("mine.safetensors", "checkpoint-best-of-paper/trainer_state.json", "checkpoint-notes.txt"):
        assert (out / name).exists(), "no run wrote it"


def test_resuming_wins_over_overwriting(models, data, tmp_path, monkeypatch):
    """What SIGTERM advises after --overwrite_output_dir True: the same command with --resume_from_checkpoint True."""
    out = tmp_path / "out"
    whole = small_run(monkeypatch, models, data, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "mine.safetensors").write_text("mine")
    more = ("--overwrite_output_dir", "True", "--resume_from_checkpoint", "True")
    assert small_run(monkeypatch, models, data, out, *more) == whole
    assert saving.own_checkpoints(str(out)).keys() == {2, 4}
    assert (out / "mine.safetensors").exists()


def test_run_does_not_delete_what_it_reads(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small_run(monkeypatch, models, data, out)
    before = contents(out)
    for model, text in (
        (out / "checkpoint-2", r"--overwrite_output_dir would delete .*checkpoint-2, which this run reads"),
        (out, "out is the model's own folder; name another one"),
    ):
        with pytest.raises(UserError, match=text):
            run(monkeypatch, str(model), data, out, "--overwrite_output_dir", "True")
    shutil.copy(data, out / "checkpoint-2" / "data.json")
    with pytest.raises(UserError, match=r"would delete .*checkpoint-2"):
        run(monkeypatch, models["llama"], str(out / "checkpoint-2" / "data.json"), out, "--overwrite_output_dir")
    (out / "checkpoint-2" / "data.json").unlink()
    assert contents(out) == before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "other.safetensors"])
def test_folder_with_a_model_that_no_run_wrote_is_left_alone(models, data, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("somebody's")
    for more in ((), ("--overwrite_output_dir", "True")):
        with pytest.raises(UserError, match=rf"already holds {name} of a model that no run of train.py wrote there"):
            run(monkeypatch, models["llama"], data, out, *more)
    assert (out / name).read_text() == "somebody's"


def test_folder_named_like_a_checkpoint_is_not_replaced(models, data, tmp_path, monkeypatch):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "paper.pdf").write_text("mine")
    with pytest.raises(UserError, match=r"checkpoint-2 is no run's checkpoint, it lacks trainer_state.json; move it"):
        small_run(monkeypatch, models, data, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-2" / "paper.pdf").exists()


def test_brackets_in_a_path_mean_themselves(models, data, tmp_path, monkeypatch):
    out = tmp_path / "run[1]*" / "a?b"
    whole = small_run(monkeypatch, models, data, out, "--save_total_limit", "1")
    assert (out / "model.safetensors").exists()
    assert saving.own_checkpoints(str(out)).keys() == {4}
    small_run(monkeypatch, models, data, tmp_path / "[x]", "--eval_fraction", "0.25")
    resume = ("--resume_from_checkpoint", str(out / "checkpoint-4"), "--max_steps", "6")
    assert run(monkeypatch, models["llama"], data, out, *resume)[:4] == whole
    with pytest.raises(UserError, match="already holds checkpoint-4"):
        run(monkeypatch, models["llama"], data, out)


def test_no_path_is_read_as_a_pattern(root):
    """glob.glob(os.path.join(folder, "*")) finds nothing in a folder named run[1]."""
    for folder, _, names in os.walk(os.path.join(root, "alpaca", "training")):
        for name in names:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    assert "glob" not in re.sub(r"\bglobal\w*|model_global", "", file.read()), name


def test_rotation_deletes_the_oldest_of_a_runs_checkpoints_only(tmp_path):
    for at, name in enumerate(["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
        os.utime(tmp_path / name, (at, at))
    saving.rotate(str(tmp_path), 2, newest=str(tmp_path / "checkpoint-6"), best=str(tmp_path / "checkpoint-2"))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6", "checkpoint-old"]
    saving.rotate(str(tmp_path), None, newest=str(tmp_path / "checkpoint-6"), best=None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6", "checkpoint-old"]


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


@pytest.mark.parametrize(
    ("strategy", "limit", "done", "there", "expected"),
    [
        ("no", None, 0, 0, 0),
        ("steps", None, 0, 0, 5),
        ("steps", 1, 0, 0, 2),
        ("steps", 1, 4, 1, 1),  # adds one, then deletes one
        ("steps", 2, 4, 1, 2),
        ("steps", 1, 4, 2, 1),  # a kill between save and rotation
        ("steps", None, 4, 2, 3),
        ("steps", None, 10, 5, 0),
        ("epoch", None, 0, 0, 2),
        ("epoch", None, 5, 1, 1),
    ],
)
def test_checkpoints_that_are_there_take_no_more_room(strategy, limit, done, there, expected):
    args = SimpleNamespace(save_strategy=strategy, save_steps=2, save_total_limit=limit, num_train_epochs=2)
    assert saving.new_checkpoints_at_once(args, 10, done, there) == expected


def test_run_that_fits_continues_after_a_kill_on_a_small_disk(models, data, tmp_path, monkeypatch, capsys):
    """The disk holds the final model and 2 checkpoints: half a save, and what will be rotated, count once."""
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    run(monkeypatch, models["llama"], data, out, *saves)
    need = re.search(r"disk: (\d\.\d) MiB needed", capsys.readouterr().out)[1]
    killed = tmp_path / "killed"
    shutil.copytree(out / "checkpoint-4", killed / "checkpoint-4")
    shutil.copytree(out / "checkpoint-4", killed / saving.STAGING / "checkpoint-5")
    used = sum(path.stat().st_size for path in killed.rglob("*") if path.is_file())
    free = int(float(need) * 2**20 * 1.05) - used
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    more = ("--resume_from_checkpoint", "True", "--max_steps", "6")
    run(monkeypatch, models["llama"], data, killed, *saves, *more)
    assert saving.own_checkpoints(str(killed)).keys() == {6}


def test_folder_that_cannot_be_written_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_for_training", None)
    (tmp_path / "out").mkdir()

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(UserError, match=r"cannot write into .*out: Permission denied; name another --output_dir"):
        run(monkeypatch, models["llama"], data, tmp_path / "out")
