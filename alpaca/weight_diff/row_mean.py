"""What an added row of the vocabulary is in the base: the mean of its rows, to the last bit as torch computes it."""

import numpy as np

from alpaca.weight_diff.checkpoint_files import Tensor
from alpaca.weight_diff.stream import WINDOW, Source, as_float32


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of a matrix's rows, to the last bit what torch's `mean(dim=0)` gives for it as float32 on a CPU.

    torch adds the rows in a cascade of four float32 sums (aten/src/ATen/native/cpu/SumKernel.cpp) and divides by their
    number. Columns left over from blocks of 32 (of 4 where there are fewer than 8 columns) are added in four cascades
    of every fourth row each. Neither threads nor AVX2 or AVX-512 change that.

    Args:
        tensor: [rows, columns].

    Returns:
        float32 [columns].
    """
    rows, columns = tensor.shape
    blocks, fours = columns - columns % (32 if columns >= 8 else 4), rows - rows % 4
    whole = _Cascade(rows, blocks)
    strands = [_Cascade(fours // 4, columns - blocks) for _ in range(4)]
    step = 4 * whole.step * max(1, WINDOW // columns // (4 * whole.step))
    block, rest = np.empty(step * columns, np.float32), np.empty((0, columns - blocks), np.float32)
    with Source(tensor, step * columns) as source:
        for first in range(0, rows, step):
            stored = source.peek(first * columns, min(rows, first + step) * columns)
            values = as_float32(stored, tensor.dtype, block[: len(stored)]).reshape(-1, columns)
            whole.add(values[:, :blocks])
            if blocks < columns:
                own = values[: fours - first, blocks:]
                for i, strand in enumerate(strands):
                    strand.add(own[i::4])
                rest = values[len(own) :, blocks:].copy()
    left = strands[0].total()
    for part in [*rest, *(strand.total() for strand in strands[1:])]:
        left += part
    return np.concatenate([whole.total(), left]) / np.float32(rows)


class _Cascade:
    """torch's sum: a level takes `step` terms from the one below it before that one's rounding errors grow."""

    def __init__(self, rows: int, columns: int):
        self._power = max(4, (rows - 1).bit_length() // 4)
        self.step = 1 << self._power
        self._levels = np.zeros((4, columns), np.float32)
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        """Adds rows; all calls but the last bring a multiple of `step`."""
        for first in range(0, len(rows), self.step):
            group = rows[first : first + self.step]
            # numpy adds row after row, as torch does, unless there is but one column.
            total = np.add.accumulate(group)[-1] if group.shape[1] == 1 else np.add.reduce(group, axis=0)
            self._levels[0] = total + np.float32(0)
            self._count += len(group)
            full = self._count
            for level in range(1, 4):
                if full % self.step:
                    break
                self._levels[level] += self._levels[level - 1]
                self._levels[level - 1] = 0
                full >>= self._power

    def total(self) -> np.ndarray:
        total = self._levels[0].copy()
        for level in self._levels[1:]:
            total += level
        return total
