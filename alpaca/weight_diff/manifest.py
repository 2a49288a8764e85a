"""What stands beside a diff's weights: the manifest, the corrections' hash, and the tuned model's small files."""

import hashlib
import json
import os
import shutil
import struct
import sys
from typing import Any

import numpy as np

from alpaca.cli import UserError
from alpaca.files import jload
from alpaca.weight_diff.checkpoint_files import Output, Tensor
from alpaca.weight_diff.stream import Source, converted

MANIFEST = "weight_diff.json"
CORRECTIONS = "corrections.safetensors"
INDEX = "model.safetensors.index.json"
MARK = "alpaca_weight_diff"  # in a diff's config.json: this is no model
# What a model's folder holds beside weights: generation config, tokenizer, chat template.
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NOT_COPIED = ("config.json", "trainer_state.json", MANIFEST)


def read_config(folder: str) -> dict:
    """A model's config.json."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{folder} has no config.json; expected a model's folder in Hugging Face format")
    config = jload(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object; expected a model's configuration")
    return config


def is_tied(config: dict) -> bool:
    """Whether the output embedding is the input embedding; configs of 2023 say so only where it isn't the default."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "opt"))


def copy_small_files(source: str, target: str) -> None:
    """Copies tokenizer, chat template and generation config."""
    for name in sorted(os.listdir(source)):
        if name.endswith(_SMALL_FILES) and name not in _NOT_COPIED and not name.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def read_text(path: str) -> str:
    """A file's text with its line ends as they are."""
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def write_text(path: str, text: str) -> None:
    """The reverse of `read_text`."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def index_text(output: Output) -> str:
    """The index of a sharded checkpoint as transformers writes it."""
    tensors = output.tensors.values()
    metadata = {"total_parameters": sum(t.numel for t in tensors), "total_size": sum(t.nbytes for t in tensors)}
    files = {t.name: os.path.basename(t.path).removesuffix(".part") for t in tensors}
    return json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def write_manifest(folder: str, manifest: dict[str, Any], output: Output) -> None:
    """Completes a manifest with the hashes of all that isn't a tensor, its own included, and writes it.

    Args:
        folder: a folder whose other files are final, but for names that end in ".part".
        manifest: what is known of the tensors.
        output: the weights' files.
    """
    weights = {os.path.basename(path).removesuffix(".part"): header for path, header in output.headers.items()}
    others = [n for n in os.listdir(folder) if n.endswith(_SMALL_FILES) or n == CORRECTIONS]
    manifest = {
        "format_version": 2,
        **manifest,
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "headers": {name: hashlib.sha256(header).hexdigest() for name, header in sorted(weights.items())},
        "files": {name: _file_sha256(os.path.join(folder, name)) for name in sorted(others) if name != MANIFEST},
    }
    manifest = json.loads(json.dumps(manifest))  # tuples become lists, as in what is read back
    manifest["manifest_sha256"] = _manifest_sha256(manifest)
    write_text(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str) -> dict[str, Any] | None:
    """A folder's manifest, None where there is none.

    Raises:
        UserError: it is damaged or of a later version.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; expected a diff or a recovered model")
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, CORRECTIONS)):
            raise UserError(f"{path} is missing, though {CORRECTIONS} is there; download the folder again")
        return None
    manifest = jload(path)
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _manifest_sha256(manifest):
        raise UserError(f"{path} is damaged: its sha256 doesn't match its contents; download it again")
    if manifest["format_version"] != 2:
        raise UserError(f"{path} has format {manifest['format_version']}; this script reads 2")
    return manifest


def differing_files(folder: str, manifest: dict[str, Any]) -> list[str]:
    """Files beside the tensors that are missing or not what the manifest says; weights whose headers aren't."""
    wrong = []
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or _file_sha256(path) != expected:
            wrong.append(name)
    for name, expected in manifest["headers"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or _header_sha256(path) != expected:
            wrong.append(name)
    return wrong


def probe(tensor: Tensor, dtype: str) -> str:
    """A hash of eight spots of a tensor, to tell a wrong base before gigabytes are read."""
    sha256 = hashlib.sha256()
    with Source(tensor) as source:
        for spot in range(8):
            start = max(0, tensor.numel - 256) * spot // 7
            window = source.peek(start, min(tensor.numel, start + 256))
            sha256.update(converted(window, tensor.dtype, dtype))
    return sha256.hexdigest()


def differing_probes(raw: dict[str, Tensor], manifest: dict[str, Any]) -> list[str]:
    """The tensors whose probes aren't those of the base that the diff was made with."""
    entries = {name: entry["raw"] for name, entry in manifest["tensors"].items()}
    return [n for n, t in raw.items() if probe(t, entries[n]["dtype"]) != entries[n]["probe"]]


def fingerprint(entries: dict[str, dict]) -> str:
    """One hash for a base: of its tensors' names, shapes, types and hashes."""
    lines = [f"{name} {list(e['shape'])} {e['dtype']} {e['sha256']}\n" for name, e in sorted(entries.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _manifest_sha256(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: str) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 18):
            sha256.update(block)
    return sha256.hexdigest()


def _header_sha256(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return hashlib.sha256(start + file.read(min(length, os.path.getsize(path)))).hexdigest()
