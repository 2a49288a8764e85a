"""alpaca/generation/batch_api.py: the same data at half the price, and no batch paid for twice."""

import json
import signal
import time

import openai_server
import pytest
from generation_runs import fails, generate, journal, outputs, start
from openai_server import unsupported

from alpaca.files import jload
from alpaca.generation import batch_api as batch_api_module


def test_batches_give_the_same_tasks_at_half_the_price(folder, server, capsys):
    generate(server, "live", price_input=1, price_output=1)
    generate(server, "batch", price_input=1, price_output=1, batch_api=True)
    live, batch = (sorted(journal(folder / name), key=lambda r: r["request_index"]) for name in ("live", "batch"))
    assert outputs(folder / "live") == outputs(folder / "batch")
    assert batch[0]["cost"] == live[0]["cost"] / 2
    assert len(server.batches) == 1
    assert not (folder / "batch" / "batch.json").exists()


def test_a_file_of_batch_requests_keeps_to_its_limits(folder, server, monkeypatch):
    server.polls_per_batch = 0
    monkeypatch.setattr(batch_api_module, "MAX_REQUESTS", 2)
    generate(server, batch_api=True)
    assert len(server.batches) == 2
    monkeypatch.setattr(batch_api_module, "MAX_BYTES", 1000)
    generate(server, "small", num_instructions_to_generate=20, batch_api=True)
    assert len(server.batches) == 4
    assert len(jload("small/regen.json")) == 20


@pytest.mark.parametrize("knows_id", [True, False])
def test_an_interrupted_batch_is_picked_up_and_not_paid_again(folder, server, knows_id):
    server.polls_per_batch = 10**6
    process = start(server, batch_api=True)
    state = folder / "out" / "batch.json"
    while not (state.exists() and jload(state)["batch_id"]):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT if knows_id else signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    if knows_id:
        assert process.returncode == 130
        assert "Run the same command to continue" in out
        assert "Traceback" not in err
    else:  # as if the crash came between the batch's creation and its noting down
        state.write_text(json.dumps({**jload(state), "batch_id": None}))
    server.polls_per_batch = 0
    generate(server, batch_api=True)
    assert len(server.batches) == 1
    assert len(jload("out/regen.json")) == 50


def test_batches_learn_refused_parameters_and_stop_if_there_is_nothing_to_learn(folder, server, capsys):
    server.polls_per_batch = 0
    server.refuses["max_tokens"] = unsupported("max_tokens", "Use 'max_completion_tokens' instead.")
    generate(server, batch_api=True)
    assert len(server.batches) == 2
    assert "sending max_completion_tokens" in capsys.readouterr().err
    server.refuses = {"messages": (400, {"error": {"message": "no batches today"}})}
    assert "no batches today" in fails(capsys, server, "other", batch_api=True)


def spoil_batches(monkeypatch, change):
    """Lets `change(files, batch)` at what a completed batch has written."""
    work_on = openai_server._Handler._work_on

    def spoilt(handler, batch):
        fresh = batch["status"] != "completed"
        work_on(handler, batch)
        if fresh and batch["status"] == "completed":
            change(handler.server.files, batch)

    monkeypatch.setattr(openai_server._Handler, "_work_on", spoilt)


def test_half_a_file_of_results_loses_nothing(folder, server, capsys, monkeypatch):
    rest = {}

    def halve(files, batch):
        name = batch["output_file_id"]
        files[name], rest[name] = files[name][:-100], files[name][-100:]

    spoil_batches(monkeypatch, halve)
    said = fails(capsys, server, batch_api=True, max_retries=0)
    assert "is no result" in said
    assert "run the same command to try this batch again, or delete out/batch.json to ask and pay again" in said
    for name, text in rest.items():
        server.files[name] += text
    generate(server, batch_api=True)
    assert len(server.batches) == 1
    assert len(jload("out/regen.json")) == 50


def test_a_request_that_no_batch_answers_is_not_asked_for_ever(folder, server, capsys, monkeypatch):
    def misname(files, batch):
        name = batch["output_file_id"]
        files[name] = files[name].replace('"custom_id": "0"', '"custom_id": "999"')

    server.polls_per_batch = 0
    spoil_batches(monkeypatch, misname)
    assert "request 0 failed with status 0" in fails(capsys, server, batch_api=True)
    assert 0 not in {record["request_index"] for record in journal(folder / "out")}
    assert 999 not in {record["request_index"] for record in journal(folder / "out")}


@pytest.mark.parametrize("body", ["Internal Server Error", {"error": "Internal Server Error"}])
def test_an_error_in_plain_words_is_asked_for_again(folder, server, monkeypatch, body):
    def fail_one(files, batch):
        if len(server.batches) == 1:
            name, result = batch["output_file_id"], {"custom_id": "0", "response": {"status_code": 500, "body": body}}
            lines = [line for line in files[name].splitlines(True) if '"custom_id": "0"' not in line]
            files[name] = "".join([*lines, json.dumps(result) + "\n"])

    server.polls_per_batch = 0
    spoil_batches(monkeypatch, fail_one)
    generate(server, batch_api=True)
    assert len(server.batches) == 2
    assert len(jload("out/regen.json")) == 50


@pytest.mark.parametrize("state", ["{}", "[]", "7", '{"tag": "x", "settings": {}, "indices": ["0"]}', "[" * 5000])
def test_a_damaged_batch_json_is_one_line(folder, server, capsys, state):
    (folder / "out").mkdir()
    (folder / "out" / "batch.json").write_text(state)
    said = fails(capsys, server, batch_api=True)
    assert "out/batch.json is not the state of a batch" in said or "batch.json, line 1" in said
    assert (folder / "out" / "batch.json").read_text() == state


def test_a_server_without_the_batch_api_is_told_in_one_line(folder, server, capsys, monkeypatch):
    monkeypatch.setattr(
        openai_server._Handler, "_upload", lambda handler, _: handler._send(404, {"detail": "Not Found"})
    )
    said = fails(capsys, server, batch_api=True)
    assert said.endswith("has no Batch API: it answered 404 to /files; leave out --batch_api")


def test_a_prompt_that_does_not_fit_is_not_asked_for_in_another_batch(folder):
    seeds = (folder / "seed_tasks.jsonl").read_text()
    (folder / "seed_tasks.jsonl").write_text(seeds.replace('"..."', f'"{"long " * 2000}"', 5))
    with openai_server.Server(context=2048) as server:
        server.polls_per_batch = 0
        generate(server, num_instructions_to_generate=300, max_tokens=1000, batch_api=True)
    reasons = [record["finish_reason"] for record in journal(folder / "out")]
    assert 0 < reasons.count("prompt_too_long") < len(reasons)
    assert len(server.requests) == len(reasons)


def test_a_batch_under_way_is_not_paid_again_one_by_one(folder, server, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "batch.json").write_text("{}")
    assert "continue with --batch_api" in fails(capsys, server)
    assert not server.requests
