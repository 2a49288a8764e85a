"""The manifest finds every damage."""

import json
import os
import random
import re
import shutil

from safetensors.torch import load_file
from weight_diff_pairs import (
    EMBED,
    assert_same_files,
    flip,
    llama_shapes,
    make_diff,
    make_pair,
    recover,
    refused,
)

import weight_diff
from alpaca.weight_diff import checkpoint_files


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
