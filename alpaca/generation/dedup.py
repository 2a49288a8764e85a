r"""ROUGE-L of new instructions against all earlier ones: exact to the last bit, without a loop over pairs.

The original called rouge_score for one pair at a time, with a new process pool for every candidate. Here each distinct
token becomes one character, so rapidfuzz's bit-parallel longest common subsequence (LCS) compares all candidates of an
answer with the whole pool at once:

    "Name two primes." -> tokens name, two, primes   -> "\0\1\2"
    "Name two odd primes." -> name, two, odd, primes -> "\0\1\3\2", LCS 3, F = 2 * 3/4 * 3/3 / (3/4 + 3/3) = 0.857

The F measure is computed by rouge_score's own float64 formula. `benchmarks/dedup.py` measures both ways.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# rapidfuzz can't encode surrogates (U+D800 to U+DFFF), so token 55,296 and later ones become characters after them.
_FIRST_SURROGATE, _SURROGATES = 0xD800, 0x800


@dataclass
class Verdict:
    """The result for one candidate.

    Attributes:
        kept: True if it has joined the pool.
        nearest: The most similar instruction, None if the pool was empty.
        score: The ROUGE-L F measure with it, 0 to 1.
        most_similar: The ten most similar instructions and their scores, best first; None if not kept.
        mean: The mean score over the pool; 0 if not kept.
    """

    kept: bool
    nearest: str | None
    score: float
    most_similar: dict[str, float] | None = None
    mean: float = 0.0


class RougePool:
    """The instructions that a new one must differ from, with their encoded forms."""

    def __init__(self, instructions: Sequence[str] = (), workers: int = 0) -> None:
        """Encodes the first instructions.

        Args:
            instructions: The instructions to begin with. They aren't compared with one another.
            workers: Threads that compare, at most one per core; one per core if 0.
        """
        self.instructions: list[str] = []
        self._workers = min(workers or 10**6, os.cpu_count() or 1)
        self._ids: dict[str, str] = {}
        self._encoded: list[str] = []
        self._lengths = np.zeros(1024, dtype=np.int64)
        self._longest = 0
        for instruction in instructions:
            self._add(instruction, self._encode(instruction))

    def __len__(self) -> int:
        """The number of instructions in the pool."""
        return len(self.instructions)

    def screen(
        self, candidates: Sequence[str], threshold: float, limit: int, eligible: Sequence[bool] | None = None
    ) -> list[Verdict]:
        """Judges candidates one after the other; each kept one joins the pool before the next is judged.

        Args:
            candidates: New instructions, in order.
            threshold: Drop a candidate with an F measure above this (not equal to it).
            limit: Keep at most this many.
            eligible: For each candidate, False if it must not be kept and is only scored.

        Returns:
            A verdict for each candidate.
        """
        encoded = [self._encode(text) for text in candidates]
        overlaps = self._common_subsequences(encoded)
        old, joined, verdicts = len(self), [], []
        for i, candidate in enumerate(candidates):
            overlap = np.concatenate([overlaps[i, :old], overlaps[i, old:][joined]])
            scores = self._scores(overlap, len(encoded[i]))
            verdict = Verdict(kept=False, nearest=None, score=0.0)
            if len(scores):
                best = len(scores) - 1 - int(np.argmax(scores[::-1]))  # the latest of equals, as in _ten_best
                verdict.nearest, verdict.score = self.instructions[best], float(scores[best])
            if verdict.score <= threshold and len(joined) < limit and (eligible is None or eligible[i]):
                verdict.kept = True
                verdict.most_similar = {self.instructions[j]: float(scores[j]) for j in _ten_best(scores)}
                verdict.mean = float(np.mean(scores)) if len(scores) else 0.0
                joined.append(i)
                self._add(candidate, encoded[i])
            verdicts.append(verdict)
        return verdicts

    def nearest_scores(self) -> np.ndarray:
        """Returns each instruction's F measure with its most similar other one: shape (n,), 0 for a lone one."""
        scores = np.zeros(len(self))
        for start in range(0, len(self), 1000):  # a block of rows at a time: 52,000 squared would be 2.7 GB
            overlaps = self._common_subsequences(self._encoded[start : start + 1000])[:, : len(self)]
            for i, overlap in enumerate(overlaps, start):
                overlap[i] = 0  # itself
                scores[i] = self._scores(overlap, len(self._encoded[i])).max()
        return scores

    def _scores(self, overlap: np.ndarray, length: int) -> np.ndarray:
        """Returns the F measures of one candidate with the whole pool.

        For a candidate they depend on two small numbers only, the LCS and the other's length, so in a large pool a
        table lookup takes a third of the time that computing takes.

        Args:
            overlap: LCS of the candidate with each instruction of the pool, shape (n,).
            length: Tokens of the candidate.
        """
        lengths = self._lengths[: len(self)]
        width = self._longest + 1
        if len(lengths) < (length + 1) * width:
            return f_measure(overlap, lengths, length)
        table = f_measure(np.arange(length + 1)[:, None], np.arange(width), length)
        return np.take(table, overlap.astype(np.int64) * width + lengths)

    def _common_subsequences(self, encoded: list[str]) -> np.ndarray:
        """Returns the LCS of each candidate with the pool and the candidates, shape (candidates, pool + candidates)."""
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import cdist

        longest = max(map(len, encoded), default=0)  # the LCS is no longer than the candidate
        dtype = np.uint8 if longest < 256 else np.uint16 if longest < 65536 else np.int32
        everything = self._encoded + encoded
        # A call this small ends before threads would have started; a larger one uses all of them.
        workers = 1 if len(encoded) * len(everything) < 2_000_000 else self._workers
        return cdist(encoded, everything, scorer=LCSseq.similarity, dtype=dtype, workers=workers)

    def _encode(self, text: str) -> str:
        from rouge_score.tokenize import tokenize

        return "".join(self._ids.get(token) or self._new_id(token) for token in tokenize(text, None))

    def _new_id(self, token: str) -> str:
        number = len(self._ids)
        self._ids[token] = chr(number if number < _FIRST_SURROGATE else number + _SURROGATES)
        return self._ids[token]

    def _add(self, instruction: str, encoded: str) -> None:
        if len(self) == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
        self._lengths[len(self)] = len(encoded)
        self._longest = max(self._longest, len(encoded))
        self._encoded.append(encoded)
        self.instructions.append(instruction)


def f_measure(overlap: np.ndarray, pool_lengths: np.ndarray, length: int) -> np.ndarray:
    """Computes ROUGE-L's F measure by the same operations as rouge_score 0.1.2 (`_score_lcs`, `scoring.fmeasure`).

    The algebraically equal 2*lcs/(m+n) rounds differently and flips decisions at exactly 0.7 (lcs 7, lengths 7 and 13).

    Args:
        overlap: Integers, the LCS with each instruction of the pool.
        pool_lengths: Integers of a shape that broadcasts with it, the tokens of each instruction of the pool.
        length: Tokens of the candidate.

    Returns:
        float64 from 0 to 1; 0 if a side has no tokens or nothing is shared.
    """
    precision = overlap / np.maximum(pool_lengths, 1)  # 0 / 1 for an instruction without tokens
    recall = overlap / max(length, 1)
    total = precision + recall
    scores = 2 * precision * recall
    return np.divide(scores, total, out=scores, where=total > 0)


def _ten_best(scores: np.ndarray) -> np.ndarray:
    """Returns np.argsort(scores, kind="stable")[-10:][::-1] without sorting the whole pool.

    The floor sinks by a fifth from the best score until ten scores reach it (0.5, 0.4, 0.32, ...); these are sorted.
    """
    floor = scores.max(initial=0.0)
    high = np.flatnonzero(scores >= floor)
    while len(high) < min(10, len(scores)):
        floor = 0.8 * floor if floor > 1e-3 else 0.0
        high = np.flatnonzero(scores >= floor)
    return high[np.argsort(scores[high], kind="stable")[-10:][::-1]]
