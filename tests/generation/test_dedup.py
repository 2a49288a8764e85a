"""alpaca/generation/dedup.py: scores equal rouge_score's to the last bit, and decisions the original's loop."""

import random

import numpy as np
import pytest
from openai_server import WORDS
from rouge_score import rouge_scorer

from alpaca.generation.dedup import RougePool, f_measure


@pytest.fixture(scope="module")
def instructions() -> list[str]:
    """Instructions of 1 to 40 words from a small vocabulary, near-duplicates among them."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS[:30], k=rng.randint(1, 30))) for _ in range(120)]
    for text in texts[:60]:
        words = text.split()
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        texts.append(" ".join(words).capitalize() + "!")
    return rng.sample(texts, len(texts))


def original_decisions(pool: list[str], candidates: list[str]) -> list[tuple[bool, float, float]]:
    """One candidate after the other against everything kept, by rouge_score's own function."""
    tokenize = rouge_scorer.tokenizers.DefaultTokenizer().tokenize
    tokens, decisions = [tokenize(text) for text in pool], []
    for candidate in candidates:
        new = tokenize(candidate)
        scores = [rouge_scorer._score_lcs(new, old).fmeasure for old in tokens]
        decisions.append((max(scores) <= 0.7, max(scores), float(np.mean(scores))))
        if decisions[-1][0]:
            tokens.append(new)
    return decisions


def test_scores_and_decisions_equal_rouge_score_to_the_last_bit(instructions):
    pool = RougePool(instructions[:60])
    verdicts = [v for i in range(60, 180, 7) for v in pool.screen(instructions[i : i + 7], 0.7, 10**6)]
    expected = original_decisions(instructions[:60], instructions[60:])
    assert [(v.kept, v.score) for v in verdicts] == [(kept, score) for kept, score, _ in expected]
    assert [v.mean for v in verdicts if v.kept] == [mean for kept, _, mean in expected if kept]
    assert {v.kept for v in verdicts} == {True, False}


def test_looking_scores_up_in_a_large_pool_gives_the_same_bits(instructions):
    pool = RougePool(instructions * 20)  # large enough for the table
    (verdict,) = pool.screen([instructions[3] + " zinc"], 1.0, 1)
    ((_, score, mean),) = original_decisions(instructions, [instructions[3] + " zinc"])
    assert verdict.score == score
    assert verdict.mean == pytest.approx(mean, rel=1e-12)


def test_verdicts_do_not_depend_on_how_candidates_are_grouped(instructions):
    one_by_one, at_once = RougePool(instructions[:50]), RougePool(instructions[:50])
    single = [v for text in instructions[50:] for v in one_by_one.screen([text], 0.7, 10**6)]
    assert single == at_once.screen(instructions[50:], 0.7, 10**6)
    assert one_by_one.instructions == at_once.instructions


def test_a_score_of_exactly_the_threshold_is_kept_as_in_the_original():
    # lcs 7 of 7 and 13 tokens: rouge_score computes 0.7 exactly or just above or below; 2*lcs/(m+n) may differ.
    words = WORDS[:13]
    pool, candidate = [" ".join(words)], " ".join(words[:7])
    (verdict,) = RougePool(pool).screen([candidate], 0.7, 1)
    ((kept, score, _),) = original_decisions(pool, [candidate])
    assert (verdict.kept, verdict.score) == (kept, score)
    assert score != 2 * 7 / (7 + 13)


def test_f_measure_equals_rouge_score_for_all_lengths_up_to_sixty():
    lengths = np.arange(1, 61)
    for length in lengths:
        for lcs in range(1, length + 1):
            others = lengths[lengths >= lcs]
            ours = f_measure(np.full(len(others), lcs), others, length)
            theirs = [rouge_scorer.scoring.fmeasure(lcs / other, lcs / length) for other in others]
            assert ours.tolist() == theirs


def test_ten_most_similar_are_ranked_best_first(instructions):
    pool = RougePool(instructions[:60])
    (verdict,) = pool.screen([" ".join(WORDS[:12])], 1.0, 1)
    scores = list(verdict.most_similar.values())
    assert len(scores) == 10
    assert scores == sorted(scores, reverse=True)
    assert verdict.score == scores[0]
    assert next(iter(verdict.most_similar)) == verdict.nearest


def test_limit_and_eligibility_decide_which_candidates_join_the_pool():
    pool = RougePool(["a b c d"])
    verdicts = pool.screen(["e f g h", "i j k l", "m n o p", "q r s t"], 0.7, 2, [True, False, True, True])
    assert [verdict.kept for verdict in verdicts] == [True, False, True, False]
    assert pool.instructions == ["a b c d", "e f g h", "m n o p"]


@pytest.mark.parametrize("texts", [["été 你好", "naïve"], ["", "   ", "?!"], ["word " * 300, "word " * 299]])
def test_odd_texts_are_scored_as_rouge_score_scores_them(texts):
    pool = ["word word word", "été", ""]
    verdicts = RougePool(pool).screen(texts, 0.7, 9)
    expected = original_decisions(pool, texts)
    assert [(v.kept, v.score) for v in verdicts] == [(kept, score) for kept, score, _ in expected]


def test_vocabularies_larger_than_the_surrogates_begin_are_told_apart():
    words = [f"w{i}" for i in range(57000)]
    pool = RougePool([" ".join(words[i : i + 100]) for i in range(0, 57000, 100)])
    (verdict,) = pool.screen([" ".join(words[55250:55330])], 0.7, 1)
    assert verdict.score == original_decisions([pool.instructions[552], pool.instructions[553]], [
        " ".join(words[55250:55330])
    ])[0][1]  # fmt: skip
