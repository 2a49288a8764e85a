"""Corrections: the elements that raw + diff doesn't restore to the bit, as positions and right values.

They are in a safetensors file of their own: `NAME.index`, uint32 positions in the flattened tensor in rising order, and
`NAME.value`, elements of the tuned model's type.

Example:
    In float32, raw = 0.75 and tuned = 0.001 give diff = -0.749, and raw + diff = 0.0009999871: the last digits of 0.001
    are lost. If that is element 70,000, `index` has 70000 and `value` has 0.001. `make_diff` finds it in the tensor's
    second window, [65536, 131072), and `recover` writes 0.001 to place 70,000 - 65,536 = 4,464 of that window.
    With weights of deviation 0.02 and changes of 0.001, 1.6 % of the elements need a correction.
"""

import os
import tempfile
import threading

import numpy as np

from alpaca.cli import UserError
from alpaca.weight_diff.checkpoint_files import SAFETENSORS_DTYPES, STORED, Output, Tensor, read_header
from alpaca.weight_diff.stream import WINDOW, Sink, Source

CORRECTIONS = "corrections.safetensors"


class CorrectionSpool:
    """Takes corrections from all threads, in chunks, until it is known how many there are.

    Args:
        folder: Where the spool is. It is a file without a name, which is gone when it is closed.
    """

    def __init__(self, folder: str):
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self._chunks: dict[str, list[tuple[int, int]]] = {}  # tensor name -> (begin, number of corrections)
        self._end = 0

    def __enter__(self) -> "CorrectionSpool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, name: str, positions: np.ndarray, values: np.ndarray) -> None:
        """Appends a chunk of a tensor's corrections; a tensor's chunks come in the tensor's order."""
        data = positions.tobytes() + values.tobytes()
        with self._lock:
            self._chunks.setdefault(name, []).append((self._end, len(positions)))
            self._end += len(data)
            while data:
                data = data[self._file.write(data) :]

    def count(self, name: str) -> int:
        """Counts the corrections of a tensor so far."""
        return sum(count for _, count in self._chunks.get(name, ()))

    def gather(self, folder: str, tensors: dict[str, Tensor]) -> None:
        """Writes the corrections file.

        Args:
            folder: Where to write it.
            tensors: The corrected tensors by name.
        """
        specs = {}
        for name in sorted(self._chunks):
            specs[f"{name}.index"] = ("U32", (self.count(name),))
            specs[f"{name}.value"] = (tensors[name].dtype, (self.count(name),))
        output = Output(folder)
        output.add_file(CORRECTIONS, specs, {"format": "pt"})
        output.create()
        for name, chunks in self._chunks.items():
            size = STORED[tensors[name].dtype].itemsize
            with Sink(output.tensors[f"{name}.index"]) as index, Sink(output.tensors[f"{name}.value"]) as value:
                for begin, count in chunks:
                    chunk = np.frombuffer(os.pread(self._file.fileno(), count * (4 + size), begin), np.uint8)
                    index.write(chunk[: count * 4])
                    value.write(chunk[count * 4 :])


class CorrectionWriter:
    """Collects one tensor's corrections and passes them on to the spool, a window of them at a time."""

    def __init__(self, spool: CorrectionSpool, name: str):
        self._spool, self._name = spool, name
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting_count = 0

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        self._waiting.append((positions.astype("<u4"), values))
        self._waiting_count += len(values)
        if self._waiting_count >= WINDOW:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._spool.append(self._name, *(np.concatenate(parts) for parts in zip(*self._waiting, strict=True)))
        self._waiting, self._waiting_count = [], 0


class CorrectionReader:
    """Applies one tensor's corrections front to back, with at most a window of them in memory.

    Args:
        file: The corrections file's tensors.
        name: The tensor.
    """

    def __init__(self, file: dict[str, Tensor], name: str):
        self._parts = [file[f"{name}.{part}"] for part in ("index", "value")] if f"{name}.index" in file else []
        self._unread = self._parts[0].numel if self._parts else 0
        self._positions, self._values = np.empty(0, np.int64), np.empty(0)
        self._last = -1

    def apply(self, start: int, stop: int, window: np.ndarray) -> None:
        """Writes the right values into `window`, which holds the tensor's elements [start, stop)."""
        while len(self._positions) or self._unread:
            if not len(self._positions):
                self._load()
            count = int(np.searchsorted(self._positions, stop))
            window[self._positions[:count] - start] = self._values[:count]
            self._positions, self._values = self._positions[count:], self._values[count:]
            if len(self._positions):
                return

    def _load(self) -> None:
        begin = self._parts[0].numel - self._unread
        count = min(WINDOW, self._unread)
        loaded = []
        for part in self._parts:
            with Source(part) as source:
                loaded.append(source.read(begin, begin + count).copy())
        self._positions, self._values = loaded[0].astype(np.int64), loaded[1]
        if np.any(np.diff(self._positions, prepend=self._last) <= 0):
            raise UserError(
                f"{self._parts[0].path}: the positions for {self._parts[0].name} don't rise; download it again"
            )
        self._last = int(self._positions[-1])
        self._unread -= count


def read_corrections(folder: str) -> dict[str, Tensor]:
    """Locates the tensors of a diff's corrections file by name.

    Raises:
        UserError: The file is damaged, or its tensors don't come in pairs of positions and values.
    """
    path = os.path.join(folder, CORRECTIONS)
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing; download the diff again")
    found = {tensor.name: tensor for tensor in read_header(path)[0]}
    for name, tensor in found.items():
        stem, _, part = name.rpartition(".")
        twin = found.get(f"{stem}.{'value' if part == 'index' else 'index'}")
        kinds = ("U32",) if part == "index" else SAFETENSORS_DTYPES.values() if part == "value" else ()
        if twin is None or tensor.dtype not in kinds or tensor.shape != (tensor.numel,) or twin.shape != tensor.shape:
            raise UserError(f"{path}: {name} is no list of corrections; download the diff again")
    return found
