"""Checkpoint files of every kind are read and written, and damaged ones are named."""

import json
import os
import re
import shutil
import struct

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


def f32(*offsets, shape=None, **fields):
    return {"dtype": "F32", "shape": shape or [(offsets[1] - offsets[0]) // 4], "data_offsets": list(offsets), **fields}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"a": f32(0, 16), "b": f32(8, 24)}, "'b' begins at byte 8, where 16 is next"),
        ({"a": f32(0, 8), "b": f32(12, 24)}, "'b' begins at byte 12, where 8 is next"),
        ({"a": f32(4, 24)}, "'a' begins at byte 4, where 0 is next"),
        ({"a": f32(0, 24), "b": f32(0, 24)}, "'b' begins at byte 0, where 24 is next"),
        ({"a": f32(-24, 0, shape=[6]), "b": f32(0, 24)}, r"'a' has \[-24, 0\] where whole numbers are expected"),
        ({"a": f32(24, 0, shape=[6])}, r"'a' has 24 bytes, but the data_offsets \[24, 0\]"),
        ({"a": f32(0, 24, shape=[-2, -3])}, r"'a' has \[-2, -3\] where"),
        ({"a": f32(0, 24, shape=[True, 6])}, r"'a' has \[True, 6\] where"),
        ({"a": f32(0, 24, shape=[6.0])}, r"'a' has \[6.0\] where"),
        ({"a": f32(0, 24, shape=[1 << 62, 6])}, "'a' has the impossible shape"),
        ({"a": f32(0, 24, shape=[7])}, r"'a' has 28 bytes, but the data_offsets \[0, 24\]"),
        ({"a": f32(0, 24, dtype="F33")}, "'a' has the unknown type 'F33'"),
        ({"a": f32(0, 24, stride=1)}, "'a' has other fields than"),
        ({"a": f32(0, 24), "__metadata__": {"step": 1}}, "__metadata__ does not map texts to texts"),
        ('{"a": %s, "a": %s}' % ((json.dumps(f32(0, 24)),) * 2), "JSON, line 1: the key 'a' is there twice"),
        ('{"a":' * 200 + "}" * 200, "not JSON"),
        ('{"a":' * 10**5, "not a JSON object"),
        ('{"a": %s}' % ("[" * 10**5 + "]" * 10**5), "JSON nested more than 100 levels deep"),
        (" " + json.dumps({"a": f32(0, 24)}), "not a JSON object followed by spaces"),
        ({"a": f32(0, 20)}, "is truncated or damaged: "),
        ({"a": f32(0, 28)}, "is truncated or damaged: "),
    ],
)  # fmt: skip
def test_a_header_that_breaks_the_formats_rules_is_refused(tmp_path, header, complaint):
    """The file has all its bytes, but a tensor would be read from another's bytes, from the header's, or not at all."""
    path = tmp_path / "model.safetensors"
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(24))
    assert re.search(complaint, refused(checkpoint_files.read_header, str(path)))


def test_a_tensor_in_two_shards_is_refused(pair, tmp_path):
    def twice(folder):
        shutil.copy(f"{folder}/model-00001-of-00002.safetensors", f"{folder}/model-00002-of-00002.safetensors")

    raw, tuned, _ = edited(pair, tmp_path, 1, twice)
    assert "a checkpoint has a tensor once" in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))


def test_an_index_that_names_another_shard_or_folder_is_refused(pair, tmp_path):
    for file, complaint in (
        ("model-00001-of-00002.safetensors", "lacks"),
        ("../raw/model.safetensors", "expected a file of this folder"),
    ):

        def rename(folder, file=file):
            with open(f"{folder}/model.safetensors.index.json") as index:
                found = json.load(index)
            found["weight_map"][max(found["weight_map"], key=found["weight_map"].get)] = file
            write(f"{folder}/model.safetensors.index.json", json.dumps(found))

        raw, tuned, _ = edited(pair, tmp_path, 1, rename)
        assert complaint in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))
        shutil.rmtree(tmp_path / "edited")


@pytest.mark.parametrize(
    "held",
    [
        [torch.ones(2)],
        torch.ones(2),
        {3: torch.ones(2)},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.eye(2).to_sparse()},
    ],
)
def test_a_bin_file_that_holds_no_state_dict_is_one_line(pair, tmp_path, held):
    def replace(folder):
        os.unlink(os.path.join(folder, "model.safetensors"))
        torch.save(held, os.path.join(folder, "pytorch_model.bin"))

    raw, tuned, _ = edited(pair, tmp_path, 0, replace)
    assert "expected a state dict" in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))
