"""The manifest finds every damage."""

import contextlib
import json
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_diff_pairs import (
    EMBED,
    assert_same_files,
    flip,
    llama_shapes,
    make_diff,
    make_pair,
    recover,
    refused,
    write,
)

import weight_diff
from alpaca.cli import UserError
from alpaca.weight_diff import checkpoint_files, manifest


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


def test_a_diff_says_that_it_is_no_model(pair):
    with open(os.path.join(pair[2], "config.json")) as file:
        config = json.load(file)
    assert config["alpaca_weight_diff"] is True
    assert config["architectures"] == []


def paths(value, path=()):
    """The way to every value in a nest of dicts; of tensors and files the first stands for all."""
    for name in list(value)[:1] if path[-1:] in (("tensors",), ("files",), ("headers",)) else value:
        yield (*path, name)
        if isinstance(value[name], dict):
            yield from paths(value[name], (*path, name))


def test_a_manifest_that_was_edited_and_hashed_again_never_ends_in_a_traceback(pair, tmp_path):
    """Each value is removed, or has another kind put in its place, in a diff's manifest and in a recovered model's."""
    recovered = recover(pair[0], pair[2], str(tmp_path))
    tried = 0
    for folder in (shutil.copytree(pair[2], tmp_path / "diff"), recovered):
        with open(f"{folder}/weight_diff.json") as file:
            text = file.read()
        ways = [way for way in paths(json.loads(text)) if way != ("manifest_sha256",)]
        for number, way in enumerate(ways):
            for value in (None, ["removed", 7, "x", [], {}, [None]][number % 6]):
                edited = json.loads(text)
                at = edited
                for name in way[:-1]:
                    at = at[name]
                at.pop(way[-1]) if value == "removed" else at.update({way[-1]: value})
                edited["manifest_sha256"] = manifest._manifest_sha256(edited)
                write(f"{folder}/weight_diff.json", json.dumps(edited))
                for command, arguments in (
                    (weight_diff.info, (folder,)),
                    (weight_diff.verify, (folder,)),
                    (weight_diff.recover, (pair[0], folder, str(tmp_path / "new"), "cpu", False, True, "float16")),
                ):
                    with contextlib.suppress(UserError):
                        command(*map(str, arguments[:3]), *arguments[3:])
                shutil.rmtree(tmp_path / "new", ignore_errors=True)
                tried += 1
    assert tried > 60
    assert sorted(os.listdir(tmp_path)) == ["diff", "out"]


@pytest.mark.parametrize("damage", ["unsorted", "beyond the end", "longer values", "no values", "other type"])
def test_corrections_that_do_not_fit_are_refused_in_one_line(pair, tmp_path, damage):
    """With a manifest that vouches for them; what they are for is checked before it is used."""
    diff = shutil.copytree(pair[2], tmp_path / "diff")
    corrections = load_file(diff / "corrections.safetensors")
    index = corrections[f"{EMBED}.index"]
    if damage == "unsorted":
        index[:] = torch.tensor(index.tolist()[::-1])
    elif damage == "beyond the end":
        index[-1] = 2**32 - 1
    elif damage == "longer values":
        corrections[f"{EMBED}.value"] = torch.zeros(len(index) + 1)
    elif damage == "no values":
        del corrections[f"{EMBED}.value"]
    else:
        corrections[f"{EMBED}.index"] = index.float()
    save_file(corrections, diff / "corrections.safetensors")
    with open(diff / "weight_diff.json") as file:
        found = json.load(file)
    found["files"]["corrections.safetensors"] = manifest._file_sha256(str(diff / "corrections.safetensors"))
    found["manifest_sha256"] = manifest._manifest_sha256(found)
    write(diff / "weight_diff.json", json.dumps(found))
    message = refused(weight_diff.recover, pair[0], str(diff), str(tmp_path / "out"), test_inference=False)
    assert EMBED in message
    assert os.listdir(tmp_path) == ["diff"]
