"""Instruction data on its way into training: read, tokenized once, and checked."""

import hashlib
import inspect
import os
import re
import stat
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from alpaca import tokenizers
from alpaca.cli import UserError
from alpaca.files import atomic_write
from alpaca.prompts import PROMPT_DICT
from alpaca.ranks import announce
from alpaca.records import check_example, load_examples

IGNORE_INDEX = -100  # the label of a token that is not learned; torch's cross-entropy leaves it out


def load_dataset_examples(data_path: str) -> list[dict[str, str]]:
    """Reads instruction data from a JSON or JSON Lines file, or from a data set on the Hugging Face Hub.

    Raises:
        UserError: The file is missing, or a record is wrong; names the first one and what was found there.
    """
    if os.path.exists(data_path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", data_path) or ".json" in data_path:
        return load_examples(data_path)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{data_path} looks like a Hub data set: pip install datasets, or name a local file") from None
    try:
        rows = datasets.load_dataset(data_path, split="train")
    except Exception as error:
        raise UserError(f"cannot load {data_path} from the Hub: {str(error).splitlines()[0]}") from error
    return [check_example(f"{data_path}, record {i}", row) for i, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

Fields = dict[str, list[torch.Tensor]]  # input_ids and labels, one int64 tensor each per example


def token_index(encoding, position: int, count: int) -> int:
    """Finds the first of `count` tokens that starts at or after a character.

    LLaMA reads "### Response:" + "- one" as ... `Response` `:-` ` one`. Character 13 is the answer's "-". The token
    `:-` covers it but starts before it, so the index is that of ` one`.

    Args:
        encoding: An encoding of the `tokenizers` library.
        position: The character.
        count: How many tokens to look at.
    """
    token = encoding.char_to_token(position)
    if token is None:  # no token covers that character
        starts = (i for i, (start, _) in enumerate(encoding.offsets[:count]) if start >= position)
        return next(starts, count)
    return token if encoding.token_to_chars(token)[0] >= position else token + 1


def tokenize_once(
    tokenize: Callable[..., Fields],
    sources: Sequence[str],
    targets: Sequence[str],
    tokenizer,
    cache_dir: str = "",
    boundary: str = "joint",
) -> Fields:
    """Calls `tokenize`, or reads what it returned for the same texts in an earlier run.

    Args:
        tokenize: train.py's `preprocess`.
        sources: Prompts.
        targets: Answers.
        tokenizer: A fast tokenizer.
        cache_dir: Where to keep the tokens; `$XDG_CACHE_HOME/alpaca` if empty.
        boundary: `--prompt_boundary`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = cache_dir or os.path.join(home, "alpaca")
    path = os.path.join(folder, f"tokens-{_content_hash(tokenize, sources, targets, tokenizer, boundary)}.npz")
    private = _is_private(folder)
    try:
        if private:
            return _read_tokens(path, len(sources))
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile):
        pass  # missing, or cut off
    fields = tokenize(sources, targets, tokenizer, boundary)
    if not private:
        print(f"tokens not cached: others may write into {folder}; chmod go-w it, or set XDG_CACHE_HOME")
        return fields
    try:
        with atomic_write(path, "wb") as file:
            lengths = np.array([len(ids) for ids in fields["input_ids"]], dtype=np.int64)
            flat = {key: torch.cat(tokens).numpy().astype(np.int32) for key, tokens in fields.items()}
            np.savez(file, lengths=lengths, **flat)
    except UserError as error:
        print(f"tokens not cached: {error}")
    return fields


def _read_tokens(path: str, examples: int) -> Fields:
    with np.load(path) as cached:
        lengths = cached["lengths"].tolist()
        flat = {key: torch.from_numpy(cached[key].astype(np.int64)) for key in ("input_ids", "labels")}
    if len(lengths) != examples:
        raise ValueError(f"{path} holds {len(lengths)} examples, not {examples}")
    return {key: list(tokens.split(lengths)) for key, tokens in flat.items()}


def _is_private(folder: str) -> bool:
    """Tells whether a folder, which is made if it is missing, is ours and nobody else may write into it.

    Whoever could plant a file in the cache would decide what a model learns.
    """
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
    except OSError:
        return True  # no folder, nothing planted; writing will say why it fails
    return not hasattr(os, "getuid") or (
        found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _content_hash(tokenize: Callable, sources: Sequence[str], targets: Sequence[str], tokenizer, boundary: str) -> str:
    """Hashes what tokens depend on: the texts, the tokenizer, the length limit and the code."""
    digest = hashlib.sha256()
    for path in (__file__, tokenizers.__file__, inspect.getsourcefile(tokenize)):
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    settings = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id), str(tokenizer.model_max_length))
    settings += (boundary,)
    for text in (*settings, *sources, *targets):
        digest.update(f"{len(text)}:".encode())
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_labels(dataset, batch_size: int) -> None:
    """Reports examples with nothing to learn, and refuses them if one is sure to fill a batch.

    Their prompt alone fills `model_max_length`, so no token of the answer is left.

    Args:
        dataset: A SupervisedDataset of train.py, or None.
        batch_size: Examples in a micro-batch.

    Raises:
        UserError: Training would stop at such a batch; an evaluation's loss would be NaN.
    """
    empty = dataset.unlearnable() if dataset else []
    if not empty:
        return
    shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
    found = f"{dataset.data_path}: {len(empty)} example(s) have nothing to learn, their prompt alone fills "
    found += f"--model_max_length: records {shown}"
    if batch_size == 1 or len(empty) == len(dataset):
        raise UserError(f"{found}; a batch needs one that has: raise --model_max_length, or leave these records out")
    announce(found)


def straddled(dataset, tokenizer) -> int:
    """Counts the answers whose first characters lie in the prompt's last token, and so are not learned.

    Every prompt ends in "### Response:". Tokenized by itself, its last token is `:` for LLaMA. An example whose last
    unlearned token is another one, such as `:-`, has an answer that begins inside it.
    """
    ends = {tokenizer(prompt, add_special_tokens=False)["input_ids"][-1] for prompt in PROMPT_DICT.values()}
    last = [int(ids[labels == IGNORE_INDEX][-1]) for ids, labels in _examples(dataset) if labels[-1] != IGNORE_INDEX]
    return sum(token not in ends for token in last)


def _examples(dataset):
    return zip(dataset.input_ids, dataset.labels, strict=True)


def describe_data(data: Mapping, tokenizer) -> None:
    """Announces how much there is to learn, how much was cut, and one example with its mask."""
    dataset, limit = data["train_dataset"], tokenizer.model_max_length
    tokens, learned = sum(map(len, dataset.input_ids)), sum(int((x != IGNORE_INDEX).sum()) for x in dataset.labels)
    held_out = f", {len(data['eval_dataset']):,} to evaluate on" if data["eval_dataset"] else ""
    announce(f"data: {len(dataset):,} examples{held_out}; {tokens:,} tokens, {learned:,} of them learned")
    if truncated := sum(int(ids[-1]) != tokenizer.eos_token_id for ids in dataset.input_ids):
        announce(f"{truncated} example(s) longer than {limit} tokens are cut: they don't teach the model to stop")
    if touched := straddled(dataset, tokenizer):
        announce(
            f"{touched:,} answer(s) of {len(dataset):,} begin inside the prompt's last token, as in the original, and "
            "don't learn that beginning; --prompt_boundary separate learns all of each answer"
        )
    ids, is_prompt = dataset.input_ids[0], dataset.labels[0] == IGNORE_INDEX
    prompt, answer = tokenizer.decode(ids[is_prompt]), tokenizer.decode(ids[~is_prompt])
    announce(f"--- record {dataset.records[0]}, prompt (not learned):\n{prompt}\n--- answer (learned):\n{answer}\n---")
