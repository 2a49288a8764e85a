"""The arithmetic of a diff: tuned - raw = diff, and raw + diff + corrections = tuned, tensor by tensor.

`subtract_tensor` and `add_tensor` are what `make_diff` and `recover` run for each tensor, on several threads.
"""

import hashlib
from typing import Any

import numpy as np

from alpaca.cli import UserError
from alpaca.weight_diff.checkpoint_files import STORED, Tensor
from alpaca.weight_diff.corrections import CorrectionReader, CorrectionSpool, CorrectionWriter
from alpaca.weight_diff.row_mean import mean_row
from alpaca.weight_diff.stream import (
    WINDOW,
    ByteCount,
    Checksum,
    Sha256AndChecksum,
    Sink,
    Source,
    as_float32,
    converted,
    from_float32,
    windows,
)

_BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


class Base:
    """Reads the base's side of a tensor as float32 windows; rows that the base lacks are the mean of those it has.

    Example:
        The base's embedding is [32000, 4096], the tuned one [32001, 4096]. The base ends at element 131,072,000, where
        a window happens to end too. So the next window, [131072000, 131076096), is the mean row alone. With 100 columns
        the base would end at 3,200,000, inside the window [3145728, 3200100): 54,272 elements are read, and the last
        100 are the mean row.

    Args:
        source: The base's tensor.
        shape: Shape of the other side, the diff or the tuned tensor.
    """

    def __init__(self, source: Source, shape: tuple[int, ...]):
        self._source = source
        self._mean = mean_row(source.tensor) if shape != source.tensor.shape else None
        self._out = np.empty(WINDOW, np.float32)
        self.bytes_read = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads elements [start, stop) as float32, into a buffer that the next call overwrites."""
        end = min(max(start, self._source.tensor.numel), stop)  # of the base's own elements
        out = self._out[: stop - start]
        if end > start:
            stored = self._source.read(start, end)
            self.bytes_read += stored.nbytes
            own = as_float32(stored, self._source.tensor.dtype, out[: end - start])
            if end == stop:
                return own
            out[: end - start] = own
        out[end - start :] = self._mean[np.arange(end, stop) % len(self._mean)]
        return out


def subtract(base: Base, tuned: Source, sink: Sink, corrections: CorrectionWriter, count: ByteCount) -> None:
    """Writes tuned - raw, and a correction for each element that raw + diff doesn't restore to the bit."""
    dtype = tuned.tensor.dtype
    a, b, c = np.empty((3, WINDOW), np.float32)
    stored, scratch = np.empty(WINDOW, STORED[dtype]), np.empty(WINDOW, np.uint32)
    with np.errstate(all="ignore"):
        for start, stop in windows(tuned.tensor.numel):
            n, before = stop - start, base.bytes_read
            raw = base.read(start, stop)
            wanted = tuned.read(start, stop)
            values = as_float32(wanted, dtype, a[:n])
            diff = from_float32(np.subtract(values, raw, out=b[:n]), dtype, stored[:n], scratch[:n])
            sink.write(diff)
            restored = np.add(as_float32(diff, dtype, c[:n]), raw, out=c[:n])
            restored = from_float32(restored, dtype, stored[:n], scratch[:n])
            wrong = np.flatnonzero(restored.view(_BITS[dtype]) != wanted.view(_BITS[dtype]))
            if len(wrong):
                corrections.add(wrong + start, wanted[wrong])
            count.add(base.bytes_read - before + wanted.nbytes)
    corrections.flush()


def add(
    base: Base,
    diff: Source,
    sink: Sink,
    corrections: CorrectionReader | None,
    tuned_dtype: str,
    count: ByteCount,
    times: int = 1,
) -> tuple[str, float]:
    """Writes raw + diff with its corrections.

    Args:
        base: The base's side.
        diff: The diff's tensor.
        sink: Takes the result in its own type; its digest is a sha256.
        corrections: This tensor's; None for a diff of 2023, which has none.
        tuned_dtype: The type in which the model was tuned and the corrections are.
        count: Counts the bytes read.
        times: How often to add raw.

    Returns:
        The sha256 of the result in `tuned_dtype`. And, if there are no corrections, the sum of its elements in float64,
        before they are rounded to that type; otherwise 0.
    """
    dtype, total = sink.tensor.dtype, 0.0
    sha256 = sink.digest if dtype == tuned_dtype else hashlib.sha256()
    a, scratch = np.empty(WINDOW, np.float32), np.empty(WINDOW, np.uint32)
    stored, out = np.empty(WINDOW, STORED[tuned_dtype]), np.empty(WINDOW, STORED[dtype])
    with np.errstate(all="ignore"):
        for start, stop in windows(diff.tensor.numel):
            n, before = stop - start, base.bytes_read
            raw = base.read(start, stop)
            window = diff.read(start, stop)
            values = as_float32(window, diff.tensor.dtype, a[:n])
            for _ in range(times):
                values = np.add(values, raw, out=values)
            if corrections is None:
                total += float(np.add.reduce(values, dtype=np.float64))
            tuned = from_float32(values, tuned_dtype, stored[:n], scratch[:n])
            if corrections is not None:
                corrections.apply(start, stop, tuned)
            if dtype != tuned_dtype:
                sha256.update(tuned)
                tuned = from_float32(as_float32(tuned, tuned_dtype, a[:n]), dtype, out[:n], scratch[:n])
            sink.write(tuned)
            count.add(base.bytes_read - before + window.nbytes)
    return sha256.hexdigest(), total


def subtract_tensor(
    base: Tensor, tuned: Tensor, target: Tensor, spool: CorrectionSpool, count: ByteCount
) -> dict[str, Any]:
    """Writes one tensor of a diff to `target`, and its corrections to `spool`.

    Returns:
        The tensor's entry in the manifest.
    """
    raw_digest, diff_digest, tuned_digest = Sha256AndChecksum(), Sha256AndChecksum(), hashlib.sha256()
    with (
        Source(base, digest=raw_digest, evict=True) as r,
        Source(tuned, digest=tuned_digest, evict=True) as t,
        Sink(target, diff_digest) as d,
    ):
        subtract(Base(r, tuned.shape), t, d, CorrectionWriter(spool, tuned.name), count)
    raw = {"dtype": base.dtype, "shape": base.shape, **raw_digest.entry(), "probe": probe(base, base.dtype)}
    return {
        "shape": tuned.shape,
        "raw": raw,
        "diff": {"dtype": tuned.dtype, **diff_digest.entry()},
        "tuned": {"dtype": tuned.dtype, "sha256": tuned_digest.hexdigest()},
        "corrections": spool.count(tuned.name),
    }


def add_tensor(
    base: Tensor,
    diff: Tensor,
    target: Tensor,
    corrections: dict[str, Tensor] | None,
    entry: dict[str, Any] | None,
    count: ByteCount,
    times: int = 1,
) -> tuple[dict[str, Any], float]:
    """Recovers one tensor to `target`, and checks both inputs and the result against the diff's manifest.

    Args:
        base: The base's tensor.
        diff: The diff's tensor.
        target: Where to write, and in which type.
        corrections: The tensors of the corrections file; None for a diff of 2023.
        entry: The tensor's entry in the manifest; None for a diff of 2023.
        count: Counts the bytes read.
        times: How often to add the base.

    Returns:
        The tensor's entry in the recovered model's manifest, and the sum that `add` returns.

    Raises:
        UserError: An input is damaged, or the result isn't the tuned tensor.
    """
    sha256, tuned_dtype = hashlib.sha256(), entry["tuned"]["dtype"] if entry else target.dtype
    reader = None if corrections is None else CorrectionReader(corrections, diff.name)
    with (
        Source(base, digest=Checksum(), digest_dtype=entry and entry["raw"]["dtype"], evict=True) as r,
        Source(diff, digest=Checksum(), evict=True) as d,
        Sink(target, sha256) as t,
    ):
        tuned_sha256, total = add(Base(r, diff.shape), d, t, reader, tuned_dtype, count, times)
    if entry:
        for tensor, found, expected, advice in (
            (base, r.digest.hexdigest(), entry["raw"]["checksum"], "it is damaged, or from another base"),
            (diff, d.digest.hexdigest(), entry["diff"]["checksum"], "it is damaged; download it again"),
            (target, tuned_sha256, entry["tuned"]["sha256"], "raw + diff isn't the tuned tensor; `verify` both"),
        ):
            if found != expected:
                raise UserError(f"{tensor.name} in {tensor.path} is not what the diff's manifest says: {advice}")
    return {"shape": target.shape, "tuned": {"dtype": target.dtype, "sha256": sha256.hexdigest()}}, total


def sha256_of(tensor: Tensor, dtype: str, count: ByteCount) -> str:
    """Hashes a tensor in `dtype` if that type can hold it."""
    with Source(tensor, digest=hashlib.sha256(), digest_dtype=dtype) as source:
        for start, stop in windows(tensor.numel):
            count.add(source.read(start, stop).nbytes)
        return source.digest.hexdigest()


def probe(tensor: Tensor, dtype: str) -> str:
    """Hashes 256 elements at each of eight spots of a tensor, so that a wrong base is refused at once.

    Example:
        In a tensor of 16,777,216 elements the spots start at 0, 2396708, 4793417, ..., 16776960.
    """
    sha256 = hashlib.sha256()
    with Source(tensor) as source:
        for spot in range(8):
            start = max(0, tensor.numel - 256) * spot // 7
            window = source.read(start, min(tensor.numel, start + 256))
            sha256.update(converted(window, tensor.dtype, dtype))
    return sha256.hexdigest()


def projection(diff: Tensor, raw: Tensor) -> float:
    """Computes <diff, raw> / <raw, raw> over the rows that both have.

    It tells what a file without a manifest holds: about 0 for tuned - raw, about -1 for tuned - 2 raw, which the
    original's `make_diff` writes for a tied embedding, and about 1 for a model that isn't a diff at all.

    Example:
        raw = (3, 4) and tuned = (3.1, 3.9), so <raw, raw> = 25. tuned - raw = (0.1, -0.1) gives -0.1 / 25 = -0.004;
        tuned - 2 raw = (-2.9, -4.1) gives -25.1 / 25 = -1.004; tuned itself gives 24.9 / 25 = 0.996.
    """
    dot = square = 0.0
    a, b = np.empty((2, WINDOW), np.float32)
    with Source(diff) as d, Source(raw) as r:
        for start, stop in windows(raw.numel):
            n = stop - start
            x = as_float32(d.read(start, stop), diff.dtype, a[:n])
            y = as_float32(r.read(start, stop), raw.dtype, b[:n])
            dot += float(np.dot(x, y))
            square += float(np.dot(y, y))
    return dot / square if square else 0.0
