"""Tokenizers as the original had them, and Alpaca's examples as tokens with a label mask.

transformers 5 rebuilds a LLaMA tokenizer from `tokenizer.model` in a way that changes tokens; it is mended here.
`tokenize_examples` does in one batch what the original did record by record, twice.
"""

import array
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alpaca.cli import UserError
from alpaca.files import atomic_write
from alpaca.prompts import format_prompt

TOKEN_BYTES = 4  # of a token in TokenizedExamples


# ---------------------------------------------------------------------------------------------------------------------
# Loading a tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Examples to tokens


@dataclass
class TokenizedExamples:
    """Examples as tokens, laid end to end.

    Attributes:
        input_ids: int32, all tokens of all examples.
        ends: int64, where each example ends in `input_ids`.
        prompt_lengths: int32, how many of each example's first tokens carry no label.
        truncated: int, how many examples were longer than `model_max_length` and so lost their EOS.
    """

    input_ids: np.ndarray
    ends: np.ndarray
    prompt_lengths: np.ndarray
    truncated: int

    def __len__(self) -> int:
        """Counts the examples."""
        return len(self.ends)

    def lengths(self) -> np.ndarray:
        """Counts each example's tokens."""
        return np.diff(self.ends, prepend=0)


def tokenize_examples(sources: Sequence[str], targets: Sequence[str], tokenizer, progress: bool = False):
    """Tokenizes prompts with their answers, in batches.

    An example is BOS (where the tokenizer adds one), the tokens of prompt + answer taken as one text, and EOS, cut at
    `tokenizer.model_max_length`. A token is part of the prompt when it starts before the answer does. So one that
    straddles the two (LLaMA joins the prompt's last `:` with `-` or `//`) has no label, as in the original: the model
    could not produce it anyway, since at inference the prompt ends with `:` alone.

    Args:
        sources: prompts.
        targets: answers, without EOS.
        tokenizer: a fast tokenizer with an EOS.
        progress: whether to show a bar.

    Returns:
        TokenizedExamples in the order of `sources`.
    """
    eos, limit, backend = tokenizer.eos_token_id, tokenizer.model_max_length, tokenizer.backend_tokenizer
    backend.no_truncation()  # a call of the tokenizer leaves its settings behind
    backend.no_padding()
    words = WordEncoder.of(tokenizer)
    flat, prompt_lengths, truncated = [], [], 0
    for start in _with_progress(range(0, len(sources), 1000), len(sources), progress):
        pairs = list(zip(sources[start : start + 1000], targets[start : start + 1000], strict=True))
        encoded = [words.encode(*pair) if words else None for pair in pairs]
        rest = [i for i, one in enumerate(encoded) if one is None]
        for i, encoding in zip(rest, backend.encode_batch(["".join(pairs[i]) for i in rest]), strict=True):
            ids = encoding.ids
            if ids[-1:] == [eos] and encoding.special_tokens_mask[-1] and encoding.offsets[-1][1] == 0:
                ids.pop()  # this tokenizer adds its own
            encoded[i] = _packed(ids), _first_token_at(encoding, len(pairs[i][0]), len(ids))
        for tokens, prompt_length in encoded:
            flat.append((tokens + _packed([eos]))[: limit * TOKEN_BYTES])
            truncated += len(tokens) >= limit * TOKEN_BYTES
            prompt_lengths.append(min(prompt_length, limit))
    lengths = np.array([len(tokens) // TOKEN_BYTES for tokens in flat], dtype=np.int64)
    return TokenizedExamples(
        input_ids=np.frombuffer(b"".join(flat), dtype=np.int32),
        ends=np.cumsum(lengths),
        prompt_lengths=np.asarray(prompt_lengths, dtype=np.int32),
        truncated=truncated,
    )


def _packed(ids: Sequence[int]) -> bytes:
    """Writes tokens as int32s: bytes are joined much faster than lists."""
    return array.array("i", ids).tobytes()


class WordEncoder:
    """Encodes LLaMA's texts word by word, and each word once.

    No token of LLaMA's goes on after a space in its middle, so the words of a text can be encoded apart and their
    tokens laid end to end. That gives the same tokens several times as fast, since texts repeat their words.
    """

    def __init__(self, tokenizer):
        """Prepares for a tokenizer that `of` found fitting."""
        model = tokenizer.backend_tokenizer.model

        class Known(dict):  # word, without the space before it -> tokens
            def __missing__(self, word: str) -> bytes:
                self[word] = _packed([token.id for token in model.tokenize("▁" + word)])
                return self[word]

        self.model, self.known, self.starts = model, Known(), {}
        odd = ["  ", "▁", *tokenizer.added_tokens_encoder]  # runs of spaces and special tokens aren't words
        self.odd = re.compile("|".join(map(re.escape, odd)))
        start = tokenizer.backend_tokenizer.encode("").ids[:1]
        self.prefix = _packed([i for i in start if i == tokenizer.bos_token_id])

    @classmethod
    def of(cls, tokenizer) -> "WordEncoder | None":
        """Makes one where that changes nothing: the tokenizer is LLaMA's and no token has a space after a letter."""
        backend, inner_space = tokenizer.backend_tokenizer, re.compile("[^▁]▁")
        normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
        steps = [one["type"] for one in normalizer.get("normalizers", [])]
        is_llama = steps == ["Prepend", "Replace"] and not backend.pre_tokenizer
        if not is_llama or any(map(inner_space.search, backend.get_vocab(with_added_tokens=False))):
            return None
        return cls(tokenizer)

    def encode(self, source: str, target: str) -> tuple[bytes, int] | None:
        """Encodes a prompt with its answer.

        Returns:
            The tokens as int32s, and how many of them start before the answer does; None for a text that is more than
            words with single spaces between them, which is for the whole tokenizer.
        """
        text = source + target
        if not source or text[0] == " " or self.odd.search(text):
            return None
        words, whole = text.split(" "), source.count(" ")  # so many words are the prompt's alone
        last = source.rpartition(" ")[2]
        prompt = self.prefix + b"".join(map(self.known.__getitem__, words[:whole]))
        answer = b"".join(map(self.known.__getitem__, words[whole:]))
        return prompt + answer, len(prompt) // TOKEN_BYTES + self._tokens_before(last, words[whole][len(last) :])

    def _tokens_before(self, last: str, first: str) -> int:
        """Counts the tokens of a word that start in its first part."""
        if (last, first) not in self.starts:
            limit = len(("▁" + last).encode())  # the model's offsets count bytes
            offsets = [token.offsets[0] for token in self.model.tokenize("▁" + last + first)]
            self.starts[last, first] = sum(offset < limit for offset in offsets)
        return self.starts[last, first]


def _first_token_at(encoding, position: int, count: int) -> int:
    """Finds the first of `count` tokens that starts at a character or after it."""
    token = encoding.char_to_token(position)
    if token is None:  # no token covers that character
        starts = (i for i, (start, _) in enumerate(encoding.offsets[:count]) if start >= position)
        return next(starts, count)
    return token if encoding.token_to_chars(token)[0] >= position else token + 1


def _with_progress(batches: range, total: int, progress: bool) -> Iterator[int]:
    from tqdm import tqdm

    with tqdm(total=total, desc="tokenizing", unit=" examples", disable=not progress) as bar:
        for start in batches:
            yield start
            bar.update(min(batches.step, total - start))


def tokenize_once(examples: Sequence[Mapping], tokenizer, cache_dir: str | None = None, progress: bool = False):
    """Tokenizes examples, or reads their tokens from the cache of an earlier run.

    Args:
        examples: records with `instruction`, `input` and `output`.
        tokenizer: the fast tokenizer.
        cache_dir: where to keep the tokens; `$XDG_CACHE_HOME/alpaca` when None.
        progress: whether to show a bar.

    Returns:
        TokenizedExamples in the order of `examples`.
    """
    sources = [format_prompt(example) for example in examples]
    targets = [example["output"] for example in examples]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = _content_hash(sources, targets, tokenizer)
    path = os.path.join(cache_dir or os.path.join(home, "alpaca"), f"tokens-{name}.npz")
    try:
        with np.load(path) as cached:
            fields = {key: cached[key] for key in cached.files}
        return TokenizedExamples(**{**fields, "truncated": int(fields["truncated"])})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        pass  # not there, or not whole
    tokenized = tokenize_examples(sources, targets, tokenizer, progress)
    try:
        with atomic_write(path, "wb") as file:
            np.savez(file, **vars(tokenized))
    except UserError as error:
        print(f"tokens not cached: {error}")
    return tokenized


def _content_hash(sources: Sequence[str], targets: Sequence[str], tokenizer) -> str:
    """Names what tokens depend on: the texts, the tokenizer, the limit and this module."""
    with open(__file__, "rb") as file:
        code = hashlib.sha256(file.read()).hexdigest()
    digest = hashlib.sha256()
    for part in (code, tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id)):
        digest.update(part.encode())
    digest.update(str(tokenizer.model_max_length).encode())
    for text in (text for pair in zip(sources, targets, strict=True) for text in pair):
        digest.update(f"{len(text)}:".encode())
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def load_dataset_examples(data_path: str) -> list[dict[str, str]]:
    """Reads instruction data from a JSON or JSON Lines file, or from a data set on the Hugging Face Hub.

    Raises:
        UserError: the file is missing, or a record is wrong (the first one, and what was found there).
    """
    from alpaca.records import check_example, load_examples

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
