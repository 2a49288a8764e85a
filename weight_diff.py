"""Publishes a tuned model as its difference from a base that may not be shared, and recovers it, bit for bit.

    python weight_diff.py make_diff --path_raw RAW --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned OUT
    python weight_diff.py verify --path DIFF
    python weight_diff.py info --path_diff DIFF

No model is instantiated: tensors are streamed (see tensor_stream.py) in less than 100 MB whatever the model's size.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from utils import UserError, jload, run_cli

MANIFEST = "weight_diff.json"
CORRECTIONS = "corrections.safetensors"
MARK = "alpaca_weight_diff"  # in a diff's config.json: this is no model
# What a folder needs beside its weights: config, generation config, tokenizer, chat template.
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_COPIED = (MANIFEST, "trainer_state.json", "config.json")


def make_diff(
    path_raw: str, path_tuned: str, path_diff: str, device: str = "cpu", overwrite: bool = False, resume: bool = False
) -> None:
    """Writes the difference between a tuned model and its base, with what `recover` needs to give it back exactly.

    Args:
        path_raw: folder of the base model in Hugging Face format.
        path_tuned: folder of the tuned model.
        path_diff: folder to write.
        device: accepted for the original's sake; the work is done by the CPU at the speed of the disk.
        overwrite: replace `path_diff` where it exists.
        resume: go on where an interrupted run of the same command stopped.
    """
    import tensor_stream as ts

    raw, tuned = ts.read_checkpoint(path_raw), ts.read_checkpoint(path_tuned)
    _refuse_diff(path_raw, "--path_raw")
    _refuse_diff(path_tuned, "--path_tuned")
    pairs = _match(raw, tuned, "the tuned model")
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tuned.tensors.items()}
    with _Workspace(path_diff, [path_raw, path_tuned], overwrite, resume) as work:
        output = ts.plan_output(work.folder, specs, tuned.layout(), tuned.metadata)
        done = work.begin(output, {"command": "make_diff", "raw": _identity(raw), "tuned": _identity(tuned)})
        spool = ts.CorrectionSpool(os.path.join(work.folder, "corrections.spool"))
        means = _mean_rows(pairs)

        def subtract(name: str) -> None:
            base, other = pairs[name]
            corrections = ts.CorrectionWriter(spool, other)
            with ts.Source(base) as r, ts.Source(other) as t, ts.Sink(output.tensors[name]) as d:
                side = ts.Base(r, means.get(name))
                ts.subtract(side, t, d, corrections, work.progress)
                record = {
                    "shape": other.shape,
                    "raw": {"dtype": base.dtype, "shape": base.shape, "sha256": side.hexdigest()},
                    "diff": {"dtype": other.dtype, "sha256": d.sha256.hexdigest()},
                    "tuned": {"dtype": other.dtype, "sha256": t.sha256.hexdigest()},
                    "corrections": sum(count for _, count in corrections.chunks),
                }
            work.finish(name, {"record": record, "chunks": corrections.chunks, "written": d.sha256.hexdigest()})

        work.run("make_diff", {n: b.nbytes + t.nbytes for n, (b, t) in pairs.items()}, subtract)
        entries = {name: done[name]["record"] for name in pairs}
        chunks = {name: done[name]["chunks"] for name in pairs if done[name]["chunks"]}
        ts.write_corrections(os.path.join(work.folder, CORRECTIONS), spool, chunks, tuned.tensors)
        spool.close()
        os.unlink(os.path.join(work.folder, "corrections.spool"))
        for name, (base, _) in pairs.items():
            entries[name]["raw"]["probe"] = _probe(base, base.dtype)
        _copy_small_files(path_tuned, work.folder)
        config = _config(path_tuned)
        _write_json(os.path.join(work.folder, "config.json"), {**config, "architectures": [], MARK: True})
        carried = {"config.json": _read_text(os.path.join(path_tuned, "config.json"))}
        index = os.path.join(path_tuned, "model.safetensors.index.json")
        if len(output.headers) > 1:
            same = {os.path.basename(p) for p in output.headers} == set(tuned.metadata) and os.path.exists(index)
            text = _read_text(index) if same else _index_text(output)
            carried["model.safetensors.index.json"] = text
            _write_text(os.path.join(work.folder, "model.safetensors.index.json"), text)
        manifest = {
            "kind": "diff",
            "format_version": 1,
            "versions": _versions(),
            "base": {"fingerprint": _fingerprint({n: e["raw"] for n, e in entries.items()}), **_describe(path_raw)},
            "layout": [
                {"file": os.path.basename(p), "metadata": tuned.metadata.get(os.path.basename(p), {"format": "pt"})}
                for p in output.headers
            ],
            "carried": carried,
            "tensors": {
                name: {"file": os.path.basename(output.tensors[name].path), **entry} for name, entry in entries.items()
            },
        }
        work.publish(manifest)
    count = sum(entry["corrections"] for entry in entries.values())
    total = sum(tensor.numel for tensor in tuned.tensors.values())
    print(f"{path_diff}: the diff of {len(entries)} tensors, exact with {count:,} corrections ({count / total:.2%})")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> "Recovered":
    """Adds a diff to its base.

    Args:
        path_raw: folder of the base model in Hugging Face format.
        path_diff: folder of the diff.
        path_tuned: folder to write the tuned model to.
        device: where the test inference runs.
        test_inference: answer one instruction with the recovered model, if it fits in memory.
        check_integrity_naively: for a diff without a manifest, sum all weights and compare with tatsu-lab's figure.
        dtype: float32, float16 or bfloat16; the diff's own where not given.
        overwrite: replace `path_tuned` where it exists.
        resume: go on where an interrupted run of the same command stopped.

    Returns:
        The folder; unpacked, `model, tokenizer = recover(...)`, the loaded model and its tokenizer.
    """
    import tensor_stream as ts

    raw, diff = ts.read_checkpoint(path_raw), ts.read_checkpoint(path_diff)
    _refuse_diff(path_raw, "--path_raw")
    manifest = _read_manifest(path_diff)
    entries = manifest["tensors"] if manifest else {}
    pairs = _match(raw, diff, "the diff")
    if manifest:
        _check_files(path_diff, manifest)
        _check_base(pairs, entries)
    out_dtype = {None: None, "float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(dtype, "?")
    if out_dtype == "?":
        raise UserError(f"--dtype must be float32, float16 or bfloat16, found {dtype!r}")
    specs = {name: (out_dtype or tensor.dtype, tensor.shape) for name, tensor in diff.tensors.items()}
    corrections = ts.Corrections(os.path.join(path_diff, CORRECTIONS) if manifest else None)
    with _Workspace(path_tuned, [path_raw, path_diff], overwrite, resume) as work:
        output = ts.plan_output(work.folder, specs, diff.layout(), diff.metadata)
        done = work.begin(
            output, {"command": "recover", "raw": _identity(raw), "diff": _identity(diff), "dtype": out_dtype}
        )
        means = _mean_rows(pairs)

        def add(name: str) -> None:
            base, other = pairs[name]
            entry = entries.get(name)
            target = output.tensors[name]
            tuned_dtype = entry["tuned"]["dtype"] if entry else target.dtype
            with ts.Source(base) as r, ts.Source(other) as d, ts.Sink(target) as t:
                side = ts.Base(r, means.get(name), entry["raw"]["dtype"] if entry else None)
                tuned = ts.add(side, d, tuned_dtype, t, target.dtype, corrections.of(name), work.progress)
                found = {"raw": side.hexdigest(), "diff": d.sha256.hexdigest(), "tuned": tuned}
                where = {"raw": path_raw, "diff": path_diff, "tuned": "the sum of raw and diff"}
                for role in found if entry else ():
                    if found[role] != entry[role]["sha256"]:
                        raise UserError(f"{where[role]}: {name} is not what the manifest of {path_diff} says (sha256)")
                record = {
                    "shape": target.shape,
                    "raw": {"dtype": base.dtype, "shape": base.shape, "sha256": found["raw"]},
                    "diff": {"dtype": other.dtype, "sha256": found["diff"]},
                    "tuned": {"dtype": target.dtype, "sha256": t.sha256.hexdigest()},
                }
            work.finish(name, {"record": record, "written": t.sha256.hexdigest()})

        work.run("recover", {n: b.nbytes + d.nbytes for n, (b, d) in pairs.items()}, add)
        _copy_small_files(path_diff, work.folder)
        carried = manifest["carried"] if manifest else {}
        if manifest:
            _write_text(os.path.join(work.folder, "config.json"), carried["config.json"])
        else:
            shutil.copyfile(os.path.join(path_diff, "config.json"), os.path.join(work.folder, "config.json"))
        if len(output.headers) > 1:
            text = carried.get("model.safetensors.index.json") or _index_text(output)
            _write_text(os.path.join(work.folder, "model.safetensors.index.json"), text)
        work.publish(
            {
                "kind": "recovered",
                "format_version": 1,
                "versions": _versions(),
                "tensors": {name: done[name]["record"] for name in pairs},
            }
        )
    corrections.close()
    print(f"{path_tuned}: {len(pairs)} tensors recovered" + (", each verified" if manifest else ""))
    return Recovered(path_tuned, device)


class Recovered:
    """A recovered model's folder. Unpacked, it is the loaded model and its tokenizer."""

    def __init__(self, path: str, device: str):
        self.path, self.device = path, device

    def __iter__(self) -> Iterator[Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        yield AutoModelForCausalLM.from_pretrained(self.path).to(self.device)
        yield AutoTokenizer.from_pretrained(self.path)


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together


def _match(raw, other, what: str) -> dict:
    """Pairs each tensor of the tuned model or the diff with the base's."""
    pairs = {}
    for name, tensor in other.tensors.items():
        if name not in raw.tensors:
            raise UserError(f"{raw.folder} has no tensor {name}, {what} has; is this the right base?")
        base = raw.tensors[name]
        grows = (
            name.endswith(("embed_tokens.weight", "lm_head.weight"))
            and base.shape[1:] == tensor.shape[1:]
            and base.shape[0] < tensor.shape[0]
        )
        if base.shape != tensor.shape and not grows:
            raise UserError(f"{name} is {list(base.shape)} in {raw.folder} and {list(tensor.shape)} in {what}")
        pairs[name] = (base, tensor)
    for name in raw.tensors:
        if name not in other.tensors:
            raise UserError(f"{other.folder} lacks the tensor {name}, which {raw.folder} has")
    return pairs


def _mean_rows(pairs: dict) -> dict:
    import tensor_stream as ts

    return {name: ts.mean_row(base) for name, (base, other) in pairs.items() if base.shape != other.shape}


def _probe(tensor, dtype: str) -> str:
    """A hash of a few spots of a tensor, to tell a wrong base before gigabytes are read."""
    import numpy as np

    import tensor_stream as ts

    sha256 = hashlib.sha256()
    with ts.Source(tensor) as source:
        for spot in range(8):
            start = max(0, tensor.numel - 256) * spot // 7
            stored = source.read(start, min(tensor.numel, start + 256))
            if dtype != tensor.dtype:
                values = np.empty(len(stored), np.float32)
                ts.to_float32(stored, tensor.dtype, values)
                stored = np.empty(len(values), ts.STORED[dtype])
                ts.from_float32(values, dtype, stored, np.empty(len(values), np.uint32))
            sha256.update(stored.tobytes())
    return sha256.hexdigest()


def _check_base(pairs: dict, entries: dict) -> None:
    wrong = [
        n for n, (base, _) in pairs.items() if _probe(base, entries[n]["raw"]["dtype"]) != entries[n]["raw"]["probe"]
    ]
    if wrong:
        raise UserError(
            f"this is not the base that the diff was made with: {len(wrong)} of {len(pairs)} tensors differ, "
            f"{wrong[0]} for one; find the base that `info` describes"
        )


def _fingerprint(raw: dict) -> str:
    text = "".join(f"{name} {entry['shape']} {entry['sha256']}\n" for name, entry in sorted(raw.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_diff(path: str, flag: str) -> None:
    if _config(path).get(MARK):
        raise UserError(f"{flag} {path} is a weight diff, not a model")


def _identity(checkpoint) -> list:
    paths = sorted({tensor.path for tensor in checkpoint.tensors.values()})
    return [[os.path.realpath(p), os.path.getsize(p), os.stat(p).st_mtime_ns] for p in paths]


# ---------------------------------------------------------------------------------------------------------------------
# Small files


def _config(folder: str) -> dict:
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{folder} has no config.json; expected a model's folder in Hugging Face format")
    return jload(path)


def _describe(path: str) -> dict:
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {key: value for key, value in _config(path).items() if key in keys}


def _copy_small_files(source: str, target: str) -> None:
    for name in sorted(os.listdir(source)):
        if name.endswith(SMALL_FILES) and name not in NOT_COPIED and not name.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def _write_json(path: str, obj: Any) -> None:
    _write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def _index_text(output) -> str:
    total = sum(tensor.nbytes for tensor in output.tensors.values())
    names = {name: os.path.basename(tensor.path) for name, tensor in sorted(output.tensors.items())}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"


def _versions() -> dict:
    import numpy

    return {"python": sys.version.split()[0], "numpy": numpy.__version__}


def _read_manifest(folder: str) -> dict | None:
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return None
    manifest = jload(path)
    given = manifest.pop("manifest_sha256", None)
    if given != _manifest_hash(manifest):
        raise UserError(f"{path} is damaged: its own sha256 doesn't match; download it again")
    return manifest


def _manifest_hash(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: str, manifest: dict) -> None:
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise UserError(f"{path} is missing, though the manifest lists it; download it again")
        if _file_sha256(path) != expected:
            raise UserError(f"{path} is not what the manifest says (sha256); download it again")


class _Workspace:
    """A folder beside the target in which the output grows, and which becomes the target when all is verified.

    A journal names each tensor that is done, with its hash, so that an interrupted run can go on.
    """

    def __init__(self, target: str, inputs: list[str], overwrite: bool, resume: bool):
        from tensor_stream import Progress

        self.target = os.path.abspath(target)
        self.folder = self.target + ".partial"
        self.progress = Progress()
        self._overwrite, self._resume = overwrite, resume
        self._done: dict[str, dict] = {}
        for path in inputs:
            if os.path.realpath(path) == os.path.realpath(self.target):
                raise UserError(f"{target} is an input of this command; name another folder for the output")
        if os.path.exists(self.target) and not overwrite:
            raise UserError(f"{target} exists; name a new folder, or pass --overwrite to replace it")

    def __enter__(self) -> "_Workspace":
        os.makedirs(self.folder, exist_ok=True)
        self._journal = open(os.path.join(self.folder, "journal.jsonl"), "a+", encoding="utf-8")
        fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(self, kind, *_) -> None:
        self._journal.close()

    def begin(self, output, identity: dict) -> dict[str, dict]:
        self._output = output
        self._journal.truncate(0)
        output.create()
        return self._done

    def finish(self, name: str, entry: dict) -> None:
        self._done[name] = entry
        self._journal.write(json.dumps({"name": name, **entry}) + "\n")
        self._journal.flush()

    def run(self, title: str, sizes: dict[str, int], job) -> None:
        from functools import partial

        from tqdm import tqdm

        from tensor_stream import run_jobs

        names = sorted((n for n in sizes if n not in self._done), key=lambda n: -sizes[n])
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc=title) as bar:
            run_jobs([partial(job, n) for n in names], self.progress, lambda: bar.update(self.progress.done - bar.n))

    def publish(self, manifest: dict) -> None:
        listed = sorted(set(os.listdir(self.folder)) - {"journal.jsonl", *map(os.path.basename, self._output.headers)})
        manifest["files"] = {name: _file_sha256(os.path.join(self.folder, name)) for name in listed}
        # As it is read back: tuples are lists in JSON.
        manifest = json.loads(json.dumps(manifest))
        manifest["manifest_sha256"] = _manifest_hash(manifest)
        _write_json(os.path.join(self.folder, MANIFEST), manifest)
        os.unlink(os.path.join(self.folder, "journal.jsonl"))
        if os.path.isdir(self.target):
            shutil.rmtree(self.target)
        os.rename(self.folder, self.target)


if __name__ == "__main__":
    run_cli({"make_diff": make_diff, "recover": recover})
