"""weight_diff.py on real checkpoint files: pairs whose noise was added in float64, 7B's tensor names, small shapes."""

import errno
import filecmp
import json
import math
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

import weight_diff
from alpaca.cli import UserError
from alpaca.prompts import PROMPT_DICT
from alpaca.weight_diff import checkpoint_files, row_mean, stream

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


@pytest.mark.parametrize("tied", ["raw", "tuned"])
def test_embeddings_may_be_tied_in_one_of_the_two(tmp_path, tied):
    folders = dict(zip(("raw", "tuned"), make_pair(tmp_path), strict=True))
    resave(folders[tied], lambda tensors: tensors.pop(HEAD))
    config = os.path.join(folders[tied], "config.json")
    with open(config) as file:
        settings = json.load(file)
    write(config, json.dumps({**settings, "tie_word_embeddings": True}))
    diff = make_diff(*folders.values(), tmp_path)
    assert_same_files(recover(folders["raw"], diff, tmp_path), folders["tuned"])


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
    assert load_file(os.path.join(diff, "corrections.safetensors"))[f"{EMBED}.index"].numel() > stream.WINDOW
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
    ("rows", "columns"),
    [(32000, 64), (32000, 100), (4097, 33), (518, 40), (519, 7), (5, 64), (70001, 48), (3, 5), (5000, 34)],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mean_row_is_torchs_to_the_bit(tmp_path, rows, columns, dtype):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DTYPES[dtype])
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    found = row_mean.mean_row(checkpoint_files.read_checkpoint(str(tmp_path)).tensors["w"])
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

    from demo import tiny_model

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


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Raw, tuned and diff, not to be changed."""
    folder = str(tmp_path_factory.mktemp("pair"))
    raw, tuned = make_pair(folder, "float16", tuned={"shards": 2})
    return raw, tuned, make_diff(raw, tuned, folder)


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


def test_wrong_shapes_and_names_are_refused_before_anything_is_written(pair, tmp_path):
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    _, tuned, diff = pair
    wrong = {
        "more rows": ({n: torch.ones(s) for n, s in llama_shapes(rows=43).items()}, "already has 2 added rows"),
        "13B": (
            {n: torch.ones(s) for n, s in llama_shapes(rows=40, hidden=64, layers=3).items()},
            "hidden size 64, 3 layers, 40 rows.* needs a model of hidden size 48, 2 layers, 41 rows",
        ),
        "other name": (
            {n.replace("q_proj", "query"): torch.ones(s) for n, s in llama_shapes().items()},
            "lacks model.layers.0.self_attn.query.weight",
        ),
        "grown elsewhere": (
            {n: torch.ones((s[0] - 1, *s[1:]) if n == q_proj else s) for n, s in llama_shapes().items()},
            re.escape(f"{q_proj} is [47, 48]") + ".*" + re.escape("[48, 48]"),
        ),
    }
    for name, (tensors, pattern) in wrong.items():
        raw = save(tmp_path / name, tensors)
        assert re.search(pattern, refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))), name
        assert re.search(pattern, refused(weight_diff.recover, raw, diff, str(tmp_path / "out"))), name
    assert f"{HEAD} is [43, 48]" in refused(weight_diff.recover, str(tmp_path / "more rows"), diff, str(tmp_path / "o"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_llama_sizes_are_told_by_shape():
    for hidden, layers, name in ((4096, 32, "LLaMA-7B"), (5120, 40, "LLaMA-13B"), (64, 2, "a model")):
        shapes = {EMBED: (9, hidden), **{f"model.layers.{i}.input_layernorm.weight": (hidden,) for i in range(layers)}}
        tensors = {n: checkpoint_files.Tensor(n, "F32", s, "", 0) for n, s in shapes.items()}
        found = checkpoint_files.Checkpoint("", tensors).looks_like
        assert found == f"{name} of hidden size {hidden}, {layers} layers, 9 rows"


def test_damaged_and_missing_files_are_named(pair, tmp_path):
    shard = "model-00002-of-00002.safetensors"

    def truncate(name, to):
        return lambda folder: os.truncate(os.path.join(folder, name), to)

    def pointer(folder):
        write(os.path.join(folder, shard), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    changes = [
        (1, lambda folder: os.unlink(os.path.join(folder, shard)), f"{shard} is missing"),
        (1, pointer, f"{shard} is a Git LFS pointer"),
        (1, truncate(shard, 5000), f"{shard} is truncated"),
        (1, truncate(shard, 4), f"{shard} is truncated"),
        (
            1,
            lambda folder: write(f"{folder}/model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
            "no weight_map",
        ),
        (0, truncate("model.safetensors", 5000), "model.safetensors is truncated"),
        (0, lambda folder: os.unlink(os.path.join(folder, "model.safetensors")), "holds no weights"),
        (0, lambda folder: os.unlink(os.path.join(folder, "config.json")), "has no config.json"),
        (1, lambda folder: resave(folder, lambda tensors: tensors.pop(EMBED)), f"lacks {EMBED}"),
        (0, lambda folder: resave(folder, lambda t: t.update({EMBED: t[EMBED].int()})), f"{EMBED} is I32"),
    ]
    for which, change, message in changes:
        raw, tuned, _ = edited(pair, tmp_path, which, change)
        assert message in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))
        shutil.rmtree(tmp_path / "edited")
    for change, message in (
        (lambda folder: resave(folder, lambda tensors: tensors.pop(HEAD)), f"lacks {HEAD}"),
        (lambda folder: os.unlink(os.path.join(folder, "corrections.safetensors")), "corrections.safetensors not as"),
        (lambda folder: os.unlink(os.path.join(folder, "weight_diff.json")), "weight_diff.json is missing"),
        (lambda folder: write(os.path.join(folder, "tokenizer_config.json"), "{}"), "tokenizer_config.json not as"),
    ):
        raw, _, diff = edited(pair, tmp_path, 2, change)
        assert message in refused(weight_diff.recover, raw, diff, str(tmp_path / "out"))
        shutil.rmtree(tmp_path / "edited")
    assert os.listdir(tmp_path) == []


def test_a_pickle_in_a_bin_file_is_not_executed(pair, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    def arm(folder):
        os.unlink(os.path.join(folder, "model.safetensors"))
        torch.save({EMBED: Bomb()}, os.path.join(folder, "pytorch_model.bin"))

    raw, tuned, _ = edited(pair, tmp_path, 0, arm)
    assert "pytorch_model.bin is truncated, damaged or holds more than tensors" in refused(
        weight_diff.make_diff, raw, tuned, str(tmp_path / "out")
    )
    with open(os.path.join(raw, "pytorch_model.bin"), "r+b") as file:
        file.truncate(400)
    assert "pytorch_model.bin is truncated" in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["edited"]


def test_another_base_is_told_before_gigabytes_are_read(pair, tmp_path):
    diff = pair[2]

    def convert(tensors):
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name] = tensors[name].flip(0)

    other, _, _ = edited(pair, tmp_path, 0, lambda folder: resave(folder, convert))
    message = refused(weight_diff.recover, other, diff, str(tmp_path / "out"))
    assert "4 of 19 tensors differ" in message
    assert "only q_proj and k_proj differ" in message
    assert os.listdir(tmp_path) == ["edited"]
    assert "is a weight diff" in refused(weight_diff.recover, diff, diff, str(tmp_path / "out"))
    assert "is a model, not a diff" in refused(weight_diff.recover, pair[0], pair[1], str(tmp_path / "out"))


def test_inputs_and_existing_folders_are_safe(pair, tmp_path):
    raw, tuned, diff = pair
    assert "an input of this command" in refused(weight_diff.recover, raw, diff, raw, overwrite=True)
    assert "an input of this command" in refused(
        weight_diff.make_diff, raw, tuned, os.path.dirname(raw), overwrite=True
    )
    out = tmp_path / "out"
    out.mkdir()
    write(out / "mine", "precious")
    assert "pass --overwrite" in refused(weight_diff.recover, raw, diff, str(out))
    assert os.listdir(out) == ["mine"]
    (tmp_path / "link").symlink_to(raw)
    assert "an input of this command" in refused(weight_diff.recover, raw, diff, str(tmp_path / "link"), overwrite=True)
    weight_diff.recover(raw, diff, str(out), test_inference=False, overwrite=True)
    assert_same_files(out, tuned)
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_an_empty_output_name_is_not_the_working_folder(pair, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    write(tmp_path / "mine" / "file", "precious")
    for overwrite in (False, True):
        assert "name is empty" in refused(weight_diff.make_diff, *pair[:2], "", overwrite=overwrite)
    assert os.listdir(tmp_path / "mine") == ["file"]


def test_a_folder_that_came_up_during_the_run_is_not_replaced(pair, tmp_path, monkeypatch):
    out, publish = tmp_path / "out", weight_diff.PartialFolder.publish

    def late(work):
        out.mkdir()
        write(out / "mine", "precious")
        publish(work)

    monkeypatch.setattr(weight_diff.PartialFolder, "publish", late)
    with pytest.raises(FileExistsError, match="move it away"):
        weight_diff.recover(pair[0], pair[2], str(out), test_inference=False)
    assert os.listdir(out) == ["mine"]
    monkeypatch.undo()
    shutil.rmtree(out)
    weight_diff.recover(pair[0], pair[2], str(out), test_inference=False, resume=True)
    assert_same_files(out, pair[1])


def test_too_small_a_disk_is_told_before_the_start(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert "GB are free on its disk" in refused(weight_diff.recover, pair[0], pair[2], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_disk_space_is_taken_at_the_start_where_the_file_system_can(pair, tmp_path, monkeypatch, reason):
    def fallocate(descriptor, offset, size):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    if reason == errno.EOPNOTSUPP:
        assert_same_files(recover(pair[0], pair[2], str(tmp_path)), pair[1])
    else:
        assert "is full; make room" in refused(weight_diff.recover, pair[0], pair[2], str(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["out.partial"]


def test_a_disk_that_was_full_at_the_start_is_no_hindrance_once_there_is_room(pair, tmp_path, monkeypatch):
    calls = []

    def fallocate(descriptor, offset, size):
        calls.append(size)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    out = str(tmp_path / "out")
    assert "run again with --resume" in refused(weight_diff.recover, pair[0], pair[2], out)
    weight_diff.recover(pair[0], pair[2], out, test_inference=False, resume=True)
    assert_same_files(out, pair[1])


def test_written_files_are_readable_like_any_other(pair, tmp_path):
    out = recover(pair[0], pair[2], str(tmp_path))
    write(tmp_path / "any", "")
    usual = os.stat(tmp_path / "any").st_mode
    for folder in (out, pair[2]):
        assert {os.stat(os.path.join(folder, name)).st_mode for name in os.listdir(folder)} == {usual}


def flip(path, bit) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_every_one_of_50_flipped_bits_is_found(pair, tmp_path):
    raw, diff = (shutil.copytree(folder, tmp_path / str(i)) for i, folder in enumerate((pair[0], pair[2])))
    places = [(raw, "model.safetensors")] * 15 + [(diff, n) for n in sorted(os.listdir(diff))] * 5
    generator = random.Random(0)
    for folder, name in places[:50]:
        path = os.path.join(folder, name)
        # What of a base isn't tensors may differ: it may be sharded otherwise.
        start = checkpoint_files.read_header(path)[0][0].offset if folder == raw else 0
        bit = generator.randrange(8 * start, 8 * os.path.getsize(path))
        flip(path, bit)
        message = refused(weight_diff.recover, str(raw), str(diff), str(tmp_path / "out"), test_inference=False)
        assert re.search(r"weight|config|model|corrections|chat_template", message), (name, bit)
        if folder == diff:
            assert refused(weight_diff.verify, str(diff))
        else:
            assert refused(weight_diff.verify, str(raw), str(pair[2]))
        flip(path, bit)
    assert len(places) >= 50
    assert not [n for n in os.listdir(tmp_path) if n.startswith("out")]
    assert_same_files(recover(str(raw), str(diff), str(tmp_path)), pair[1])


def test_a_flipped_bit_that_does_not_change_the_sum_is_found_too(tmp_path):
    raw, tuned = make_pair(tmp_path, shapes=llama_shapes(rows=400))
    diff = make_diff(raw, tuned, str(tmp_path))
    tensor = checkpoint_files.read_checkpoint(raw).tensors[EMBED]
    probed = {(tensor.numel - 256) * spot // 7 + i for spot in range(8) for i in range(256)}
    corrected = load_file(os.path.join(diff, "corrections.safetensors"))[f"{EMBED}.index"].tolist()
    place = next(i for i in corrected if i not in probed and i < tensor.numel)
    flip(tensor.path, 8 * (tensor.offset + 4 * place))
    assert f"{EMBED} in {tensor.path} is not what" in refused(weight_diff.recover, raw, diff, str(tmp_path / "out"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


def test_words_that_changed_places_are_found(pair, tmp_path):
    """The inputs' checksums are blind to them; the sha256 of what comes out isn't."""
    diff = shutil.copytree(pair[2], tmp_path / "diff")
    tensor = checkpoint_files.read_checkpoint(str(diff)).tensors[EMBED]
    with open(tensor.path, "r+b") as file:
        file.seek(tensor.offset)
        words = file.read(16)
        assert words[:8] != words[8:]
        file.seek(tensor.offset)
        file.write(words[8:] + words[:8])
    message = refused(weight_diff.recover, pair[0], str(diff), str(tmp_path / "out"), test_inference=False)
    assert message.startswith(EMBED)
    assert "raw + diff isn't the tuned tensor" in message
    assert EMBED in refused(weight_diff.verify, str(diff))
    assert os.listdir(tmp_path) == ["diff"]


def test_verify_and_info_tell_what_a_folder_is(pair, tmp_path, capsys):
    raw, tuned, diff = pair
    out = recover(raw, diff, str(tmp_path))
    for path, against, what in (
        (diff, None, "the diff"),
        (out, None, "the tuned model"),
        (raw, diff, "the base of the diff"),
        (tuned, diff, "the tuned model"),
    ):
        capsys.readouterr()
        weight_diff.verify(path, against)
        assert f"{what}, 19 tensors, each as the manifest says" in capsys.readouterr().out
    assert "has no manifest" in refused(weight_diff.verify, raw)
    for path in (raw, diff, out):
        assert f"{out} is a recovered model, not a diff" in refused(weight_diff.verify, path, out)
    weight_diff.info(out)
    assert capsys.readouterr().out.endswith("a recovered model, not a diff\n")
    weight_diff.info(diff)
    printed = capsys.readouterr().out
    assert "base: a model of hidden size 48, 2 layers, 40 rows, fingerprint " in printed
    assert f"adds: 1 row(s) to {HEAD}, 1 row(s) to {EMBED}" in printed
    assert re.search(r"corrections: [\d,]+ elements", printed)
    resave(out, lambda tensors: tensors[EMBED].mul_(2))
    assert f"1 of 19 tensors and files are not as the manifest says: {EMBED}" in refused(weight_diff.verify, out, diff)


def test_a_diff_says_that_it_is_no_model(pair):
    with open(os.path.join(pair[2], "config.json")) as file:
        config = json.load(file)
    assert config["alpaca_weight_diff"] is True
    assert config["architectures"] == []


def test_model_that_does_not_fit_in_memory_is_not_asked(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weight_diff, "host_memory", lambda: 1000)
    weight_diff.recover(pair[0], pair[2], str(tmp_path / "out"))
    assert "no test inference: the model takes" in capsys.readouterr().out


def test_a_device_that_is_not_there_costs_no_recovered_model(tiny, tmp_path, capsys):
    raw, tuned = str(tiny / "llama" / "raw"), str(tiny / "llama" / "tuned")
    weight_diff.recover(raw, make_diff(raw, tuned, str(tmp_path)), str(tmp_path / "out"), device="cuda:99")
    assert "no test inference: " in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions and memory, in processes of their own

KILLED = """
import os, signal, sys, weight_diff
from alpaca.weight_diff import stream
moment, command, *folders = sys.argv[1:]
moments = iter(range(int(moment), -1, -1))
def counted(function):
    def call(*args, **kwargs):
        if next(moments) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
stream.WINDOW = 256
stream.Progress.add = counted(stream.Progress.add)
os.rename = counted(os.rename)
os.unlink = counted(os.unlink)
weight_diff.write_text = counted(weight_diff.write_text)
getattr(weight_diff, command)(*folders, **({"test_inference": False} if command == "recover" else {}))
"""


@pytest.mark.parametrize("command", ["make_diff", "recover"])
def test_killed_at_any_of_20_moments_a_run_resumes_to_the_same_folder(pair, tmp_path, command, root):
    raw, tuned, diff = pair
    inputs, wanted = (
        ((raw, tuned), diff) if command == "make_diff" else ((raw, diff), recover(raw, diff, str(tmp_path)))
    )
    flags = {} if command == "make_diff" else {"test_inference": False}
    target = str(tmp_path / "killed")
    windows = sum(math.ceil(t.numel() / 256) for t in load(tuned).values())
    for moment in [*range(0, windows, windows // 7), windows + 1, windows + 3, windows + 5]:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(moment), command, *inputs, target], capture_output=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not os.path.exists(target)
        partial = os.listdir(target + ".partial")
        weights = [n for n in partial if n.endswith(".safetensors") and n != "corrections.safetensors"]
        assert moment >= windows or (not weights and "config.json" not in partial)
        getattr(weight_diff, command)(*inputs, target, resume=True, **flags)
        assert_same_files(target, wanted)
        assert sorted(os.listdir(target)) == sorted(os.listdir(wanted))
        assert not os.path.exists(target + ".partial")
        shutil.rmtree(target)


def test_resume_takes_up_what_is_done_and_refuses_other_inputs(pair, tmp_path, root):
    raw, _, diff = pair
    target = str(tmp_path / "out")
    subprocess.run([sys.executable, "-c", KILLED, "150", "recover", raw, diff, target], capture_output=True)
    with open(os.path.join(target + ".partial", "journal.jsonl")) as journal:
        assert len(journal.readlines()) > 1
    with open(os.path.join(target + ".partial", "journal.jsonl"), "a") as journal:
        journal.write('{"name": "half a li')
    assert "begun with other files or flags" in refused(
        weight_diff.recover, raw, diff, target, resume=True, dtype="float16"
    )
    weight_diff.recover(raw, diff, target, resume=True, test_inference=False)
    assert_same_files(target, pair[1])
    with open(os.path.join(target, "weight_diff.json")) as manifest:
        assert len(json.load(manifest)["tensors"]) == 19


MEASURED = """
import sys, weight_diff
getattr(weight_diff, sys.argv[1])(*sys.argv[2:], **({"test_inference": False} if sys.argv[1] == "recover" else {}))
print("torch" in sys.modules, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def measured(*arguments) -> tuple[bool, float]:
    """Whether torch was loaded, and the peak resident memory in MB, of a process that runs one command."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    torch_loaded, peak = done.stdout.split("\n")[-2].split()
    assert re.search(r"\[\d\d:\d\d<.*B/s\]", done.stderr)  # progress: time left and bytes a second
    return torch_loaded == "True", int(peak) / 1024


def test_memory_is_bounded_and_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for hidden in (256, 640):
        folder = tmp_path / str(hidden)
        shapes = llama_shapes(rows=8000, hidden=hidden, inner=4 * hidden)
        raw, tuned = make_pair(folder, shapes=shapes)
        for arguments in (
            ("make_diff", raw, tuned, str(folder / "diff")),
            ("recover", raw, str(folder / "diff"), str(folder / "out")),
        ):
            torch_loaded, peak = measured(*arguments)
            assert not torch_loaded
            peaks.append(peak)
        assert os.path.getsize(folder / "out" / "model.safetensors") > hidden * 70_000
        if hidden == 256:
            bins = save(folder / "bin", load(raw), bin_files=True)
            torch_loaded, peak = measured("recover", bins, str(folder / "diff"), str(folder / "from_bin"))
            assert torch_loaded
            # A build for GPUs takes 500 MB for its import alone, one for CPUs 220.
            command = [sys.executable, "-c", "import sys, torch\n" + MEASURED.split("\n")[-2]]
            alone = subprocess.check_output(command, text=True)
            assert peak < int(alone.split()[1]) / 1024 + 100
            assert_same_files(folder / "from_bin", tuned)
        shutil.rmtree(folder)
    assert max(peaks) < 100
    assert abs(max(peaks[2:]) - max(peaks[:2])) < 10


def test_command_line_takes_the_originals_flags_and_refuses_in_one_line(pair, tmp_path, root):
    raw, _, diff = pair
    script = [sys.executable, f"{root}/weight_diff.py"]
    flags = ["--path_raw", raw, "--path_diff", diff, "--path_tuned", str(tmp_path / "out")]
    old = ["--device", "cpu", "--test_inference", "False", "--check_integrity_naively", "False"]
    done = subprocess.run([*script, "recover", *flags, *old], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'out'}: 19 tensors recovered, each one verified\n"
    again = subprocess.run([*script, "recover", *flags], capture_output=True, text=True)
    assert again.returncode == 2
    assert re.fullmatch(r"error: .* exists; .*\n", again.stderr)
    shown = subprocess.run([*script, "make_diff", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "PATH_TUNED" in shown.stdout + shown.stderr
