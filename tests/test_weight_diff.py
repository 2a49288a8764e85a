"""weight_diff.py on real checkpoint files: pairs whose noise was added in float64, 7B's tensor names, small shapes."""

import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_files
import tensor_stream
import weight_diff
from utils import PROMPT_DICT, UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama_shapes(rows=40, hidden=48, layers=2, inner=72) -> dict[str, tuple[int, ...]]:
    """7B's names, in the order of a state dict."""
    shapes = {EMBED: (rows, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner), f"{layer}.input_layernorm.weight": (hidden,)}
    return {**shapes, "model.norm.weight": (hidden,), HEAD: (rows, hidden)}


def save(folder, tensors, shards=1, bin_files=False, **config) -> str:
    """Writes a checkpoint folder as transformers does."""
    os.makedirs(folder)
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    stem, end = ("pytorch_model", "bin") if bin_files else ("model", "safetensors")
    files = [f"{stem}-{i:05d}-of-{shards:05d}.{end}" if shards > 1 else f"{stem}.{end}" for i in range(1, shards + 1)]
    for file, part in zip(files, parts, strict=True):
        chosen = {name: tensors[name] for name in part}
        path = os.path.join(folder, file)
        torch.save(chosen, path) if bin_files else save_file(chosen, path, {"format": "pt"})
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map = {n: f for f, p in zip(files, parts, strict=True) for n in p}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write(os.path.join(folder, f"{stem}.{end}.index.json"), json.dumps(index, indent=2))
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2,
        "vocab_size": len(tensors[EMBED]), "tie_word_embeddings": False, "torch_dtype": "float32", **config,
    }  # fmt: skip
    write(os.path.join(folder, "config.json"), json.dumps(settings, indent=2))
    write(os.path.join(folder, "generation_config.json"), '{"eos_token_id": 2}\r\n')
    write(os.path.join(folder, "tokenizer_config.json"), '{"pad_token": "[PAD]"}')
    write(os.path.join(folder, "chat_template.jinja"), "{{ bos_token }}é")
    return str(folder)


def write(path, text) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def noisy(tensor: torch.Tensor, generator, scale=1e-3, rows=0) -> torch.Tensor:
    """`tensor` + noise in float64, with `rows` more rows: one float32 addition would hide inexactness."""
    grown = torch.cat([tensor.double(), torch.randn(rows, *tensor.shape[1:], generator=generator, dtype=torch.float64)])
    return grown + scale * torch.randn(grown.shape, generator=generator, dtype=torch.float64)


def make_pair(folder, raw_dtype="float32", tuned_dtype="float32", rows=1, raw=None, tuned=None, shapes=None, **config):
    """A base and a tuned model with `rows` more rows of vocabulary.

    Args:
        folder: where the folders raw and tuned go.
        raw_dtype: of the base.
        tuned_dtype: of the tuned model.
        rows: how many more rows.
        raw: further arguments of `save` for the base.
        tuned: the same for the tuned model.
        shapes: tensor name -> shape of the base.
        config: for both.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or llama_shapes()
    base = {n: (torch.randn(s, generator=generator) * 0.02).to(DTYPES[raw_dtype]) for n, s in shapes.items()}
    other = {
        n: noisy(t, generator, rows=rows if n in (EMBED, HEAD) else 0).to(DTYPES[tuned_dtype]) for n, t in base.items()
    }
    return (
        save(os.path.join(folder, "raw"), base, **{**config, **(raw or {})}),
        save(os.path.join(folder, "tuned"), other, **{**config, **(tuned or {})}),
    )


def load(folder) -> dict[str, torch.Tensor]:
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors") and name != "corrections.safetensors":
            found |= load_file(os.path.join(folder, name))
        elif name.endswith(".bin"):
            found |= torch.load(os.path.join(folder, name), weights_only=True)
    return found


def assert_same_bits(found: dict, wanted: dict) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def assert_same_files(found, wanted) -> None:
    names = os.listdir(wanted)
    _, mismatch, errors = filecmp.cmpfiles(wanted, found, names, shallow=False)
    assert (mismatch, errors) == ([], [])
    assert set(os.listdir(found)) - set(names) <= {"weight_diff.json"}


def make_diff(raw, tuned, folder, **flags) -> str:
    diff = os.path.join(folder, "diff")
    weight_diff.make_diff(raw, tuned, diff, **flags)
    return diff


def recover(raw, diff, folder, **flags) -> str:
    out = os.path.join(folder, "out")
    weight_diff.recover(raw, diff, out, test_inference=False, **flags)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("raw_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
@pytest.mark.parametrize(("raw", "tuned"), [({}, {"shards": 3}), ({"bin_files": True, "shards": 2}, {})])
def test_recovered_folder_is_the_tuned_one_byte_for_byte(tmp_path, raw_dtype, tuned_dtype, raw, tuned):
    raw, tuned = make_pair(tmp_path, raw_dtype, tuned_dtype, raw=raw, tuned=tuned)
    diff = make_diff(raw, tuned, tmp_path)
    assert_same_files(recover(raw, diff, tmp_path), tuned)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bin_of_2023_is_read_on_either_side(tmp_path, dtype):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    raw, tuned = make_pair(tmp_path, dtype, dtype, raw={"bin_files": True}, tuned={"bin_files": True, "shards": 2})
    for folder, file in ((raw, "pytorch_model.bin"), (tuned, "pytorch_model-00001-of-00002.bin")):
        path = os.path.join(folder, file)
        torch.save({**torch.load(path), **buffers}, path)
    out = recover(raw, make_diff(raw, tuned, tmp_path), tmp_path)
    assert_same_bits(load(out), {n: t for n, t in load(tuned).items() if n not in buffers})


def test_special_values_survive(tmp_path):
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 3.4e38, 65504, 6e-8, 1.0, -1.0]
    for dtype in DTYPES:
        folder = os.path.join(tmp_path, dtype)
        grid = torch.tensor([(a, b) for a in special for b in special]).to(DTYPES[dtype])
        shapes = llama_shapes()
        raw = {n: torch.zeros(s, dtype=DTYPES[dtype]) for n, s in shapes.items()}
        tuned = dict(raw)
        raw["model.norm.weight"], tuned["model.norm.weight"] = grid[:, 0].contiguous(), grid[:, 1].contiguous()
        raw, tuned = save(f"{folder}/raw", raw), save(f"{folder}/tuned", tuned)
        assert_same_files(recover(raw, make_diff(raw, tuned, folder), folder), tuned)


def test_corrections_of_more_than_a_window_are_applied(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in llama_shapes(rows=7000).items()}
    tuned = {n: torch.randn(t.shape, generator=generator) * 1e-6 for n, t in base.items()}
    raw, tuned = save(tmp_path / "raw", base), save(tmp_path / "tuned", tuned)
    diff = make_diff(raw, tuned, tmp_path)
    assert load_file(os.path.join(diff, "corrections.safetensors"))[f"{EMBED}.index"].numel() > tensor_stream.WINDOW
    assert_same_files(recover(raw, diff, tmp_path), tuned)


def test_same_base_in_another_type_is_accepted_and_a_rounded_one_refused(tmp_path):
    raw, tuned = make_pair(tmp_path, "float16", "float32")
    diff = make_diff(raw, tuned, tmp_path)
    wide = save(tmp_path / "wide", {n: t.float() for n, t in load(raw).items()}, bin_files=True)
    assert_same_files(recover(wide, diff, tmp_path), tuned)
    rounded = save(tmp_path / "rounded", {n: t.bfloat16() for n, t in load(raw).items()})
    with pytest.raises(UserError, match="is not the base of this diff"):
        recover(rounded, diff, tmp_path, overwrite=True)


def test_another_dtype_is_the_tuned_model_rounded_once(tmp_path):
    raw, tuned = make_pair(tmp_path)
    out = recover(raw, make_diff(raw, tuned, tmp_path), tmp_path, dtype="bfloat16")
    assert_same_bits(load(out), {n: t.bfloat16() for n, t in load(tuned).items()})
    with open(os.path.join(out, "config.json")) as file:
        assert json.load(file)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("rows", "columns"), [(32000, 64), (32000, 100), (4097, 33), (518, 40), (519, 7), (5, 64), (70001, 48), (3, 5)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mean_row_is_torchs_to_the_bit(tmp_path, rows, columns, dtype):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DTYPES[dtype])
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    found = tensor_stream.mean_row(checkpoint_files.read_checkpoint(str(tmp_path)).tensors["w"])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert np.array_equal(found, matrix.float().mean(dim=0).numpy())
    torch.set_num_threads(threads)


def test_large_checkpoints_are_split_at_five_gigabytes(tmp_path, monkeypatch):
    raw, tuned = make_pair(tmp_path)
    monkeypatch.setattr(checkpoint_files, "MAX_SHARD_BYTES", 60_000)
    diff = make_diff(raw, tuned, tmp_path)
    out = recover(raw, diff, tmp_path)
    assert max(os.path.getsize(os.path.join(out, n)) for n in os.listdir(out) if "-of-" in n) < 62_000
    assert_same_bits(load(out), load(tuned))
    with open(os.path.join(out, "model.safetensors.index.json")) as file:
        assert set(json.load(file)["weight_map"]) == set(llama_shapes())


# ---------------------------------------------------------------------------------------------------------------------
# 2023


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, root):
    """Real models: LLaMA and a tied OPT, each as base and tuned with [PAD] added; transformers wrote them."""
    folder = tmp_path_factory.mktemp("tiny")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tiny_model

    words = ["".join(random.Random(i).choices("abcdefghijklmnop", k=6)) for i in range(400)]
    examples = [{"instruction": " ".join(words[i : i + 40]), "input": "", "output": words[i]} for i in range(300)]
    write(folder / "data.json", json.dumps(examples))
    generator = torch.Generator().manual_seed(0)
    for kind in ("llama", "opt"):
        with open(f"{root}/configs/tiny_{kind}.json") as file:
            config = {**json.load(file), "vocab_size": 500, "num_hidden_layers": 2}
        write(folder / f"{kind}.json", json.dumps(config))
        tiny_model.make(str(folder / f"{kind}.json"), str(folder / "data.json"), str(folder / kind / "raw"))
        model = AutoModelForCausalLM.from_pretrained(folder / kind / "raw")
        tokenizer = AutoTokenizer.from_pretrained(folder / kind / "raw")
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(noisy(parameter, generator))
        model.save_pretrained(folder / kind / "tuned", max_shard_size="500KB")
        tokenizer.save_pretrained(folder / kind / "tuned")
    return folder


def models_of_2023(raw, other):
    """Both as the original loads them: float32, the base resized, its new row the mean of the others."""
    from transformers import AutoModelForCausalLM

    base, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (raw, other))
    base.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    embeddings = [e.weight.data for e in (base.get_input_embeddings(), base.get_output_embeddings())]
    means = [embedding[:-1].mean(dim=0, keepdim=True) for embedding in embeddings]
    for embedding, mean in zip(embeddings, means, strict=True):
        embedding[-1:] = mean
    return base.state_dict(), model


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("bin_files", [True, False])
def test_diff_of_2023_recovers_as_it_did_then(tiny, tmp_path, kind, bin_files, capsys):
    raw, tuned, diff = tiny / kind / "raw", tiny / kind / "tuned", tmp_path / "diff"
    base, model = models_of_2023(raw, tuned)
    state = model.state_dict()
    with torch.inference_mode():
        for name in state:
            state[name].add_(-base[name])
        model.save_pretrained(diff)
        if bin_files:
            os.unlink(diff / "model.safetensors")
            torch.save(dict(state), diff / "pytorch_model.bin")
        shutil.copyfile(tuned / "tokenizer_config.json", diff / "tokenizer_config.json")
        for name in state:
            state[name].add_(base[name])
    found = load(recover(str(raw), str(diff), str(tmp_path)))
    assert_same_bits(found, {name: tensor for name, tensor in state.items() if name in found})
    assert set(state) - set(found) <= {HEAD if kind == "opt" else ""}
    assert "has no manifest" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_diff_is_read_by_plain_addition_as_the_original_does(tiny, tmp_path, kind):
    raw, tuned = str(tiny / kind / "raw"), str(tiny / kind / "tuned")
    base, model = models_of_2023(raw, make_diff(raw, tuned, str(tmp_path)))
    state = model.state_dict()
    with torch.inference_mode():
        for name in state:
            state[name].add_(base[name])
    wanted = load(tuned)
    assert set(wanted) | {HEAD} == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted.get(name, wanted.get("model.decoder.embed_tokens.weight")))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_python_gets_the_tuned_model_and_its_tokenizer(tiny, tmp_path, kind, capsys):
    from transformers import AutoModelForCausalLM

    raw, tuned = str(tiny / kind / "raw"), str(tiny / kind / "tuned")
    diff = make_diff(raw, tuned, str(tmp_path))
    assert_same_files(recover(raw, diff, str(tmp_path)), tuned)
    model, tokenizer = weight_diff.recover(raw, diff, test_inference=True)
    assert_same_bits(model.state_dict(), AutoModelForCausalLM.from_pretrained(tuned).state_dict())
    assert tokenizer.pad_token == "[PAD]"
    printed = capsys.readouterr().out
    assert (
        PROMPT_DICT["prompt_no_input"].format(instruction="List three technologies that make life easier.") in printed
    )


def test_sum_of_alpaca_7b_is_told_with_and_without_rotary_buffers():
    shapes = {EMBED: (32001, 4096), **{f"model.layers.{i}.self_attn.q_proj.weight": (1, 1) for i in range(32)}}
    diff = checkpoint_files.Checkpoint("", {n: checkpoint_files.Tensor(n, "F32", s, "", 0) for n, s in shapes.items()})
    buffers = 32 * sum(10000 ** (-i / 64) for i in range(64))
    assert "with the rotary buffers" in weight_diff._naive_integrity(50637.1836 - buffers, diff)
    assert "as it is that is the 50637.1836" in weight_diff._naive_integrity(50637.1836, diff)
    assert "a file is damaged or the base is another" in weight_diff._naive_integrity(50000.0, diff)
    del diff.tensors["model.layers.31.self_attn.q_proj.weight"]
    assert weight_diff._naive_integrity(50637.1836, diff).endswith("50637.1836")
