"""Reads, adds, hashes and writes checkpoints window by window, so that no tensor is ever whole in memory.

It needs numpy alone: a safetensors header is a length and a JSON object, bfloat16 is the upper half of a float32.
`pread`/`pwrite` on fixed buffers, not mmap: mapped pages count as the process's memory. A window stays in the cache.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from utils import UserError, jload

WINDOW = 1 << 16  # elements: 256 KB of float32
MAX_SHARD_BYTES = 5 * 10**9
THREADS = max(2, min(4, os.cpu_count() or 1))
# numpy has no bfloat16: its bits travel as uint16.
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_ORDER = ("F32", "BF16", "F16")  # the library's own writer puts the widest types first


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `dtype` is safetensors' name for it, `offset` where its bytes begin in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.numel * STORED[self.dtype].itemsize


@dataclass
class Checkpoint:
    """A folder's tensors in the order of its files, and for each safetensors file its header's `__metadata__`."""

    folder: str
    tensors: dict[str, Tensor]
    metadata: dict[str, dict | None] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layout(self) -> dict[str, list[str]]:
        """File name -> names of its tensors; empty for a checkpoint that isn't safetensors."""
        files: dict[str, list[str]] = {name: [] for name in self.metadata}
        for tensor in self.tensors.values() if files else ():
            files[os.path.basename(tensor.path)].append(tensor.name)
        return files


# ---------------------------------------------------------------------------------------------------------------------
# Reading checkpoints


def read_checkpoint(folder: str) -> Checkpoint:
    """Finds a folder's tensors without reading them: safetensors, or 2023's `pytorch_model*.bin`, sharded or single.

    Raises:
        UserError: no folder, no weights, a missing, truncated or damaged file, an LFS pointer in place of one, or a
            tensor that is neither float32, float16 nor bfloat16.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder; expected one with a checkpoint (download it first)")
    for single, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = os.path.join(folder, f"{single}.index.json")
        if os.path.exists(os.path.join(folder, single)):
            files, promised = [single], None
        elif os.path.exists(index):
            promised = jload(index).get("weight_map") or {}
            files = sorted(set(promised.values()))
        else:
            continue
        return _read_files(folder, files, promised, read)
    raise UserError(
        f"{folder} holds no weights; expected model.safetensors, pytorch_model.bin or their index and shards"
    )


def _read_files(folder: str, files: list[str], promised: dict[str, str] | None, read: Callable) -> Checkpoint:
    found = Checkpoint(folder, {})
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing, though the index names it; download the folder again")
        with open(path, "rb") as file:
            if file.read(20).startswith(b"version https://git-"):
                raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {folder}")
        tensors, metadata = read(path)
        if metadata is not NO_HEADER:
            found.metadata[name] = metadata
        found.tensors.update((tensor.name, tensor) for tensor in tensors)
    for name, file in (promised or {}).items():
        if name not in found.tensors:
            raise UserError(f"{os.path.join(folder, file)} lacks the tensor {name}, though the index says it has it")
    return found


NO_HEADER = object()


def _read_safetensors(path: str) -> tuple[list[Tensor], dict | None]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path} is truncated or no safetensors file ({size:,} bytes); download it again")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None)
            entries = [(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a damaged safetensors header ({error}); download it again") from error
    end = 8 + length + max((entry[4] for entry in entries), default=0)
    if end != size:
        raise UserError(f"{path} is truncated or damaged: {size:,} bytes, its header says {end:,}; download it again")
    entries.sort(key=lambda entry: entry[3])
    tensors = []
    for name, dtype, shape, begin, stop in entries:
        if is_rotary_buffer(name):
            continue
        if dtype not in STORED:
            raise UserError(f"{path}: {name} is {dtype}; expected float32, float16 or bfloat16")
        tensors.append(Tensor(name, dtype, shape, path, 8 + length + begin))
        if tensors[-1].nbytes != stop - begin:
            raise UserError(f"{path} has a damaged safetensors header ({name}: {shape} is not {stop - begin:,} bytes)")
    return tensors, metadata


def _read_bin(path: str) -> tuple[list[Tensor], object]:
    raise UserError(f"{path}: .bin checkpoints are not read yet")


def is_rotary_buffer(name: str) -> bool:
    """Old LLaMA checkpoints saved a buffer that every model computes for itself."""
    return name.endswith("rotary_emb.inv_freq")


# ---------------------------------------------------------------------------------------------------------------------
# Writing safetensors


@dataclass
class Output:
    """Safetensors files to be written: each tensor's place, and each file's header and size."""

    tensors: dict[str, Tensor]
    headers: dict[str, bytes]
    sizes: dict[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def create(self) -> None:
        """Makes the files with their headers and at full length; an existing file of that length is kept."""
        for path, header in self.headers.items():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.ftruncate(descriptor, self.sizes[path])
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)


def plan_output(
    folder: str,
    specs: dict[str, tuple[str, tuple[int, ...]]],
    layout: dict[str, list[str]] | None = None,
    metadata: dict[str, dict | None] | None = None,
) -> Output:
    """Lays tensors out in safetensors files as the library's own writer does, byte for byte.

    Args:
        folder: where the files will be.
        specs: tensor name -> (dtype, shape), in the order in which to fill shards.
        layout: file name -> tensor names, to repeat another checkpoint's files; kept if no file exceeds 5 GB.
        metadata: file name -> `__metadata__`; transformers asks for {"format": "pt"}, the default.
    """
    sizes = {name: Tensor(name, dtype, shape, "", 0).nbytes for name, (dtype, shape) in specs.items()}
    fits = layout and all(sum(sizes[n] for n in names) <= MAX_SHARD_BYTES for names in layout.values())
    if not fits:
        layout, metadata = _pack(sizes), None
    output = Output({}, {}, {})
    for file, names in layout.items():
        path = os.path.join(folder, file)
        meta = metadata[file] if metadata else {"format": "pt"}
        ordered = sorted(names, key=lambda n: (_SAFETENSORS_ORDER.index(specs[n][0]), n))
        header: dict = {} if meta is None else {"__metadata__": meta}
        end = 0
        for name in ordered:
            dtype, shape = specs[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        output.headers[path] = struct.pack("<Q", len(text)) + text
        output.sizes[path] = len(output.headers[path]) + end
        for name in ordered:
            begin = len(output.headers[path]) + header[name]["data_offsets"][0]
            output.tensors[name] = Tensor(name, *specs[name], path, begin)
    return output


def _pack(sizes: dict[str, int]) -> dict[str, list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


# ---------------------------------------------------------------------------------------------------------------------
# Windows


class Source:
    """Reads one tensor front to back in windows of at most `WINDOW` elements, and hashes what it reads."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.sha256 = hashlib.sha256()
        self._descriptor = os.open(tensor.path, os.O_RDONLY)
        self._buffer = memoryview(bytearray(WINDOW * STORED[tensor.dtype].itemsize))

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) as stored, in a buffer that the next call overwrites."""
        dtype = STORED[self.tensor.dtype]
        window = self._buffer[: (stop - start) * dtype.itemsize]
        position, filled = self.tensor.offset + start * dtype.itemsize, 0
        while filled < len(window):
            count = os.preadv(self._descriptor, [window[filled:]], position + filled)
            if not count:
                raise UserError(
                    f"{self.tensor.path} ended within {self.tensor.name}; the file changed while it was read"
                )
            filled += count
        self.sha256.update(window)
        return np.frombuffer(window, dtype)


class Sink:
    """Writes one tensor front to back and hashes what it writes."""

    def __init__(self, tensor: Tensor):
        self.sha256 = hashlib.sha256()
        self._descriptor = os.open(tensor.path, os.O_WRONLY)
        self._position = tensor.offset

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def write(self, window: np.ndarray) -> None:
        view = memoryview(window).cast("B")
        self.sha256.update(view)
        while len(view):
            count = os.pwrite(self._descriptor, view, self._position)
            self._position += count
            view = view[count:]


def windows(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each window of a tensor."""
    for start in range(0, numel, WINDOW):
        yield start, min(numel, start + WINDOW)


def to_float32(stored: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """Widens a window of stored elements to float32, exactly."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, stored)


def from_float32(values: np.ndarray, dtype: str, out: np.ndarray, scratch: np.ndarray) -> None:
    """Rounds float32 to `dtype` as torch does: to nearest, ties to even.

    Args:
        values: float32 [n].
        dtype: safetensors' name.
        out: `STORED[dtype]` [n].
        scratch: uint32 [n], overwritten.
    """
    if dtype != "BF16":
        np.copyto(out, values, casting="same_kind")
        return
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
    """Runs jobs on `THREADS` threads; numpy, hashlib and the system calls let them overlap.

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
# The arithmetic


class Base:
    """The raw model's side of a tensor as float32 windows; grown rows are the mean of the rows that are there.

    Args:
        source: the raw tensor.
        mean_row: float32 [hidden size], given when the other side has more rows.
        hash_dtype: the type in which to hash the tensor, where it is stored in another one: the same weights may come
            as float16 or as float32. Values that the type cannot hold make the hash that of other weights.
    """

    def __init__(self, source: Source, mean_row: np.ndarray | None = None, hash_dtype: str | None = None):
        self.source = source
        self._mean_row = mean_row
        self._hash_dtype = None if hash_dtype in (None, source.tensor.dtype) else hash_dtype
        self._sha256 = hashlib.sha256()

    def hexdigest(self) -> str:
        return (self._sha256 if self._hash_dtype else self.source.sha256).hexdigest()

    def read(self, start: int, stop: int, out: np.ndarray) -> int:
        """Fills `out`, float32 [stop - start]; returns how many bytes were read from the file."""
        own = max(0, min(stop, self.source.tensor.numel) - start)
        if own:
            stored = self.source.read(start, start + own)
            to_float32(stored, self.source.tensor.dtype, out[:own])
            if self._hash_dtype:
                self._sha256.update(_exactly_as(out[:own], self._hash_dtype))
        if start + own < stop:
            columns = np.arange(start + own, stop) - self.source.tensor.numel
            out[own:] = self._mean_row[columns % len(self._mean_row)]
        return own * STORED[self.source.tensor.dtype].itemsize


def _exactly_as(values: np.ndarray, dtype: str) -> bytes:
    stored, back = np.empty(len(values), STORED[dtype]), np.empty_like(values)
    from_float32(values, dtype, stored, np.empty(len(values), np.uint32))
    to_float32(stored, dtype, back)
    same = np.array_equal(back.view(np.uint32), values.view(np.uint32))
    return (stored if same else values).tobytes()


def subtract(base: Base, tuned: Source, sink: Sink, corrections: "CorrectionWriter", progress: Progress) -> None:
    """Writes tuned - raw, and a correction for each element that raw + diff doesn't give back to the bit."""
    dtype = tuned.tensor.dtype
    raw, values, diff = (np.empty(WINDOW, np.float32) for _ in range(3))
    stored, scratch = np.empty(WINDOW, STORED[dtype]), np.empty(WINDOW, np.uint32)
    for start, stop in windows(tuned.tensor.numel):
        n = stop - start
        count = base.read(start, stop, raw[:n])
        wanted = tuned.read(start, stop)
        to_float32(wanted, dtype, values[:n])
        np.subtract(values[:n], raw[:n], out=diff[:n])
        from_float32(diff[:n], dtype, stored[:n], scratch[:n])
        sink.write(stored[:n])
        to_float32(stored[:n], dtype, diff[:n])
        np.add(raw[:n], diff[:n], out=diff[:n])
        from_float32(diff[:n], dtype, stored[:n], scratch[:n])
        bits = BITS[dtype]
        wrong = np.flatnonzero(stored[:n].view(bits) != wanted.view(bits))
        if len(wrong):
            corrections.add(wrong + start, wanted[wrong])
        progress.add(count + wanted.nbytes)
    corrections.flush()


def add(
    base: Base, diff: Source, tuned_dtype: str, sink: Sink, out_dtype: str, corrections: "CorrectionReader",
    progress: Progress,
) -> str:  # fmt: skip
    """Writes raw + diff with its corrections.

    Args:
        base: the raw tensor.
        diff: the diff's tensor.
        tuned_dtype: the type in which raw + diff was tuned and its hash taken.
        sink: takes the written elements.
        out_dtype: the type to write.
        corrections: of this tensor.
        progress: counts the bytes read.

    Returns:
        The sha256 of the tuned tensor in `tuned_dtype`.
    """
    raw, values = np.empty(WINDOW, np.float32), np.empty(WINDOW, np.float32)
    scratch = np.empty(WINDOW, np.uint32)
    tuned, out = np.empty(WINDOW, STORED[tuned_dtype]), np.empty(WINDOW, STORED[out_dtype])
    sha256 = hashlib.sha256()
    for start, stop in windows(diff.tensor.numel):
        n = stop - start
        count = base.read(start, stop, raw[:n])
        stored = diff.read(start, stop)
        to_float32(stored, diff.tensor.dtype, values[:n])
        np.add(raw[:n], values[:n], out=values[:n])
        from_float32(values[:n], tuned_dtype, tuned[:n], scratch[:n])
        corrections.apply(start, stop, tuned)
        if out_dtype == tuned_dtype:
            sink.write(tuned[:n])
        else:
            sha256.update(memoryview(tuned[:n]).cast("B"))
            to_float32(tuned[:n], tuned_dtype, values[:n])
            from_float32(values[:n], out_dtype, out[:n], scratch[:n])
            sink.write(out[:n])
        progress.add(count + stored.nbytes)
    return (sink.sha256 if out_dtype == tuned_dtype else sha256).hexdigest()


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of a matrix's rows, to the last bit what torch's `mean(dim=0)` gives for it as float32 on a CPU.

    torch adds rows in a cascade of four float32 accumulators (ATen/native/cpu/SumKernel.cpp): the first takes
    2**max(4, ceil(log2(rows)) // 4) rows, then empties into the second, and so on. Of the columns that are left over
    from blocks of 32 (of 4 where there are fewer than 8 columns), it adds every fourth row in a cascade of its own.

    Args:
        tensor: [rows, hidden size].

    Returns:
        float32 [hidden size].
    """
    rows, width = tensor.shape
    blocks = width - width % (32 if width >= 8 else 4)
    total = _Cascade(rows, blocks)
    strands = [_Cascade(rows // 4, width - blocks) for _ in range(4)]
    rest = []
    row = np.empty(width, np.float32)
    with Source(tensor) as source:
        for i in range(rows):
            for start in range(0, width, WINDOW):
                stop = min(width, start + WINDOW)
                to_float32(source.read(i * width + start, i * width + stop), tensor.dtype, row[start:stop])
            total.add(row[:blocks])
            if i < rows // 4 * 4:
                strands[i % 4].add(row[blocks:])
            else:
                rest.append(row[blocks:].copy())
    left = strands[0].sum()
    for part in [*rest, *(strand.sum() for strand in strands[1:])]:
        left += part
    return np.concatenate([total.sum(), left]) / np.float32(rows)


class _Cascade:
    def __init__(self, rows: int, width: int):
        self._power = max(4, (rows - 1).bit_length() // 4)
        self._levels = np.zeros((4, width), np.float32)
        self._count = 0

    def add(self, row: np.ndarray) -> None:
        self._levels[0] += row
        self._count += 1
        if self._count % (1 << self._power):
            return
        for level in range(1, 4):
            self._levels[level] += self._levels[level - 1]
            self._levels[level - 1] = 0
            if self._count & (((1 << self._power) - 1) << (level * self._power)):
                break

    def sum(self) -> np.ndarray:
        total = self._levels[0].copy()
        for level in self._levels[1:]:
            total += level
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Corrections: for each tensor that has some, its elements' positions and their right values


class CorrectionSpool:
    """Takes corrections in chunks as they come, from all threads, until how many there are is known."""

    def __init__(self, path: str):
        self._file = open(path, "ab+")  # noqa: SIM115
        self._lock = threading.Lock()

    def append(self, data: bytes) -> int:
        """Writes a chunk; returns where it begins."""
        with self._lock:
            begin = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
        return begin

    def read(self, begin: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, begin)

    def close(self) -> None:
        self._file.close()


class CorrectionWriter:
    """Gathers one tensor's corrections; `chunks` are (offset in the spool, how many) in the tensor's order."""

    def __init__(self, spool: CorrectionSpool, tensor: Tensor):
        self.chunks: list[tuple[int, int]] = []
        self.sha256 = hashlib.sha256()
        self._spool = spool
        self._index = STORED_INDEX[index_dtype(tensor)]
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        self._waiting.append((positions, values))
        if sum(len(p) for p, _ in self._waiting) >= WINDOW:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        positions = np.concatenate([p for p, _ in self._waiting]).astype(self._index)
        values = np.concatenate([v for _, v in self._waiting])
        self._waiting = []
        data = positions.tobytes() + values.tobytes()
        self.sha256.update(data)
        self.chunks.append((self._spool.append(data), len(values)))


STORED_INDEX = {"U32": np.dtype("<u4"), "I64": np.dtype("<i8")}


def index_dtype(tensor: Tensor) -> str:
    return "U32" if tensor.numel < 1 << 32 else "I64"


def write_corrections(
    path: str, spool: CorrectionSpool, chunks: dict[str, list[tuple[int, int]]], like: dict[str, Tensor]
):
    """Gathers the spool into a safetensors file: for each tensor `NAME:index`, flat positions, and `NAME:value`."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(chunks):
        count = sum(n for _, n in chunks[name])
        for part, dtype, size in _parts(like[name]):
            header[f"{name}:{part}"] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + count * size]}
            end += count * size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(chunks):
            index_size, value_size = (size for _, _, size in _parts(like[name]))
            for begin, count in chunks[name]:
                file.write(spool.read(begin, count * index_size))
            for begin, count in chunks[name]:
                file.write(spool.read(begin + count * index_size, count * value_size))


def _parts(tensor: Tensor) -> tuple[tuple[str, str, int], tuple[str, str, int]]:
    index = index_dtype(tensor)
    return ("index", index, STORED_INDEX[index].itemsize), ("value", tensor.dtype, STORED[tensor.dtype].itemsize)


class CorrectionReader:
    """One tensor's corrections, applied front to back; at most `WINDOW` of them in memory."""

    def __init__(self, file: int | None, index: tuple[str, int, int] | None, value: tuple[str, int, int] | None):
        self._file, self._index_at, self._value_at = file, index, value
        self._left = index[2] if index else 0
        self._taken = 0
        self._index = np.empty(0, np.int64)
        self._value = np.empty(0, np.float32)

    def apply(self, start: int, stop: int, window: np.ndarray) -> None:
        """Puts the right values into `window`, the tensor's elements [start, stop)."""
        while True:
            count = int(np.searchsorted(self._index, stop))
            window[self._index[:count] - start] = self._value[:count]
            self._index, self._value = self._index[count:], self._value[count:]
            if len(self._index) or not self._left:
                return
            count = min(WINDOW, self._left)
            self._index = self._load(self._index_at, STORED_INDEX, count).astype(np.int64)
            self._value = self._load(self._value_at, STORED, count)
            self._left -= count
            self._taken += count

    def _load(self, place: tuple[str, int, int], types: dict[str, np.dtype], count: int) -> np.ndarray:
        dtype = types[place[0]]
        return np.frombuffer(
            os.pread(self._file, count * dtype.itemsize, place[1] + self._taken * dtype.itemsize), dtype
        )


class Corrections:
    """A diff's corrections file; a diff without one has none."""

    def __init__(self, path: str | None):
        self._file = os.open(path, os.O_RDONLY) if path else None
        self._entries: dict[str, tuple[str, int, int]] = {}
        if path:
            length = struct.unpack("<Q", os.pread(self._file, 8, 0))[0]
            header = json.loads(os.pread(self._file, length, 8))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self._entries[name] = (entry["dtype"], 8 + length + entry["data_offsets"][0], entry["shape"][0])

    def of(self, name: str) -> CorrectionReader:
        return CorrectionReader(self._file, self._entries.get(f"{name}:index"), self._entries.get(f"{name}:value"))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
