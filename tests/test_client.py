"""alpaca/client.py: what a client learns from a server, what it waits for, and when it gives up, over real HTTP."""

import asyncio
import email.utils
import json
import time
from types import SimpleNamespace

import pytest
from openai_server import Server, completion_for, unsupported

from alpaca import client as client_module
from alpaca.cli import UserError
from alpaca.client import Client
from utils import OpenAIDecodingArguments, openai_completion

PROMPT = "###\n4. Instruction:"


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def clock(monkeypatch):
    """A clock of the module's own: sleeping moves it on and takes no time. `slept` lists the pauses."""
    clock = SimpleNamespace(now=time.time(), slept=[])

    async def sleep(seconds):
        clock.slept.append(seconds)
        clock.now += seconds
        await asyncio.sleep(0)

    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    return clock


def ask(server: Server, times: int = 1, model: str = "tiny", parameters: dict | None = None, **settings):
    """Completes the prompt some times, one after the other; returns the last completion and what was logged."""
    lines = []

    async def run():
        async with Client(server.base_url, log=lines.append, **settings) as client:
            sent = {"max_tokens": 3072, "temperature": 1.0, "top_p": 1.0} if parameters is None else parameters
            return [await client.complete(PROMPT, model, **sent) for _ in range(times)][-1]

    return asyncio.run(run()), lines


def sent(server: Server) -> list[list[str]]:
    """The optional parameters of each request."""
    return [sorted(set(body) - {"model", "messages", "prompt"}) for _, body in server.requests]


def test_completion_carries_text_reason_and_usage(server):
    completion, lines = ask(server)
    assert completion.text == completion["text"] == completion_for(PROMPT)
    assert completion.finish_reason == "stop"
    assert completion.usage["total_tokens"] == completion.usage["prompt_tokens"] + completion.usage["completion_tokens"]
    assert sent(server) == [["max_tokens", "temperature", "top_p"]]
    assert not lines


@pytest.mark.parametrize(
    "refusal",
    [
        unsupported("max_tokens", "Use 'max_completion_tokens' instead."),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs"}]}),
        (422, {"detail": "Unexpected fields in the request: {'max_tokens'}"}),
        (400, {"object": "error", "message": "Unrecognized request argument supplied: max_tokens", "code": 400}),
    ],
    ids=["openai", "fastapi", "transformers", "flat"],
)
def test_refused_max_tokens_is_renamed_once_remembered_and_said_in_one_line(server, refusal):
    server.refuses["max_tokens"] = refusal
    _, lines = ask(server, times=3)
    with_old, with_new = ["max_tokens", "temperature", "top_p"], ["max_completion_tokens", "temperature", "top_p"]
    assert sent(server) == [with_old, with_new, with_new, with_new]
    assert server.requests[1][1]["max_completion_tokens"] == 3072
    assert lines == ["The server refuses max_tokens; sending max_completion_tokens instead."]


def test_parameters_without_another_name_are_left_out(server):
    server.refuses = {
        name: unsupported(name) for name in ("top_p", "temperature", "logit_bias", "max_completion_tokens")
    }
    server.refuses["max_tokens"] = unsupported("max_tokens", "Use 'max_completion_tokens' instead.")
    parameters = {"max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "logit_bias": {"50256": -100}}
    _, lines = ask(server, times=2, parameters=parameters)
    assert sent(server)[-2:] == [[], []]
    assert len(lines) == 5
    assert len(server.requests) == 7


def test_asking_what_a_refusal_teaches_changes_nothing_and_learning_it_twice_says_it_once(server):
    lines = []
    client = Client(server.base_url, log=lines.append)
    error = SimpleNamespace(status_code=400, code=None, param=None, body="Unsupported parameter: 'max_tokens'")
    before = client.request(PROMPT, "tiny", {"max_tokens": 9})
    lesson = client.lesson(error, before[1], "chat")
    assert lesson == client_module.Lesson(refused="max_tokens")
    assert (client.request(PROMPT, "tiny", {"max_tokens": 9}), lines) == (before, [])
    client.learn(lesson)
    client.learn(lesson)
    assert client.request(PROMPT, "tiny", {"max_tokens": 9})[1]["max_completion_tokens"] == 9
    assert lines == ["The server refuses max_tokens; sending max_completion_tokens instead."]


def test_a_wrong_value_is_an_error_and_not_left_out(server):
    message = "temperature must be at most 2"
    server.refuses["temperature"] = 400, {"error": {"message": message, "param": "temperature", "code": None}}
    with pytest.raises(UserError, match=message):
        ask(server)
    assert len(server.requests) == 1


def test_max_tokens_shrinks_until_the_context_fits(server):
    def too_long(body):
        message = f"This model's maximum context length is 2048 tokens. However, you requested {body['max_tokens']}."
        return (
            {"status": 400, "error": {"message": message, "param": "max_tokens"}} if body["max_tokens"] > 2000 else {}
        )

    server.faults = [too_long] * 5
    _, lines = ask(server, times=2)
    assert [body["max_tokens"] for _, body in server.requests] == [3072, 2457, 1965, 1965]
    assert len(lines) == 2


@pytest.mark.parametrize(
    "refusal",
    [None, (400, {"error": {"message": "default chat template is no longer allowed"}}), (405, {"detail": "no"})],
)
def test_auto_falls_back_to_completions_where_there_is_no_chat(server, refusal):
    if refusal:
        server.refuses["messages"] = refusal
    else:
        server.apis = ["completions"]
    completion, lines = ask(server, times=2)
    assert completion.text == completion_for(PROMPT)
    assert [path for path, _ in server.requests] == ["/v1/chat/completions", "/v1/completions", "/v1/completions"]
    assert lines == ["The server has no chat for this model; using /completions."]


def test_auto_tries_completions_where_chat_fails_before_the_first_answer(server, clock):
    server.refuses["messages"] = 500, {"error": "Internal Server Error"}  # transformers serve without a chat template
    completion, lines = ask(server, times=2)
    assert completion.text == completion_for(PROMPT)
    assert [path for path, _ in server.requests] == ["/v1/chat/completions", "/v1/completions", "/v1/completions"]
    assert lines[-1] == "The server has no chat for this model; using /completions."


def test_auto_comes_back_to_chat_after_a_passing_failure(server, clock):
    server.apis = ["chat"]
    server.faults = [{"status": 500}]
    ask(server, times=2)
    paths = [path.removeprefix("/v1/") for path, _ in server.requests]
    assert paths == ["chat/completions", "completions", "chat/completions", "chat/completions"]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_the_api_that_is_asked_for_is_used(server, api):
    ask(server, api=api)
    assert [path for path, _ in server.requests] == ["/v1/chat/completions" if api == "chat" else "/v1/completions"]


def test_retry_after_is_honoured_above_two_minutes(server, clock):
    server.faults = [{"status": 429, "headers": {"Retry-After": "150"}}]
    _, lines = ask(server)
    assert 150 <= sum(clock.slept) <= 152
    assert "429" in lines[0]
    assert "told to fail" in lines[0]


def test_retry_after_may_be_a_date(server, clock):
    later = email.utils.formatdate(clock.now + 90, usegmt=True)
    server.faults = [{"status": 503, "headers": {"Retry-After": later}}]
    ask(server)
    assert 88 <= sum(clock.slept) <= 92


def test_one_requests_retry_after_holds_the_others_back(server, clock):
    server.faults = [{"status": 429, "headers": {"Retry-After": "100"}}]

    async def run():
        async with Client(server.base_url, log=lambda _: None) as client:
            first = asyncio.ensure_future(client.complete(PROMPT, "tiny"))
            while not clock.slept:
                await asyncio.sleep(0.01)
            clock.now -= clock.slept[0] / 2  # half of the pause is over
            await client.complete(PROMPT, "tiny")
            await first

    asyncio.run(run())
    assert len(clock.slept) >= 2
    assert clock.slept[1] > 30


@pytest.mark.parametrize(
    "fault", [{"status": 429}, {"status": 500}, {"status": 503}, {"drop": True}, {"half": True}, {"raw": "<html>"}],
    ids=lambda fault: str(fault),
)  # fmt: skip
def test_passing_failures_are_retried_and_lasting_ones_end_in_one_line(server, clock, fault):
    server.faults = [fault] * 2
    completion, lines = ask(server, max_retries=3)
    assert completion.text == completion_for(PROMPT)
    assert len(lines) == 2
    server.faults, server.requests = [fault] * 9, []
    with pytest.raises(UserError) as caught:
        ask(server, max_retries=3)
    assert len(server.requests) == 4
    assert "\n" not in str(caught.value)
    assert "failed 4 times" in str(caught.value)


def test_back_off_grows_and_is_jittered(server, clock):
    server.faults = [{"status": 500}] * 6
    ask(server)
    for i, pause in enumerate(clock.slept):
        assert 0.25 * 2**i <= pause <= 0.5 * 2**i
    assert len({pause / 2**i for i, pause in enumerate(clock.slept)}) == 6


def test_a_slow_answer_is_given_up_and_asked_for_again(server, clock):
    server.faults = [{"delay": 1.0}]
    _, lines = ask(server, timeout=0.2)
    assert len(server.requests) == 2
    assert "timed out" in lines[0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "error": {"message": "bad key", "code": "invalid_api_key"}}, "bad key.*OPENAI_API_KEY"),
        ({"status": 403, "error": {"message": "not for you"}}, "not for you"),
        ({"status": 402, "error": {"message": "pay"}}, "no quota or credit"),
        ({"status": 429, "error": {"message": "quota", "code": "insufficient_quota"}}, "no quota or credit"),
        ({"status": 429, "error": {"message": "quota", "type": "insufficient_quota"}}, "no quota or credit"),
        ({"status": 400, "error": {"message": "odd\nrequest"}}, "odd request"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_waiting_cannot_cure_ends_at_the_first_call(server, fault, said):
    server.faults = [fault]
    with pytest.raises(UserError, match=said) as caught:
        ask(server)
    assert len(server.requests) == 1
    assert "\n" not in str(caught.value)


def test_unknown_model_lists_what_is_served(server):
    server.models = ["tiny", "small"]
    with pytest.raises(UserError, match="serves no model 'huge'; it serves tiny, small"):
        ask(server, model="huge")
    assert len(server.requests) == 1


def test_refused_connection_says_where_and_what_to_do():
    with pytest.raises(UserError, match=r"cannot reach http://127.0.0.1:9/v1.*start the server"):
        ask(SimpleNamespace(base_url="http://127.0.0.1:9/v1"))


def test_a_server_that_goes_away_later_is_waited_for(clock):
    with Server() as server:
        server.faults = [{}, {"drop": True}, {"drop": True}]
        ask(server, times=2)
        assert len(server.requests) == 4


def test_prompt_that_a_content_filter_refuses_is_an_empty_answer(server):
    server.faults = [{"status": 400, "error": {"message": "filtered", "code": "content_filter"}}]
    completion, _ = ask(server)
    assert (completion.text, completion.finish_reason) == ("", "content_filter")


def test_the_only_served_model_is_found_and_several_are_listed(server):
    async def only():
        async with Client(server.base_url) as client:
            return await client.only_model()

    assert asyncio.run(only()) == "tiny"
    server.models = ["a", "b"]
    with pytest.raises(UserError, match="serves a, b; say which one with --model_name"):
        asyncio.run(only())


def test_no_key_and_no_server_names_both_ways_out():
    with pytest.raises(UserError, match=r"OPENAI_API_KEY.*transformers serve MODEL.*--base_url"):
        Client()


@pytest.mark.parametrize("key", ["sk-sec ret", "sk-\u2026secret", "\u201csk-secret\u201d", "sk\nsecret"])
def test_a_key_that_cannot_be_one_is_refused_and_not_printed(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a character that no key has") as caught:
        client_module.Client()
    assert key not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\r\n")
    assert client_module.Client().openai.api_key == "sk-secret"


def test_base_url_and_key_come_from_the_environment(monkeypatch):
    with Server(key="k") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        assert ask(SimpleNamespace(base_url=None))[0].text


@pytest.mark.parametrize("version", [None, "2024-10-21"])
def test_azure_is_reached_by_its_own_variables(monkeypatch, version):
    with Server(key="k", models=["my-deployment"]) as server:
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.base_url.removesuffix("/v1"))
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", "k")
        if version:
            monkeypatch.setenv("OPENAI_API_VERSION", version)
        assert ask(SimpleNamespace(base_url=None), model="my-deployment")[0].text
        path = "/openai/deployments/my-deployment/chat/completions" if version else "/openai/v1/chat/completions"
        assert server.requests[0][0] == path


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"choices": []}', '{"choices": [{"text": 3}]}', '{"choices": "x"}', "7"]
)
def test_odd_bodies_are_malformed(body):
    with pytest.raises(client_module.Malformed):
        client_module.read_completion(body)


def test_an_answer_without_usage_or_content_is_read():
    body = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    assert client_module.read_completion(body) == client_module.Completion("", "length", None)


@pytest.mark.parametrize("usage", ["many", [1], {"prompt_tokens": None}])
def test_usage_that_counts_nothing_is_no_usage(usage):
    answer = {"choices": [{"text": "yes", "finish_reason": "stop"}], "usage": usage}
    assert client_module.read_completion(answer) == client_module.Completion("yes", "stop", None)


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    body = r'{"choices": [{"text": "a \ud83d\ude00 b \ud83d c", "finish_reason": "length"}]}'
    assert client_module.read_completion(body).text == "a \U0001f600 b \ufffd c"


# utils.openai_completion, the public name


def test_openai_completion_keeps_the_originals_forms(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    arguments = OpenAIDecodingArguments(max_tokens=5)
    assert openai_completion(PROMPT, arguments)["text"] == completion_for(PROMPT)
    assert openai_completion([PROMPT, "a" + PROMPT], arguments, "tiny", return_text=True, batch_size=2) == [
        completion_for(PROMPT),
        completion_for("a" + PROMPT),
    ]
    message = {"role": "user", "content": PROMPT}
    assert openai_completion(message, arguments, return_text=True) == completion_for(PROMPT)
    assert len(openai_completion([PROMPT] * 5, arguments, max_instances=3)) == 3
    nested = openai_completion([PROMPT] * 2, OpenAIDecodingArguments(n=3), return_text=True, batch_size=6)
    assert [len(texts) for texts in nested] == [3, 3]
    openai_completion(PROMPT, OpenAIDecodingArguments(stop=["\n"]), logit_bias={"50256": -100})
    assert sent(server)[-1] == ["logit_bias", "max_tokens", "stop", "temperature", "top_p"]


def test_openai_completion_works_where_a_loop_runs_already(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)

    async def notebook():
        return openai_completion(PROMPT, OpenAIDecodingArguments(), return_text=True)

    assert asyncio.run(notebook()) == completion_for(PROMPT)
