"""Reads, writes, hashes and converts tensors window by window, so that no tensor is ever whole in memory.

It needs numpy alone: bfloat16 is the upper half of a float32. Three things make it fast: `pread`/`pwrite` on fixed
buffers (mapped pages would count as the process's memory), windows that stay in the processor's cache, and a thread for
each tensor in progress, as reading, arithmetic, hashing and writing all let other threads run.

Example:
    7B's `q_proj` has 4096 x 4096 = 16,777,216 elements: 256 windows of 65,536. In float32 a window is 256 KiB. Each
    thread holds about ten such buffers, so four threads stay near 10 MB, whatever the size of the model.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import numpy as np

from alpaca.cli import UserError
from alpaca.weight_diff.checkpoint_files import STORED, Tensor

WINDOW = 1 << 16  # elements
EVICTED_BYTES = 8 << 20  # at a time
THREADS = max(2, min(4, os.cpu_count() or 1))
# Every float16 as float32: looking them up is twice as fast as numpy's conversion.
_FLOAT16_AS_FLOAT32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

T = TypeVar("T")


class Digest(Protocol):
    """A hash in progress: hashlib's, or a `Checksum`."""

    def update(self, window: np.ndarray, /) -> None: ...
    def hexdigest(self) -> str: ...


class Checksum:
    """The sum of a tensor's bytes as little-endian 64-bit words, mod 2**64, the last word padded with zeros.

    It costs a tenth of a sha256 and detects any flipped bit. `recover` computes it for its inputs, and sha256 for its
    output. So the output is verified in full, and the checksums tell which input is damaged, even where rounding hides
    the flipped bit.

    Example:
        The float32 values 1.0, 2.0, 3.0 are the words 0x400000003f800000 and 0x40400000, so their checksum is
        400000007fc00000.
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
    """Both digests that a manifest has for a tensor which `recover` reads."""

    def __init__(self) -> None:
        self._digests = {"sha256": hashlib.sha256(), "checksum": Checksum()}

    def update(self, window: np.ndarray) -> None:
        for digest in self._digests.values():
            digest.update(window)

    def entry(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


class Source:
    """Reads one tensor in windows.

    Args:
        tensor: The tensor to read.
        window: The most elements to read at once.
        digest: Is updated with every window, so these must be read front to back.
        digest_dtype: The type in which `digest` sees the elements; the tensor's own when None. A base that is float16
            for one user may be float32 for another, with the same values.
        evict: Drops what was read from the page cache. Gigabytes that nobody reads again would push out other data, and
            evicting pages we have read keeps page reclaim off the write path.
    """

    def __init__(
        self,
        tensor: Tensor,
        window: int = WINDOW,
        digest: Digest | None = None,
        digest_dtype: str | None = None,
        evict: bool = False,
    ):
        self.tensor = tensor
        self.digest = digest
        self._digest_dtype = digest_dtype or tensor.dtype
        self._evicted = tensor.offset if evict and hasattr(os, "posix_fadvise") else None
        self._descriptor = os.open(tensor.path, os.O_RDONLY)
        self._buffer = memoryview(bytearray(window * STORED[tensor.dtype].itemsize))

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads elements [start, stop) as stored, into a buffer that the next call overwrites."""
        size = STORED[self.tensor.dtype].itemsize
        begin, end = self.tensor.offset + start * size, self.tensor.offset + stop * size
        buffer, filled = self._buffer[: end - begin], 0
        while filled < len(buffer):
            count = os.preadv(self._descriptor, [buffer[filled:]], begin + filled)
            if not count:
                raise UserError(f"{self.tensor.path} ended within {self.tensor.name}: it changed while it was read")
            filled += count
        window = np.frombuffer(buffer, STORED[self.tensor.dtype])
        if self.digest:
            self.digest.update(converted(window, self.tensor.dtype, self._digest_dtype))
        if self._evicted is not None and end - self._evicted >= EVICTED_BYTES:
            os.posix_fadvise(self._descriptor, self._evicted, end - self._evicted, os.POSIX_FADV_DONTNEED)
            self._evicted = end
        return window


class Sink:
    """Writes one tensor front to back, and updates `digest` with what it writes."""

    def __init__(self, tensor: Tensor, digest: Digest | None = None):
        self.tensor = tensor
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
    """Yields [start, stop) of each window: (0, 65536), (65536, 131072), (131072, 150000) for 150,000 elements."""
    for start in range(0, numel, WINDOW):
        yield start, min(numel, start + WINDOW)


def copy_tensor(source: Tensor, target: Tensor) -> None:
    """Copies a tensor to another place of the same type and shape."""
    with Source(source) as reader, Sink(target) as sink:
        for start, stop in windows(source.numel):
            sink.write(reader.read(start, stop))


class ByteCount:
    """Counts the bytes read by all threads. Once `stopped` is set, each thread gives up at its next window."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.stopped = False
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.stopped:
            raise InterruptedError
        with self._lock:
            self.bytes_read += nbytes


def run_jobs(title: str, sizes: dict[str, int], job: Callable[[str, ByteCount], T]) -> dict[str, T]:
    """Runs a job for each tensor on `THREADS` threads, under a bar of bytes read, rate and time left.

    Args:
        title: Name of the bar.
        sizes: Tensor name -> bytes that its job reads. The largest start first.
        job: Takes a tensor's name and the count to add to. The first error stops all others at their next window.

    Returns:
        Tensor name -> what its job returned, in the order of `sizes`.
    """
    from tqdm import tqdm

    count = ByteCount()
    with (
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=title, mininterval=0.5) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        largest_first = sorted(sizes, key=lambda name: (-sizes[name], name))
        futures = {name: pool.submit(job, name, count) for name in largest_first}
        waiting = set(futures.values())
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(count.bytes_read - bar.n)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or a thread that has given up takes the next job
            count.stopped = True
            raise
    return {name: futures[name].result() for name in sizes}


# ---------------------------------------------------------------------------------------------------------------------
# Types


def as_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """Converts a window of stored elements to float32, exactly.

    Example:
        The bfloat16 1.5 is stored as 0x3FC0; shifted left by 16 bits it is 0x3FC00000, the float32 1.5.

    Args:
        stored: `STORED[dtype]` [n].
        dtype: safetensors' name of its type.
        out: float32 [n], filled unless the window is float32 already.

    Returns:
        float32 [n]: `stored` if that is float32 already, otherwise `out`.
    """
    if dtype == "F32":
        return stored
    if dtype == "F16":
        return np.take(_FLOAT16_AS_FLOAT32, stored.view(np.uint16), out=out, mode="clip")
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    return np.left_shift(bits, 16, out=bits).view(np.float32)


def from_float32(values: np.ndarray, dtype: str, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Rounds float32 as torch does, to nearest, ties to even.

    A bfloat16 is the upper 16 bits of a float32. Adding 0x7FFF, and one more if the last bit to stay is set, carries
    into the upper half exactly when the value has to be rounded up.

    Example:
        1.00390625 = 0x3F808000 lies midway between the bfloat16 values 1.0 = 0x3F80 and 1.0078125 = 0x3F81. The last
        bit of 0x3F80 is 0, so the sum is 0x3F80FFFF: it stays 0x3F80, the even one. 1.01171875 = 0x3F818000 lies midway
        between 0x3F81 and 0x3F82. The last bit of 0x3F81 is 1, so the sum is 0x3F820000: it becomes 0x3F82 = 1.015625.

    Args:
        values: float32 [n].
        dtype: safetensors' name of the type.
        out: `STORED[dtype]` [n], filled unless `dtype` is float32.
        scratch: uint32 [n], overwritten.

    Returns:
        `values` if `dtype` is float32, otherwise `out`.
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
    """Converts a window to another type, or returns it as it is if that type can't hold it exactly."""
    if dtype == to:
        return stored
    n = len(stored)
    values = as_float32(stored, dtype, np.empty(n, np.float32))
    with np.errstate(all="ignore"):
        out = from_float32(values, to, np.empty(n, STORED[to]), np.empty(n, np.uint32))
    back = as_float32(out, to, np.empty(n, np.float32))
    return out if np.array_equal(back.view(np.uint32), values.view(np.uint32)) else stored
