"""Tiny checkpoints: both kinds load and generate like the real ones; a wrong line writes nothing."""

import json
import os
import subprocess
import sys

import pytest

from alpaca.cli import UserError
from demo import tiny_model

TEXTS = ["Add 2 and 35.", "Name three rivers.", "Say “good night” in French: bonne nuit 🌙", "Tidy  up\n\tthis list."]


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps([{"instruction": text, "input": "", "output": text} for text in TEXTS * 10]))
    return str(path)


@pytest.fixture(scope="module", params=["llama", "opt"])
def checkpoint(request, root, data_path, tmp_path_factory) -> tuple[str, str]:
    """A kind of model and the folder where the command made one."""
    output_dir = str(tmp_path_factory.mktemp("tiny") / request.param)
    config = os.path.join(root, "configs", f"tiny_{request.param}.json")
    tiny_model.make(config, data_path, output_dir, vocab_size=400, dtype="bfloat16")
    return request.param, output_dir


def test_checkpoint_loads_and_generates(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, folder = checkpoint
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == kind
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.shape[0] == 400 >= len(tokenizer)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (1, inputs["input_ids"].shape[1] + 5)


def test_tokenizer_behaves_as_the_real_ones(checkpoint):
    from transformers import AutoTokenizer

    kind, folder = checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # LLaMA's and OPT's own: BOS in front, no EOS behind; LLaMA has no pad token, OPT's BOS, EOS and UNK are one.
    ids = tokenizer(TEXTS[1])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    specials = {"llama": (1, 2, 0, None), "opt": (2, 2, 2, 1)}[kind]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == specials
    for text in [*TEXTS, "never seen: Ωmega 数 \x07"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_same_seed_gives_the_same_weights_and_another_seed_others(root, data_path, tmp_path):
    config = os.path.join(root, "configs", "tiny_llama.json")
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        tiny_model.make(config, data_path, str(tmp_path / name), vocab_size=400, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("settings", "flags", "complaint"),
    [
        ({"model_type": "gpt2"}, {}, "model_type must be llama or opt, found 'gpt2'"),
        ([1], {}, "model_type must be llama or opt, found None"),
        ({"model_type": "llama"}, {}, "vocab_size must be 260 or more, found None"),
        ({"model_type": "llama"}, {"vocab_size": -5}, "vocab_size must be 260 or more, found -5"),
        ({"model_type": "llama"}, {"vocab_size": 262}, "262 tokens are too few for this data .*; raise --vocab_size"),
        ({"model_type": "llama", "vocab_size": 400}, {"dtype": "int8"}, "--dtype must be float32, float16 or bfloat16"),
        (
            {"model_type": "opt", "vocab_size": 400, "hidden_size": 10, "num_attention_heads": 3},
            {},
            "cannot make this opt model",
        ),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(settings, flags, complaint, data_path, tmp_path):
    config = tmp_path / "config.json"
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.write_text(json.dumps({**small, **settings} if isinstance(settings, dict) else settings))
    with pytest.raises(UserError, match=complaint):
        tiny_model.make(str(config), data_path, str(tmp_path / "out"), **flags)
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_folder_that_holds_something_is_refused_in_one_line(root, data_path, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["--config", "configs/tiny_opt.json", "--data_path", data_path, "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "demo.tiny_model", "make", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path} exists and is not an empty folder; name a new one\n"
    assert os.listdir(tmp_path) == ["notes.txt"]
