"""Answers by a server: the prompts, the answers and the files are those of the model in process."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from engine_server import EngineServer
from openai_server import unsupported
from taught_model import LESSONS, UNTAUGHT

import inference
from alpaca.cli import UserError
from alpaca.files import jdump, jload
from alpaca.inference.engine import NEUTRAL, Engine
from alpaca.prompts import format_prompt


@pytest.fixture
def server(alpaca):
    with EngineServer(alpaca) as server:
        yield server


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "data.json")
    jdump([{**UNTAUGHT[i // 2]} if i % 2 else LESSONS[i // 2 % 6] for i in range(24)], path)
    return path


def bodies(server) -> list[dict]:
    assert {path for path, _ in server.requests} == {"/v1/completions"}
    return [body for _, body in server.requests]


def test_a_batch_by_an_engine_writes_the_file_of_the_model_in_process(server, model_path, data_path, tmp_path):
    inference.batch(data_path, str(tmp_path / "process.json"), model_path, max_new_tokens=60)
    server.seconds = 0.05
    inference.batch(data_path, str(tmp_path / "engine.json"), base_url=server.base_url, in_flight=8, max_new_tokens=60)
    assert (tmp_path / "engine.json").read_bytes() == (tmp_path / "process.json").read_bytes()
    assert server.most_in_flight == 8
    assert sorted(server.prompts()) == sorted(map(format_prompt, jload(data_path)))
    assert sorted(os.listdir(tmp_path)) == ["engine.json", "process.json"]


def test_no_default_of_the_server_shapes_an_answer(server, data_path, tmp_path):
    flags = {"base_url": server.base_url, "max_new_tokens": 20}
    inference.batch(data_path, str(tmp_path / "greedy.json"), **flags)
    fixed = {"model": "models/tiny-alpaca", "max_tokens": 20, **NEUTRAL}
    for body in bodies(server):
        assert {**body, "prompt": ""} == {**fixed, "prompt": "", "temperature": 0.0}
    server.requests.clear()
    inference.batch(data_path, str(tmp_path / "sampled.json"), **flags, temperature=0.7, top_p=0.9, seed=5)
    expected = [format_prompt(record) for record in jload(data_path)]
    for body in bodies(server):
        assert body["seed"] - 5 in [row for row, prompt in enumerate(expected) if prompt == body["prompt"]]
        body = {name: value for name, value in body.items() if name not in ("prompt", "seed")}
        assert body == {**fixed, "temperature": 0.7, "top_p": 0.9}
    assert len({body["seed"] for body in bodies(server)}) == 24


def test_a_parameter_that_the_server_refuses_is_left_out(server, data_path, tmp_path, capsys):
    server.refuses = {name: unsupported(name) for name in NEUTRAL}
    inference.batch(data_path, str(tmp_path / "out.json"), base_url=server.base_url, max_new_tokens=20)
    assert len(jload(tmp_path / "out.json")) == 24
    assert capsys.readouterr().err.count("refuses min_p; leaving it out") == 1


def test_a_killed_batch_goes_on_without_asking_twice(server, root, data_path, tmp_path, capsys):
    output, journal = str(tmp_path / "out.json"), tmp_path / "out.json.partial.jsonl"
    server.seconds = 0.05
    flags = ["--data", data_path, "--output", output, "--base_url", server.base_url, "--in_flight", "3"]
    command = [sys.executable, "inference.py", "batch", *flags, "--max_new_tokens", "20"]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sum(len(json.loads(line)["rows"]) for line in journal.read_text().splitlines())
    server.requests.clear()
    inference.batch(data_path, output, base_url=server.base_url, max_new_tokens=20)
    assert len(server.requests) == 24 - kept
    assert f"continuing after {kept} answers" in capsys.readouterr().err
    assert [record["instruction"] for record in jload(output)] == [r["instruction"] for r in jload(data_path)]


def test_ctrl_c_ends_a_batch_at_once_and_keeps_its_answers(server, root, data_path, tmp_path):
    journal = tmp_path / "out.json.partial.jsonl"
    server.seconds = 0.3
    flags = ["--data", data_path, "--output", str(tmp_path / "out.json"), "--base_url", server.base_url]
    command = [sys.executable, "inference.py", "batch", *flags, "--in_flight", "2", "--max_new_tokens", "20"]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert len(server.requests) < 24


def test_a_failure_keeps_what_was_on_its_way(server, data_path, tmp_path):
    output, fault = str(tmp_path / "out.json"), {"status": 400, "error": {"message": "out of order"}}
    server.faults = [{"delay": 0.3}] * 4 + [fault]
    with pytest.raises(UserError, match="answered 400: out of order"):
        inference.batch(data_path, output, base_url=server.base_url, in_flight=5, max_new_tokens=20)
    assert len(server.requests) == 5
    inference.batch(data_path, output, base_url=server.base_url, max_new_tokens=20)
    assert len(server.requests) == 5 + 20
    assert len(jload(output)) == 24


def test_answers_of_another_model_or_server_are_not_mixed(server, data_path, tmp_path):
    server.models.append("other")
    server.faults = [{}, {}, {"status": 400}]
    arguments = {"data": data_path, "output": str(tmp_path / "out.json"), "base_url": server.base_url}
    with pytest.raises(UserError, match="answered 400"):
        inference.batch(**arguments, model_name="other", in_flight=1, max_new_tokens=20)
    with pytest.raises(UserError, match="begun with another model_name;"):
        inference.batch(**arguments, model_name="models/tiny-alpaca", max_new_tokens=20)


def test_an_answer_streams_and_goes_on_after_a_lost_connection(server):
    server.breaks = [4]
    engine = Engine(server.base_url)
    settings = engine.settings(60, 0.0, 1.0)
    pieces = list(engine.stream(engine.encode(LESSONS[5], 60)[0], settings))
    assert "".join(pieces) == server.known[format_prompt(LESSONS[5])]
    assert len(pieces) > 10
    assert len(server.requests) == 2


def test_another_answer_after_a_lost_connection_is_refused(server):
    server.breaks = [4]
    texts = iter(["The first answer of all.", "And quite another."])
    server.answer = lambda prompt: next(texts)
    engine = Engine(server.base_url)
    with pytest.raises(UserError, match="now answers otherwise; ask again"):
        list(engine.stream("Hi", engine.settings(60, 1.0, 1.0)))


def test_a_server_that_cannot_stream_answers_at_once(server):
    server.faults = [{"raw": json.dumps({"choices": [{"text": "Bonjour", "finish_reason": "stop"}]})}]
    engine = Engine(server.base_url)
    assert list(engine.stream("Hi", engine.settings(60, 0.0, 1.0))) == ["Bonjour"]


def test_a_stream_that_is_closed_hangs_up(server):
    server.answer = lambda prompt: "word " * 100_000
    engine = Engine(server.base_url)
    stream = engine.stream("Hi", engine.settings(60, 0.0, 1.0))
    next(stream)
    stream.close()
    until = time.monotonic() + 20
    while server.in_flight and time.monotonic() < until:
        time.sleep(0.01)
    assert server.in_flight == 0


def test_answer_and_chat_ask_the_engine(server, monkeypatch, capsys):
    flags = {"base_url": server.base_url, "max_new_tokens": 60}
    inference.answer("Translate to French.", "Good morning", **flags)
    assert capsys.readouterr().out == "Bonjour\n"
    server.faults = [{"status": 400, "error": {"message": "not today"}}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Sing.\n\nName the three primary colors.\n\n"))
    inference.chat(**flags)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["", "Red, blue and yellow."]
    assert "error: " in printed.err
    assert "not today" in printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--model_path, or a server that has it with --base_url; found neither"),
        ({"model_path": "m", "base_url": "http://127.0.0.1:9/v1"}, "found both"),
        ({"base_url": ""}, "--base_url is empty"),
        ({"model_path": "m", "model_name": "x"}, "give the server's --base_url, too"),
        ({"base_url": "http://127.0.0.1:9/v1", "device": "cpu"}, "the server's own business"),
        ({"base_url": "http://127.0.0.1:9/v1", "dtype": "float32"}, "the server's own business"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "cannot reach http://127.0.0.1:9/v1"),
    ],
)
def test_the_model_is_named_in_one_way(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        inference.answer("Hi", **flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [{"base_url": "u", "batch_size": 4}, {"model_path": "m", "in_flight": 4}])
def test_a_width_that_would_have_no_effect_is_refused(flags, data_path, tmp_path):
    with pytest.raises(UserError, match="--batch_size belongs to --model_path, and --in_flight to --base_url"):
        inference.batch(data_path, str(tmp_path / "out.json"), **flags)
    assert os.listdir(tmp_path) == []
