"""inference.py as its user drives it, on a tiny LLaMA that was taught a handful of answers word for word."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import judged_pairs
import pytest
import torch
from safetensors.torch import load_file, save_file
from taught_model import LESSONS, UNTAUGHT

import inference
from alpaca.cli import UserError
from alpaca.files import jdump, jload
from alpaca.inference import answering
from alpaca.inference import batch as batches
from alpaca.inference.batch import AnswerJournal


def run(root, *arguments, stdin=None):
    command = [sys.executable, "inference.py", *arguments]
    return subprocess.run(command, cwd=root, input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_answer_prints_the_taught_answer_and_nothing_else(root, model_path):
    done = run(
        root, "answer", "--model_path", model_path, "--instruction", "Translate to French.", "--input", "Good morning"
    )
    assert (done.returncode, done.stdout) == (0, "Bonjour\n")
    assert "parameters" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_answers_each_instruction_on_its_own_and_leaves_at_end_of_input(model_path, monkeypatch, capsys):
    lines = "Count to forty.\n\n\nTranslate to French.\nGood morning\nName the three primary colors.\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    inference.chat(model_path=model_path)
    assert capsys.readouterr().out.splitlines() == [LESSONS[5]["output"], "Bonjour", "Red, blue and yellow."]


def test_interrupt_ends_the_answer_and_not_the_chat(model_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count to forty.\n\nName the three primary colors.\n\n"))
    stream, asked = answering.Alpaca.stream, []

    def interrupted_once(*args):
        for piece in stream(*args):
            yield piece
            if not asked:
                asked.append(piece)
                raise KeyboardInterrupt

    monkeypatch.setattr(answering.Alpaca, "stream", interrupted_once)
    inference.chat(model_path=model_path)
    assert capsys.readouterr().out.splitlines() == [asked[0], "Red, blue and yellow."]


def test_a_line_that_cannot_be_read_does_not_end_the_chat(root, model_path):
    lines = b"caf\xe9\n\nName the three primary colors.\n\n"
    command = [sys.executable, "inference.py", "chat", "--model_path", model_path]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=root, env=environment, input=lines, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout.split(b"\n")) == (0, [b"Red, blue and yellow.", b""]), done.stderr
    assert b"error: the instruction is no text" in done.stderr


@pytest.mark.parametrize("command", ["chat", "compare"])
def test_a_closed_stdin_is_the_end_of_the_input(root, model_path, tmp_path, command):
    flags = f"chat --model_path {model_path}"
    if command == "compare":
        a, b, judged = judged_pairs.write_outputs(tmp_path)
        flags = f"compare --a {a} --b {b} --output {judged}"
    done = subprocess.run(
        f"{sys.executable} inference.py {flags} <&-", shell=True, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    jdump([{**UNTAUGHT[i // 2]} if i % 2 else LESSONS[i // 2 % 6] for i in range(24)], str(path))
    return str(path)


def test_batches_equal_one_at_a_time_in_input_order(model_path, data_path, alpaca, tmp_path):
    for size in (1, 5, 16):
        inference.batch(
            model_path=model_path,
            data=data_path,
            output=str(tmp_path / f"{size}.json"),
            batch_size=size,
            max_new_tokens=60,
        )
    one = jload(tmp_path / "1.json")
    assert one == jload(tmp_path / "5.json") == jload(tmp_path / "16.json")
    data = jload(data_path)
    assert [(r["instruction"], r["input"]) for r in one] == [(r["instruction"], r["input"]) for r in data]
    assert all(r.keys() == {"instruction", "input", "output", "generator"} for r in one)
    assert {r["generator"] for r in one} == {"tiny-alpaca"}
    settings = alpaca.settings(60, 0.0, 1.0)
    for record in one:
        assert record["output"] == "".join(alpaca.stream(alpaca.encode(record, 60)[0], settings))
    assert [r["output"] for r in one[2:10:2]] == [lesson["output"] for lesson in LESSONS[1:5]]
    assert not os.path.exists(tmp_path / "1.json.partial.jsonl")


def test_killed_batch_goes_on_to_the_same_result(root, model_path, data_path, tmp_path, capfd):
    arguments = {"data": data_path, "batch_size": 2, "max_new_tokens": 80, "temperature": 1.5, "seed": 7}
    inference.batch(model_path=model_path, output=str(tmp_path / "whole.json"), **arguments)
    output, journal = tmp_path / "killed.json", tmp_path / "killed.json.partial.jsonl"
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "inference.py", "batch", "--model_path", model_path, "--output", str(output), *flags]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    kept = journal.read_text()
    journal.write_text(kept[: kept.rfind("\n") + 1] + '{"rows": [9, 4], "outp')  # and its last line half written
    with pytest.raises(UserError, match="begun with another seed"):
        inference.batch(model_path=model_path, output=str(output), **{**arguments, "seed": 8})
    capfd.readouterr()
    inference.batch(model_path=model_path, output=str(output), **arguments)
    assert f"continuing after {2 * (kept.count(chr(10)) - 1)} answers" in capfd.readouterr().err
    assert jload(output) == jload(tmp_path / "whole.json")
    assert not journal.exists()
    with pytest.raises(UserError, match="exists"):
        inference.batch(model_path=model_path, output=str(output), **arguments)


def test_answers_of_a_model_that_was_trained_further_are_not_mixed(model_copy, data_path, tmp_path):
    arguments = {"model_path": str(model_copy), "data": data_path, "output": str(tmp_path / "out.json")}
    described, encoded = [], []
    for _ in range(2):
        alpaca = inference.load(str(model_copy))
        settings = alpaca.settings(5, 0.0, 1.0)
        encoded = batches.encode_all(alpaca, batches.load_instances(data_path), settings)
        described.append(batches.describe_run(alpaca, encoded, settings, 42, batch_size=16))
    assert described[0] == described[1]
    with AnswerJournal(arguments["output"]) as journal:  # as an interrupted run leaves it
        journal.begin(described[0], len(encoded))
        journal.append([{"rows": [0], "outputs": ["the old model's"]}])
    weights = load_file(model_copy / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()}, model_copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="begun with another model; its answers don't fit"):
        inference.batch(**arguments, max_new_tokens=5)
    assert not os.path.exists(arguments["output"])


def test_greedy_batch_out_of_memory_goes_on_with_smaller_batches(model_path, data_path, tmp_path, monkeypatch):
    output = str(tmp_path / "out.json")
    generate, sizes = answering.Alpaca.generate, []

    def short_of_memory(self, prompts, *args):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError
        return generate(self, prompts, *args)

    monkeypatch.setattr(answering.Alpaca, "generate", short_of_memory)
    with pytest.raises(UserError, match="out of memory with 8 prompts at once; lower --batch_size"):
        inference.batch(model_path=model_path, data=data_path, output=output, batch_size=8, max_new_tokens=5)
    inference.batch(model_path=model_path, data=data_path, output=output, batch_size=4, max_new_tokens=5)
    assert sizes == [8, 8, 4, 4, 4, 4]
    assert len(jload(output)) == 24


def test_a_full_disk_keeps_the_answers_so_far(root, model_path, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"Say {i}."} for i in range(100)]))
    command = [sys.executable, "inference.py", "batch", "--model_path", model_path, "--max_new_tokens", "8"]
    command += ["--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "out.json")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "out.json.partial.jsonl: File too large; the answers in it are safe" in done.stderr.splitlines()[-1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "continuing after" in done.stderr
    assert len(jload(tmp_path / "out.json")) == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -1.0}, "--temperature must be"),
        ({"temperature": 1e-300}, "--temperature must be 0 .greedy. or at least"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 2**32}, "--seed must be from 0"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be"),
        ({"dtype": "int8"}, "--dtype must be"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used here"),
        ({"device": "meta"}, "--device meta cannot be used here"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"instruction": " "}, "--instruction is empty"),
        ({"instruction": "\udcff"}, "the instruction is no text"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(model_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        inference.answer(model_path=model_path, **{"instruction": "Hi", **flags})
    assert "\n" not in str(caught.value)


def test_a_batch_without_an_output_name_is_refused_before_it_begins(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--output is empty"):
        inference.batch(model_path=model_path, data="data.json", output="")


def test_mistake_exits_with_status_2_before_torch_is_loaded(root, tmp_path):
    code = (
        "import sys, inference\n"
        "argv = ['answer', '--model_path', '/no/such', '--instruction', 'x']\n"
        "try: inference.run_cli({'answer': inference.answer}, argv)\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == "error: /no/such is not a folder; --model_path takes the folder that train.py wrote\n"


def test_batch_runs_without_a_progress_bar(root, model_path, tmp_path):
    jdump(LESSONS[:2], str(tmp_path / "data.json"))
    command = [sys.executable, "inference.py", "batch", "--model_path", model_path, "--max_new_tokens", "8"]
    command += ["--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(jload(tmp_path / "out.json")) == 2


def test_a_second_run_of_the_same_batch_is_refused_before_it_loads_the_model(data_path, tmp_path):
    output = str(tmp_path / "out.json")
    with AnswerJournal(output), pytest.raises(UserError, match=r"another run is writing .*out.json.partial.jsonl"):
        inference.batch(model_path="/no/such", data=data_path, output=output)


def test_a_batch_that_cannot_load_its_model_leaves_no_journal(data_path, tmp_path):
    with pytest.raises(UserError, match="/no/such is not a folder"):
        inference.batch(model_path="/no/such", data=data_path, output=str(tmp_path / "out.json"))
    assert os.listdir(tmp_path) == []
