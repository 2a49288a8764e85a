"""alpaca/client.py: what a client learns from a server, what it waits for, and when it gives up, over real HTTP."""

import asyncio
import email.utils
import json
import re
import time
from types import SimpleNamespace

import pytest
from openai_server import Server, completion_for, unsupported

from alpaca import client as client_module
from alpaca.cli import UserError
from alpaca.client import Client, Lesson, PromptTooLong, clean
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
    assert lesson == Lesson(refused="max_tokens")
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


def test_max_tokens_shrinks_until_the_context_fits_where_no_limit_is_named(server):
    def too_long(body):
        refusal = {"status": 400, "error": {"message": "Too much for the context window.", "param": "max_tokens"}}
        return refusal if body["max_tokens"] > 2000 else {}

    server.faults = [too_long] * 5
    _, lines = ask(server, times=2)
    assert [body["max_tokens"] for _, body in server.requests] == [3072, 2457, 1965, 1965]
    assert len(lines) == 2


@pytest.mark.parametrize(("wording", "allowed"), [("openai", 2044), ("litellm", 2044), ("vllm", 2048)])
def test_the_contexts_limit_is_read_from_the_refusal(wording, allowed):
    with Server(context=2048, wording=wording) as server:
        _, lines = ask(server, times=2)
    assert [body["max_tokens"] for _, body in server.requests] == [3072, allowed, allowed]
    assert lines == [f"The model's context is too short for that many tokens; trying max_tokens={allowed}."]


@pytest.mark.parametrize("wording", ["openai", "litellm", "vllm", "llama.cpp"])
def test_a_prompt_that_leaves_no_room_is_its_own_error_and_lowers_nothing_for_others(wording):
    async def run(server):
        async with Client(server.base_url, log=lambda _: None) as client:
            with pytest.raises(PromptTooLong, match=r"the prompt is too long for the model's context: .*2048"):
                await client.complete("word " * 3000 + PROMPT, "tiny", max_tokens=1000)
            await client.complete(PROMPT, "tiny", max_tokens=1000)

    with Server(context=2048, wording=wording) as server:
        asyncio.run(run(server))
        assert [body["max_tokens"] for _, body in server.requests] == [1000, 1000]


@pytest.mark.parametrize(
    ("message", "asked", "room"),
    [
        (
            "maximum context length is 2048 tokens and your request has 528 input tokens (3072 > 2048 - 528).",
            3072,
            1520,
        ),
        ("max_tokens is too large: 6000. This model supports at most 4096 completion tokens, whereas you", 6000, 4096),
        ("input length and `max_tokens` exceed context limit: 1500 + 3072 > 2048, decrease", 3072, 548),
        ("context length is 2048 tokens. However, your prompt contains at least 1 input tokens", 2048, 1638),
        ("The decoder prompt (length 1500) is longer than the maximum model length of 1024.", 3072, None),
        ("prompt is too long: 3100 tokens > 2048 maximum", 3072, None),
        ("the context length is no number: " + "9" * 5000, 3072, 2457),
        ("maximum context length is 2048", 65, None),
    ],
)
def test_wordings_of_a_full_context_are_understood(server, message, asked, room):
    error = SimpleNamespace(status_code=400, code=None, param=None, body=message)
    lesson = Client(server.base_url).lesson(error, {"max_tokens": asked}, "chat")
    assert lesson == (Lesson(max_tokens=room) if room else Lesson(prompt_too_long=True))


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


@pytest.mark.parametrize(
    "asked", ["inf", "999999999", "Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"]
)
def test_retry_after_is_obeyed_for_max_outage_at_most_and_the_line_says_so(server, clock, asked):
    server.faults = [{"status": 429, "headers": {"Retry-After": asked}}]
    _, lines = ask(server, max_outage=100)
    assert 100 <= sum(clock.slept) <= 102
    assert "retry 1 of 8 in 10" in lines[0]
    assert "the server asks to wait" in lines[0]


@pytest.mark.parametrize("asked", ["nan", "-5", "soon", ""])
def test_a_retry_after_that_says_nothing_delays_little(server, clock, asked):
    server.faults = [{"status": 429, "headers": {"Retry-After": asked}}]
    ask(server)
    assert sum(clock.slept) <= 0.5


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


def test_an_answer_that_drips_is_given_up_when_its_time_is_over(server, clock):
    server.faults = [{"drip": 0.05}]
    completion, lines = ask(server, timeout=0.5)  # the whole answer would take a minute, each byte comes in time
    assert completion.text == completion_for(PROMPT)
    assert lines[0].startswith("Request timed out (TimeoutError); retry 1 of 8")


LOADING = 503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}  # llama.cpp's words


def test_a_server_that_loads_its_model_is_waited_for_from_the_start(server, clock):
    server.down = LOADING
    lines = []

    def log(line):
        lines.append(line)
        server.down = None

    async def run():
        async with Client(server.base_url, log=log) as client:
            return await client.only_model()

    assert asyncio.run(run()) == "tiny"
    assert lines[0].endswith("is down (503 Loading model); waiting up to 600 s for it.")
    assert "is back after" in lines[1]


def test_an_outage_is_one_probe_and_one_line_and_everybody_waits_for_it(server, clock):
    lines = []

    async def run():
        async with Client(server.base_url, max_retries=0, log=lines.append) as client:
            await client.complete(PROMPT, "tiny")
            server.down = LOADING
            requests = [asyncio.ensure_future(client.complete(PROMPT, "tiny")) for _ in range(20)]
            while server.probes < 5:
                await asyncio.sleep(0.01)
            late = asyncio.ensure_future(client.complete(PROMPT, "tiny"))
            while server.probes < 10:
                await asyncio.sleep(0.01)
            asked = len(server.requests)
            server.down = None
            await asyncio.gather(*requests, late)
            return asked

    assert asyncio.run(run()) == 21  # during the outage nothing but the probe was sent
    assert len(server.requests) == 42
    assert [line.split(" is ")[1][:4] for line in lines] == ["down", "back"]


def test_an_outage_of_a_stopped_server_ends_when_it_is_started_again(server, clock):
    async def run():
        async with Client(server.base_url, max_retries=0, log=lambda _: None) as client:
            await client.complete(PROMPT, "tiny")
            server.shutdown()
            server.server_close()
            await client.openai._client.aclose()  # kill -9 closes the connections, too
            client.openai._client = __import__("openai").DefaultAsyncHttpxClient()
            waiting = asyncio.ensure_future(client.complete(PROMPT, "tiny"))
            while len(clock.slept) < 3:
                await asyncio.sleep(0.01)
            with Server(port=server.server_port):
                return (await waiting).text

    assert asyncio.run(run()) == completion_for(PROMPT)


def test_an_outage_that_outlasts_the_patience_ends_in_one_line(server, clock):
    server.down = LOADING
    with pytest.raises(
        UserError, match=r"has been down for 90 s \(503 Loading model\); start it again, then run the same"
    ):
        ask(server, max_outage=90)
    assert 90 <= sum(clock.slept) <= 91
    assert len(server.requests) == 1


def test_a_lost_request_at_a_server_that_answers_is_no_outage(server, clock):
    server.faults = [{"drop": True}, {"status": 503}]
    _, lines = ask(server)
    assert ["retry 1 of 8" in lines[0], "retry 2 of 8" in lines[1], len(lines)] == [True, True, 2]


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


@pytest.mark.parametrize("data", ['[{"id": 7}]', "7", "[" * 5000, "1" * 5000, '"x"'])
def test_a_list_of_models_that_is_none_is_one_line(server, data, monkeypatch):
    monkeypatch.setattr(Server, "model_list", lambda _: f'{{"data": {data}}}')
    with pytest.raises(UserError, match=r"/models gave no list of models; is --base_url an OpenAI-compatible server"):
        ask_for_model(server)


def test_a_server_that_fails_at_its_list_of_models_has_its_model_named(server):
    server.down = 500, "Internal Server Error"  # transformers serve, without a cache of models
    with pytest.raises(UserError, match=r"answered 500: Internal Server Error, at /models; say which .* --model_name"):
        ask_for_model(server)
    assert server.probes == 1


def test_a_base_url_without_v1_is_named_and_chat_not_blamed(server):
    lines = []

    async def run():
        async with Client(server.base_url.removesuffix("/v1") + "/v2", log=lines.append) as client:
            await client.complete(PROMPT, "tiny")

    server.apis = []
    with pytest.raises(
        UserError, match=r"answered 404: Not Found \(the --base_url of such a server usually ends in /v1\)"
    ):
        asyncio.run(run())
    assert lines == []


def ask_for_model(server):
    async def run():
        async with Client(server.base_url, log=lambda _: None) as client:
            return await client.only_model()

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["base_url", "OPENAI_BASE_URL", "AZURE_OPENAI_ENDPOINT"])
def test_an_empty_url_is_refused_and_not_taken_for_openai(monkeypatch, name):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-0123456789")
    if name.isupper():
        monkeypatch.setenv(name, "")
    with pytest.raises(UserError, match=f"{name} is empty; give the server's URL, or leave it out to use OpenAI"):
        Client(None if name.isupper() else "")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "HTTP_PROXY",
            "ftp://ada:secret@proxy",
            r"HTTP_PROXY=ftp://\*\*\*@proxy, set in the environment, cannot be used",
        ),
        (
            "SSL_CERT_FILE",
            "/none.pem",
            "SSL_CERT_FILE=/none.pem, set in the environment, cannot be used: .*No such file",
        ),
    ],
)
def test_a_bad_proxy_or_certificate_file_is_named_and_not_the_url(monkeypatch, server, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        Client(server.base_url)
    assert "base_url" not in str(caught.value)


def test_a_proxy_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("http_proxy", "http://ada:secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"through the proxy http://\*\*\*@127.0.0.1:9: correct HTTP_PROXY or NO_PROXY"):
        ask(SimpleNamespace(base_url="http://server.invalid/v1"))


def test_messages_hold_no_key_no_password_and_no_escape_sequence(monkeypatch, server):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-verysecret")
    said = "\x1b]0;title\x07\x1b[31mno\x1b[0m sk-verysecret\r\n at http://ada:p@ss@host/v1 \u202e\x9b2J"
    shown = r"no \*\*\* at http://\*\*\*@host/v1 \\u202e\\x9b2J"
    server.faults = [{"status": 400, "error": {"message": said}}]
    with pytest.raises(UserError, match=shown):
        ask(server)
    server.faults = [{"status": 500, "error": {"message": said}}]
    url = server.base_url.replace("http://", "http://ada:secret@")
    monkeypatch.setattr(client_module.random, "uniform", lambda a, b: 0.0)
    _, lines = ask(SimpleNamespace(base_url=url))
    assert re.search(shown, lines[0])
    with pytest.raises(UserError, match=r"http://\*\*\*@127.0.0.1:\d+/v1 serves no model"):
        ask(SimpleNamespace(base_url=url), model="huge")
    assert clean("plain — text") == "plain — text"


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
    "body",
    [
        "[" * 5000,
        '{"choices": ' + "1" * 5000 + "}",
        '{"a": ' * 500 + "1" + "}" * 500,
        "",
        "[]",
        "{}",
        '{"choices": []}',
        '{"choices": [{"text": 3}]}',
        '{"choices": "x"}',
        "7",
    ],
)
def test_odd_bodies_are_malformed(body):
    with pytest.raises(client_module.Malformed):
        client_module.read_completion(body)


def test_an_answer_without_usage_or_content_is_read():
    body = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    assert client_module.read_completion(body) == client_module.Completion("", "length", None)


@pytest.mark.parametrize(
    "usage",
    ["many", [1], {"prompt_tokens": None}, *({"prompt_tokens": n, "completion_tokens": 1} for n in (-1, True, 10**18))],
)
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
