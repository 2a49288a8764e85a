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


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_model_that_brings_code_of_its_own_is_refused(models, data, tmp_path, monkeypatch, file):
    """Were it run, the code would write a file; on a terminal transformers would ask and wait."""
    folder = tmp_path / "model"
    shutil.copytree(models["opt"], folder)
    config = json.loads((folder / file).read_text())
    if file == "config.json":
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    else:
        config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", None]}}
    (folder / file).write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    words = r"brings code of its own \(auto_map .*\), and such code is never run|cannot load .*tokenizer"
    with pytest.raises(UserError, match=words) as refusal:
        run(monkeypatch, str(folder), data, tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_chat_template_starts_with_bos_only_where_the_tokenizer_does():
    assert alpaca_chat_template(True).startswith("{{ bos_token }}")
    assert "bos_token" not in alpaca_chat_template(False)
