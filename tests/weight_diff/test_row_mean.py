"""The mean row is torch's to the bit."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weight_diff_pairs import DTYPES

from alpaca.weight_diff import checkpoint_files, row_mean


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(32000, 64), (32000, 100), (4097, 33), (518, 40), (519, 7), (5, 64), (70001, 48), (3, 5), (5000, 34)],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mean_row_is_torchs_to_the_bit(tmp_path, rows, columns, dtype):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DTYPES[dtype])
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    found = row_mean.mean_row(checkpoint_files.read_header(str(tmp_path / "model.safetensors"))[0][0])
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert np.array_equal(found, matrix.float().mean(dim=0).numpy())
    torch.set_num_threads(threads)
