"""A run's speed, by a clock that the test drives."""

import sys
from types import SimpleNamespace

import transformers
from training_runs import logged

import train
from alpaca.training import throughput, trainer
from alpaca.training.packing import model as packed_model

pytest_plugins = ["training_runs"]


def test_speed_is_trainings_alone_and_the_time_left_everythings(trainee, tmp_path, monkeypatch):
    """A clock that only evaluations (100 s), saves (1,000 s) and passes (1 s) move."""

    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def taking(seconds, function):
        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(throughput, "peak_flops", lambda device: (1e9, "a test"))
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(trainer, "time", clock)
    for name, seconds in (("evaluation_loop", 100), ("_save_checkpoint", 1000)):
        monkeypatch.setattr(transformers.Trainer, name, taking(seconds, getattr(transformers.Trainer, name)))
    monkeypatch.setattr(packed_model, "_packed_loss", taking(1, packed_model._packed_loss))
    flags = ["--max_steps", "4", "--eval_fraction", "0.2", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--gradient_accumulation_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, *flags, "--output_dir", str(tmp_path / "out")])
    train.train()
    rates = logged(tmp_path / "out", "useful_tokens_per_s")
    assert len(rates) == 4
    assert all(20 < rate < 2 * 256 for rate in rates)  # the tokens of two examples in a second
    left = logged(tmp_path / "out", "hours_left")
    assert left == [round(s / 3600, 3) for s in (3 * 1, 2 * 1, 1103 / 3, 0)]
