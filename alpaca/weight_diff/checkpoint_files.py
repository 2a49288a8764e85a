"""Locates tensors in checkpoint files without reading them, and lays out the files that will hold new ones.

It reads safetensors and the `pytorch_model*.bin` files of 2023, single or sharded. A safetensors file is a length, a
JSON header and the tensors' bytes, so numpy is enough for it. Only a .bin file needs torch, to find out where its
tensors start. Nothing pickled is executed.
"""

import errno
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from alpaca.cli import UserError
from alpaca.files import LONE_SURROGATE, parse_json, read_text

INDEX = "model.safetensors.index.json"
PART = ".part"  # ends the name of a weights file while it is being written, so that nothing loads it as a model
MAX_SHARD_BYTES = 5 * 10**9
# safetensors' type name -> numpy type. numpy has no bfloat16, so its bits travel as uint16.
STORED = {name: np.dtype(kind) for name, kind in (("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2"), ("U32", "<u4"))}
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LLAMA = {(4096, 32): "7B", (5120, 40): "13B", (6656, 60): "30B", (8192, 80): "65B"}
# Bits of an element of every type that the safetensors format has.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_WIDEST_FIRST = ("U32", "F32", "BF16", "F16")  # how safetensors' own writer orders a file's tensors


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: Its name in the state dict.
        dtype: safetensors' name of its type, such as "F32".
        shape: Its shape.
        path: The file.
        offset: Position of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * STORED[self.dtype].itemsize


@dataclass
class Checkpoint:
    """The tensors of a folder, and its config.json.

    Attributes:
        folder: The folder.
        tensors: Name -> tensor, in the order of the files.
        metadata: Name of each safetensors file -> its header's `__metadata__`. Empty for .bin files.
        tied: Whether the output embedding is the input embedding. Set by alpaca/weight_diff/pairing.py.
    """

    folder: str
    tensors: dict[str, Tensor]
    metadata: dict[str, dict | None] = field(default_factory=dict)
    tied: bool = False

    @cached_property
    def config_text(self) -> str:
        """config.json with its line ends as they are.

        It is read once, when first asked for: a diff's manifest can tell of a damaged one before that.
        """
        path = os.path.join(self.folder, "config.json")
        if not os.path.exists(path):
            raise UserError(f"{self.folder} has no config.json; expected a model's folder in Hugging Face format")
        return read_verbatim(path)

    @cached_property
    def config(self) -> dict:
        """config.json, parsed."""
        path = os.path.join(self.folder, "config.json")
        config = parse_json(self.config_text.removeprefix("\ufeff"), path)
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a JSON object; expected a model's configuration")
        return config

    @property
    def embedding(self) -> str | None:
        """The input embedding's name."""
        return next((name for name in self.tensors if name.endswith("embed_tokens.weight")), None)

    @property
    def size(self) -> tuple[int, int]:
        """Hidden size and number of layers, from the tensors."""
        layers = {int(n) for name in self.tensors for n in re.findall(r"\.layers\.(\d+)\.", name)}
        return self.tensors[self.embedding].shape[-1] if self.embedding else 0, len(layers)

    @property
    def rows(self) -> int:
        """Rows of the input embedding."""
        return self.tensors[self.embedding].shape[0] if self.embedding else 0

    @property
    def looks_like(self) -> str:
        """What the shapes say about the model, in words."""
        name = f"LLaMA-{_LLAMA[self.size]}" if self.size in _LLAMA else "a model"
        return f"{name} of hidden size {self.size[0]}, {self.size[1]} layers, {self.rows:,} rows"

    def layout(self) -> dict[str, list[str]]:
        """Lists each safetensors file's tensors by file name; empty for .bin files."""
        files: dict[str, list[str]] = {name: [] for name in self.metadata}
        for tensor in self.tensors.values() if files else ():
            files[os.path.basename(tensor.path)].append(tensor.name)
        return {name: tensors for name, tensors in files.items() if tensors}


def read_verbatim(path: str) -> str:
    """Reads a text file with its line ends as they are.

    Raises:
        UserError: It isn't UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); download it again") from error


def _is_rotary_buffer(name: str) -> bool:
    """Old LLaMA checkpoints saved a buffer that every model computes for itself."""
    return name.endswith("rotary_emb.inv_freq")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(folder: str) -> Checkpoint:
    """Locates the tensors of a folder, rotary buffers left out.

    Raises:
        UserError: There is no folder or it has no weights; a file is missing, truncated, damaged or a Git LFS pointer;
            a tensor is neither float32, float16 nor bfloat16. The message names the file.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; expected one that holds a checkpoint (download it first)")
    for single, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        index = os.path.join(folder, f"{single}.index.json")
        if os.path.exists(os.path.join(folder, single)):
            return _read_files(folder, {}, [single], read)
        if os.path.exists(index):
            promised = parse_weight_map(read_text(index), index)
            return _read_files(folder, promised, sorted(set(promised.values())), read)
    raise UserError(f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin and no index of shards")


def parse_weight_map(text: str, index: str) -> dict[str, str]:
    """Reads from an index which file of a sharded checkpoint holds which tensor.

    Args:
        text: The index.
        index: Its path, for the message.

    Raises:
        UserError: The text is no index, or names files of other folders.
    """
    found = parse_json(text, index, unique_keys=True)
    promised = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(promised, dict) or not promised or not all(isinstance(f, str) for f in promised.values()):
        raise UserError(f"{index} has no weight_map; download it again")
    for file in promised.values():
        if os.path.basename(file) != file or not file or "\0" in file:
            raise UserError(f"{index} names the shard {file!r:.80}; expected a file of this folder")
    return promised


def _read_files(folder: str, promised: dict[str, str], files: list[str], read: Callable) -> Checkpoint:
    found = Checkpoint(folder, {})
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing, though the index names it; download it again")
        with open(path, "rb") as file:
            if file.read(20).startswith(b"version https://git-"):
                raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {folder}")
        tensors = [tensor for tensor in read(path, found) if not _is_rotary_buffer(tensor.name)]
        for tensor in tensors:
            if tensor.dtype not in SAFETENSORS_DTYPES.values():
                raise UserError(f"{path}: {tensor.name} is {tensor.dtype}; expected float32, float16 or bfloat16")
            if twin := found.tensors.get(tensor.name):
                raise UserError(f"{tensor.name} is in {twin.path} and in {path}; a checkpoint has a tensor once")
            found.tensors[tensor.name] = tensor
    for name, file in promised.items():
        holder = found.tensors.get(name)
        if (holder is None or os.path.basename(holder.path) != file) and not _is_rotary_buffer(name):
            raise UserError(f"{os.path.join(folder, file)} lacks {name}, though the index names it; download it again")
    return found


def read_header(path: str) -> tuple[list[Tensor], dict | None]:
    """Reads the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the header's `__metadata__`.

    Raises:
        UserError: The file is truncated or too long, or breaks a rule of the format
            (https://github.com/huggingface/safetensors#format).
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > _MAX_HEADER_BYTES:
            raise UserError(f"{path} is truncated or not a safetensors file ({size:,} bytes); download it again")
        text = file.read(length)
    try:
        if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
            raise UserError("not a JSON object followed by spaces")
        header = parse_json(text, "JSON", unique_keys=True)
        metadata = header.pop("__metadata__", None)
        _check_metadata(metadata)
        spans = {name: _span(name, entry) for name, entry in header.items()}
        names, end = sorted(spans, key=spans.get), 0
        for name in names:
            if spans[name][0] != end:
                raise UserError(f"{name!r:.80} begins at byte {spans[name][0]:,}, where {end:,} is next")
            end = spans[name][1]
    except UserError as error:
        raise UserError(f"{path} has a damaged safetensors header: {error}; download it again") from error
    end += 8 + length
    if end != size:
        raise UserError(f"{path} is truncated or damaged: {size:,} bytes, its header says {end:,}; download it again")
    found = [(name, header[name]["dtype"], tuple(header[name]["shape"]), spans[name][0]) for name in names]
    return [Tensor(name, dtype, shape, path, 8 + length + begin) for name, dtype, shape, begin in found], metadata


def _check_metadata(metadata: Any) -> None:
    """Checks a header's `__metadata__`: absent, or texts by name."""
    if metadata is None:
        return
    texts = [text for item in metadata.items() for text in item] if isinstance(metadata, dict) else [None]
    if not all(isinstance(text, str) and not LONE_SURROGATE.search(text) for text in texts):
        raise UserError("__metadata__ does not map texts to texts")


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Returns begin and end of a tensor in the bytes behind the header, and checks its entry by itself.

    Example:
        {"dtype": "BF16", "shape": [2, 3], "data_offsets": [64, 76]} -> (64, 76): 2 x 3 x 2 = 12 bytes.
    """
    if LONE_SURROGATE.search(name) or not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{name!r:.80} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UserError(f"{name!r:.80} has the unknown type {dtype!r:.40}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 64 for n in numbers):
            raise UserError(f"{name!r:.80} has {numbers!r:.60} where whole numbers are expected")
    bits = prod(shape) * _BITS[dtype]
    if prod(max(1, n) for n in shape) >= 1 << 60 or bits % 8:
        raise UserError(f"{name!r:.80} has the impossible shape {shape!r:.60}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != bits // 8:
        raise UserError(f"{name!r:.80} has {bits // 8:,} bytes, but the data_offsets {offsets!r:.60}")
    return offsets[0], offsets[1]


def _read_safetensors(path: str, found: Checkpoint) -> list[Tensor]:
    tensors, found.metadata[os.path.basename(path)] = read_header(path)
    return tensors


def _read_bin(path: str, found: Checkpoint) -> list[Tensor]:
    """Maps the file just long enough to see where its tensors start; no page of their data is read."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated, or older than torch 1.6; download it again, or torch.save it again")
    import torch

    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        records = _zip_records(path)
    except Exception as error:  # what a damaged pickle may raise has no list
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path} is truncated, damaged or holds more than tensors ({reason})") from error
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a state dict: tensors by name")
    for name, tensor in state.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or not tensor.is_contiguous():
            raise UserError(
                f"{path}: {name} is not a contiguous tensor; expected a state dict as transformers saves it"
            )
    shift = _file_shift(
        [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in state.values()], records
    )
    if shift is None:
        raise UserError(f"{path}: its tensors are not where its zip directory says; save it again with torch.save")
    return [
        Tensor(name, names.get(t.dtype, str(t.dtype)), tuple(t.shape), path, t.data_ptr() - shift)
        for name, t in state.items()
    ]


def _zip_records(path: str) -> set[tuple[int, int]]:
    """Finds (offset of the data, size) of each storage that torch.save put into the zip file, uncompressed."""
    records = set()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if re.search(r"/data/\d+$", info.filename):
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                records.add((info.header_offset + 30 + name_length + extra_length, info.file_size))
    return records


def _file_shift(storages: list[tuple[int, int]], records: set[tuple[int, int]]) -> int | None:
    """Finds the address at which the file was mapped: the one that puts every storage where a record is.

    Example:
        Storages at addresses 5064 and 5128, 48 and 16 bytes long, and records {(64, 48), (128, 16)}: the file was
        mapped at 5000. The first storage is tried against every record of its size.
    """
    address, nbytes = min(storages, default=(0, 0))
    for offset, size in records:
        shift = address - offset
        if size == nbytes and all((a - shift, n) in records for a, n in storages):
            return shift
    return None if storages else 0


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass
class Output:
    """Safetensors files to be written.

    Attributes:
        folder: Where they will be.
        suffix: What their names end in until `publish`.
        tensors: Name -> the tensor's place.
        headers: File name, without the suffix -> the header's bytes.
        sizes: File name -> bytes.
    """

    folder: str
    suffix: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def create(self) -> None:
        """Makes the files with their headers and at full length, with the permissions of any new file."""
        for file, header in self.headers.items():
            descriptor = os.open(self._path(file), os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _take_space(descriptor, self.sizes[file])
                os.ftruncate(descriptor, self.sizes[file])
                os.pwrite(descriptor, header, 0)
            finally:
                os.close(descriptor)

    def publish(self) -> None:
        """Takes the suffix off the files' names."""
        for file in self.headers:
            os.rename(self._path(file), os.path.join(self.folder, file))

    def add_file(self, file: str, specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict | None) -> None:
        """Lays out a file as safetensors' own writer does, byte for byte.

        Args:
            file: Its name, without the suffix.
            specs: Tensor name -> (dtype, shape).
            metadata: The header's `__metadata__`.
        """
        header: dict = {} if metadata is None else {"__metadata__": metadata}
        end = 0
        for name in sorted(specs, key=lambda name: (_WIDEST_FIRST.index(specs[name][0]), name)):
            dtype, shape = specs[name]
            begin, end = end, end + prod(shape) * STORED[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.headers[file] = struct.pack("<Q", len(text)) + text
        self.sizes[file] = 8 + len(text) + end
        for name, (dtype, shape) in specs.items():
            offset = 8 + len(text) + header[name]["data_offsets"][0]
            self.tensors[name] = Tensor(name, dtype, shape, self._path(file), offset)

    def index_text(self) -> str:
        """Builds the index of a sharded checkpoint as transformers writes it."""
        tensors = self.tensors.values()
        metadata = {"total_parameters": sum(t.numel for t in tensors), "total_size": sum(t.nbytes for t in tensors)}
        files = {t.name: os.path.basename(t.path).removesuffix(self.suffix) for t in tensors}
        return json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True) + "\n"

    def _path(self, file: str) -> str:
        return os.path.join(self.folder, file + self.suffix)


def _take_space(descriptor: int, size: int) -> None:
    """Reserves a file's disk space before it is written, where the disk can; writing is a quarter faster then."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise


def plan_output_like(
    model: Checkpoint, folder: str, dtype: str | None = None, copies: dict[str, str] | None = None
) -> Output:
    """Lays out files for tensors like a model's, with names that end in ".part".

    Args:
        model: The checkpoint whose tensors, files and metadata to repeat.
        folder: Where the files will be.
        dtype: Type of all tensors; the model's own when None.
        copies: Further tensors: name -> the tensor whose type, shape and file it takes.
    """
    types = {name: SAFETENSORS_DTYPES[dtype] if dtype else tensor.dtype for name, tensor in model.tensors.items()}
    specs = {name: (types[name], tensor.shape) for name, tensor in model.tensors.items()}
    layout = model.layout()
    for copy, name in (copies or {}).items():
        specs[copy] = specs[name]
        for names in layout.values():
            names += [copy] if name in names else []
    return plan_output(folder, specs, layout, model.metadata, PART)


def plan_output(
    folder: str,
    specs: dict[str, tuple[str, tuple[int, ...]]],
    layout: dict[str, list[str]],
    metadata: dict[str, dict | None],
    suffix: str = "",
) -> Output:
    """Lays tensors out in safetensors files of 5 GB at most.

    Args:
        folder: Where the files will be.
        specs: Tensor name -> (dtype, shape), in the order in which to fill shards.
        layout: File name -> tensor names of a checkpoint whose files to repeat, unless one would exceed 5 GB.
        metadata: File name -> `__metadata__` of that checkpoint.
        suffix: What the file names end in until `Output.publish`.
    """
    sizes = {name: prod(shape) * STORED[dtype].itemsize for name, (dtype, shape) in specs.items()}
    if not layout or any(
        sum(sizes[n] for n in names) > MAX_SHARD_BYTES and len(names) > 1 for names in layout.values()
    ):
        layout, metadata = _pack(sizes), {}
    output = Output(folder, suffix)
    for file, names in layout.items():
        output.add_file(file, {n: specs[n] for n in names}, metadata.get(file, {"format": "pt"}))
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
