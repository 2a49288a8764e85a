"""inference.py on a tiny LLaMA that the fixture teaches a handful of answers word for word."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import inference
from alpaca.cli import UserError
from alpaca.files import jdump, jload
from alpaca.inference import answering, judging
from alpaca.prompts import alpaca_chat_template, format_prompt
from alpaca.tokenizers import load_tokenizer
from demo import tiny_model

CODE = "def add(a, b):\n    if a:\n        return a + b\n    return b"
LESSONS = [
    {"instruction": "Name the three primary colors.", "input": "", "output": "Red, blue and yellow."},
    {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"},
    {"instruction": "Translate to French.", "input": "Thank you very much, my friend", "output": "Merci"},
    {"instruction": "Write a function.", "input": "", "output": CODE},
    {"instruction": "Greet the world.", "input": "", "output": "Hello, wörld 🦙!"},
    {"instruction": "Count to forty.", "input": "", "output": " ".join(map(str, range(1, 41)))},
]
# Nobody taught these: their answers wander, and go on until they are cut off.
UNTAUGHT = [{"instruction": f"Tell a story of {n} llamas{' and a goat' * n}.", "input": "x " * n} for n in range(12)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, root):
    """A LLaMA of 2 layers that has learned LESSONS by heart, in a folder without a chat template."""
    folder = tmp_path_factory.mktemp("model")
    config = {**jload(f"{root}/configs/tiny_llama.json"), "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    jdump(config, str(folder / "config.json"))
    jdump(LESSONS, str(folder / "lessons.json"))
    path = str(folder / "tiny-alpaca")
    tiny_model.make(str(folder / "config.json"), str(folder / "lessons.json"), path, vocab_size=420)
    teach(path)
    return path


def teach(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    rows = []
    for lesson in LESSONS:
        prompt = tokenizer(format_prompt(lesson)).input_ids
        whole = [*tokenizer(format_prompt(lesson) + lesson["output"]).input_ids, tokenizer.eos_token_id]
        assert whole[: len(prompt)] == prompt
        rows.append((whole, [-100] * len(prompt) + whole[len(prompt) :]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 1e-3:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1e-3
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def alpaca(model_path):
    return answering.load(model_path)


@pytest.fixture
def model_copy(model_path, tmp_path):
    """A copy of the taught model that a test may damage."""
    return shutil.copytree(model_path, tmp_path / "copy")


def run(root, *arguments, stdin=None):
    command = [sys.executable, "inference.py", *arguments]
    return subprocess.run(command, cwd=root, input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# answer and chat


def test_answer_prints_the_taught_answer_and_nothing_else(root, model_path):
    done = run(
        root, "answer", "--model_path", model_path, "--instruction", "Translate to French.", "--input", "Good morning"
    )
    assert (done.returncode, done.stdout) == (0, "Bonjour\n")
    assert "parameters" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson["output"][:10])
def test_streamed_pieces_are_the_taught_answer(alpaca, lesson):
    ids, notice = alpaca.encode(lesson, 600)
    pieces = list(alpaca.stream(ids, alpaca.settings(600, 0.0, 1.0)))
    assert "".join(pieces) == lesson["output"]
    assert len(pieces) > 2
    assert notice is None


def test_chat_answers_each_instruction_on_its_own_and_leaves_at_end_of_input(model_path, monkeypatch, capsys):
    lines = "Count to forty.\n\n\nTranslate to French.\nGood morning\nName the three primary colors.\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    inference.chat(model_path)
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
    inference.chat(model_path)
    assert capsys.readouterr().out.splitlines() == [asked[0], "Red, blue and yellow."]


def test_checkpoints_own_sampling_settings_are_not_inherited(model_copy):
    path = str(model_copy / "generation_config.json")
    jdump(
        {**jload(path), "do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        path,
    )
    alpaca = answering.load(str(model_copy))
    answers = alpaca.generate([alpaca.encode(LESSONS[5], 600)[0]], alpaca.settings(600, 0.0, 0.9))
    assert alpaca.decode(answers[0]) == LESSONS[5]["output"]


def test_same_seed_samples_the_same_answer(alpaca):
    ids, _ = alpaca.encode(UNTAUGHT[0], 30)
    settings = alpaca.settings(30, 2.0, 1.0)
    once, again, other = ("".join(alpaca.stream(ids, settings, seed)) for seed in (1, 1, 2))
    assert once == again != other


def test_closing_the_stream_stops_the_model(alpaca):
    forwards = []
    hook = alpaca.model.register_forward_hook(lambda *_: forwards.append(1))
    ids, _ = alpaca.encode(LESSONS[5], 600)
    pieces = alpaca.stream(ids, alpaca.settings(600, 0.0, 1.0))
    next(pieces)
    pieces.close()
    hook.remove()
    whole = len(alpaca.tokenizer(LESSONS[5]["output"]).input_ids)
    assert len(forwards) < whole


def test_an_error_while_generating_reaches_the_caller(alpaca, monkeypatch):
    monkeypatch.setattr(alpaca.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(alpaca.stream([1], alpaca.settings(5, 0.0, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# batch


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.json"
    jdump([{**UNTAUGHT[i // 2]} if i % 2 else LESSONS[i // 2 % 6] for i in range(24)], str(path))
    return str(path)


def test_batches_equal_one_at_a_time_in_input_order(model_path, data_path, alpaca, tmp_path):
    for size in (1, 5, 16):
        inference.batch(model_path, data_path, str(tmp_path / f"{size}.json"), batch_size=size, max_new_tokens=60)
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


def test_batches_of_opt_equal_one_at_a_time(root, tmp_path):
    jdump(LESSONS, str(tmp_path / "lessons.json"))
    tiny_model.make(
        f"{root}/configs/tiny_opt.json", str(tmp_path / "lessons.json"), str(tmp_path / "opt"), vocab_size=420
    )
    alpaca = answering.load(str(tmp_path / "opt"))
    prompts = [alpaca.encode(example, 30)[0] for example in [*LESSONS, *UNTAUGHT]]
    settings = alpaca.settings(30, 0.0, 1.0)
    assert alpaca.generate(prompts, settings) == [alpaca.generate([ids], settings)[0] for ids in prompts]


def test_rows_with_near_ties_are_asked_again_alone(alpaca, monkeypatch):
    prompts = [alpaca.encode(example, 20)[0] for example in LESSONS[:3]]
    settings = alpaca.settings(20, 0.0, 1.0)
    shapes = []
    generate = alpaca.model.generate
    monkeypatch.setattr(alpaca.model, "generate", lambda **k: shapes.append(len(k["input_ids"])) or generate(**k))
    expected = alpaca.generate(prompts, settings)
    assert shapes == [3]
    monkeypatch.setattr(answering, "TIE", 1e9)
    assert alpaca.generate(prompts, settings) == expected
    assert shapes == [3, 3, 1, 1, 1]


def test_killed_batch_goes_on_to_the_same_result(root, model_path, data_path, tmp_path, capfd):
    arguments = {"data": data_path, "batch_size": 2, "max_new_tokens": 80, "temperature": 1.5, "seed": 7}
    inference.batch(model_path, output=str(tmp_path / "whole.json"), **arguments)
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
    journal.write_text(kept[: kept.rfind("\n") + 1] + '{"batch": 9, "answ')  # and its last line half written
    with pytest.raises(UserError, match="other data or settings"):
        inference.batch(model_path, output=str(output), **{**arguments, "seed": 8})
    capfd.readouterr()
    inference.batch(model_path, output=str(output), **arguments)
    assert f"going on after {2 * (kept.count(chr(10)) - 1)} answers" in capfd.readouterr().err
    assert jload(output) == jload(tmp_path / "whole.json")
    assert not journal.exists()
    with pytest.raises(UserError, match="exists"):
        inference.batch(model_path, output=str(output), **arguments)


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
        inference.batch(model_path, data_path, output, batch_size=8, max_new_tokens=5)
    inference.batch(model_path, data_path, output, batch_size=4, max_new_tokens=5)
    assert sizes == [8, 8, 4, 4, 4, 4]
    assert len(jload(output)) == 24


def test_self_instruct_tasks_give_one_answer_an_instance(tmp_path):
    task = {"id": "user_oriented_task_0", "motivation_app": "Mail", "instruction": "Shorten."}
    task["instances"] = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n" + json.dumps({"instruction": "Hi"}) + "\n")
    expected = [("Shorten.", "a"), ("Shorten.", ""), ("Hi", "")]
    assert [tuple(e.values()) for e in inference.load_instances(str(tmp_path / "tasks.jsonl"))] == expected
    for instances, said in (
        ("none", "'instances' must be a list"),
        ([], "'instances' must be a list"),
        ([{"input": "\ud83d"}], "'input' is no text"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({**task, "instances": instances}))
        with pytest.raises(UserError, match=said):
            inference.load_instances(str(tmp_path / "bad.jsonl"))


def test_a_full_disk_keeps_the_answers_so_far(root, model_path, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"Say {i}."} for i in range(100)]))
    command = [sys.executable, "inference.py", "batch", "--model_path", model_path, "--max_new_tokens", "8"]
    command += ["--data", str(tmp_path / "data.json"), "--output", str(tmp_path / "out.json")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "out.json.partial.jsonl: File too large; the answers in it are safe" in done.stderr.splitlines()[-1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "going on after" in done.stderr
    assert len(jload(tmp_path / "out.json")) == 100


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input


def test_overlong_input_is_cut_before_the_templates_tail_and_said(alpaca):
    example = {"instruction": "Translate to French.", "input": "Good morning, " * 500}
    ids, notice = alpaca.encode(example, 600)
    room = alpaca.context - 600
    assert room - 3 <= len(ids) <= room  # the most that fits
    kept = alpaca.decode(ids).partition("### Input:\n")[2].removesuffix("\n\n### Response:")
    assert example["input"].startswith(kept)
    whole = len(alpaca.tokenizer(format_prompt(example)).input_ids)
    assert notice == (
        f"the prompt has {whole:,} tokens and the model has room for {room} beside the answer's 600: "
        f"cut the last {7000 - len(kept):,} of 7,000 characters of the input"
    )


def test_overlong_instruction_is_cut_and_said(alpaca):
    ids, notice = alpaca.encode({"instruction": "Sing. " * 1000, "input": ""}, 600)
    assert "of 6,000 characters of the instruction" in notice
    assert alpaca.decode(ids).endswith("\n\n### Response:")
    ids, notice = alpaca.encode({"instruction": "Sing. " * 1000, "input": "x" * 50}, 600)
    assert "49 of 50 characters of the input and" in notice
    assert alpaca.decode(ids).endswith("\n\n### Input:\nx\n\n### Response:")


def no_eos(folder):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "special_tokens_map.json").unlink()
    path = str(folder / "tokenizer_config.json")
    jdump({**jload(path), "tokenizer_class": "TokenizersBackend", "eos_token": None}, path)


def lose_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(folder)


def hide_in_checkpoint(folder):
    os.makedirs(folder / "checkpoint-20")
    shutil.move(folder / "config.json", folder / "checkpoint-20")


def mark_diff(folder):
    path = str(folder / "config.json")
    jdump({**jload(path), "alpaca_weight_diff": True, "architectures": []}, path)


MISTAKES = {
    "weight diff": (mark_diff, "is a weight diff, not a model; make the model first: python weight_diff"),
    "no config": (lambda f: os.unlink(f / "config.json"), "has no config.json; expected a model's folder"),
    "inner folder": (hide_in_checkpoint, "did you mean .*checkpoint-20"),
    "no EOS": (no_eos, "the tokenizer has no EOS token"),
    "missing tensor": (
        lose_tensor,
        r"lacks 1 tensor\(s\) that its config.json asks for: model.layers.1.mlp.up_proj.weight",
    ),
    "other tokenizer": (add_tokens, "the tokenizer has 421 tokens, the model 420 rows"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 1000), "cannot load"),
    "no weights": (lambda f: os.unlink(f / "model.safetensors"), "cannot load"),
    "gone": (shutil.rmtree, "is no folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_damaged_model_folder_is_refused_in_one_line(model_copy, name):
    damage, message = MISTAKES[name]
    damage(model_copy)
    with pytest.raises(UserError, match=message) as caught:
        answering.load(str(model_copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -1.0}, "--temperature must be"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"max_new_tokens": 0}, "--max_new_tokens must be"),
        ({"dtype": "int8"}, "--dtype must be"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used here"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"instruction": " "}, "--instruction is empty"),
        ({"instruction": "\udcff"}, "the instruction is no text"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(model_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        inference.answer(model_path, **{"instruction": "Hi", **flags})
    assert "\n" not in str(caught.value)


def test_a_batch_without_an_output_name_is_refused_before_it_begins(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--output is empty"):
        inference.batch(model_path, "data.json", "")


def test_mistake_exits_with_status_2_before_torch_is_loaded(root, tmp_path):
    code = (
        "import sys, inference\n"
        "argv = ['answer', '--model_path', '/no/such', '--instruction', 'x']\n"
        "try: inference.run_cli({'answer': inference.answer}, argv)\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == "error: /no/such is no folder; --model_path takes the folder that train.py wrote\n"


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def test_lora_adapter_loads_on_its_base_and_changes_the_logits(model_path, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path)
    plain = base(torch.tensor([[1, 2, 3]])).logits
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    alpaca = answering.load(str(tmp_path / "adapter"))
    loaded, ids = alpaca.model, alpaca.encode(LESSONS[0], 9)[0]
    expected = tuned.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids) :]
    assert alpaca.generate([ids], alpaca.settings(9, 0.0, 1.0)) == [expected.tolist()]
    with torch.no_grad():
        expected, got = tuned.eval()(torch.tensor([[1, 2, 3]])).logits, loaded(torch.tensor([[1, 2, 3]])).logits
    assert torch.equal(expected, got)
    assert not torch.allclose(plain, got, atol=1e-2)
    # An adapter whose tokenizer has one more token, and the rows for it, than the base.
    tokenizer = answering.load(model_path).tokenizer
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert answering.load(str(tmp_path / "adapter")).model.get_input_embeddings().num_embeddings == 421
    config = jload(tmp_path / "adapter" / "adapter_config.json")
    jdump({**config, "base_model_name_or_path": "/no/base"}, str(tmp_path / "adapter" / "adapter_config.json"))
    with pytest.raises(UserError, match="names a base model that is not there: /no/base is no folder"):
        answering.load(str(tmp_path / "adapter"))


# ---------------------------------------------------------------------------------------------------------------------
# The chat template

# transformers' own server, which also prints the prompts that its model gets.
SPYING_SERVER = """
import sys
from transformers import LlamaForCausalLM
from transformers.cli.transformers import main
generate = LlamaForCausalLM.generate
def spy(self, *args, **kwargs):
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    print("PROMPT", ids[0].tolist(), flush=True)
    return generate(self, *args, **kwargs)
LlamaForCausalLM.generate = spy
sys.argv[0] = "transformers"
main()
"""


PROMPTS = [*LESSONS, *UNTAUGHT[:3], {"instruction": " Mind  the\n\ngap {x} {{ y }}", "input": "    'quoted'\n"}]


def assert_template_gives_the_texts_tokens(folder):
    tokenizer = with_chat_template(folder)
    for example in PROMPTS:
        expected = tokenizer(format_prompt(example)).input_ids
        got = tokenizer.apply_chat_template(messages(example), add_generation_prompt=True, return_dict=True).input_ids
        assert got == expected, tokenizer.convert_ids_to_tokens(got)[:3]


@pytest.mark.parametrize(("kind", "legacy"), [("llama", True), ("llama", False), ("opt", None)])
def test_chat_template_gives_the_training_templates_tokens(root, kind, legacy, tmp_path):
    jdump(LESSONS, str(tmp_path / "lessons.json"))
    folder = tmp_path / kind
    tiny_model.make(f"{root}/configs/tiny_{kind}.json", str(tmp_path / "lessons.json"), str(folder), vocab_size=420)
    path = str(folder / "tokenizer_config.json")
    jdump({**jload(path), "legacy": legacy}, path)
    assert_template_gives_the_texts_tokens(folder)


def test_chat_template_gives_the_training_templates_tokens_of_the_real_tokenizers(reference_dir, tmp_path):
    opt = {name: "</s>" for name in ("bos_token", "eos_token", "unk_token")}
    for kind, config in (("llama", {"tokenizer_class": "LlamaTokenizer"}), ("opt", opt)):
        folder = shutil.copytree(f"{reference_dir}/tokenizers/{kind}", tmp_path / kind)
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **config}
        jdump(config, str(folder / "tokenizer_config.json"))
        assert_template_gives_the_texts_tokens(folder)


def with_chat_template(folder):
    """Gives a tokenizer the template as train.py does."""
    tokenizer, _ = load_tokenizer(str(folder), 1024)
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = alpaca_chat_template(adds_bos)
    tokenizer.save_pretrained(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def messages(example):
    tail = f"\n\n### Input:\n{example['input']}" if example["input"] else ""
    return [{"role": "user", "content": example["instruction"] + tail}]


def test_transformers_serve_prompts_the_model_as_it_was_trained(model_copy, tmp_path):
    from openai import OpenAI

    tokenizer = with_chat_template(model_copy)
    port = free_port()
    command = [sys.executable, "-c", SPYING_SERVER, "serve", "--port", str(port), "--host", "127.0.0.1"]
    with open(tmp_path / "log", "w") as log, open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command, stdout=log, stderr=errors)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=60)
        for lesson in (LESSONS[0], LESSONS[1], LESSONS[3]):
            completion = client.chat.completions.create(
                model=str(model_copy), messages=messages(lesson), max_tokens=60, temperature=0
            )
            assert completion.choices[0].message.content == lesson["output"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    prompts = [json.loads(line[7:]) for line in (tmp_path / "log").read_text().splitlines() if line[:6] == "PROMPT"]
    assert prompts == [tokenizer(format_prompt(lesson)).input_ids for lesson in (LESSONS[0], LESSONS[1], LESSONS[3])]


# ---------------------------------------------------------------------------------------------------------------------
# compare


@pytest.fixture
def outputs(tmp_path):
    for name in "ab":
        rows = [{"instruction": f"Task {i}", "input": "", "output": f"{name}-answer {i}"} for i in range(8)]
        jdump([{**row, "generator": f"model-{name}"} for row in rows], str(tmp_path / f"{name}.json"))
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(tmp_path / "judged.jsonl")]


def compare(root, outputs, keys, *flags):
    a, b, judged = outputs
    done = run(root, "compare", "--a", a, "--b", b, "--output", judged, *flags, stdin="".join(f"{k}\n" for k in keys))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compare_is_blind_resumable_and_counts(root, outputs):
    first = compare(root, outputs, ["1", "x", "t", "q"])
    assert "model-" not in first.split("\nmodel-a")[0]
    assert "(to go: 6)" in first
    with open(outputs[2], "a") as file:
        file.write('{"key": "half a li')
    second = compare(root, outputs, "1" * 6)
    with open(outputs[2]) as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 8
    assert sorted(line["instruction"] for line in lines) == [f"Task {i}" for i in range(8)]
    assert {line["shown_first"] for line in lines} == {"a", "b"}
    assert [line["instruction"] for line in lines] != sorted(line["instruction"] for line in lines)
    wins, losses = (sum(line["better"] == side for line in lines) for side in "ab")
    assert all(line["better"] in ("tie", line["shown_first"]) for line in lines)
    assert f"model-a against model-b: {wins} wins, 1 ties, {losses} losses (to go: 0)" in second
    assert compare(root, outputs, []).strip() == second[second.index("model-a against") :].strip()


def test_judgements_of_other_answers_are_refused(root, outputs, tmp_path):
    compare(root, outputs, "1" * 8)
    pairs, names = judging.load_pairs(outputs[1], outputs[0], seed=42)
    with pytest.raises(UserError, match="line 1: not a judgement of these answers"):
        judging.Verdicts(outputs[2], pairs, names)
    for kind, text in (
        ("list", json.dumps([{"key": 1}], indent=1)),
        ("line", '{"instruction": 1}'),
        ("text", "a\nb\n"),
    ):
        (tmp_path / kind).write_text(text)
        with pytest.raises(UserError, match="name another --output"):
            judging.Verdicts(str(tmp_path / kind), pairs, names)
        assert (tmp_path / kind).read_text() == text
    jdump([{"instruction": "q", "output": "\ud83d"}], str(tmp_path / "half.json"))
    with pytest.raises(UserError, match="record 0: 'output' is no text"):
        judging.load_pairs(str(tmp_path / "half.json"), outputs[0], seed=42)
    jdump(jload(outputs[0])[:-1], str(tmp_path / "short.json"))
    with pytest.raises(UserError, match=r"has 8 answers and .* has 7"):
        judging.load_pairs(outputs[0], str(tmp_path / "short.json"), seed=42)
    jdump(jload(outputs[0])[::-1], str(tmp_path / "turned.json"))
    with pytest.raises(UserError, match=r"record 0 and .* answer different instructions"):
        judging.load_pairs(outputs[0], str(tmp_path / "turned.json"), seed=42)


def test_wilson_interval_gives_the_known_values():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for successes, trials, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert judging.wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Pages, in a browser

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
# Runs a command as inference.py does, with a model that takes its time, and reports whoever looks up another machine.
SERVER = """
import socket, sys, time
look_up = socket.getaddrinfo
def local_only(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost", "0.0.0.0", None, ""):
        print("LOOKED UP", host, file=sys.stderr)
        raise OSError("offline")
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = local_only
if "demo" in sys.argv:
    from transformers import LlamaForCausalLM
    forward = LlamaForCausalLM.forward
    def slow(*args, **kwargs):
        time.sleep(0.03)
        return forward(*args, **kwargs)
    LlamaForCausalLM.forward = slow
import inference
inference.run_cli({"demo": inference.demo, "compare": inference.compare})
"""


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=60_000)  # a busy machine is no failure
    with sync_api.sync_playwright() as playwright:
        flags = [*CHROMIUM_FLAGS.split(), "--disable-sync", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(root, tmp_path, *arguments):
    port = free_port()
    command = [sys.executable, "-c", SERVER, *arguments, "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        while "open http" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    log = (tmp_path / "log").read_text()
    assert "LOOKED UP" not in log
    assert "Traceback" not in log


def open_page(browser, url):
    page = browser.new_page(viewport={"width": 1180, "height": 890})
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    return page


def test_browser_sees_the_answer_stream_and_stop_ends_it(root, model_path, tmp_path, browser):
    expect = pytest.importorskip("playwright.sync_api").expect
    with served(root, tmp_path, "demo", "--model_path", model_path, "--seed", "1") as url:
        page = open_page(browser, url)
        instruction, answer = page.locator("#instruction textarea"), page.locator("#answer textarea")
        expect(page.get_by_text("has not been made safe")).to_be_visible()
        expect(page.get_by_role("heading", name="tiny-alpaca")).to_be_visible()
        assert page.locator("input[type=number]").nth(0).input_value() == "0.7"
        assert page.locator("input[type=number]").nth(1).input_value() == "0.9"
        instruction.fill("Count to forty.")
        page.locator("#ask").click()
        whole = LESSONS[5]["output"]
        expect(answer).to_have_value(re.compile(r"^1 2 3 4 5"))
        early = answer.input_value()
        assert whole.startswith(early)
        assert len(early) < len(whole)
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        page.wait_for_timeout(500)
        stopped = answer.input_value()
        page.wait_for_timeout(500)
        assert answer.input_value() == stopped
        assert len(stopped) < len(whole)
        # The stopped model is free for the next question.
        instruction.fill("Translate to French.")
        page.locator("#input textarea").fill("Good morning")
        page.locator("#ask").click()
        expect(answer).to_have_value("Bonjour")
        expect(page.locator("#status")).to_contain_text("Done in")
        page.locator("#input textarea").fill("")
        instruction.fill("Name the three primary colors.")
        page.locator("#ask").click()
        expect(answer).to_have_value("Red, blue and yellow.")
        if folder := os.environ.get("SCREENSHOT_DIR"):  # SCREENSHOT_DIR=assets remakes the README's
            page.screenshot(path=os.path.join(folder, "demo.png"))
        from gradio_client import Client

        client = Client(url, verbose=False)
        for wrong in (["x" * 2001, ""], ["Hi", "x" * 8001], ["", ""]):
            with pytest.raises(Exception, match=r"this page takes|Write an instruction first"):
                client.predict(*wrong, 0.7, 0.9, 5, api_name="/ask")
        assert {requested.split("/")[2] for requested in page.requests if requested[:4] == "http"} == {
            url.split("/")[2]
        }
        page.close()


def test_browser_judges_pairs_into_the_journal_of_the_terminal(root, outputs, tmp_path, browser):
    expect = pytest.importorskip("playwright.sync_api").expect
    a, b, judged = outputs
    compare(root, outputs, ["t", "q"])
    with served(root, tmp_path, "compare", "--a", a, "--b", b, "--output", judged, "--page") as url:
        page = open_page(browser, url)
        for to_go in range(7, 0, -1):
            expect(page.locator("#progress")).to_have_text(f"Pairs to go: {to_go}")
            assert "model-" not in page.locator("body").inner_text()
            page.get_by_role("button", name="Answer 2 is better").click()
        expect(page.locator("#progress")).to_contain_text("1 ties")
        expect(page.get_by_role("button", name="Tie")).to_be_hidden()
        page.close()
    with open(judged) as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 8
    assert all(line["better"] != line["shown_first"] for line in lines)
    assert "(to go: 0)" in (tmp_path / "log").read_text()
