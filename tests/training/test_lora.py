"""LoRA adapters: they learn, and merge into their model."""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from training_runs import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca import models as model_loading
from alpaca.cli import UserError
from alpaca.training import lora, saving, sharding

pytest_plugins = ["training_runs"]


def test_lora_learns_and_merges_to_equal_logits(models, data, tmp_path, monkeypatch, capsys):
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
    printed = capsys.readouterr().out
    serving = (
        f"vllm serve {models['llama']} --enable-lora --lora-modules alpaca={out} --chat-template {out}/chat_template"
    )
    assert serving in printed
    for folder in (out, tmp_path / "merged"):
        assert (folder / "tokenizer.model").read_bytes() == Path(models["llama"], "tokenizer.model").read_bytes()
    assert not (tmp_path / "merged" / "added_tokens.json").exists(), "a LoRA run adds no token"
    assert "--chat-template" in (out / "README.md").read_text()
    assert "merged into" in (tmp_path / "merged" / "README.md").read_text()
    merge_fails_cleanly(out, tmp_path, monkeypatch)


def merge_fails_cleanly(adapter, tmp_path, monkeypatch):
    """One line, and nothing stays that would look like a model or block the next merge."""
    with monkeypatch.context() as patch:
        patch.setattr(model_loading, "check_saved", lambda folder, *shapes: [] / 0)
        with pytest.raises(TypeError):
            lora.merge(str(adapter), str(tmp_path / "broken"))
    assert not (tmp_path / "broken").exists()
    no_more, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # a disk that is full after 300 KB
    try:
        with pytest.raises(
            UserError, match=r"cannot save into .*full, .* free \(.*\)\. The adapter is unchanged"
        ) as full:
            lora.merge(str(adapter), str(tmp_path / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, no_more)
    assert "\n" not in str(full.value)
    (tmp_path / "killed" / saving.STAGING).mkdir(parents=True)
    (tmp_path / "killed" / saving.STAGING / "model.safetensors").write_text(
        "half a model, from a merge that was killed"
    )
    lora.merge(str(adapter), str(tmp_path / "killed"))
    assert not (tmp_path / "killed" / saving.STAGING).exists()
    for name, content in (("adapter_model.safetensors", b"x" * 99), ("adapter_config.json", b'{"r": 4}')):
        cut = shutil.copytree(adapter, tmp_path / f"cut-{name}")
        (cut / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is not an adapter of|names no base_model_name_or_path") as refusal:
            lora.merge(str(cut), str(tmp_path / "never"))
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "never").exists()


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
