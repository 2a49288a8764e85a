"""Model folders: loaded whole, with their adapter, or refused in one line."""

import os
import shutil

import pytest
import torch
from taught_model import LESSONS

from alpaca.cli import UserError
from alpaca.files import jdump, jload
from alpaca.inference import loading


def test_checkpoints_own_sampling_settings_are_not_inherited(model_copy):
    path = str(model_copy / "generation_config.json")
    jdump(
        {**jload(path), "do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        path,
    )
    alpaca = loading.load(str(model_copy))
    answers = alpaca.generate([alpaca.encode(LESSONS[5], 600)[0]], alpaca.settings(600, 0.0, 0.9))
    assert alpaca.decode(answers[0]) == LESSONS[5]["output"]


def no_eos(folder):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "special_tokens_map.json").unlink()
    path = str(folder / "tokenizer_config.json")
    jdump({**jload(path), "tokenizer_class": "TokenizersBackend", "eos_token": None}, path)


def lose_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(folder)


def hide_in_checkpoint(folder):
    os.makedirs(folder / "checkpoint-20")
    shutil.move(folder / "config.json", folder / "checkpoint-20")


def mark_diff(folder):
    path = str(folder / "config.json")
    jdump({**jload(path), "alpaca_weight_diff": True, "architectures": []}, path)


def need_code(folder):
    """Makes the model one that only its own Python file can build; the file would leave a mark if it ran."""
    path = str(folder / "config.json")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    jdump({**jload(path), "model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}, path)
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


MISTAKES = {
    "own code": (need_code, r"brings code of its own \(auto_map .*\), and such code is never run"),
    "weight diff": (mark_diff, "is a weight diff, not a model; recover the model first: python weight_diff"),
    "no config": (lambda f: os.unlink(f / "config.json"), "has no config.json; expected a model's folder"),
    "inner folder": (hide_in_checkpoint, "did you mean .*checkpoint-20"),
    "no EOS": (no_eos, "the tokenizer has no EOS token"),
    "missing tensor": (
        lose_tensor,
        r"lacks 1 tensor\(s\) that its config.json asks for: model.layers.1.mlp.up_proj.weight",
    ),
    "other tokenizer": (add_tokens, "the tokenizer has 421 tokens but the model only 420 rows"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 1000), "cannot load"),
    "no weights": (lambda f: os.unlink(f / "model.safetensors"), "cannot load"),
    "gone": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_damaged_model_folder_is_refused_in_one_line(model_copy, name):
    damage, message = MISTAKES[name]
    damage(model_copy)
    with pytest.raises(UserError, match=message) as caught:
        loading.load(str(model_copy))
    assert "\n" not in str(caught.value)
    assert not os.path.exists(model_copy / "ran")


def test_lora_adapter_loads_on_its_base_and_changes_the_logits(model_path, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path)
    plain = base(torch.tensor([[1, 2, 3]])).logits
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    alpaca = loading.load(str(tmp_path / "adapter"))
    loaded, ids = alpaca.model, alpaca.encode(LESSONS[0], 9)[0]
    expected = tuned.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids) :]
    assert alpaca.generate([ids], alpaca.settings(9, 0.0, 1.0)) == [expected.tolist()]
    with torch.no_grad():
        expected, got = tuned.eval()(torch.tensor([[1, 2, 3]])).logits, loaded(torch.tensor([[1, 2, 3]])).logits
    assert torch.equal(expected, got)
    assert not torch.allclose(plain, got, atol=1e-2)
    # An adapter whose tokenizer has one more token, and the rows for it, than the base.
    tokenizer = loading.load(model_path).tokenizer
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert loading.load(str(tmp_path / "adapter")).model.get_input_embeddings().num_embeddings == 421
    config = jload(tmp_path / "adapter" / "adapter_config.json")
    jdump({**config, "base_model_name_or_path": "/no/base"}, str(tmp_path / "adapter" / "adapter_config.json"))
    with pytest.raises(UserError, match="names a base model that cannot be used: /no/base is not a folder"):
        loading.load(str(tmp_path / "adapter"))
