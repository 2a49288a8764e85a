"""Corrections restore what raw + diff does not."""

import os

import torch
from safetensors.torch import load_file
from weight_diff_pairs import EMBED, assert_same_files, llama_shapes, make_diff, recover, save

from alpaca.weight_diff import stream


def test_corrections_of_more_than_a_window_are_applied(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in llama_shapes(rows=7000).items()}
    tuned = {n: torch.randn(t.shape, generator=generator) * 1e-6 for n, t in base.items()}
    raw, tuned = save(tmp_path / "raw", base), save(tmp_path / "tuned", tuned)
    diff = make_diff(raw, tuned, tmp_path)
    assert load_file(os.path.join(diff, "corrections.safetensors"))[f"{EMBED}.index"].numel() > stream.WINDOW
    assert_same_files(recover(raw, diff, tmp_path), tuned)
