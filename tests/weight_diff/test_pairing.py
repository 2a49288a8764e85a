"""Only what belongs together is paired."""

import builtins
import json
import os
import re
import shutil

import pytest
import torch
from weight_diff_pairs import (
    HEAD,
    assert_same_files,
    edited,
    flip,
    llama_shapes,
    load,
    make_diff,
    make_pair,
    recover,
    refused,
    resave,
    save,
    write,
)

import weight_diff
from alpaca.cli import UserError


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


def test_same_base_in_another_type_is_accepted_and_a_rounded_one_refused(tmp_path):
    raw, tuned = make_pair(tmp_path, "float16", "float32")
    diff = make_diff(raw, tuned, tmp_path)
    wide = save(tmp_path / "wide", {n: t.float() for n, t in load(raw).items()}, bin_files=True)
    assert_same_files(recover(wide, diff, tmp_path), tuned)
    rounded = save(tmp_path / "rounded", {n: t.bfloat16() for n, t in load(raw).items()})
    with pytest.raises(UserError, match="is not the base of this diff"):
        recover(rounded, diff, tmp_path, overwrite=True)


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


@pytest.mark.parametrize("command", ["make_diff", "recover", "verify"])
def test_each_folders_config_is_read_once(pair, tmp_path, monkeypatch, command):
    raw, tuned, diff = pair
    read, opened = builtins.open, []
    monkeypatch.setattr(
        builtins, "open", lambda path, *args, **kwargs: opened.append(str(path)) or read(path, *args, **kwargs)
    )
    if command == "make_diff":
        weight_diff.make_diff(raw, tuned, str(tmp_path / "out"))
        folders = [raw, tuned]
    elif command == "recover":
        unmarked = shutil.copytree(diff, tmp_path / "diff")
        for name in ("weight_diff.json", "corrections.safetensors"):
            os.unlink(unmarked / name)
        opened.clear()
        weight_diff.recover(raw, str(unmarked), str(tmp_path / "out"), test_inference=False)
        folders = [raw, str(unmarked)]
    else:
        weight_diff.verify(tuned, diff)
        folders = [tuned]
    for folder in folders:
        assert opened.count(os.path.join(folder, "config.json")) == 1


def test_a_damaged_base_is_still_known_as_the_base(pair, tmp_path):
    raw, _, diff = pair
    broken = shutil.copytree(raw, tmp_path / "raw")
    flip(broken / "model.safetensors", 8 * (os.path.getsize(broken / "model.safetensors") - 1))
    message = refused(weight_diff.verify, str(broken), diff)
    assert re.search(r": 1 of 19 tensors and files differ from the manifest: \S+$", message)
