"""What a run loads: the tokenizer, the skeleton, the weights."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from training_runs import run
from transformers import AutoModelForCausalLM

import train
from alpaca import models as model_loading
from alpaca.cli import UserError
from alpaca.prompts import alpaca_chat_template
from alpaca.training import loading, sharding

pytest_plugins = ["training_runs"]


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_only_the_first_rank_of_fsdp_loads_weights(models, monkeypatch, kind):
    chosen, args = (
        train.ModelArguments(model_name_or_path=models[kind]),
        SimpleNamespace(model_max_length=512, cache_dir=None),
    )
    tokenizer, skeleton = loading.load_skeleton(chosen, args)
    assert sharding.sends_weights(skeleton)
    plan = SimpleNamespace(sends_weights=True, dtype=torch.float32)
    loaded = loading.load_for_training(chosen, args, plan, tokenizer, skeleton.config)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    empty = loading.load_for_training(chosen, args, plan, tokenizer, skeleton.config)
    assert model_loading.tensor_shapes(empty) == model_loading.tensor_shapes(loaded)
    for ours, theirs in zip(empty.buffers(), loaded.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    skeleton.register_buffer("statistics", torch.zeros(1))
    assert not sharding.sends_weights(skeleton), "accelerate sends no buffers"


def test_weight_diff_is_not_trained(models, data, tmp_path, monkeypatch):
    diff = tmp_path / "diff"
    shutil.copytree(models["llama"], diff)
    config = json.loads((diff / "config.json").read_text())
    (diff / "config.json").write_text(json.dumps({**config, "alpaca_weight_diff": True}))
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match="is a weight diff, not a model"):
        run(monkeypatch, str(diff), data, tmp_path / "out")


def test_chat_template_starts_with_bos_only_where_the_tokenizer_does():
    assert alpaca_chat_template(True).startswith("{{ bos_token }}")
    assert "bos_token" not in alpaca_chat_template(False)
