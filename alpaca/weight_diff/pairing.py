"""Finds out which tensors of a base and a diff, or a tuned model, belong together, and what is wrong if they don't."""

from typing import Any

from alpaca.cli import UserError
from alpaca.models import DIFF_MARK
from alpaca.weight_diff.checkpoint_files import Checkpoint, Tensor, read_checkpoint
from alpaca.weight_diff.delta import probe, projection, sha256_of
from alpaca.weight_diff.manifest import differing_files, read_manifest
from alpaca.weight_diff.stream import ByteCount

LM_HEAD = "lm_head.weight"
Pairs = dict[str, tuple[Tensor, Tensor]]  # tensor name -> (the base's, the other's)


def read_model(path: str, flag: str) -> Checkpoint:
    """Reads a model's folder, without the output embedding if that is tied, whether or not it was saved.

    Args:
        path: The folder.
        flag: The flag that named it, for the message.

    Raises:
        UserError: It holds no model, or a weight diff.
    """
    found = read_checkpoint(path)
    if found.config.get(DIFF_MARK):
        raise UserError(f"{flag} {path} is a weight diff; expected a model (recover turns it into one)")
    _drop_tied_head(found)
    return found


def read_diff(path: str) -> tuple[Checkpoint, dict[str, Any] | None]:
    """Reads a diff's folder, and verifies everything that isn't a tensor if it has a manifest.

    Returns:
        The diff without its copies of tied tensors, and its manifest or None.

    Raises:
        UserError: It holds no diff, or files differ from the manifest.
    """
    found, manifest = read_checkpoint(path), read_manifest(path)
    if manifest is None:
        _drop_tied_head(found)
        return found, None
    if manifest["kind"] != "diff":
        raise UserError(f"--path_diff {path} is a recovered model, not a diff")
    wrong = differing_files(path, manifest)
    for copy, name in manifest["copies"].items():
        entry, tensor = manifest["tensors"][name]["diff"], found.tensors.pop(copy, None)
        if tensor is None or sha256_of(tensor, entry["dtype"], ByteCount()) != entry["sha256"]:
            wrong.append(copy)
    wrong += sorted(manifest["tensors"].keys() ^ found.tensors.keys())
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong[:5])} differ from the manifest; download the diff again")
    # With copies, the diff's own config.json says that its embeddings aren't tied; the tuned model's are.
    found.tied = bool(manifest["copies"]) or _is_tied(found.config)
    return found, manifest


def _drop_tied_head(found: Checkpoint) -> None:
    found.tied = _is_tied(found.config)
    if found.tied:
        found.tensors.pop(LM_HEAD, None)


def _is_tied(config: dict) -> bool:
    """Whether the output embedding is the input embedding; configs of 2023 say so only if it isn't the default."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "opt"))


def match_tensors(raw: Checkpoint, other: Checkpoint) -> Pairs:
    """Pairs the base's tensors with those of a tuned model or a diff, by name and shape.

    Only embeddings may have more rows than the base's. If just one of the two ties its embeddings, the base's input
    embedding also stands for the output embedding, or the base's output embedding is left out.

    Returns:
        Tensor name -> (the base's, the other's).

    Raises:
        UserError: A tensor is missing, has another shape or is too large.
    """
    bases = dict(raw.tensors)
    if raw.tied and raw.embedding and LM_HEAD in other.tensors:
        bases[LM_HEAD] = bases[raw.embedding]
    if other.tied and LM_HEAD not in other.tensors:
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
        return f"{raw.folder} already has {count} added rows, as a tuned model has; use the base as published"
    return "use the base that the model was tuned from, and download it again if a file is missing"


def check_base(raw: Checkpoint, pairs: Pairs, manifest: dict[str, Any]) -> None:
    """Refuses another base after reading a few bytes of each tensor; `recover` checks every byte as it passes.

    Raises:
        UserError: The base isn't the one that the diff was made with.
    """
    wrong = _differing_probes({name: base for name, (base, _) in pairs.items()}, manifest)
    if not wrong:
        return
    why = "it is another model, or another version of it"
    if all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in wrong):
        why = "as only q_proj and k_proj differ, it was converted from LLaMA's original files by other rules"
    raise UserError(
        f"{raw.folder} is not the base of this diff: {len(wrong)} of {len(pairs)} tensors differ, "
        f"among them {wrong[0]}; {why}"
    )


def _differing_probes(raw: dict[str, Tensor], manifest: dict[str, Any]) -> list[str]:
    """Lists the tensors whose probes aren't those of the base that the diff was made with."""
    entries = {name: entry["raw"] for name, entry in manifest["tensors"].items()}
    return [n for n, t in raw.items() if probe(t, entries[n]["dtype"]) != entries[n]["probe"]]


def role_of(found: Checkpoint, manifest: dict[str, Any], is_own: bool) -> str:
    """Decides what a folder has to be compared with: the manifest's entries for "raw", "diff" or "tuned".

    A folder's own manifest says whether it is a diff or a recovered model. Any other folder is the diff if its
    config.json says so. It is the base if it has the base's shapes and most of its probes, since a damaged base differs
    in a few only. Otherwise it is the tuned model.

    Args:
        found: The folder.
        manifest: Its own manifest, or a diff's.
        is_own: Which of the two.
    """
    if is_own:
        return "diff" if manifest["kind"] == "diff" else "tuned"
    if found.config.get(DIFF_MARK):
        return "diff"
    entries, tensors = manifest["tensors"], found.tensors
    if any(name not in tensors or list(tensors[name].shape) != e["raw"]["shape"] for name, e in entries.items()):
        return "tuned"
    wrong = _differing_probes({name: tensors[name] for name in entries}, manifest)
    return "raw" if len(wrong) < len(entries) / 2 else "tuned"


def is_subtracted_twice(diff: Checkpoint, pairs: Pairs) -> bool:
    """Whether a diff without a manifest holds tuned - 2 raw for a tied embedding.

    The original goes through both names of a tied embedding, so it subtracts, and adds, the base twice.

    Raises:
        UserError: It is a model, not a diff.
    """
    if not diff.embedding:
        return False
    base, other = pairs[diff.embedding]
    times = projection(other, base)
    if times > 0.5:
        raise UserError(f"{diff.folder} is a model, not a diff: its embeddings are {times:.2f} times the base's")
    return times < -0.5 and diff.tied


def tied_copies(tuned: Checkpoint) -> dict[str, str]:
    """Names the tensor that the diff holds twice: the original's `recover` adds a base to each of two tied names."""
    return {LM_HEAD: tuned.embedding} if tuned.embedding and tuned.tied else {}


def bytes_to_read(pairs: Pairs) -> dict[str, int]:
    """Counts the bytes to read for each tensor."""
    return {name: base.nbytes + other.nbytes for name, (base, other) in pairs.items()}
