"""Publishes a tuned model as its difference from a base that may not be shared, and recovers it, bit for bit.

    python weight_diff.py make_diff --path_raw RAW --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned OUT
    python weight_diff.py verify --path DIFF
    python weight_diff.py info --path_diff DIFF

No model is instantiated: tensors are streamed (alpaca/weight_diff/stream.py) in less than 100 MB at any size.

A diff is tuned - raw in the tuned model's types and files, and beside it `corrections.safetensors`, the elements that
raw + diff doesn't give back to the bit, and `weight_diff.json`, the sha256 of every tensor of raw, diff and tuned.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from alpaca.cli import UserError, run_cli
from alpaca.models import host_memory, load_model
from alpaca.prompts import format_prompt
from alpaca.tokenizers import load_tokenizer
from alpaca.weight_diff.checkpoint_files import DTYPES, Checkpoint, Output, Tensor, plan_output, read_checkpoint
from alpaca.weight_diff.corrections import CorrectionReader, CorrectionSpool, CorrectionWriter, read_corrections
from alpaca.weight_diff.manifest import (
    CORRECTIONS,
    INDEX,
    MARK,
    copy_small_files,
    differing_files,
    differing_probes,
    fingerprint,
    index_text,
    probe,
    read_config,
    read_manifest,
    read_text,
    write_manifest,
    write_text,
)
from alpaca.weight_diff.pairing import (
    Pairs,
    added_row,
    check_base,
    is_subtracted_twice,
    match_tensors,
    pair_sizes,
    read_diff,
    read_model,
    tied_copies,
)
from alpaca.weight_diff.partial_folder import SPOOL, SUFFIX, PartialFolder, run_with_bar
from alpaca.weight_diff.stream import (
    Base,
    Checksum,
    Progress,
    Sha256AndChecksum,
    Sink,
    Source,
    add,
    copy_tensor,
    sha256_of,
    subtract,
)

# The sum of all elements of tatsu-lab's alpaca-7b that the original's `recover` asks for, and the part of it that comes
# from the rotary buffers, which checkpoints held then: 32 layers of sum(10000 ** (-i / 64) for i in range(64)).
ALPACA_7B_SUM = 50637.1836
ROTARY_7B_SUM = 238.72


def make_diff(
    path_raw: str, path_tuned: str, path_diff: str, device: str = "cpu", overwrite: bool = False, resume: bool = False
) -> None:
    """Writes the difference between a tuned model and its base, with what `recover` needs to give it back exactly.

    Args:
        path_raw: folder of the base model in Hugging Face format.
        path_tuned: folder of the tuned model.
        path_diff: folder to write.
        device: accepted as in the original; the disk sets the pace.
        overwrite: replace `path_diff` where it exists.
        resume: go on where an interrupted run of the same command stopped.

    Raises:
        UserError: the two don't belong together, a file is damaged, the target exists or the disk is too small.
    """
    work = PartialFolder(path_diff, [path_raw, path_tuned], overwrite, resume)
    raw, tuned = read_model(path_raw, "--path_raw"), read_model(path_tuned, "--path_tuned")
    pairs = match_tensors(raw, tuned)
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tuned.tensors.items()}
    layout, copies = tuned.layout(), tied_copies(tuned)
    for copy, name in copies.items():
        specs[copy] = specs[name]
        for names in layout.values():
            names += [copy] if name in names else []
    with work:
        output = plan_output(work.folder, specs, layout, tuned.metadata, SUFFIX)
        done = work.begin(output, {"make_diff": [raw.identity(), tuned.identity()]})
        spool = CorrectionSpool(os.path.join(work.folder, SPOOL))

        def job(name: str) -> None:
            base, other = pairs[name]
            corrections = CorrectionWriter(spool)
            raw_digest, diff_digest, tuned_digest = Sha256AndChecksum(), Sha256AndChecksum(), hashlib.sha256()
            with (
                Source(base, digest=raw_digest, evict=True) as r,
                Source(other, digest=tuned_digest, evict=True) as t,
                Sink(output.tensors[name], diff_digest) as d,
            ):
                subtract(Base(r, added_row(base, other)), t, d, corrections, work.progress)
            entry = {
                "shape": other.shape,
                "raw": {"dtype": base.dtype, "shape": base.shape, **raw_digest.entry()},
                "diff": {"dtype": other.dtype, **diff_digest.entry()},
                "tuned": {"dtype": other.dtype, "sha256": tuned_digest.hexdigest()},
                "corrections": sum(count for _, count in corrections.chunks),
            }
            entry["raw"]["probe"] = probe(base, base.dtype)
            work.finish(name, {"entry": entry, "chunks": corrections.chunks})

        work.run("make_diff", pair_sizes(pairs), job)
        for copy, name in copies.items():
            copy_tensor(output.tensors[name], output.tensors[copy])
        chunks = {name: done[name]["chunks"] for name in sorted(pairs) if done[name]["chunks"]}
        spool.gather(os.path.join(work.folder, CORRECTIONS), chunks, tuned.tensors)
        entries = {name: done[name]["entry"] for name in pairs}
        _finish_diff(raw, tuned, output, entries, copies)
        work.publish()
    count = sum(entry["corrections"] for entry in entries.values())
    total = sum(other.numel for _, other in pairs.values())
    print(f"{path_diff}: {len(pairs)} tensors, exact with {count:,} corrections ({count / total:.2%} of the elements)")


def _finish_diff(
    raw: Checkpoint, tuned: Checkpoint, output: Output, entries: dict[str, dict], copies: dict[str, str]
) -> None:
    """Writes all but the weights; the manifest carries what of the tuned model's files the diff has otherwise."""
    folder = os.path.dirname(next(iter(output.headers)))
    carried = {"config.json": read_text(os.path.join(tuned.folder, "config.json"))}
    index = os.path.join(tuned.folder, INDEX)
    if os.path.exists(index) and tuned.metadata:
        carried[INDEX] = read_text(index)
    copy_small_files(tuned.folder, folder)
    _write_index(output, {} if copies else carried)
    config = {**read_config(tuned.folder), "architectures": [], MARK: True}
    if copies:
        config["tie_word_embeddings"] = False
    manifest = {
        "kind": "diff",
        "base": {"fingerprint": fingerprint({n: e["raw"] for n, e in entries.items()}), "is": raw.looks_like},
        "carried": carried,
        "copies": copies,
        "tensors": entries,
    }
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write_manifest(folder, manifest, output)


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
    """Adds a diff to its base, and verifies both and the sum where the diff has a manifest.

    Args:
        path_raw: folder of the base model in Hugging Face format.
        path_diff: folder of the diff.
        path_tuned: folder to write the tuned model to; without it the model is only tested, or returned to Python.
        device: where the test inference runs.
        test_inference: answer one instruction with the recovered model, if it fits in memory.
        check_integrity_naively: for a diff without a manifest, sum all elements and compare with alpaca-7b's figure.
        dtype: float32, float16 or bfloat16; the diff's own when None.
        overwrite: replace `path_tuned` where it exists.
        resume: go on where an interrupted run of the same command stopped.

    Returns:
        The folder. Unpacked, `model, tokenizer = recover(...)`, it is the loaded model and its tokenizer.

    Raises:
        UserError: the two don't belong together, a file is damaged, the target exists or the disk is too small.
    """
    if path_tuned is None:
        with tempfile.TemporaryDirectory(prefix="recovered_") as folder:
            target = os.path.join(folder, "model")
            recovered = recover(path_raw, path_diff, target, device, False, check_integrity_naively, dtype)
            recovered.load()
        if test_inference:
            recovered.answer()
        return recovered
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype must be {', '.join(DTYPES)}, found {dtype!r}")
    work = PartialFolder(path_tuned, [path_raw, path_diff], overwrite, resume)
    raw, diff, manifest = read_model(path_raw, "--path_raw"), *read_diff(path_diff)
    for copy in manifest["copies"] if manifest else ():
        raw.tensors.pop(copy, None)  # of a base whose embeddings aren't tied, as the tuned model's are
    pairs = match_tensors(raw, diff)
    twice = None  # the tensor to which the base is added twice
    if manifest:
        check_base(raw, pairs, manifest)
    else:
        twice = diff.embedding if is_subtracted_twice(diff, pairs) else None
        print(f"{path_diff} has no manifest: what is recovered is raw + diff in float32, and cannot be verified")
    specs = {name: (DTYPES[dtype] if dtype else tensor.dtype, tensor.shape) for name, tensor in diff.tensors.items()}
    with work:
        output = plan_output(work.folder, specs, diff.layout(), diff.metadata, SUFFIX)
        done = work.begin(output, {"recover": [raw.identity(), diff.identity(), dtype]})
        job = _Addition(diff, manifest, pairs, twice, output, work)
        work.run("recover", pair_sizes(pairs), job)
        entries = {name: done[name]["entry"] for name in pairs}
        _finish_model(path_diff, manifest, dtype, output, entries)
        work.publish()
    print(f"{path_tuned}: {len(pairs)} tensors recovered" + (", each one verified" if manifest else ""))
    if not manifest and check_integrity_naively:
        print(_naive_integrity(sum(done[name]["total"] for name in pairs), diff))
    recovered = Recovered(path_tuned, device)
    if test_inference:
        recovered.answer()
    return recovered


class _Addition:
    """Recovers and verifies one tensor at a time; called by several threads."""

    def __init__(
        self,
        diff: Checkpoint,
        manifest: dict[str, Any] | None,
        pairs: Pairs,
        twice: str | None,
        output: Output,
        work: PartialFolder,
    ):
        self._pairs, self._output, self._work = pairs, output, work
        self._entries = manifest["tensors"] if manifest else {}
        self._corrections = read_corrections(os.path.join(diff.folder, CORRECTIONS)) if manifest else None
        self._twice = twice

    def __call__(self, name: str) -> None:
        base, diff = self._pairs[name]
        target = self._output.tensors[name]
        entry = self._entries.get(name)
        dtypes = (entry["tuned"]["dtype"] if entry else target.dtype, target.dtype)
        corrections = CorrectionReader(self._corrections, name)
        sha256 = hashlib.sha256()
        with (
            Source(base, digest=Checksum(), evict=True) as r,
            Source(diff, digest=Checksum(), evict=True) as d,
            Sink(target, sha256) as t,
        ):
            side = Base(r, added_row(base, diff), entry["raw"]["dtype"] if entry else None)
            times = 2 if name == self._twice else 1
            tuned_sha256, total = add(side, d, t, corrections, dtypes, self._work.progress, times)
        if entry:
            raw_checksum, diff_checksum = r.digest.hexdigest(), d.digest.hexdigest()
            _expect(raw_checksum == entry["raw"]["checksum"], base, "it is damaged, or of another base")
            _expect(diff_checksum == entry["diff"]["checksum"], diff, "it is damaged; download it again")
            _expect(
                tuned_sha256 == entry["tuned"]["sha256"], target, "raw + diff isn't the tuned tensor; `verify` both"
            )
        found = {"shape": target.shape, "tuned": {"dtype": target.dtype, "sha256": sha256.hexdigest()}}
        self._work.finish(name, {"entry": found, "total": total})


def _expect(right: bool, tensor: Tensor, otherwise: str) -> None:
    if not right:
        raise UserError(f"{tensor.name} in {tensor.path} is not what the diff's manifest says: {otherwise}")


def _finish_model(
    path_diff: str, manifest: dict[str, Any] | None, dtype: str | None, output: Output, entries: dict[str, dict]
) -> None:
    """Writes all but the weights."""
    folder = os.path.dirname(next(iter(output.headers)))
    carried = manifest["carried"] if manifest else {"config.json": read_text(os.path.join(path_diff, "config.json"))}
    copy_small_files(path_diff, folder)
    _write_index(output, carried if dtype is None else {})
    config, text = json.loads(carried["config.json"]), carried["config.json"]
    key = "dtype" if "dtype" in config else "torch_dtype"
    if dtype and config.get(key) != dtype:
        text = json.dumps({**config, key: dtype}, indent=2, ensure_ascii=False) + "\n"
    write_text(os.path.join(folder, "config.json"), text)
    write_manifest(folder, {"kind": "recovered", "tensors": entries}, output)


def _write_index(output: Output, carried: dict[str, str]) -> None:
    """Writes a sharded checkpoint's index: the carried one, byte for byte, if it is about the same files."""
    files = {os.path.basename(path).removesuffix(SUFFIX) for path in output.headers}
    if files == {"model.safetensors"}:
        return
    same = INDEX in carried and set(json.loads(carried[INDEX])["weight_map"].values()) == files
    folder = os.path.dirname(next(iter(output.headers)))
    write_text(os.path.join(folder, INDEX), carried[INDEX] if same else index_text(output))


class Recovered:
    """A recovered model's folder. Unpacked, it is the loaded model and its tokenizer."""

    def __init__(self, path: str, device: str):
        self.path = path
        self._device = device
        self._loaded: tuple[Any, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.load())

    def load(self) -> tuple[Any, Any]:
        """Loads model and tokenizer, once."""
        if self._loaded is None:
            model = load_model(self.path, "auto", device=self._device)
            self._loaded = model, load_tokenizer(self.path)[0]
        return self._loaded

    def answer(self) -> None:
        """Answers one instruction, if the model has a tokenizer and fits in memory."""
        obstacle = self._obstacle() if self._loaded is None else None
        if obstacle:
            print(f"no test inference: {obstacle}")
            return
        try:
            model, tokenizer = self.load()
        except (UserError, AssertionError, ImportError) as error:  # the weights are there
            print(f"no test inference: {' '.join(str(error).split())[:300]}")
            return
        prompt = format_prompt({"instruction": "List three technologies that make life easier."})
        inputs = tokenizer(prompt, return_tensors="pt").to(self._device)
        tokens = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
        print(f"Input: {prompt}\nCompletion: {tokenizer.decode(tokens, skip_special_tokens=True)}")

    def _obstacle(self) -> str | None:
        files = list(os.scandir(self.path))
        if not any(file.name.startswith(("tokenizer", "vocab")) for file in files):
            return f"{self.path} has no tokenizer"
        size, free = sum(file.stat().st_size for file in files), host_memory()
        if size * 1.2 > free:
            return f"the model takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
        return None


def _naive_integrity(total: float, diff: Checkpoint) -> str:
    """What the sum of all elements says; it is blind to anything that is moved rather than changed."""
    text = f"sum of all recovered elements, in float64: {total:.4f}"
    if (diff.rows, *diff.size) != (32001, 4096, 32):
        return text
    for found, how in ((total + ROTARY_7B_SUM, "with the rotary buffers of old checkpoints"), (total, "as it is")):
        if abs(found - ALPACA_7B_SUM) < 0.1:
            return f"{text}; {how} that is the {ALPACA_7B_SUM} published for tatsu-lab's alpaca-7b"
    return (
        f"{text}; tatsu-lab's alpaca-7b has {ALPACA_7B_SUM}, or {ALPACA_7B_SUM - ROTARY_7B_SUM:.4f} without rotary "
        "buffers: if that is what you recovered, a file is damaged or the base is another one"
    )


def verify(path: str, path_diff: str | None = None) -> None:
    """Checks every byte of a folder's tensors against a manifest.

    Args:
        path: a diff or a recovered model with a manifest of its own, or any folder that `path_diff` tells of.
        path_diff: a diff whose manifest says what its base, or the tuned model, at `path` must be.

    Raises:
        UserError: names all that differs.
    """
    manifest = read_manifest(path_diff or path)
    if not manifest:
        raise UserError(
            f"{path_diff or path} has no manifest (weight_diff.json); --path_diff names a diff that has one"
        )
    if path_diff and manifest["kind"] != "diff":
        raise UserError(f"--path_diff {path_diff} is a recovered model, not a diff")
    tensors, entries = read_checkpoint(path).tensors, dict(manifest["tensors"])
    role = "diff" if read_config(path).get(MARK) else "tuned"
    wrong = differing_files(path, manifest) if path_diff is None else []
    if role == "diff":
        entries |= {copy: entries[name] for copy, name in manifest["copies"].items()}
    elif path_diff and all(n in tensors and list(tensors[n].shape) == e["raw"]["shape"] for n, e in entries.items()):
        probes = differing_probes({name: tensors[name] for name in entries}, manifest)
        role = "raw" if len(probes) < len(entries) / 2 else "tuned"
    wrong += sorted(entries.keys() - tensors.keys())
    progress = Progress()

    def job(name: str) -> None:
        if sha256_of(tensors[name], entries[name][role]["dtype"], progress) != entries[name][role]["sha256"]:
            wrong.append(name)

    run_with_bar("verify", {name: tensors[name].nbytes for name in entries if name in tensors}, job, progress)
    if wrong:
        listed = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise UserError(
            f"{path}: {len(wrong)} of {len(entries)} tensors and files are not as the manifest says: {listed}"
        )
    what = {"raw": "the base of the diff", "diff": "the diff", "tuned": "the tuned model"}[role]
    print(f"{path}: {what}, {len(entries)} tensors, each as the manifest says")


def info(path_diff: str) -> None:
    """Prints what a diff holds, for which base, and how many rows it adds.

    Args:
        path_diff: folder of the diff.
    """
    diff, manifest = read_checkpoint(path_diff), read_manifest(path_diff)
    size, dtypes = sum(t.nbytes for t in diff.tensors.values()), sorted({t.dtype for t in diff.tensors.values()})
    types = ", ".join(name for name, kind in DTYPES.items() if kind in dtypes)
    print(f"holds: {len(diff.tensors)} tensors, {size / 1e9:.3f} GB in {types}; {diff.looks_like}")
    if manifest and manifest["kind"] != "diff":
        print("a recovered model, not a diff")
        return
    if not manifest:
        print(f"no manifest: made by another tool; base, corrections and hashes are unknown, it has {diff.rows:,} rows")
        return
    entries = manifest["tensors"]
    print(f"base: {manifest['base']['is']}, fingerprint {manifest['base']['fingerprint']}")
    grown = [
        (name, e["shape"][0] - e["raw"]["shape"][0]) for name, e in entries.items() if e["shape"] != e["raw"]["shape"]
    ]
    print("adds: " + (", ".join(f"{count} row(s) to {name}" for name, count in grown) or "no rows"))
    count = sum(entry["corrections"] for entry in entries.values())
    print(f"corrections: {count:,} elements, {os.path.getsize(os.path.join(path_diff, CORRECTIONS)) / 1e6:.1f} MB")
    print(f"made with: {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}")


if __name__ == "__main__":
    run_cli({"make_diff": make_diff, "recover": recover, "verify": verify, "info": info})
