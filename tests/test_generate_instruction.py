"""generate_instruction.py as its user runs it, against a server over real HTTP."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from generation_runs import SEEDS, fails, generate, journal, outputs, start
from openai_server import Server, unsupported

import generate_instruction
from alpaca.files import jload
from alpaca.records import load_examples
from demo import tiny_model


def test_prompt_is_written_as_the_original_writes_it():
    tasks = [{"instruction": a, "input": b, "output": c} for a, b, c in SEEDS[:3]]
    assert generate_instruction.encode_prompt(tasks, "Rules:\n") == (
        "Rules:\n"
        "###\n1. Instruction: Explain why the sky is blue at noon.\n1. Input:\n<noinput>\n"
        "1. Output:\nAir scatters blue light most.\n"
        "###\n2. Instruction: Sort these numbers from low to high\n2. Input:\n3 1 2\n2. Output:\n1 2 3\n"
        "###\n3. Instruction: Write a haiku about autumn rain.\n3. Input:\n<noinput>\n"
        "3. Output:\nRain on the last leaf\n"
        "###\n4. Instruction:"
    )


@pytest.mark.parametrize(
    ("instruction", "kept"),
    [
        ("Name two primes", False),
        ("Name two odd primes", True),
        ("word " * 150, True),
        ("word " * 151, False),
        ("Describe the IMAGE you see", False),
        ("Describe the imagery you see", True),
        ("Tell me where to go to eat", False),
        ("Write a program that adds", False),
        ("Please write a program that adds", True),
        ("(Name two odd primes)", False),
        ("Élan vital is what exactly", False),
        ("Explain what élan vital is", True),
    ],
)
def test_filters_of_the_original(instruction, kept):
    text = f" {instruction}\n4. Input:\n<noinput>\n4. Output:\nok"
    found = generate_instruction.post_process_gpt3_response(3, {"text": text, "finish_reason": "stop"})
    assert found == ([{"instruction": instruction.strip(), "input": "", "output": "ok"}] if kept else [])


def test_rejected_tasks_come_with_their_reason_if_asked_for():
    response = {"text": " Draw a map\n4. Input:\n<noinput>\n4. Output:\nok\n###\n5. Instr", "finish_reason": "length"}
    found = generate_instruction.post_process_gpt3_response(3, response, with_rejected=True)
    assert found == [
        {"instruction": "Draw a map", "input": "", "output": "ok", "reason": "too_short"},
    ]
    assert generate_instruction.post_process_gpt3_response(3, response) == []


def test_words_are_found_whole_and_in_any_case():
    assert generate_instruction.find_word_in_string("map", "A Map!")
    assert not generate_instruction.find_word_in_string("map", "maple")
    assert generate_instruction.post_process_gpt3_response(3, None) == []


def test_run_meets_its_target_exactly_and_writes_what_train_reads(folder, server, capsys):
    generate(server)
    regen = jload("out/regen.json")
    assert len(regen) == 50
    three = load_examples("out/alpaca_data.json")
    assert three == [{name: task[name] for name in ("instruction", "input", "output")} for task in regen]
    assert [list(task) for task in three] == [["instruction", "input", "output"]] * 50
    assert list(regen[0])[3:] == ["most_similar_instructions", "avg_similarity_score"]
    assert len(regen[-1]["most_similar_instructions"]) == 10
    table = capsys.readouterr().out
    for words in ("requests answered", "tasks parsed", "tasks kept", "surplus", "cost"):
        assert words in table
    record = journal(folder / "out")[0]
    names = ["request_index", "prompt_sha256", "model", "settings", "text", "finish_reason", "usage", "cost"]
    assert list(record) == names


def test_public_functions_are_what_a_run_calls(folder, server, monkeypatch):
    called = set()

    def record(function):
        def recorded(*args, **more):
            called.add(function.__name__)
            return function(*args, **more)

        monkeypatch.setattr(generate_instruction, function.__name__, recorded)

    record(generate_instruction.encode_prompt)
    record(generate_instruction.post_process_gpt3_response)
    record(generate_instruction.find_word_in_string)
    generate(server)
    assert called == {"encode_prompt", "post_process_gpt3_response", "find_word_in_string"}
    called.clear()
    generate_instruction.main(["replay", "--journal_path=out/requests.jsonl", "--output_dir=again"])
    assert called == {"post_process_gpt3_response", "find_word_in_string"}


def test_default_request_asks_for_what_the_original_asked_without_stop_or_logit_bias(folder, server):
    generate(server, api="completions")
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert isinstance(body.pop("prompt"), str)
    assert body == {"model": "tiny", "max_tokens": 3072, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    server.requests.clear()
    generate(server, "biased", logit_bias='{"50256": -100}')
    assert server.requests[0][1]["logit_bias"] == {"50256": -100}


def test_max_requests_keeps_all_that_those_requests_yield(folder, server, capsys):
    generate(server, num_instructions_to_generate=10_000, max_requests=3, request_batch_size=2)
    assert len(jload("out/regen.json")) == 51
    assert len(server.requests) == 3
    assert "--max_requests 3 is reached. Run it again with a higher limit to continue." in capsys.readouterr().out


def test_sigkill_at_twenty_moments_changes_nothing_and_repeats_no_journaled_request(folder, server):
    server.seconds = 0.02
    whole = {"num_instructions_to_generate": 400, "request_batch_size": 3}
    generate(server, "whole", **whole)
    requests = len(journal(folder / "whole"))
    server.requests.clear()
    path, rng, paid = folder / "killed" / "requests.jsonl", random.Random(0), []
    for kill in range(20):
        process = start(server, "killed", **whole)
        moment = (kill + 1) * requests / 22  # 20 moments spread over the run, each at a random point of a request
        while process.poll() is None and (path.read_bytes().count(b"\n") if path.exists() else 0) < moment:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if kill % 4 == 3:  # a crash of the machine may tear the last line
            with open(path, "ab") as file:
                file.write(b'{"request_index": 99, "prompt_sha')
        asked = {body["messages"][0]["content"] for _, body in server.requests}
        assert not asked & set(paid)
        whole_lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        paid = [generate_instruction.encode_prompt(_sample(json.loads(line)), _rules()) for line in whole_lines]
        server.requests.clear()
    assert start(server, "killed", **whole).wait() == 0
    assert outputs(folder / "killed") == outputs(folder / "whole")
    indices = [record["request_index"] for record in journal(folder / "killed")]
    assert len(indices) == len(set(indices))


def _sample(record):
    seeds = generate_instruction.load_seed_tasks("seed_tasks.jsonl")
    return random.Random(f"0-{record['request_index']}").sample(seeds, 3)


def _rules():
    with open("prompt.txt") as file:
        return file.read()


def test_a_finished_run_asks_nothing_when_run_again_and_goes_on_to_a_higher_target(folder, server):
    generate(server)
    before = outputs(folder / "out")
    server.requests.clear()
    generate(server)
    assert not server.requests
    assert outputs(folder / "out") == before
    generate(server, num_instructions_to_generate=80)
    assert len(server.requests) == 2
    generate(server, "at_once", num_instructions_to_generate=80)
    assert outputs(folder / "out") == outputs(folder / "at_once")


def test_replay_makes_the_same_files_without_a_call_and_others_under_other_rules(folder, server, capsys):
    generate(server)
    server.requests.clear()
    replay = ["replay", "--journal_path=out/requests.jsonl"]
    generate_instruction.main([*replay, "--output_dir=again", "--num_instructions_to_generate=50"])
    assert outputs(folder / "again") == outputs(folder / "out")
    generate_instruction.main([*replay, "--output_dir=strict", "--similarity_threshold=0.3", "--keywords=cedar, ruby"])
    strict = jload("strict/regen.json")
    assert 0 < len(strict) < 50
    assert not any("ruby" in task["instruction"] for task in strict)
    assert "keyword" in capsys.readouterr().out
    assert not server.requests
    with pytest.raises(SystemExit):
        generate_instruction.main([*replay, "--output_dir=out"])
    assert "name another --output_dir" in capsys.readouterr().err


def test_dry_run_prints_prompt_and_estimate_and_sends_nothing(folder, capsys):
    generate(None, dry_run=True, num_instructions_to_generate=1300, model_name="gpt-4o-mini")
    out = capsys.readouterr().out
    assert out.startswith("Come up with tasks.")
    assert "about 100 requests" in out
    assert "completion tokens; $0.1" in out
    assert not (folder / "out").exists()


def test_unknown_and_missing_model_names_list_what_is_served(folder, server, capsys):
    assert "it serves tiny" in fails(capsys, server, model_name="huge")
    server.models = ["a", "b"]
    assert "serves a, b" in fails(capsys, server)


def test_no_key_and_no_server_is_one_line_with_both_ways_out(folder, capsys):
    said = fails(capsys, None)
    assert "OPENAI_API_KEY" in said
    assert "--base_url" in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed_tasks_path": "none.jsonl"}, "cannot read none.jsonl: No such file"),
        ({"prompt_path": "none.txt"}, "cannot read the prompt none.txt"),
        ({"num_prompt_instructions": 26}, "1 to the number of 25 seed tasks, found 26"),
        ({"request_batch_size": 0}, "--request_batch_size must be 1 or more"),
        ({"logit_bias": "50256"}, "must be a JSON object"),
        ({"similarity_threshold": 7}, "from 0 to 1"),
        ({"price_input": 1}, "--price_input and --price_output go together"),
        ({"price_input": -1, "price_output": 1}, "must be 0 or more"),
        ({"price_input": "inf"}, "--price_input must be a number"),
        ({"temperature": -0.1}, "--temperature must be 0 or more, found -0.1"),
        ({"top_p": 0}, "--top_p must be above 0 and at most 1"),
        ({"max_requests": -1}, "--max_requests must be 0 or more"),
        ({"max_cost_usd": -1}, "--max_cost_usd must be 0 or more"),
        ({"max_tokens_total": -1}, "--max_tokens_total must be 0 or more"),
        ({"max_retries": -1}, "--max_retries must be 0 or more"),
        ({"max_outage": -1}, "--max_outage must be 0 or more"),
        ({"min_words": 10, "max_words": 2}, "--min_words 10 and --max_words 2 leave no task"),
        ({"min_words": -1}, "--min_words must be 0 or more"),
        ({"logit_bias": "[" * 5000}, "must be a JSON object"),
        ({"base_url": ""}, "--base_url is empty"),
        ({"max_cost_usd": "nan"}, "--max_cost_usd must be a number"),
        ({"request_timeout": 0}, "--request_timeout must be above 0"),
        ({"num_instructions_to_generate": 0}, "--num_instructions_to_generate must be 1 or more"),
        ({"output_dir": "prompt.txt"}, "--output_dir prompt.txt is a file"),
        ({"base_url": "localhost:80/v1"}, "must begin with http:// or https://"),
        ({"base_url": "http://127.0.0.1:99999/v1"}, "99999/v1' cannot be used: Port out of range"),
        ({"api": "chatty"}, "--api must be auto, chat or completions"),
        ({"modelname": "x"}, "did you mean --model_name"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_flags_are_one_line(folder, server, capsys, change, said):
    assert said in fails(capsys, server, **{"output_dir": "out", **change})
    assert not server.requests


@pytest.mark.parametrize("wording", ["openai", "vllm", "llama.cpp"])
def test_a_prompt_that_does_not_fit_is_journaled_and_the_run_goes_on(folder, capsys, wording):
    seeds = (folder / "seed_tasks.jsonl").read_text()
    (folder / "seed_tasks.jsonl").write_text(seeds.replace('"..."', f'"{"long " * 2000}"', 5))
    with Server(context=2048, wording=wording) as server:
        generate(server, num_instructions_to_generate=300)
        records = journal(folder / "out")
        too_long = [record for record in records if record["finish_reason"] == "prompt_too_long"]
        assert 0 < len(too_long) < len(records)
        assert all((record["text"], record["usage"]["total_tokens"]) == ("", 0) for record in too_long)
        assert re.search(rf"prompt_too_long +{len(too_long)}\n", capsys.readouterr().out)
        refused = {prompt for prompt in server.prompts() if "long long" in prompt}
        server.requests.clear()
        generate(server, num_instructions_to_generate=400)
        assert not refused & set(server.prompts())
    assert len(jload("out/regen.json")) == 400


def test_each_request_has_a_seed_of_its_own_until_the_server_refuses_it(folder, server, capsys):
    generate(server)
    seeds = [body["seed"] for _, body in server.requests]
    assert len(set(seeds)) == len(seeds) == 3
    server.requests.clear()
    server.refuses["seed"] = unsupported("seed")
    generate(server, "again")
    assert [body.get("seed") for _, body in server.requests] == [0, None, None, None]
    assert capsys.readouterr().err.count("The server refuses seed; leaving it out.") == 1
    assert outputs(folder / "again") == outputs(folder / "out")


def test_an_emoji_survives_a_terminal_that_cannot_show_it(folder, server, monkeypatch):
    server.models = ["tiny \U0001f999"]
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    process = start(server)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert r"tiny \U0001f999" in out


@pytest.mark.parametrize("count", [None, "3", 0, [3]])
def test_replay_of_a_journal_without_the_number_of_seed_tasks_is_one_line(folder, server, capsys, count):
    generate(server)
    path = folder / "out" / "requests.jsonl"
    field = "" if count is None else f'"num_prompt_instructions": {json.dumps(count)}, '
    path.write_text(path.read_text().replace('"num_prompt_instructions": 3, ', field))
    with pytest.raises(SystemExit) as stop:
        generate_instruction.main(["replay", f"--journal_path={path}", "--output_dir=again"])
    assert stop.value.code == 2
    assert "requests.jsonl: the settings of request 0 have no num_prompt_instructions" in capsys.readouterr().err


def test_help_names_every_flag_at_once(root):
    done = subprocess.run(
        [sys.executable, "-m", "generate_instruction", "generate_instruction_following_data", "--help"],
        cwd=root, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    assert "request_batch_size" in done.stdout + done.stderr
    code = "import generate_instruction, sys; assert not {'openai', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# A real server of the ecosystem


@pytest.fixture
def transformers_serve(tmp_path, root):
    """`transformers serve` with a tiny random LLaMA; gives its base URL and the model's name."""
    data = [{"instruction": f"Say {i}", "input": "", "output": f"{i} is said, twice {2 * i}"} for i in range(300)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    config = jload(os.path.join(root, "configs", "tiny_llama.json"))
    config.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config.update(num_key_value_heads=2, vocab_size=600)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = str(tmp_path / "tiny")
    tiny_model.make(str(tmp_path / "config.json"), str(tmp_path / "data.json"), model)
    with Server() as free:  # for a port that nobody uses
        port = free.server_port
    command = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", model, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=subprocess.STDOUT)
    try:
        while not _answers(port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def test_transformers_serve_is_understood(folder, transformers_serve, capsys):
    base_url, model = transformers_serve
    capsys.readouterr()
    # A random model keeps to no format: its answers are cut by length.
    generate(None, base_url=base_url, model_name=model, max_tokens=40, max_requests=2)
    records = journal(folder / "out")
    assert [record["request_index"] for record in records] == [0, 1]
    assert all(record["usage"]["completion_tokens"] == 40 for record in records)
    assert all(record["finish_reason"] == "length" for record in records)
    assert "refuses" not in capsys.readouterr().err
