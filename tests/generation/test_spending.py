"""alpaca/generation/spending.py: costs, and limits that are never passed."""

import pytest
from generation_runs import fails, generate, journal

from alpaca.generation import spending
from alpaca.generation.config import Config


def test_costs_are_counted_by_the_prices_given(folder, server, capsys):
    generate(server, price_input=1.0, price_output=10.0)
    usage = [record["usage"] for record in journal(folder / "out")]
    expected = sum(u["prompt_tokens"] * 1.0 + u["completion_tokens"] * 10.0 for u in usage) / 1e6
    assert sum(record["cost"] for record in journal(folder / "out")) == pytest.approx(expected)
    assert f"${expected:.4f}" in capsys.readouterr().out


def test_answers_that_came_without_prices_count_towards_the_limit(folder, server, capsys):
    generate(server)
    capsys.readouterr()
    most = {"price_input": 0, "price_output": 10, "max_cost_usd": 4000 * 10 / 1e6}
    generate(server, num_instructions_to_generate=1000, **most)
    tokens = sum(record["usage"]["completion_tokens"] for record in journal(folder / "out"))
    assert tokens + 3072 > 4000 >= tokens
    assert f"${tokens * 10 / 1e6:.4f} spent" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 8])
def test_max_cost_is_never_passed_and_says_so(folder, server, capsys, size):
    most = 8 * 3072 * 10 / 1e6  # what eight answers of full length would cost
    generate(server, num_instructions_to_generate=10_000, price_input=0, price_output=10, max_cost_usd=most,
             request_batch_size=size)  # fmt: skip
    spent = sum(record["cost"] for record in journal(folder / "out"))
    assert most - 2 * 3072 * 10 / 1e6 < spent <= most
    assert server.most_in_flight <= 8
    assert "could pass --max_cost_usd" in capsys.readouterr().out


def test_max_tokens_total_is_never_passed(folder, server, capsys):
    generate(server, num_instructions_to_generate=10_000, max_tokens_total=9000)
    assert sum(record["usage"]["total_tokens"] for record in journal(folder / "out")) <= 9000
    assert "could pass --max_tokens_total 9000" in capsys.readouterr().out


def test_max_cost_needs_prices_and_the_table_has_some(folder, server, capsys):
    assert "--price_input" in fails(capsys, server, max_cost_usd=1)
    assert not server.requests
    assert spending.find_prices("gpt-4o-mini-2024-07-18", Config()) == (0.15, 0.6)


def test_limit_counts_every_answer_in_flight_at_its_full_length():
    config = Config(max_cost_usd=1.0, price_input=0.0, price_output=10.0, max_tokens=3000)  # $0.03 an answer at most
    spent = spending.Spending(config, spending.find_prices(None, config), cost=0.9)
    assert spent.limit_reached("prompt", in_flight=2) is None
    assert spent.limit_reached("prompt", in_flight=3) == (
        "--max_cost_usd 1.0 ($0.9000 spent, one more may cost $0.0300)"
    )
