"""alpaca/generation/dispatch.py: requests in flight, their order, failures and Ctrl-C."""

import json
import random
import signal
import time

import pytest
from generation_runs import fails, generate, journal, outputs, start

from alpaca.files import jload


def test_neither_concurrency_nor_order_of_arrival_changes_the_output(folder, server):
    made = []
    for size in (1, 3, 16):
        rng = random.Random(size)
        server.faults = [{"delay": rng.random() * 0.1} for _ in range(40)]
        generate(server, f"out{size}", request_batch_size=size)
        made.append(outputs(folder / f"out{size}"))
    assert made[0] == made[1] == made[2]
    assert server.most_in_flight > 1


def test_requests_of_a_round_are_in_flight_together_and_the_end_is_not_overpaid(folder, server):
    server.seconds = 0.05
    generate(server, num_instructions_to_generate=400, request_batch_size=8)
    assert server.most_in_flight == 8
    assert len(server.requests) <= 400 / 17 + 4


@pytest.mark.parametrize("batch_api", [False, True])
def test_an_answer_that_is_missing_among_later_ones_is_asked_for(folder, server, batch_api):
    server.polls_per_batch = 0
    generate(server, "whole", num_instructions_to_generate=30)
    generate(server)
    path = folder / "out" / "requests.jsonl"
    lines = sorted(path.read_text().splitlines(True), key=lambda line: json.loads(line)["request_index"])
    path.write_text(lines[0] + lines[2])  # enough tasks in all, but those of line 1 come first
    server.requests.clear()
    generate(server, num_instructions_to_generate=30, batch_api=batch_api)
    assert len(server.requests) == 1
    assert outputs(folder / "out") == outputs(folder / "whole")


def test_many_answers_behind_a_missing_one_wait_for_it_at_any_width(folder, server):
    generate(server, num_instructions_to_generate=130, request_batch_size=8)
    before, path = outputs(folder / "out"), folder / "out" / "requests.jsonl"
    lines = path.read_text().splitlines(True)
    path.write_text("".join(line for line in lines if not line.startswith('{"request_index": 1,')))
    server.requests.clear()
    generate(server, num_instructions_to_generate=130, request_batch_size=1)
    assert len(server.requests) == 1
    assert outputs(folder / "out") == before


def test_five_rounds_without_a_kept_task_stop_the_run_and_say_why(folder, server, capsys):
    server.answer = lambda prompt: "I am sorry."
    said = fails(capsys, server, request_batch_size=2)
    assert "malformed 1" in said
    assert 10 <= len(server.requests) <= 16  # five rounds, at most two unread ones, and one in flight


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "error": {"message": "Incorrect API key"}}, "Incorrect API key"),
        ({"status": 429, "error": {"message": "no money", "code": "insufficient_quota"}}, "no quota or credit"),
        ({"status": 400, "error": {"message": "bad request"}}, "bad request"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_failures_that_last_end_at_the_first_call(folder, server, capsys, fault, said):
    server.faults = [fault] * 50
    assert said in fails(capsys, server, request_batch_size=16)
    assert len(server.requests) == 1


def test_a_failure_in_the_middle_keeps_what_came_and_the_same_command_goes_on(folder, server, capsys):
    generate(server, "whole")
    server.faults = [{}, {}, {"status": 400, "error": {"message": "no recording"}}]
    assert "no recording" in fails(capsys, server, request_batch_size=1)
    assert len(jload("out/regen.json")) == 34
    generate(server)
    assert outputs(folder / "out") == outputs(folder / "whole")


def test_ctrl_c_finishes_the_journal_and_says_how_to_go_on(folder, server):
    server.seconds = 0.3
    process = start(server, num_instructions_to_generate=10_000, request_batch_size=4)
    while len(server.requests) < 7:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "requests in flight" in err
    assert "Run the same command to continue" in out
    assert "Traceback" not in err
    assert len(journal(folder / "out")) == server.answered  # nothing that was paid for is missing
    assert len(jload("out/regen.json")) == 17 * server.answered


def test_ctrl_c_does_not_sit_out_a_long_retry_after(folder, server):
    server.faults = [{}, *[{"status": 429, "headers": {"Retry-After": "300"}}] * 5]
    process = start(server)
    while len(server.requests) < 3:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "429 told to fail; retry 1 of 8 in 30" in err
    assert "Run the same command to continue" in out
    assert "Traceback" not in err
