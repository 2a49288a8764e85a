"""Pairs for the tests of weight diffs: noise added in float64, 7B's tensor names, small shapes."""

import filecmp
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import weight_diff
from alpaca.cli import UserError

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


def refused(function, *arguments, **flags) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edited(pair, tmp_path, which: int, change) -> list[str]:
    """The pair's folders, one of them a copy that `change` has changed."""
    folders = list(pair)
    folders[which] = shutil.copytree(pair[which], tmp_path / "edited")
    change(folders[which])
    return [str(folder) for folder in folders]


def resave(folder, change) -> None:
    tensors = load(folder)
    change(tensors)
    for name in os.listdir(folder):
        if ".safetensors" in name or name == "weight_diff.json":
            os.unlink(os.path.join(folder, name))
    save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})


def flip(path, bit) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def whole_pair(folder) -> tuple[str, str, str]:
    """A float16 base, a float32 model tuned from it in two shards, and their diff."""
    raw, tuned = make_pair(folder, "float16", tuned={"shards": 2})
    return raw, tuned, make_diff(raw, tuned, folder)
