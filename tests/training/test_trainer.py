"""The trainer: it stops at a loss that teaches nothing, and resumes whatever names a model's files use."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from training_runs import assert_same, run, weights
from transformers import AutoConfig, AutoModelForCausalLM

import train
from alpaca.cli import UserError

pytest_plugins = ["training_runs"]


def test_model_whose_files_name_tensors_otherwise_continues_exactly(models, data, tmp_path, monkeypatch):
    """GPT-NeoX's output layer is lm_head in memory and embed_out in its files; the Trainer resumes by the former."""
    folder, out = tmp_path / "neox", tmp_path / "out"
    config = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("gpt_neox", **config, num_attention_heads=2, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(os.path.join(models["llama"], name), folder)
    whole = run(monkeypatch, str(folder), data, out, "--save_strategy", "steps", "--save_steps", "2")
    assert "embed_out.weight" in weights(out)
    more = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert run(monkeypatch, str(folder), data, tmp_path / "continued", *more) == whole
    assert_same(tmp_path / "continued", out, 1e-7)
    shutil.copy(out / "model.safetensors", out / "checkpoint-2")  # names that the Trainer doesn't know
    with pytest.raises(UserError, match=r"the checkpoint lacks 1 of this model's tensors, lm_head.weight first"):
        run(monkeypatch, str(folder), data, tmp_path / "other", *more)


def test_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(models, data, tmp_path, monkeypatch):
    more = ("--learning_rate", "1e30", "--max_grad_norm", "0", "--save_strategy", "steps", "--save_steps", "1")
    with pytest.raises(UserError) as stop:
        run(monkeypatch, models["llama"], data, tmp_path / "out", *more, "--warmup_ratio", "0.5")
    assert re.search(r"stopped at step \d: the loss is (nan|inf) on records \[\d+, \d+, \d+, \d+\]", str(stop.value))
    kept = re.search(r"The last good checkpoint is (\S+)", str(stop.value)).group(1)
    assert all(tensor.isfinite().all() for tensor in weights(kept).values())
    assert not os.path.exists(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_batch_without_a_label_stops_with_its_records(models, data, tmp_path, monkeypatch, padding_free, capsys):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:8]
    for number in (4, 5):
        examples[number]["instruction"] = "much too long " * 200
    path = tmp_path / "long.json"
    path.write_text(json.dumps(examples))
    more = ("--train_sampling_strategy", "sequential", "--padding_free", padding_free)
    with pytest.raises(UserError, match=r"stopped at step 2: nothing to learn on records \[4, 5\]"):
        run(monkeypatch, models["llama"], str(path), tmp_path / "out", *more, batch=2)
    output = capsys.readouterr().out
    assert "2 example(s) have nothing to learn, their prompt alone fills --model_max_length: records 4, 5" in output


def test_weights_in_16_bits_are_not_trained_unless_asked_for(trainee, tmp_path, monkeypatch):

    flags = [*trainee, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--gradient_accumulation_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    load = train.load_for_training
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_for_training", lambda *args: load(*args).to(torch.bfloat16))
        with pytest.raises(UserError, match="would be trained in 16 bits"):
            train.train()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--pure_bf16", "True"])
    train.train()


def test_steps_of_2e_5_vanish_in_pure_bfloat16():
    for dtype, moved in ((torch.float32, True), (torch.bfloat16, False)):
        weight = torch.nn.Parameter(torch.full((8,), 0.02, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0).step()
        assert bool((weight.float() != torch.tensor(0.02, dtype=dtype).float()).all()) == moved
