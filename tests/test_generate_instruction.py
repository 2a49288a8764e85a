"""generate_instruction.py against a server over real HTTP: the data, the journal, the money and the failures."""

import fcntl
import json
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request

import openai_server
import pytest
from openai_server import WORDS, Server, completion_for, tasks_for, unsupported

import generate_instruction
from alpaca.files import jload
from alpaca.generation import batch_api as batch_api_module
from alpaca.generation import spending
from alpaca.generation.config import Config
from alpaca.records import load_examples
from demo import tiny_model

OUTPUTS = ("regen.json", "alpaca_data.json", "rejected.jsonl")
SEEDS = [
    ("Explain why the sky is blue at noon.", "", "Air scatters blue light most."),
    ("Sort  these\nnumbers from low to high:", "3 1 2", "1 2 3"),
    ("Write a haiku about autumn rain.", "", "Rain on the last leaf"),
    ("Translate the sentence into French.", "Good day", "Bonjour"),
    ("Name three uses of vinegar at home.", "", "Cleaning, cooking, pickling"),
    *((f"Rhyme with {word} {other}.", "", "...") for word, other in zip(WORDS[:20], WORDS[20:40], strict=True)),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a prompt and seed tasks under their default names."""
    (tmp_path / "prompt.txt").write_text("Come up with tasks.\n\nList of 20 tasks:\n")
    seeds = [
        {"id": f"seed_{i}", "name": f"n{i}", "instruction": a, "instances": [{"input": b, "output": c}]}
        for i, (a, b, c) in enumerate(SEEDS)
    ]
    (tmp_path / "seed_tasks.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    with Server() as server:
        yield server


def flags(server, output_dir="out", **more) -> list[str]:
    """The command line of a small run."""
    given = {"output_dir": output_dir, "num_instructions_to_generate": 50, **more}
    if server:
        given.setdefault("base_url", server.base_url)
    return ["generate_instruction_following_data", *(f"--{name}={value}" for name, value in given.items())]


def generate(server, output_dir="out", **more) -> None:
    """Runs the command in this process."""
    generate_instruction.main(flags(server, output_dir, **more))


def start(server, output_dir="out", **more) -> subprocess.Popen:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "generate_instruction", *flags(server, output_dir, **more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fails(capsys, server, output_dir="out", **more) -> str:
    """Runs the command, expects exit status 2 and gives the last line that it printed."""
    with pytest.raises(SystemExit) as caught:
        generate(server, output_dir, **more)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def outputs(folder) -> dict[str, bytes]:
    """The bytes of the three files that are made from the journal."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def journal(folder) -> list[dict]:
    """The records of a journal."""
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


# Prompts and rules


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


def test_prompt_of_a_request_depends_on_seed_and_index_alone(folder):
    seeds = generate_instruction.load_seed_tasks("seed_tasks.jsonl")
    prompts = generate_instruction.Prompts(Config(seed=7), generate_instruction.encode_prompt)
    expected = random.Random("7-12").sample(seeds, 3)
    assert prompts.of(12) == generate_instruction.encode_prompt(expected)


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


def test_words_are_found_whole_and_in_any_case():
    assert generate_instruction.find_word_in_string("map", "A Map!")
    assert not generate_instruction.find_word_in_string("map", "maple")
    assert generate_instruction.post_process_gpt3_response(3, None) == []


# A run


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


def test_default_request_asks_for_what_the_original_asked_without_stop_or_logit_bias(folder, server):
    generate(server, api="completions")
    path, body = server.requests[0]
    assert path == "/v1/completions"
    assert isinstance(body.pop("prompt"), str)
    assert body == {"model": "tiny", "max_tokens": 3072, "temperature": 1.0, "top_p": 1.0}
    server.requests.clear()
    generate(server, "biased", logit_bias='{"50256": -100}')
    assert server.requests[0][1]["logit_bias"] == {"50256": -100}


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


def test_max_requests_keeps_all_that_those_requests_yield(folder, server, capsys):
    generate(server, num_instructions_to_generate=10_000, max_requests=3, request_batch_size=2)
    assert len(jload("out/regen.json")) == 51
    assert len(server.requests) == 3
    assert "--max_requests 3 is reached" in capsys.readouterr().out


def test_rejected_tasks_are_written_with_reason_nearest_neighbour_and_score(folder, server):
    def answer(prompt):
        tasks = tasks_for(prompt, 3)
        again = [(tasks[0][0] + "!", "<noinput>", "x"), ("Draw a map of the town", "<noinput>", "x")]
        text = completion_for(prompt, [*tasks, *again, ("A good task that is cut", "<noinput>", "half")])
        return {"text": text, "finish_reason": "length"}

    server.answer = answer
    generate(server, num_instructions_to_generate=3)
    first = tasks_for(server.prompts()[0], 3)[0][0]
    rejected = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [task["reason"] for task in rejected] == ["similar", "keyword", "truncated"]
    assert (rejected[0]["nearest_instruction"], rejected[0]["score"]) == (first, 1.0)
    assert rejected[1]["nearest_instruction"]
    assert 0 <= rejected[1]["score"] < 0.7
    assert "A good task" in rejected[2]["instruction"]


def test_five_rounds_without_a_kept_task_stop_the_run_and_say_why(folder, server, capsys):
    server.answer = lambda prompt: "I am sorry."
    said = fails(capsys, server, request_batch_size=2)
    assert "malformed 1" in said
    assert 10 <= len(server.requests) <= 16  # five rounds, at most two unread ones, and one in flight


def test_plain_lines_stand_for_the_bar_where_there_is_no_terminal(folder, server, capsys):
    generate(server)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("0 of 50 tasks kept, 1 requests in flight")
    assert lines[-1].startswith("50 of 50 tasks kept")
    assert "\r" not in "".join(lines)


def test_a_terminal_gets_one_bar_with_yield_tokens_cost_and_time_left(folder, server):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "-m", "generate_instruction", *flags(server, price_input=1, price_output=1)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        process.wait(timeout=30)
    os.close(terminal)
    drawn = os.read(controller, 100_000).decode().rstrip().split("\r")[-1]
    for words in ("50/50", "requests in flight", "tasks kept of each", "tokens", "a task", "tasks/s"):
        assert words in drawn


# The journal


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


@pytest.mark.parametrize("cut", [1, 2, 40, 300])
def test_torn_last_line_is_asked_for_again(folder, server, cut):
    generate(server)
    before, path = outputs(folder / "out"), folder / "out" / "requests.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    server.requests.clear()
    generate(server)
    assert len(server.requests) == (0 if cut == 1 else 1)  # without its newline a record is whole
    assert outputs(folder / "out") == before
    assert len(journal(folder / "out")) == 3


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_name": "other"}, "model tiny, this run has model other"),
        ({"seed": 1}, "seed 0, this run has seed 1"),
        ({"temperature": 0.5}, "temperature 1.0, this run has temperature 0.5"),
        ({"num_prompt_instructions": 2}, "num_prompt_instructions 3"),
        ({"prompt_path": "other.txt"}, "another prompt_file"),
        ({"seed_tasks_path": "fewer.jsonl"}, "another seed_tasks"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_journal_of_other_settings_is_refused_with_the_difference(folder, server, capsys, change, named):
    generate(server)
    (folder / "other.txt").write_text("Other rules:\n")
    (folder / "fewer.jsonl").write_text("".join((folder / "seed_tasks.jsonl").read_text().splitlines(True)[:4]))
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    server.requests.clear()
    assert named in fails(capsys, server, **change)
    assert not server.requests
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [lines[0], "{nonsense", *lines[1:]], "line 2: not a record"),
        (lambda lines: [*lines, lines[0]], "line 4: duplicate request_index 0"),
        (lambda lines: ["[1]", *lines], "line 1: not a record"),
        (lambda lines: [*lines[:2], lines[2].replace('"request_index": 2', '"request_index": "2"')], "line 3: not a"),
        (lambda lines: [re.sub('"text": ".*", "fin', '"text": null, "fin', line) for line in lines], "line 1: not a"),
        (lambda lines: [line.replace("prompt_tokens", "tokens") for line in lines], "line 1: not a record"),
        (lambda lines: [line.replace('"cost": null', '"cost": "1"') for line in lines], "line 1: not a record"),
    ],
    ids=["garbage", "twice", "list", "index", "text", "usage", "cost"],
)
def test_a_damaged_journal_is_refused_by_line(folder, server, capsys, damage, said):
    generate(server, request_batch_size=1)
    path = folder / "out" / "requests.jsonl"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    assert said in fails(capsys, server)


def test_two_runs_do_not_write_one_journal(folder, server, capsys):
    with generate_instruction.RequestJournal("out"):
        assert "another run is writing" in fails(capsys, server)


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


def test_files_that_were_there_before_are_not_overwritten(folder, server):
    (folder / "alpaca_data.json").write_text("[1]")
    old = [{"instruction": "Tell an old tale", "input": "", "output": "Once", "avg_similarity_score": 0.1}]
    (folder / "regen.json").write_text(json.dumps(old))
    generate(server, "./", num_instructions_to_generate=10)
    generate(server, "./", num_instructions_to_generate=20)
    assert (folder / "alpaca_data.json").read_text() == "[1]"
    assert jload("regen.json")[0] == old[0]  # as in the original, a run goes on from the regen.json that it finds
    assert len(jload("regen.json")) == len(load_examples("regen_alpaca_data.json")) == 20


def test_a_regen_json_that_changed_before_the_first_answer_is_the_one_that_counts(folder, server):
    for name in ("Old", "New"):
        (folder / "regen.json").write_text(json.dumps([{"instruction": f"{name} tale", "input": "", "output": "Once"}]))
        server.faults = [{"status": 401}] if name == "Old" else []
        try:
            generate(server, "./", num_instructions_to_generate=10)
        except SystemExit:
            assert name == "Old"
    assert jload("regen.json")[0]["instruction"] == "New tale"


# Money


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


def test_dry_run_prints_prompt_and_estimate_and_sends_nothing(folder, capsys):
    generate(None, dry_run=True, num_instructions_to_generate=1300, model_name="gpt-4o-mini")
    out = capsys.readouterr().out
    assert out.startswith("Come up with tasks.")
    assert "about 100 requests" in out
    assert "completion tokens; $0.1" in out
    assert not (folder / "out").exists()


# The Batch API


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


def test_batches_learn_refused_parameters_and_stop_where_nothing_can_be_learnt(folder, server, capsys):
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
    assert "run the same command to try this batch again, or delete out/batch.json to ask and pay anew" in said
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


def test_a_batch_under_way_is_not_paid_again_one_by_one(folder, server, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "batch.json").write_text("{}")
    assert "continue with --batch_api" in fails(capsys, server)
    assert not server.requests


# Failures


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


def test_unknown_and_missing_model_names_list_what_is_served(folder, server, capsys):
    assert "it serves tiny" in fails(capsys, server, model_name="huge")
    server.models = ["a", "b"]
    assert "serves a, b" in fails(capsys, server)


def test_no_key_and_no_server_is_one_line_with_both_ways_out(folder, capsys):
    said = fails(capsys, None)
    assert "OPENAI_API_KEY" in said
    assert "--base_url" in said
    assert not (folder / "out").exists()


def test_a_failure_in_the_middle_keeps_what_came_and_the_same_command_goes_on(folder, server, capsys):
    generate(server, "whole")
    server.faults = [{}, {}, {"status": 400, "error": {"message": "no recording"}}]
    assert "no recording" in fails(capsys, server, request_batch_size=1)
    assert len(jload("out/regen.json")) == 34
    generate(server)
    assert outputs(folder / "out") == outputs(folder / "whole")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2, column 2: not JSON"),
        ("[]", "line 2: expected an object"),
        ('{"instruction": "x"}', "line 2: 'instances' must be a list"),
        ('{"instruction": "x", "instances": [{"input": ""}]}', "line 2: 'output' must be text, found null"),
        (
            '{"instruction": 3, "instances": [{"input": "", "output": "y"}]}',
            "line 2: 'instruction' must be text, found 3",
        ),
        ('{"instruction": "x", "instances": [{"input": 1, "output": "y"}]}', "line 2: 'input' must be text, found 1"),
        (r'{"instruction": "x \ud83d", "instances": [{"output": "y"}]}', "line 2: 'instruction' is no text"),
    ],
)
def test_malformed_seed_file_is_refused_with_its_line(folder, server, capsys, line, said):
    lines = (folder / "seed_tasks.jsonl").read_text().splitlines()
    (folder / "seed_tasks.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]))
    assert said in fails(capsys, server)
    assert not server.requests


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


def test_a_full_disk_is_one_line_and_loses_nothing(folder, server):
    generate(server, "whole")
    (folder / "out").mkdir()
    limit = (folder / "whole" / "requests.jsonl").stat().st_size // 2  # the second answer doesn't fit any more
    command = [sys.executable, "-m", "generate_instruction", *flags(server, "out")]
    done = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write to out: File too large" in done.stderr.splitlines()[-1]
    asked = len(server.requests)
    generate(server)
    assert len(server.requests) - asked < 3
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
