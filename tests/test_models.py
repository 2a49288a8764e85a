"""Whole models: what is missing or broken is refused, saved ones are checked."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca import models as model_loading
from alpaca.cli import UserError

pytest_plugins = ["training_runs"]


def test_model_whose_files_are_not_whole_is_refused(models, tmp_path):
    def broken(name: str, config=None) -> str:
        model = AutoModelForCausalLM.from_pretrained(models["llama"])
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**settings, **(config or {})}))
        return str(tmp_path / name)

    os.remove(os.path.join(broken("missing"), "model-00002-of-00004.safetensors"))
    os.truncate(os.path.join(broken("cut"), "model-00002-of-00004.safetensors"), 5000)
    broken("deeper", {"num_hidden_layers": 3})
    broken("wider", {"vocab_size": 800})
    for name, words in (
        ("missing", r"cannot load .*missing: No such file or directory: .*model-00002-of-00004"),
        ("cut", "cannot load .*cut: Error while deserializing header"),
        ("deeper", r"deeper lacks 9 tensor\(s\) that its config.json asks for: model.layers.2.input_layernorm.weight"),
        ("wider", r"lm_head.weight has shape \(700, 64\), its config.json says \(800, 64\)"),
    ):
        with pytest.raises(UserError, match=words):
            model_loading.load_model(str(tmp_path / name), torch.float32)
    assert model_loading.load_model(models["opt"], torch.float32), "a tied output layer lacks nothing"


def test_checkpoint_that_was_not_saved_right_is_not_passed_as_done(models, tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    shapes = model_loading.tensor_shapes(model)
    assert model_loading.check_saved(models["llama"], *shapes) == 21
    whole = load_file(models["llama"] + "/model.safetensors")
    norm = "model.norm.weight"
    for wrong, words in (
        ({name: tensor for name, tensor in whole.items() if name != norm}, "lacks 1 of 21 tensors, model.norm.weight"),
        ({**whole, norm: whole[norm][:3].clone()}, r"has shape \(3,\), the model \(64,\)"),
        ({**whole, norm: whole[norm] / 0}, "is not finite"),
        ({**whole, "extra": whole[norm].clone()}, "holds extra, which the model does not have"),
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=words):
            model_loading.check_saved(str(tmp_path), *shapes)
    tied = model_loading.tensor_shapes(AutoModelForCausalLM.from_pretrained(models["opt"]))
    assert model_loading.check_saved(models["opt"], *tied) == len(tied[0]) - 1, "one of two tied tensors is enough"
