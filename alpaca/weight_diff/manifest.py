"""Everything in a folder beside its weights: manifest, config.json, index and small files such as the tokenizer's."""

import hashlib
import json
import os
import shutil
import struct
import sys
from typing import Any

import numpy as np

from alpaca.cli import UserError
from alpaca.files import jload, parse_json
from alpaca.models import DIFF_MARK
from alpaca.weight_diff.checkpoint_files import (
    INDEX,
    SAFETENSORS_DTYPES,
    Checkpoint,
    Output,
    parse_weight_map,
    read_verbatim,
)
from alpaca.weight_diff.corrections import CORRECTIONS

MANIFEST = "weight_diff.json"
# What a model's folder holds beside weights: generation config, tokenizer, chat template.
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# In a folder that isn't finished: the first file to be written and the last to be removed.
MARKER = "weight_diff.unfinished"
_DTYPE, _SIZES = set(SAFETENSORS_DTYPES.values()), [int]
_HASHED = {"dtype": _DTYPE, "sha256": str}
_BESIDE = {"versions": {str: str}, "headers": {str: str}, "files": {str: str}}
# What a manifest of each kind holds at least. {str: form} is an object with any names, [form] a list of any length, and
# a set lists the values that may stand there.
_FORMS: dict[str, dict] = {
    "diff": {
        "base": {"fingerprint": str, "is": str},
        "carried": {str: str},
        "copies": {str: str},
        "tensors": {
            str: {
                "shape": _SIZES,
                "raw": {**_HASHED, "shape": _SIZES, "checksum": str, "probe": str},
                "diff": {**_HASHED, "checksum": str},
                "tuned": _HASHED,
                "corrections": int,
            }
        },
        **_BESIDE,
    },
    "recovered": {"tensors": {str: {"shape": _SIZES, "tuned": _HASHED}}, **_BESIDE},
}
_NOT_COPIED = ("config.json", "trainer_state.json", MANIFEST)


def finish_diff(
    output: Output, raw: Checkpoint, tuned: Checkpoint, entries: dict[str, dict], copies: dict[str, str]
) -> None:
    """Writes a diff's small files, index, config.json and manifest; its weights and corrections are there already.

    The manifest carries the tuned config.json, and its index if it has one, verbatim, because the diff's copies differ.

    Args:
        output: The diff's weights.
        raw: The base.
        tuned: The tuned model.
        entries: Tensor name -> its entry in the manifest.
        copies: Tensors that the diff holds twice: second name -> first name.
    """
    carried = {"config.json": tuned.config_text}
    if tuned.metadata and os.path.exists(index := os.path.join(tuned.folder, INDEX)):
        carried[INDEX] = read_verbatim(index)
    _copy_small_files(tuned.folder, output.folder)
    _write_index(output, None if copies else carried.get(INDEX))
    config = {**tuned.config, "architectures": [], DIFF_MARK: True}
    if copies:
        config["tie_word_embeddings"] = False
    _write_text(os.path.join(output.folder, "config.json"), _config_text(config))
    base = {"fingerprint": _fingerprint({n: e["raw"] for n, e in entries.items()}), "is": raw.looks_like}
    _write_manifest(output, {"kind": "diff", "base": base, "carried": carried, "copies": copies, "tensors": entries})


def finish_model(
    output: Output, diff: Checkpoint, manifest: dict[str, Any] | None, dtype: str | None, entries: dict[str, dict]
) -> None:
    """Writes a recovered model's small files, index, config.json and manifest; its weights are there already.

    Args:
        output: The model's weights.
        diff: The diff.
        manifest: Its manifest; None for a diff of 2023.
        dtype: The type that the user asked for, or None.
        entries: Tensor name -> its entry in the manifest.
    """
    carried = manifest["carried"] if manifest else {"config.json": diff.config_text}
    _copy_small_files(diff.folder, output.folder)
    _write_index(output, carried.get(INDEX) if dtype is None else None)
    text = carried["config.json"]
    if dtype:
        config = parse_json(text.removeprefix("\ufeff"), "config.json")
        key = "dtype" if "dtype" in config else "torch_dtype"
        text = text if config.get(key) == dtype else _config_text({**config, key: dtype})
    _write_text(os.path.join(output.folder, "config.json"), text)
    _write_manifest(output, {"kind": "recovered", "tensors": entries})


def small_files(folder: str) -> list[str]:
    """Lists the files to copy beside the weights: tokenizer, chat template, generation config.

    Raises:
        UserError: One of them can't be copied: a link to nothing, a folder, a pipe, a file that may not be read.
    """
    names = [n for n in sorted(os.listdir(folder)) if n.endswith(_SMALL_FILES) and not n.endswith(".index.json")]
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise UserError(f"{path} is not a readable file (a link to nothing, or a folder?); restore or remove it")
    return [name for name in names if name not in _NOT_COPIED]


def _copy_small_files(source: str, target: str) -> None:
    for name in small_files(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def _write_index(output: Output, carried: str | None) -> None:
    """Writes a sharded checkpoint's index: the carried text, byte for byte, if it names the same files."""
    if set(output.headers) == {"model.safetensors"}:
        return
    same = carried is not None and set(parse_weight_map(carried, INDEX).values()) == set(output.headers)
    _write_text(os.path.join(output.folder, INDEX), carried if same else output.index_text())


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def _config_text(config: dict) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def _write_manifest(output: Output, manifest: dict[str, Any]) -> None:
    """Completes a manifest with the hashes of everything that isn't a tensor, its own included, and writes it.

    All other files of the folder are final by now, except that the weights' names may still end in ".part".
    """
    others = [n for n in os.listdir(output.folder) if n.endswith(_SMALL_FILES) or n == CORRECTIONS]
    manifest = {
        "format_version": 2,
        **manifest,
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "headers": {name: hashlib.sha256(header).hexdigest() for name, header in sorted(output.headers.items())},
        "files": {n: _file_sha256(os.path.join(output.folder, n)) for n in sorted(others) if n != MANIFEST},
    }
    manifest = json.loads(json.dumps(manifest))  # tuples become lists, as in what is read back
    manifest["manifest_sha256"] = _manifest_sha256(manifest)
    path = os.path.join(output.folder, MANIFEST)
    _write_text(path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str) -> dict[str, Any] | None:
    """Reads a folder's manifest; None if it has none.

    Raises:
        UserError: The manifest is damaged, missing beside corrections, or has a later format.
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
    if (version := manifest.get("format_version")) != 2:
        raise UserError(f"{path} has format {version!r:.40}; this script reads 2")
    _check_form(path, manifest)
    return manifest


def _check_form(path: str, manifest: dict[str, Any]) -> None:
    """Refuses a manifest that somebody has edited and hashed again, so that it lacks what the commands read."""
    kind, carried = manifest.get("kind"), manifest.get("carried")
    whole = isinstance(kind, str) and kind in _FORMS and _has_form(manifest, _FORMS[kind])
    if whole and kind == "diff":
        whole = "config.json" in carried and set(manifest["copies"].values()) <= manifest["tensors"].keys()
    if not whole:
        raise UserError(f"{path} lacks what a manifest has, or has something else in its place; download it again")
    if kind == "diff":
        if not isinstance(parse_json(carried["config.json"].removeprefix("\ufeff"), f"{path}, config.json"), dict):
            raise UserError(f"{path} carries a config.json that is not a JSON object; download it again")
        if INDEX in carried:
            parse_weight_map(carried[INDEX], f"{path}, {INDEX}")


def _has_form(value: Any, form: Any) -> bool:
    if isinstance(form, set):
        return isinstance(value, str) and value in form
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return type(value) is form
    if not isinstance(value, dict):
        return False
    if str in form:
        return all(_has_form(item, form[str]) for item in value.values())
    return all(name in value and _has_form(value[name], inner) for name, inner in form.items())


def differing_files(folder: str, manifest: dict[str, Any]) -> list[str]:
    """Lists the files that are missing or differ from the manifest; of a weights file only its header counts."""
    expected = {name: (_file_sha256, sha256) for name, sha256 in manifest["files"].items()}
    expected |= {name: (_header_sha256, sha256) for name, sha256 in manifest["headers"].items()}
    paths = {name: os.path.join(folder, name) for name in expected}
    return [
        name
        for name, (hash_of, sha256) in expected.items()
        if not os.path.isfile(paths[name]) or hash_of(paths[name]) != sha256
    ]


def not_ours(folder: str) -> str | None:
    """Says what is in a folder that this script did not write, or None if it wrote all of it.

    The proof is the folder's own manifest: it names every file, and the hash of all but the weights.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error).split(";")[0]
    if manifest is None:
        return f"it has no manifest ({MANIFEST})"
    known = {MANIFEST, MARKER, *manifest["files"], *manifest["headers"]}
    entries = {entry.name: entry for entry in os.scandir(folder)}
    strange = sorted(n for n, e in entries.items() if n not in known or not e.is_file(follow_symlinks=False))
    changed = sorted(set(differing_files(folder, manifest)) & entries.keys())
    for names, what in ((strange, "it also holds"), (changed, "it has other contents in")):
        if names:
            return f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return None


def _fingerprint(entries: dict[str, dict]) -> str:
    """Hashes the names, shapes, types and hashes of a base's tensors into one hash for the base."""
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
