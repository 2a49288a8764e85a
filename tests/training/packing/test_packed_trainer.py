"""Padding-free runs of train.py end with the padded runs' losses and weights, on one rank and on two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from training_runs import assert_same_run, logged

import train

pytest_plugins = ["training_runs"]

UNEVEN = ["--eval_fraction", "0.075", "--eval_strategy", "steps", "--eval_steps", "1"]
UNEVEN += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1"]
WAYS = {
    "ddp": ["--plain"],
    "ddp, global": ["--plain", "--loss_reduction", "global"],
    "fsdp": ["--fsdp", "full_shard auto_wrap"],  # memory is plenty: gathered weights are kept
    "fsdp, resharded": ["--fsdp", "full_shard auto_wrap", "--fsdp_config", '{"fsdp_reshard_after_forward": true}'],
    "fsdp, checkpointing": ["--fsdp", "full_shard auto_wrap", "--gradient_checkpointing", "True"],
    "lora": ["--plain", "--lora_r", "4", "--lora_dropout", "0.0"],
    # 37 examples: ranks repeat some, and each epoch's last step has one micro-batch; evaluated after every step
    "uneven": ["--plain", *UNEVEN, "--num_train_epochs", "2", "--loss_reduction", "global"],
    "dropped": ["--plain", *UNEVEN, "--dataloader_drop_last", "True"],
    # weights are whole after an evaluation, and sharded again in what is saved
    "fsdp, uneven": [
        "--fsdp",
        "full_shard auto_wrap",
        *UNEVEN,
        "--num_train_epochs",
        "2",
        "--loss_reduction",
        "global",
    ],
}
STEPS = {"uneven": 8, "dropped": 3, "fsdp, uneven": 8}


def test_two_ranks_of_train_py_end_with_the_padded_runs_weights(trainee, tmp_path, root):
    commands = []
    for way, flags in WAYS.items():
        common = [*trainee, *flags, "--gradient_accumulation_steps", "3"]
        commands.append([*common, "--output_dir", str(tmp_path / way), "--max_tokens_per_pass", "300"])
        if not way.startswith("fsdp"):  # those must end where data-parallel ranks do
            commands.append([*common, "--output_dir", str(tmp_path / f"padded {way}"), "--padding_free", "false"])
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "padding-free: passes of at most 300 tokens, shared prefixes of" in run.stdout
    assert run.stdout.count("FSDP2 keeps gathered weights") == 3  # said once each where the choice was free
    assert [line for line in run.stdout.splitlines() if line.startswith("resharding: ")] == [
        f"resharding: {way}" for way in ("False", "True", "False", "False")
    ]
    assert "gradients wait whole" not in run.stdout  # FSDP2 would hold all of them on each device
    for way in WAYS:
        padded = f"padded {way.removeprefix('fsdp, ')}"
        padded = padded if (tmp_path / padded).exists() else "padded ddp"
        assert_same_run(tmp_path / way, tmp_path / padded, STEPS.get(way, 4))
        assert logged(tmp_path / way, "eval_loss") == pytest.approx(logged(tmp_path / padded, "eval_loss"), abs=2e-5)
    assert len(logged(tmp_path / "uneven", "eval_loss")) == 8 + 1


def test_a_single_process_under_fsdp2_ends_with_the_padded_runs_weights(trainee, tmp_path, root, monkeypatch):

    common = [*trainee, "--gradient_accumulation_steps", "6"]
    flags = ["--output_dir", str(tmp_path / "one"), "--fsdp", "full_shard auto_wrap"]
    half = [
        "--output_dir",
        str(tmp_path / "half"),
        "--fsdp",
        "full_shard auto_wrap",
        "--half",
        "--bf16",
        "True",
        "--use_cpu",
        "True",
    ]
    (tmp_path / "commands.json").write_text(json.dumps([[*common, *flags], [*common, *half]]))
    # No torchrun: train.py makes its own world.
    script = [sys.executable, os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json")]
    run = subprocess.run(script, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FSDP2 wraps LlamaDecoderLayer" in run.stdout
    flags = ["--output_dir", str(tmp_path / "padded"), "--padding_free", "false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *flags])
    train.train()
    assert_same_run(tmp_path / "one", tmp_path / "padded")
    assert logged(tmp_path / "half") == pytest.approx(logged(tmp_path / "one"), rel=2e-2)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in logged(tmp_path / "half"))


def test_ligers_kernels_leave_the_packed_forward_pass_alone(trainee, tmp_path, monkeypatch):

    seen = []

    def stand_in(model, config):
        """What Liger does to a model unless told not to: puts a forward pass with its own loss there."""
        seen.append(config)
        if (config or {}).get("fused_linear_cross_entropy", True):
            model.forward = None

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", stand_in)
    flags = [*trainee, "--max_steps", "1", "--eval_fraction", "0.2"]  # the Trainer evaluates in Liger's way, too
    for name, more in (("liger", ["--use_liger_kernel", "True"]), ("plain", [])):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more, "--output_dir", str(tmp_path / name)])
        train.train()
    assert seen == [{"fused_linear_cross_entropy": False}] * 2, "in the rehearsal and in the run"
    assert logged(tmp_path / "liger", "eval_loss") == logged(tmp_path / "plain", "eval_loss") != []
    assert_same_run(tmp_path / "liger", tmp_path / "plain", steps=1)
