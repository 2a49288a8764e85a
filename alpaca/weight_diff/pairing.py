"""Which tensors of a base and a diff, or a tuned model, belong together, and what is wrong where they don't."""

import os
from typing import Any

import numpy as np

from alpaca.cli import UserError
from alpaca.weight_diff.checkpoint_files import Checkpoint, Tensor, read_checkpoint
from alpaca.weight_diff.manifest import MARK, differing_files, differing_probes, is_tied, read_config, read_manifest
from alpaca.weight_diff.row_mean import mean_row
from alpaca.weight_diff.stream import Progress, projection, sha256_of

LM_HEAD = "lm_head.weight"
Pairs = dict[str, tuple[Tensor, Tensor]]  # tensor name -> the base's, the other's


def read_model(path: str, flag: str) -> Checkpoint:
    """A model's tensors; a tied output embedding is left out, whether or not it was saved."""
    if os.path.isdir(path) and read_config(path).get(MARK):
        raise UserError(f"{flag} {path} is a weight diff; expected a model (recover makes one of it)")
    found = read_checkpoint(path)
    if is_tied(read_config(path)):
        found.tensors.pop(LM_HEAD, None)
    return found


def read_diff(path: str) -> tuple[Checkpoint, dict[str, Any] | None]:
    """A diff's tensors and its manifest, with all that isn't a tensor verified."""
    found, manifest = read_checkpoint(path), read_manifest(path)
    if manifest is None:
        if is_tied(read_config(path)):
            found.tensors.pop(LM_HEAD, None)
        return found, None
    if manifest["kind"] != "diff":
        raise UserError(f"--path_diff {path} is a recovered model, not a diff")
    wrong = differing_files(path, manifest)
    for copy, name in manifest["copies"].items():
        entry, tensor = manifest["tensors"][name]["diff"], found.tensors.pop(copy, None)
        if tensor is None or sha256_of(tensor, entry["dtype"], Progress()) != entry["sha256"]:
            wrong.append(copy)
    wrong += sorted(manifest["tensors"].keys() ^ found.tensors.keys())
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong[:5])} not as the manifest says; download the diff again")
    return found, manifest


def match_tensors(raw: Checkpoint, other: Checkpoint) -> Pairs:
    """Pairs the base's tensors with those of a tuned model or a diff, by name and shape.

    Returns:
        Tensor name -> (base's, other's); only embeddings may have more rows than the base's.
    """
    bases = dict(raw.tensors)
    if LM_HEAD in other.tensors and LM_HEAD not in bases and is_tied(read_config(raw.folder)):
        bases[LM_HEAD] = bases[raw.embedding]
    if LM_HEAD not in other.tensors and is_tied(read_config(other.folder)):
        bases.pop(LM_HEAD, None)
    problems = []
    for name, tensor in other.tensors.items():
        shape = bases[name].shape if name in bases else tensor.shape
        grows = name.endswith(("embed_tokens.weight", LM_HEAD)) and shape[1:] == tensor.shape[1:]
        if shape != tensor.shape and not (grows and shape[0] < tensor.shape[0]):
            problems.append(f"{name} is {list(shape)} in {raw.folder} and {list(tensor.shape)} in {other.folder}")
        if tensor.numel >= 1 << 32:
            problems.append(f"{name} has {tensor.numel:,} elements; a diff's tensors have less than {1 << 32:,}")
    problems += [f"{other.folder} lacks {name}, which {raw.folder} has" for name in bases if name not in other.tensors]
    problems += [f"{raw.folder} lacks {name}, which {other.folder} has" for name in other.tensors if name not in bases]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; {_likely_mistake(raw, other)}")
    return {name: (bases[name], tensor) for name, tensor in other.tensors.items()}


def _likely_mistake(raw: Checkpoint, other: Checkpoint) -> str:
    if raw.size != other.size:
        return f"{raw.folder} is {raw.looks_like}, {other.folder} needs {other.looks_like}"
    if raw.rows > other.rows:
        count = raw.rows - other.rows
        return f"{raw.folder} already has {count} added rows, as a tuned model has; take the base as published"
    return "take the base that the model was tuned from, and download it again if a file is missing"


def check_base(raw: Checkpoint, pairs: Pairs, manifest: dict[str, Any]) -> None:
    """Tells another base by a few bytes of each tensor; every byte is checked as it passes."""
    wrong = differing_probes({name: base for name, (base, _) in pairs.items()}, manifest)
    if not wrong:
        return
    why = "it is another model, or another version of it"
    if all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in wrong):
        why = "as only q_proj and k_proj differ, it was converted from LLaMA's original files by other rules"
    raise UserError(
        f"{raw.folder} is not the base of this diff: {len(wrong)} of {len(pairs)} tensors differ, "
        f"{wrong[0]} for one; {why}"
    )


def is_subtracted_twice(diff: Checkpoint, pairs: Pairs) -> bool:
    """Whether a diff without a manifest holds tuned - 2 raw for a tied embedding.

    The original goes through a tied embedding's two names, and so subtracts, and adds, the base twice.

    Raises:
        UserError: it is no diff but a model.
    """
    if not diff.embedding:
        return False
    base, other = pairs[diff.embedding]
    times = projection(other, base)
    if times > 0.5:
        raise UserError(f"{diff.folder} is a model, not a diff: its embeddings are {times:.2f} times the base's")
    return times < -0.5 and is_tied(read_config(diff.folder))


def added_row(base: Tensor, other: Tensor) -> np.ndarray | None:
    """What a row is that `other` has more than the base: float32 [hidden size], None where it has no more."""
    return mean_row(base) if base.shape != other.shape else None


def tied_copies(tuned: Checkpoint) -> dict[str, str]:
    """Tensors that the diff holds twice: the original's `recover` adds a base to each of two tied names."""
    return {LM_HEAD: tuned.embedding} if tuned.embedding and is_tied(read_config(tuned.folder)) else {}


def pair_sizes(pairs: Pairs) -> dict[str, int]:
    """Bytes to read for each tensor."""
    return {name: base.nbytes + other.nbytes for name, (base, other) in pairs.items()}
