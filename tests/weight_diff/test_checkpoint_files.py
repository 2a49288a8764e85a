"""Checkpoint files of every kind are read and written, and damaged ones are named."""

import json
import os
import shutil

import pytest
import torch
from weight_diff_pairs import (
    DTYPES,
    EMBED,
    HEAD,
    assert_same_bits,
    edited,
    llama_shapes,
    load,
    make_diff,
    make_pair,
    recover,
    refused,
    resave,
    write,
)

import weight_diff
from alpaca.weight_diff import checkpoint_files


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
        (
            lambda folder: os.unlink(os.path.join(folder, "corrections.safetensors")),
            "corrections.safetensors differ",
        ),
        (lambda folder: os.unlink(os.path.join(folder, "weight_diff.json")), "weight_diff.json is missing"),
        (
            lambda folder: write(os.path.join(folder, "tokenizer_config.json"), "{}"),
            "tokenizer_config.json differ",
        ),
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_bin_of_2023_is_read_on_either_side(tmp_path, dtype):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    raw, tuned = make_pair(tmp_path, dtype, dtype, raw={"bin_files": True}, tuned={"bin_files": True, "shards": 2})
    for folder, file in ((raw, "pytorch_model.bin"), (tuned, "pytorch_model-00001-of-00002.bin")):
        path = os.path.join(folder, file)
        torch.save({**torch.load(path), **buffers}, path)
    out = recover(raw, make_diff(raw, tuned, tmp_path), tmp_path)
    assert_same_bits(load(out), {n: t for n, t in load(tuned).items() if n not in buffers})


def test_large_checkpoints_are_split_at_five_gigabytes(tmp_path, monkeypatch):
    raw, tuned = make_pair(tmp_path)
    monkeypatch.setattr(checkpoint_files, "MAX_SHARD_BYTES", 60_000)
    diff = make_diff(raw, tuned, tmp_path)
    out = recover(raw, diff, tmp_path)
    assert max(os.path.getsize(os.path.join(out, n)) for n in os.listdir(out) if "-of-" in n) < 62_000
    assert_same_bits(load(out), load(tuned))
    with open(os.path.join(out, "model.safetensors.index.json")) as file:
        assert set(json.load(file)["weight_map"]) == set(llama_shapes())


def test_written_files_are_readable_like_any_other(pair, tmp_path):
    out = recover(pair[0], pair[2], str(tmp_path))
    write(tmp_path / "any", "")
    usual = os.stat(tmp_path / "any").st_mode
    for folder in (out, pair[2]):
        assert {os.stat(os.path.join(folder, name)).st_mode for name in os.listdir(folder)} == {usual}
