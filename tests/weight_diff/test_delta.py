"""The arithmetic of a diff."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alpaca.weight_diff import delta, row_mean
from alpaca.weight_diff.checkpoint_files import read_header
from alpaca.weight_diff.stream import Source, windows


def test_a_projection_tells_a_diff_from_a_twice_subtracted_one_and_from_a_model(tmp_path):
    raw, tuned = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.1, 3.9]])
    files = {"raw": raw, "diff": tuned - raw, "twice": tuned - 2 * raw, "tuned": tuned}
    save_file(files, tmp_path / "a.safetensors")
    tensors = {tensor.name: tensor for tensor in read_header(str(tmp_path / "a.safetensors"))[0]}
    for name, wanted in (("diff", -0.004), ("twice", -1.004), ("tuned", 0.996)):
        assert delta.projection(tensors[name], tensors["raw"]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(655, 100), (1024, 64), (1100, 60)])
def test_rows_that_the_base_lacks_are_its_mean_row(tmp_path, dtype, rows, columns):
    """The base ends inside a window, at its end, and inside the second one."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": matrix}, tmp_path / "a.safetensors")
    [tensor] = read_header(str(tmp_path / "a.safetensors"))[0]
    with Source(tensor) as source:
        base = delta.Base(source, (rows + 3, columns))
        read = np.concatenate([base.read(*window).copy() for window in windows((rows + 3) * columns)])
    assert base.bytes_read == tensor.nbytes
    read = read.reshape(-1, columns)
    assert np.array_equal(read[:rows], matrix.float().numpy())
    assert np.array_equal(read[rows:], np.stack([row_mean.mean_row(tensor)] * 3))
