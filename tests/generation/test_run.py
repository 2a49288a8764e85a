"""alpaca/generation/run.py: which request comes next."""

from types import SimpleNamespace

import pytest

from alpaca.generation.config import Config
from alpaca.generation.run import Run


def run(kept, answers, journaled, target=100, **flags) -> Run:
    """A run that has kept so many tasks of so many answers, with the given indices in its journal."""
    per_answer = kept / answers if answers else 0
    harvest = SimpleNamespace(remaining=target - kept, kept_per_answer=per_answer, answers=answers)
    spending = SimpleNamespace(limit_reached=lambda prompt, in_flight: None)
    journal = SimpleNamespace(records={})
    made = Run(Config(**flags), str, harvest, journal, spending, model="tiny", settings={}, save=None)
    journal.records.update(dict.fromkeys(journaled))
    return made


def test_requests_are_needed_until_those_in_flight_will_meet_the_target():
    ten_each = run(kept=40, answers=4, journaled=range(4))
    assert ten_each.needs_more(set(range(4, 9)))
    assert not ten_each.needs_more(set(range(4, 10)))


def test_answers_that_wait_in_the_journal_count_like_those_in_flight():
    two_waiting = run(kept=40, answers=4, journaled=range(6))
    assert two_waiting.needs_more({6, 7, 8})
    assert not two_waiting.needs_more({6, 7, 8, 9})


def test_missing_next_answer_is_needed_whatever_follows_it():
    crashed = run(kept=80, answers=2, journaled=[0, 1, 3, 4])
    assert crashed.needs_more(set())
    assert crashed.next_request(set()) == 2
    assert not crashed.needs_more({2})


def test_nothing_is_needed_once_the_target_is_met():
    assert not run(kept=100, answers=4, journaled=range(4)).needs_more(set())


@pytest.mark.parametrize(("assumed", "expected"), [(10.0, 4), (17.0, 3)])
def test_first_batch_is_sized_by_an_assumption_and_later_ones_by_what_was_kept(assumed, expected):
    assert run(kept=0, answers=0, journaled=[], target=40).requests_needed(assumed) == expected
    assert run(kept=40, answers=2, journaled=range(2)).requests_needed(assumed) == 3


def test_request_past_max_requests_is_refused_with_the_reason():
    limited = run(kept=40, answers=4, journaled=range(4), max_requests=6)
    assert limited.next_request({4}) == 5
    assert limited.next_request({4, 5}) is None
    assert limited.stopped == "--max_requests 6 is reached"
