"""LoRA adapters: they learn, and merge into their model."""

import os
import sys

import pytest
import torch
from training_runs import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca import models as model_loading
from alpaca.cli import UserError
from alpaca.training import lora, saving, sharding

pytest_plugins = ["training_runs"]


def test_lora_learns_and_merges_to_equal_logits(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    more = ("--lora_r", "8", "--learning_rate", "2e-2", "--num_train_epochs", "4")
    found = run(monkeypatch, models["llama"], data, out, *more)
    assert sum(found[-4:]) / 4 < found[0] - 0.08
    assert os.path.getsize(out / "adapter_model.safetensors") < os.path.getsize(models["llama"] + "/model.safetensors")
    lora.merge(str(out), str(tmp_path / "merged"))
    import peft

    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    adapted, merged = (
        peft.PeftModel.from_pretrained(base, out),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    with pytest.raises(UserError, match="is not empty"):
        lora.merge(str(out), str(tmp_path / "merged"))
    with pytest.raises(UserError, match="is not empty, or not a folder"):
        lora.merge(str(out), data)
    with pytest.raises(UserError, match=r"out is not an adapter of .*opt: .*; name its model with --base_model"):
        lora.merge(str(out), str(tmp_path / "other"), base_model=models["opt"])
    monkeypatch.setattr(model_loading, "check_saved", lambda folder, *shapes: [] / 0)
    with pytest.raises(TypeError):
        lora.merge(str(out), str(tmp_path / "broken"))
    assert os.listdir(tmp_path / "broken") == [saving.STAGING], "what was not read back looks like no model"


def test_lora_in_bfloat16_learns_what_float32_learns(models, data, tmp_path, monkeypatch):
    """Frozen weights in bfloat16, adapters in float32, under autocast, with dropout and without."""
    more = ("--lora_r", "4", "--lora_dropout", "0", "--padding_free", "false")
    exact = run(monkeypatch, models["llama"], data, tmp_path / "float32", *more)
    monkeypatch.setattr(sharding, "has_bfloat16", lambda: True)
    seen = set()
    linear = torch.nn.functional.linear

    def spy(x, weight, *args):
        seen.add((x.dtype, weight.dtype))
        return linear(x, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    found = run(monkeypatch, models["llama"], data, tmp_path / "bfloat16", "--bf16", "True", *more)
    assert found == pytest.approx(exact, rel=2e-3)
    assert found != exact
    assert (torch.bfloat16, torch.float32) in seen, "adapters read what the layer before them wrote"
    assert (torch.float32, torch.float32) not in seen
    more = ("--lora_r", "4", "--bf16", "True", "--gradient_checkpointing", "True")
    noisy = run(monkeypatch, models["llama"], data, tmp_path / "dropout", *more)
    assert noisy == pytest.approx(exact, rel=2e-2)


def test_merging_without_peft_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^merging an adapter needs peft: pip install peft$"):
        lora.merge(models["llama"], str(tmp_path / "merged"))


def test_lora_targets_are_all_found(models):
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert lora.target_names(lora.add_adapter(model, 2, 4, 0.0, "q_proj, v_proj")) == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match="--lora_target_modules q_proj,u_proj: the model has no 'u_proj'"):
        lora.add_adapter(AutoModelForCausalLM.from_pretrained(models["llama"]), 2, 4, 0.0, "q_proj,u_proj")
