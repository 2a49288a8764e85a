"""Publishes a tuned model as its difference from a base that may not be shared, and recovers it, bit for bit.

    python weight_diff.py make_diff --path_raw RAW --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw RAW --path_diff DIFF --path_tuned OUT
    python weight_diff.py verify --path DIFF
    python weight_diff.py info --path_diff DIFF

No model is loaded: tensors are streamed (alpaca/weight_diff/stream.py) in less than 100 MB of memory at any size.

A diff is tuned - raw, in the tuned model's types and files. Beside it are `corrections.safetensors`, the elements that
raw + diff doesn't restore to the bit, and `weight_diff.json`, the sha256 of every tensor of raw, diff and tuned.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from alpaca.cli import UserError, run_cli
from alpaca.files import size_text
from alpaca.models import host_memory, load_model
from alpaca.prompts import format_prompt
from alpaca.tokenizers import load_tokenizer
from alpaca.weight_diff.checkpoint_files import SAFETENSORS_DTYPES, Checkpoint, plan_output_like, read_checkpoint
from alpaca.weight_diff.corrections import CORRECTIONS, CorrectionSpool, read_corrections
from alpaca.weight_diff.delta import add_tensor, sha256_of, subtract_tensor
from alpaca.weight_diff.manifest import MANIFEST, differing_files, finish_diff, finish_model, read_manifest, small_files
from alpaca.weight_diff.pairing import (
    bytes_to_read,
    check_base,
    is_subtracted_twice,
    match_tensors,
    read_diff,
    read_model,
    role_of,
    tied_copies,
)
from alpaca.weight_diff.partial_folder import PartialFolder
from alpaca.weight_diff.stream import ByteCount, copy_tensor, run_jobs

# The sum of all elements of tatsu-lab's alpaca-7b that the original's `recover` expects, and the part of it that comes
# from the rotary buffers, which checkpoints held then: 32 layers of sum(10000 ** (-i / 64) for i in range(64)).
ALPACA_7B_SUM = 50637.1836
ROTARY_7B_SUM = 238.72


def make_diff(path_raw: str, path_tuned: str, path_diff: str, device: str = "cpu", overwrite: bool = False) -> None:
    """Writes the difference between a tuned model and its base, with what `recover` needs to restore it exactly.

    Args:
        path_raw: Folder of the base model in Hugging Face format.
        path_tuned: Folder of the tuned model.
        path_diff: Folder to write.
        device: Accepted as in the original and not used: the disk sets the pace.
        overwrite: Replace `path_diff`, if this script wrote all of it, once the new diff is whole.

    Raises:
        UserError: The two don't belong together, a file is damaged, the target exists or the disk is too small.
    """
    work = PartialFolder(path_diff, "--path_diff", [path_raw, path_tuned], overwrite)
    raw, tuned = read_model(path_raw, "--path_raw"), read_model(path_tuned, "--path_tuned")
    pairs, copies = match_tensors(raw, tuned), tied_copies(tuned)
    small_files(path_tuned)  # refuses what can't be copied, before hours of arithmetic
    with work.writing(), CorrectionSpool(work.folder) as spool:
        output = plan_output_like(tuned, work.folder, copies=copies)
        work.create(output)

        def subtract(name: str, count: ByteCount) -> dict[str, Any]:
            return subtract_tensor(*pairs[name], output.tensors[name], spool, count)

        entries = run_jobs("make_diff", bytes_to_read(pairs), subtract)
        for copy, name in copies.items():
            copy_tensor(output.tensors[name], output.tensors[copy])
        spool.gather(work.folder, tuned.tensors)
        finish_diff(output, raw, tuned, entries, copies)
        work.publish(output)
    count = sum(entry["corrections"] for entry in entries.values())
    total = sum(tensor.numel for tensor in tuned.tensors.values())
    print(f"{path_diff}: {len(pairs)} tensors, exact with {count:,} corrections ({count / total:.2%} of the elements)")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
    dtype: str | None = None,
    overwrite: bool = False,
) -> "Recovered":
    """Adds a diff to its base. If the diff has a manifest, the inputs and the result are verified.

    Args:
        path_raw: Folder of the base model in Hugging Face format.
        path_diff: Folder of the diff.
        path_tuned: Folder to write the tuned model to; without it the model is only tested, or returned to Python.
        device: Device of the test inference.
        test_inference: Answer one instruction with the recovered model, if it fits in memory.
        check_integrity_naively: For a diff without a manifest, sum all elements and compare with alpaca-7b's figure.
        dtype: Type of the recovered weights: float32, float16 or bfloat16; the diff's own when None.
        overwrite: Replace `path_tuned`, if this script wrote all of it, once the new model is whole.

    Returns:
        The recovered folder. Unpacked, `model, tokenizer = recover(...)`, it is the loaded model and its tokenizer.

    Raises:
        UserError: The two don't belong together, a file is damaged, the target exists or the disk is too small.
    """
    if dtype not in (None, *SAFETENSORS_DTYPES):
        raise UserError(f"--dtype must be {', '.join(SAFETENSORS_DTYPES)}, found {dtype!r}")
    if path_tuned is None:
        with tempfile.TemporaryDirectory(prefix="recovered_") as folder:
            recovered = recover(path_raw, path_diff, f"{folder}/model", device, False, check_integrity_naively, dtype)
            recovered.load()
    else:
        total, diff = _write_tuned(path_raw, path_diff, path_tuned, dtype, overwrite)
        if check_integrity_naively and total is not None:
            print(_naive_integrity(total, diff))
        recovered = Recovered(path_tuned, device)
    if test_inference:
        recovered.answer()
    return recovered


def _write_tuned(
    path_raw: str, path_diff: str, path_tuned: str, dtype: str | None, overwrite: bool
) -> tuple[float | None, Checkpoint]:
    """Writes the recovered model. Returns the sum of its elements if the diff has no manifest, and the diff."""
    work = PartialFolder(path_tuned, "--path_tuned", [path_raw, path_diff], overwrite)
    raw, (diff, manifest) = read_model(path_raw, "--path_raw"), read_diff(path_diff)
    pairs = match_tensors(raw, diff)
    small_files(path_diff)
    times = dict.fromkeys(pairs, 1)  # how often the base is added
    if manifest:
        check_base(raw, pairs, manifest)
        corrections, known = read_corrections(path_diff), manifest["tensors"]
    else:
        corrections, known = None, {}
        if is_subtracted_twice(diff, pairs):
            times[diff.embedding] = 2
        print(f"{path_diff} has no manifest: the model is raw + diff in float32, and cannot be verified")
    with work.writing():
        output = plan_output_like(diff, work.folder, dtype)
        work.create(output)

        def add(name: str, count: ByteCount) -> tuple[dict[str, Any], float]:
            return add_tensor(*pairs[name], output.tensors[name], corrections, known.get(name), count, times[name])

        results = run_jobs("recover", bytes_to_read(pairs), add)
        finish_model(output, diff, manifest, dtype, {name: entry for name, (entry, _) in results.items()})
        work.publish(output)
    print(f"{path_tuned}: {len(pairs)} tensors recovered" + (", each one verified" if manifest else ""))
    return None if manifest else sum(total for _, total in results.values()), diff


def _naive_integrity(total: float, diff: Checkpoint) -> str:
    """Says what the sum of all elements means; it can't tell if elements have changed places."""
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
        if self._loaded is None and (obstacle := self._obstacle()):
            print(f"no test inference: {obstacle}")
            return
        try:
            model, tokenizer = self.load()
        except (UserError, AssertionError, ImportError) as error:  # the weights are written all the same
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
            return f"the model needs {size_text(size * 1.2)} of memory, {size_text(free)} are free"
        return None


def verify(path: str, path_diff: str | None = None) -> None:
    """Checks every byte of a folder's tensors against a manifest.

    Args:
        path: A diff or a recovered model with its own manifest; or, with --path_diff, any base, diff or tuned model.
        path_diff: A diff whose manifest says what the folder at --path must hold.

    Raises:
        UserError: Something differs; the message names it.
    """
    manifest = read_manifest(path_diff or path)
    if not manifest:
        raise UserError(f"{path_diff or path} has no manifest ({MANIFEST}); --path_diff names a diff that has one")
    if path_diff and manifest["kind"] != "diff":
        raise UserError(f"--path_diff {path_diff} is a recovered model, not a diff")
    found, entries = read_checkpoint(path), dict(manifest["tensors"])
    role = role_of(found, manifest, is_own=path_diff is None)
    wrong = [] if path_diff else differing_files(path, manifest)
    if role == "diff":
        entries |= {copy: entries[name] for copy, name in manifest["copies"].items()}

    def is_right(name: str, count: ByteCount) -> bool:
        expected = entries[name][role]
        return sha256_of(found.tensors[name], expected["dtype"], count) == expected["sha256"]

    wrong += sorted(entries.keys() - found.tensors.keys())
    results = run_jobs("verify", {n: t.nbytes for n, t in found.tensors.items() if n in entries}, is_right)
    wrong += [name for name, right in results.items() if not right]
    if wrong:
        listed = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise UserError(f"{path}: {len(wrong)} of {len(entries)} tensors and files differ from the manifest: {listed}")
    role_name = {"raw": "the base of the diff", "diff": "the diff", "tuned": "the tuned model"}[role]
    print(f"{path}: {role_name}, {len(entries)} tensors, each as the manifest says")


def info(path_diff: str) -> None:
    """Prints what a diff holds, for which base, and how many rows it adds.

    Args:
        path_diff: Folder of the diff.
    """
    diff, manifest = read_checkpoint(path_diff), read_manifest(path_diff)
    size = sum(tensor.nbytes for tensor in diff.tensors.values())
    dtypes = {tensor.dtype for tensor in diff.tensors.values()}
    types = ", ".join(name for name, kind in SAFETENSORS_DTYPES.items() if kind in dtypes)
    print(f"holds: {len(diff.tensors)} tensors, {size_text(size)} in {types}; {diff.looks_like}")
    if not manifest:
        print(f"no manifest: made by another tool; base, corrections and hashes are unknown, it has {diff.rows:,} rows")
        return
    if manifest["kind"] != "diff":
        print("a recovered model, not a diff")
        return
    entries = manifest["tensors"]
    print(f"base: {manifest['base']['is']}, fingerprint {manifest['base']['fingerprint']}")
    added = {
        name: e["shape"][0] - e["raw"]["shape"][0] for name, e in entries.items() if e["shape"] != e["raw"]["shape"]
    }
    print("adds: " + (", ".join(f"{count} row(s) to {name}" for name, count in added.items()) or "no rows"))
    count = sum(entry["corrections"] for entry in entries.values())
    print(f"corrections: {count:,} elements, {size_text(os.path.getsize(os.path.join(path_diff, CORRECTIONS)))}")
    print(f"made with: {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; `argv` is `sys.argv[1:]` when None."""
    run_cli({"make_diff": make_diff, "recover": recover, "verify": verify, "info": info}, argv)


if __name__ == "__main__":
    main()
