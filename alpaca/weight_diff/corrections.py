"""Corrections: the elements that raw + diff doesn't give back to the bit, their positions and right values.

They stand in a safetensors file of their own: `NAME.index`, uint32 positions in the flattened tensor in rising order,
and `NAME.value`, elements of the tuned model's type.
"""

import os
import threading

import numpy as np

from alpaca.weight_diff.checkpoint_files import STORED, Output, Tensor, read_header
from alpaca.weight_diff.stream import WINDOW, Sink, Source


class CorrectionSpool:
    """Takes corrections in chunks from all threads until it is known how many there are."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._lock = threading.Lock()

    def append(self, data: bytes) -> int:
        """Writes a chunk; returns where it begins."""
        with self._lock:
            begin = os.lseek(self._descriptor, 0, os.SEEK_END)
            while data:
                data = data[os.write(self._descriptor, data) :]
        return begin

    def gather(self, path: str, chunks: dict[str, list[list[int]]], tensors: dict[str, Tensor]) -> None:
        """Writes the corrections file, safetensors with `NAME.index` and `NAME.value`.

        Args:
            path: the file.
            chunks: tensor name -> (where, how many) of each of its chunks.
            tensors: what is corrected.
        """
        specs = {}
        for name, places in chunks.items():
            count = sum(count for _, count in places)
            specs |= {f"{name}.index": ("U32", (count,)), f"{name}.value": (tensors[name].dtype, (count,))}
        output = Output()
        output.add_file(path, specs, {"format": "pt"})
        output.create()
        for name, places in chunks.items():
            size = STORED[tensors[name].dtype].itemsize
            with Sink(output.tensors[f"{name}.index"]) as index, Sink(output.tensors[f"{name}.value"]) as value:
                for begin, count in places:
                    chunk = np.frombuffer(os.pread(self._descriptor, count * (4 + size), begin), np.uint8)
                    index.write(chunk[: count * 4])
                    value.write(chunk[count * 4 :])
        os.close(self._descriptor)


class CorrectionWriter:
    """Gathers one tensor's corrections; `chunks` are (where in the spool, how many) in the tensor's order."""

    def __init__(self, spool: CorrectionSpool):
        self.chunks: list[tuple[int, int]] = []
        self._spool = spool
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        self._waiting.append((positions.astype("<u4"), values))
        self._count += len(values)
        if self._count >= WINDOW:
            self.flush()

    def flush(self) -> None:
        if self._count:
            positions, values = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self.chunks.append((self._spool.append(positions.tobytes() + values.tobytes()), self._count))
        self._waiting, self._count = [], 0


class CorrectionReader:
    """One tensor's corrections, applied front to back with at most a window of them in memory.

    Args:
        file: the corrections file's tensors, None for a diff that has no such file and isn't exact.
        name: the tensor.
    """

    def __init__(self, file: dict[str, Tensor] | None, name: str):
        self.exact = file is not None
        self._parts = (
            [file[f"{name}.{part}"] for part in ("index", "value")] if file and f"{name}.index" in file else []
        )
        self._left = self._parts[0].numel if self._parts else 0
        self._positions, self._values = np.empty(0, np.int64), np.empty(0)

    def apply(self, start: int, stop: int, window: np.ndarray) -> None:
        """Puts the right values into `window`, the tensor's elements [start, stop)."""
        while len(self._positions) or self._left:
            if not len(self._positions):
                self._load()
            count = int(np.searchsorted(self._positions, stop))
            window[self._positions[:count] - start] = self._values[:count]
            self._positions, self._values = self._positions[count:], self._values[count:]
            if len(self._positions):
                return

    def _load(self) -> None:
        begin = self._parts[0].numel - self._left
        count = min(WINDOW, self._left)
        loaded = []
        for part in self._parts:
            with Source(part) as source:
                loaded.append(source.peek(begin, begin + count).copy())
        self._positions, self._values = loaded[0].astype(np.int64), loaded[1]
        self._left -= count


def read_corrections(path: str) -> dict[str, Tensor]:
    """The corrections file's tensors by name."""
    return {tensor.name: tensor for tensor in read_header(path)[0]}
