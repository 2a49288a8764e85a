"""Subtracts, adds, hashes and corrects tensors window by window, so that no tensor is ever whole in memory.

It needs numpy alone: bfloat16 is the upper half of a float32. What makes it fast: `pread`/`pwrite` on fixed buffers
(mapped pages would count as the process's memory), windows that stay in the processor's cache, and a thread for each
tensor in work, as reading, arithmetic, hashing and writing all let other threads run.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

import numpy as np

from alpaca.cli import UserError
from alpaca.weight_diff.checkpoint_files import STORED, Tensor

if TYPE_CHECKING:
    from alpaca.weight_diff.corrections import CorrectionReader, CorrectionWriter

WINDOW = 1 << 16
EVICTED_BYTES = 8 << 20  # at a time
THREADS = max(2, min(4, os.cpu_count() or 1))
# Every float16 as float32: looking them up is twice as fast as numpy's conversion.
_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


class Digest(Protocol):
    """A hash in the making: hashlib's, or a `Checksum`."""

    def update(self, window: np.ndarray, /) -> None: ...
    def hexdigest(self) -> str: ...


class Checksum:
    """The sum of a tensor's bytes as little-endian 64-bit words, mod 2**64, the last word filled up with zeros.

    It costs a tenth of a sha256 and sees any flipped bit. `recover` takes it of what goes in, and sha256 of what comes
    out: so the output is verified in full, and the checksums tell which input is at fault, also where rounding hides
    the flipped bit.
    """

    def __init__(self) -> None:
        self._value = 0

    def update(self, window: np.ndarray) -> None:
        """Adds a window; all but the last are a multiple of 8 bytes long."""
        data = window.view(np.uint8)
        whole = len(data) - len(data) % 8
        words = int(np.add.reduce(data[:whole].view("<u8"))) + int.from_bytes(data[whole:].tobytes(), "little")
        self._value = (self._value + words) % (1 << 64)

    def hexdigest(self) -> str:
        return f"{self._value:016x}"


class Sha256AndChecksum:
    """What a manifest says of a tensor that `recover` reads."""

    def __init__(self) -> None:
        self._digests = {"sha256": hashlib.sha256(), "checksum": Checksum()}

    def update(self, window: np.ndarray) -> None:
        for digest in self._digests.values():
            digest.update(window)

    def entry(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


class Source:
    """Reads one tensor front to back in windows, and gives `digest` what it reads.

    Args:
        tensor: what to read.
        window: the most elements to be read at once.
        digest: sees what `read` gives.
        evict: whether what was read leaves the page cache. Gigabytes that nobody reads again would push out what others
            use, and the kernel looks longer for a page to write to than it takes to fill it.
    """

    def __init__(self, tensor: Tensor, window: int = WINDOW, digest: Digest | None = None, evict: bool = False):
        self.tensor = tensor
        self.digest = digest
        self._evicted = tensor.offset if evict and hasattr(os, "posix_fadvise") else None
        self._descriptor = os.open(tensor.path, os.O_RDONLY)
        self._buffer = memoryview(bytearray(window * STORED[tensor.dtype].itemsize))

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) as stored, in a buffer that the next call overwrites."""
        window = self.peek(start, stop)
        if self.digest:
            self.digest.update(window)
        if self._evicted is not None:
            self._evict(self.tensor.offset + start * window.itemsize)
        return window

    def _evict(self, end: int) -> None:
        if end - self._evicted >= EVICTED_BYTES:
            os.posix_fadvise(self._descriptor, self._evicted, end - self._evicted, os.POSIX_FADV_DONTNEED)
            self._evicted = end

    def peek(self, start: int, stop: int) -> np.ndarray:
        """As `read`, from anywhere in the tensor, without the digest."""
        dtype = STORED[self.tensor.dtype]
        window = self._buffer[: (stop - start) * dtype.itemsize]
        position, filled = self.tensor.offset + start * dtype.itemsize, 0
        while filled < len(window):
            count = os.preadv(self._descriptor, [window[filled:]], position + filled)
            if not count:
                raise UserError(f"{self.tensor.path} ended within {self.tensor.name}: it changed while it was read")
            filled += count
        return np.frombuffer(window, dtype)


class Sink:
    """Writes one tensor front to back, and gives `digest` what it writes."""

    def __init__(self, tensor: Tensor, digest: Digest | None = None):
        self.digest = digest
        self._descriptor = os.open(tensor.path, os.O_WRONLY)
        self._position = tensor.offset

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def write(self, window: np.ndarray) -> None:
        if self.digest:
            self.digest.update(window)
        view = memoryview(window).cast("B")
        while len(view):
            count = os.pwrite(self._descriptor, view, self._position)
            self._position += count
            view = view[count:]


def windows(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each window of a tensor."""
    for start in range(0, numel, WINDOW):
        yield start, min(numel, start + WINDOW)


class Progress:
    """Counts bytes read, for all threads; `stopped` makes each thread give up at its next window."""

    def __init__(self) -> None:
        self.done = 0
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self.done += nbytes


def run_jobs(jobs: Iterable[Callable[[], None]], progress: Progress, report: Callable[[], None]) -> None:
    """Runs jobs on `THREADS` threads.

    Args:
        jobs: one per tensor; the first error stops all others at their next window and is raised.
        progress: what the jobs count on.
        report: called a few times a second from the calling thread.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = {pool.submit(job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                report()
                for future in done:
                    future.result()
        except BaseException:
            progress.stopped = True
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Types


def as_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """A window of stored elements as float32, exactly; in `out`, float32 [n], unless it is float32 already."""
    if dtype == "F32":
        return stored
    if dtype == "F16":
        return np.take(_HALVES, stored.view(np.uint16), out=out, mode="clip")
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    return np.left_shift(bits, 16, out=bits).view(np.float32)


def from_float32(values: np.ndarray, dtype: str, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Rounds float32 as torch does, to nearest, ties to even.

    Args:
        values: float32 [n].
        dtype: safetensors' name of the type.
        out: `STORED[dtype]` [n], filled unless `dtype` is float32.
        scratch: uint32 [n], overwritten.

    Returns:
        `values` where `dtype` is float32, else `out`.
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        np.copyto(out, values, casting="same_kind")
        return out
    bits = values.view(np.uint32)
    np.right_shift(bits, 16, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)
    np.add(scratch, 0x7FFF, out=scratch)
    np.add(scratch, bits, out=scratch)
    np.right_shift(scratch, 16, out=scratch)
    np.copyto(out, scratch, casting="same_kind")
    nan = np.isnan(values)
    if nan.any():
        out[nan] = 0x7FC0
    return out


def converted(stored: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """A window in another type, or as it is where that type cannot hold it exactly."""
    if dtype == to:
        return stored
    n = len(stored)
    values = as_float32(stored, dtype, np.empty(n, np.float32))
    with np.errstate(all="ignore"):
        out = from_float32(values, to, np.empty(n, STORED[to]), np.empty(n, np.uint32))
    back = as_float32(out, to, np.empty(n, np.float32))
    return out if np.array_equal(back.view(np.uint32), values.view(np.uint32)) else stored


# ---------------------------------------------------------------------------------------------------------------------
# raw + diff = tuned


class Base:
    """The raw model's side of a tensor as float32 windows; rows that it lacks are the mean of those it has.

    Args:
        source: the raw tensor.
        mean: float32 [hidden size], given when the other side has more rows.
        digest_dtype: the type in which the source's digest sees the tensor: the same weights may come as float16 or
            as float32.
    """

    def __init__(self, source: Source, mean: np.ndarray | None = None, digest_dtype: str | None = None):
        self._source = source
        self._mean = mean
        self._digest_dtype = digest_dtype or source.tensor.dtype
        self._same = self._digest_dtype == source.tensor.dtype
        self._out = np.empty(WINDOW, np.float32)
        self.nbytes = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) as float32, in a buffer that the next call overwrites."""
        tensor, n = self._source.tensor, stop - start
        own = max(0, min(stop, tensor.numel) - start)
        values = self._out[:n]
        if own:
            window = (self._source.read if self._same else self._source.peek)(start, start + own)
            self.nbytes += window.nbytes
            values = as_float32(window, tensor.dtype, self._out[:own])
            if not self._same:
                self._source.digest.update(converted(window, tensor.dtype, self._digest_dtype))
        if own < n:
            self._out[:own] = values[:own]
            columns = np.arange(start + own, stop) - tensor.numel
            self._out[own:n] = self._mean[columns % len(self._mean)]
            values = self._out[:n]
        return values


def subtract(base: Base, tuned: Source, sink: Sink, corrections: "CorrectionWriter", progress: Progress) -> None:
    """Writes tuned - raw, and a correction for each element that raw + diff doesn't give back to the bit."""
    dtype = tuned.tensor.dtype
    a, b, c = np.empty((3, WINDOW), np.float32)
    stored, scratch = np.empty(WINDOW, STORED[dtype]), np.empty(WINDOW, np.uint32)
    with np.errstate(all="ignore"):
        for start, stop in windows(tuned.tensor.numel):
            n, before = stop - start, base.nbytes
            raw = base.read(start, stop)
            wanted = tuned.read(start, stop)
            values = as_float32(wanted, dtype, a[:n])
            diff = from_float32(np.subtract(values, raw, out=b[:n]), dtype, stored[:n], scratch[:n])
            sink.write(diff)
            again = np.add(as_float32(diff, dtype, c[:n]), raw, out=c[:n])
            again = from_float32(again, dtype, stored[:n], scratch[:n])
            wrong = np.flatnonzero(again.view(BITS[dtype]) != wanted.view(BITS[dtype]))
            if len(wrong):
                corrections.add(wrong + start, wanted[wrong])
            progress.add(base.nbytes - before + wanted.nbytes)
    corrections.flush()


def add(
    base: Base,
    diff: Source,
    sink: Sink,
    corrections: "CorrectionReader",
    dtypes: tuple[str, str],
    progress: Progress,
    times: int = 1,
) -> tuple[str, float]:
    """Writes raw + diff with its corrections.

    Args:
        base: the raw tensor.
        diff: the diff's tensor.
        sink: takes what is written, with a sha256 as its digest.
        corrections: of this tensor.
        dtypes: the type in which the model was tuned, and the one to write.
        progress: counts the bytes read.
        times: how often raw is added.

    Returns:
        The sha256 of the sum in the type in which the model was tuned; and, of a diff without corrections, the total
        of its elements in float64.
    """
    dtype, out_dtype = dtypes
    sha256, total = sink.digest if dtype == out_dtype else hashlib.sha256(), 0.0
    a = np.empty(WINDOW, np.float32)
    scratch = np.empty(WINDOW, np.uint32)
    stored, out = np.empty(WINDOW, STORED[dtype]), np.empty(WINDOW, STORED[out_dtype])
    with np.errstate(all="ignore"):
        for start, stop in windows(diff.tensor.numel):
            n, before = stop - start, base.nbytes
            raw = base.read(start, stop)
            window = diff.read(start, stop)
            values = as_float32(window, diff.tensor.dtype, a[:n])
            for _ in range(times):
                values = np.add(values, raw, out=values)
            if not corrections.exact:
                total += float(np.add.reduce(values, dtype=np.float64))
            tuned = from_float32(values, dtype, stored[:n], scratch[:n])
            corrections.apply(start, stop, tuned)
            if dtype != out_dtype:
                sha256.update(tuned)
                tuned = from_float32(as_float32(tuned, dtype, a[:n]), out_dtype, out[:n], scratch[:n])
            sink.write(tuned)
            progress.add(base.nbytes - before + window.nbytes)
    return sha256.hexdigest(), total


def sha256_of(tensor: Tensor, dtype: str, progress: Progress) -> str:
    """The hash of a tensor in a type that can hold it."""
    with Source(tensor, digest=hashlib.sha256()) as source:
        base = Base(source, digest_dtype=dtype)
        for start, stop in windows(tensor.numel):
            base.read(start, stop)
            progress.add((stop - start) * STORED[tensor.dtype].itemsize)
        return source.digest.hexdigest()


def copy_tensor(source: Tensor, target: Tensor) -> None:
    """Copies a tensor to another place of the same type and shape."""
    with Source(source) as reader, Sink(target) as sink:
        for start, stop in windows(source.numel):
            sink.write(reader.peek(start, stop))


def projection(diff: Tensor, raw: Tensor) -> float:
    """<diff, raw> / <raw, raw> over the rows that both have: about 0 for tuned - raw, about -1 for tuned - 2 raw."""
    dot = square = 0.0
    a, b = np.empty((2, WINDOW), np.float32)
    with Source(diff) as d, Source(raw) as r:
        for start, stop in windows(raw.numel):
            n = stop - start
            x = as_float32(d.peek(start, stop), diff.dtype, a[:n])
            y = as_float32(r.peek(start, stop), raw.dtype, b[:n])
            dot += float(np.dot(x, y))
            square += float(np.dot(y, y))
    return dot / square if square else 0.0
