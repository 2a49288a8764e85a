"""demo/replay.py, as a process, over real HTTP."""

import contextlib
import hashlib
import json
import re
import socket
import subprocess
import sys

import openai
import pytest

PROMPT = "List of 20 tasks:\n###\n1. Instruction:"
RECORD = {
    "request_index": 0,
    "prompt_sha256": hashlib.sha256(PROMPT.encode()).hexdigest(),
    "text": " Say it — in one line.",
    "finish_reason": "length",
    "usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16},
}


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps(RECORD, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def start(root, recording, port=0):
    command = [sys.executable, "-m", "demo.replay", "--port", str(port), "--recording", str(recording)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def client(root, recording):
    server = start(root, recording)
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
            yield made
    finally:
        server.terminate()
        server.communicate()


def test_recorded_prompt_is_answered_on_both_apis(root, recording):
    with client(root, recording) as api:
        assert [model.id for model in api.models.list()] == ["recorded"]
        completion = api.completions.create(model="recorded", prompt=PROMPT)
        messages = [{"role": "user", "content": PROMPT}]
        chat = api.chat.completions.create(model="recorded", messages=messages)
    assert completion.choices[0].text == chat.choices[0].message.content == RECORD["text"]
    assert completion.choices[0].finish_reason == chat.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == chat.usage.total_tokens == 16


def test_unknown_prompt_is_a_404_that_says_how_the_recording_was_made(root, recording):
    with client(root, recording) as api, pytest.raises(openai.NotFoundError, match="--seed 0"):
        api.completions.create(model="recorded", prompt=PROMPT + " ")


def test_occupied_port_is_refused_in_one_line(root, recording):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start(root, recording, port)
        out, err = server.communicate(timeout=30)
    assert (server.returncode, out, err.count("\n")) == (2, "", 1)
    assert f"port {port}: Address already in use" in err


def test_malformed_recording_is_refused_with_its_line(root, recording):
    recording.write_text(recording.read_text(encoding="utf-8") + '{"text": 1}\n', encoding="utf-8")
    server = start(root, recording)
    _, err = server.communicate(timeout=30)
    assert (server.returncode, err.count("\n")) == (2, 1)
    assert "completions.jsonl, line 2" in err
