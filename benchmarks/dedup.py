"""De-duplication against large pools, beside rouge_score's own function in the same run. All decisions are compared.

    python -m benchmarks.dedup run

Instructions have the lengths and the words of those in alpaca_data.json. One candidate in five is an instruction of
the pool with a few words changed. Candidates come in rounds of 17, the tasks of one answer.
Writes benchmarks/results/dedup.json.
"""

import os
import random
import sys
import time

import numpy as np
from rouge_score import rouge_scorer

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump
from alpaca.generation.dedup import RougePool
from alpaca.records import load_examples
from benchmarks.provenance import RESULTS, ROOT, provenance

ROUND = 17
REFERENCE_CANDIDATES = {2_000: 170, 13_000: 51, 52_000: 34, 500_000: 10}


def draw(source: list[list[str]], count: int, rng: random.Random) -> list[str]:
    """Draws instructions with the lengths and the words of real ones."""
    lengths, words = [len(words) for words in source], [word for words in source for word in words]
    return [" ".join(rng.choices(words, k=rng.choice(lengths))) for _ in range(count)]


def draw_candidates(source: list[list[str]], pool: list[str], rng: random.Random) -> list[str]:
    """Draws ten rounds of candidates; every fifth is a near-copy of an instruction in the pool."""
    candidates = draw(source, 10 * ROUND, rng)
    for i in range(0, len(candidates), 5):
        words = rng.choice(pool).split()
        for _ in range(rng.randint(1, 3)):
            words[rng.randrange(len(words))] = rng.choice(source[0])
        candidates[i] = " ".join(words)
    return candidates


def ours(pool: list[str], candidates: list[str]) -> tuple[list[tuple[bool, float]], float]:
    """Screens candidates by RougePool; returns (kept, score) for each, and seconds per candidate."""
    rouge = RougePool(pool)
    rouge.screen(candidates[:1], 0.0, 0)  # loads the libraries before the clock starts
    start = time.perf_counter()
    verdicts = [
        verdict
        for i in range(0, len(candidates), ROUND)
        for verdict in rouge.screen(candidates[i : i + ROUND], 0.7, sys.maxsize)
    ]
    return [(v.kept, v.score) for v in verdicts], (time.perf_counter() - start) / len(candidates)


def original(pool: list[str], candidates: list[str]) -> tuple[list[tuple[bool, float]], float]:
    """Does the same by rouge_score's own function, one pair at a time in one process."""
    tokenize = rouge_scorer.tokenizers.DefaultTokenizer().tokenize
    tokens, decisions = [tokenize(text) for text in pool], []
    start = time.perf_counter()
    for candidate in candidates:
        new = tokenize(candidate)
        scores = [rouge_scorer._score_lcs(new, old).fmeasure for old in tokens]
        np.mean(scores)
        decisions.append((max(scores) <= 0.7, max(scores)))
        if decisions[-1][0]:
            tokens.append(new)
    return decisions, (time.perf_counter() - start) / len(candidates)


def run(data_path: str = os.path.join(ROOT, "alpaca_data.json"), sizes: str = "2000,13000,52000,500000") -> None:
    """Measures every size, prints a table and writes the result.

    Args:
        data_path: Alpaca-format data whose instructions give the lengths and the words.
        sizes: Comma-separated sizes of the pool.

    Raises:
        UserError: A decision or a score differs from rouge_score's.
    """
    source = [example["instruction"].split() for example in load_examples(data_path)]
    rng, rows = random.Random(0), []
    print("      pool  ms a candidate  million pairs/s  rouge_score ms  times faster  decisions compared, equal")
    for size in map(int, sizes.split(",")):
        pool = draw(source, size, rng)
        candidates = draw_candidates(source, pool, rng)
        decisions, seconds = ours(pool, candidates)
        expected, reference = original(pool, candidates[: REFERENCE_CANDIDATES.get(size, 4)])
        if decisions[: len(expected)] != expected:
            raise UserError(f"pool {size}: a decision or score differs from rouge_score's")
        row = {
            "pool": size,
            "ms_per_candidate": round(1000 * seconds, 3),
            "million_pairs_per_s": round(size / seconds / 1e6, 1),
            "rouge_score_ms_per_candidate": round(1000 * reference, 1),
            "times_faster": round(reference / seconds),
            "decisions_compared": len(expected),
            "of_which_rejected": sum(not kept for kept, _ in expected),
        }
        rows.append(row)
        print(
            f"{size:>10,}{1000 * seconds:>16.2f}{size / seconds / 1e6:>17.1f}{1000 * reference:>16.1f}"
            f"{reference / seconds:>14.0f}  {len(expected)}, all equal (scores too)"
        )
    result = {"rows": rows, **provenance("rapidfuzz", "rouge_score", "numpy")}
    jdump(result, os.path.join(RESULTS, "dedup.json"))


if __name__ == "__main__":
    run_cli({"run": run})
