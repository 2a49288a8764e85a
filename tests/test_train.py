"""train.py: the original's losses, the seed's commands, runs that survive, checkpoints that load."""

import errno
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from types import SimpleNamespace

import documented
import pytest
import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from alpaca import models as model_loading
from alpaca.cli import UserError
from alpaca.prompts import alpaca_chat_template, format_prompt
from alpaca.training import lora, saving
from alpaca.training import memory as memory_estimate
from alpaca.training import sharding as sharding_module
from demo import tiny_model

BUNDLED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "alpaca_data.json")
CONFIG = {
    "llama": {"num_key_value_heads": 4, "intermediate_size": 172, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
SHORT = [
    "--num_train_epochs",
    "1",
    "--learning_rate",
    "1e-3",
    "--warmup_ratio",
    "0.03",
    "--lr_scheduler_type",
    "cosine",
]
SHORT += ["--logging_steps", "1", "--disable_tqdm", "True", "--save_strategy", "no", "--weight_decay", "0."]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny matrices are quicker on one thread than on two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(root, tmp_path_factory) -> str:
    """32 short seed tasks."""
    with open(os.path.join(root, "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    examples = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    examples = sorted(examples, key=lambda e: len(format_prompt(e) + e["output"]))[:32]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(examples), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def models(data, tmp_path_factory) -> dict[str, str]:
    """A tiny model of each kind, without dropout."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for kind, more in CONFIG.items():
        config = {"model_type": kind, "vocab_size": 700, "hidden_size": 64, "num_hidden_layers": 2, "dropout": 0.0}
        config |= {"num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": kind == "opt"}
        (folder / f"{kind}.json").write_text(json.dumps({**config, **more}))
        made[kind] = str(folder / kind)
        tiny_model.make(str(folder / f"{kind}.json"), data, made[kind])
    return made


def arguments(model: str, data: str, output_dir, *more, batch: int = 4, accumulation: int = 2) -> list[str]:
    flags = ["--model_name_or_path", model, "--data_path", data, "--output_dir", str(output_dir)]
    flags += ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    return [*flags, *SHORT, *map(str, more)]


def run(monkeypatch, *args, **kwargs) -> list[float]:
    """Runs train.py in this process; returns the losses it logged."""
    flags = arguments(*args, **kwargs)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.train()
    return losses(flags[5])


def losses(output_dir) -> list[float]:
    with open(os.path.join(output_dir, "trainer_state.json")) as file:
        return [entry["loss"] for entry in json.load(file)["log_history"] if "loss" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(os.path.join(folder, "model.safetensors"))


def assert_same(found, expected, tolerance: float):
    """Losses of every step and all final weights agree."""
    assert losses(found) == pytest.approx(losses(expected), abs=tolerance)
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < tolerance


def launch(script: str, *args: str, processes: int = 2, **kwargs) -> subprocess.CompletedProcess:
    """Starts torchrun on two processes; returns when they are done."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*torchrun, "--master_port", str(free_port()), script, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, **kwargs)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def plain_loop(model_dir: str, data: str, batch: int, accumulation: int) -> list[float]:
    """The original's training in plain PyTorch: micro-batch means averaged, AdamW, cosine with warmup, clipping."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    if model.config.model_type == "llama":
        spm = sentencepiece.SentencePieceProcessor(model_file=os.path.join(model_dir, "tokenizer.model"))
        model.resize_token_embeddings(701, mean_resizing=False)
        for rows in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
            rows[700] = rows[:700].mean(dim=0)
    else:
        bpe = AutoTokenizer.from_pretrained(model_dir)

    def encode(text: str) -> list[int]:
        return [1, *spm.encode(text)] if model.config.model_type == "llama" else bpe(text)["input_ids"]

    with open(data, encoding="utf-8") as file:
        examples = json.load(file)
    rows = []
    for example in examples:
        prompt = format_prompt(example)
        rows.append(([*encode(prompt + example["output"]), 2], len(encode(prompt))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    steps, found = len(rows) // (batch * accumulation), []
    for step in range(steps):
        warmup = -(-steps * 3 // 100)
        progress = (step - warmup) / max(1, steps - warmup)
        scale = step / warmup if step < warmup else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        optimizer.param_groups[0]["lr"] = 1e-3 * scale
        total = 0.0
        for micro in range(accumulation):
            start = (step * accumulation + micro) * batch
            parts = []
            for ids, prompt in rows[start : start + batch]:  # one at a time: no padding to go wrong
                logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
                parts.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="none"))
            loss = torch.cat(parts).mean() / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_losses_are_a_plain_loops(models, data, tmp_path, monkeypatch, kind):
    more = ("--train_sampling_strategy", "sequential", "--padding_free", "false")
    found = run(monkeypatch, models[kind], data, tmp_path / "out", *more)
    assert found == pytest.approx(plain_loop(models[kind], data, 4, 2), abs=2e-5)


def test_losses_are_the_originals_at_every_step(reference_dir, tmp_path, monkeypatch):
    fidelity = os.path.join(reference_dir, "fidelity")
    subprocess.run(
        [sys.executable, os.path.join(fidelity, "build_tiny.py"), "llama", str(tmp_path / "model")], check=True
    )
    with open(os.path.join(fidelity, "reference_lr1e-3.json")) as file:
        reference = json.load(file)
    with open(os.path.join(fidelity, "alpaca_256.json"), encoding="utf-8") as file:
        examples = json.load(file)
    ordered = tmp_path / "ordered.json"
    ordered.write_text(json.dumps([examples[i] for i in reference["order"]]))
    more = ("--train_sampling_strategy", "sequential", "--padding_free", "false", "--seed", "42")
    found = run(monkeypatch, str(tmp_path / "model"), str(ordered), tmp_path / "out", *more)
    micro = reference["micro"]
    exact = [micro[i] + micro[i + 1] for i in range(0, len(micro), 2)]
    assert found == pytest.approx(exact, abs=1e-4)
    assert found == pytest.approx([step["loss"] for step in reference["steps"] if "loss" in step], abs=1e-4)
    assert weights(tmp_path / "out")["lm_head.weight"].shape[0] == 32001


def test_global_reduction_is_the_same_however_a_batch_is_split(models, data, tmp_path, monkeypatch):
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        split = {"batch": batch, "accumulation": accumulation}
        more = ("--loss_reduction", "global", "--padding_free", "false")
        run(monkeypatch, models["llama"], data, tmp_path / str(batch), *more, **split)
    assert_same(tmp_path / "4", tmp_path / "8", 1e-5)
    assert_same(tmp_path / "2", tmp_path / "8", 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# More than one process


def test_two_processes_train_as_one(models, data, tmp_path, monkeypatch, root):
    """Data-parallel, FSDP2, FSDP2 with offload and ZeRO-3 with offload against a single process, in one launch."""
    with open(os.path.join(root, "configs", "default_offload_opt_param.json")) as file:
        zero3 = json.load(file)
    can_compile = shutil.which("g++") and os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    zero3["optimizer"]["params"]["torch_adam"] = not can_compile  # DeepSpeed's own Adam for the CPU
    zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False  # as in 2023's file
    zero3["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto"}}  # likewise
    for part in ("offload_optimizer", "offload_param"):
        zero3["zero_optimization"][part]["pin_memory"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap"]
    ways = {
        "plain": ["--plain", *fsdp, "LlamaDecoderLayer"],
        "fsdp": [*fsdp, "LlamaDecoderLayer", "--padding_free", "false"],
        "opt": [*fsdp, "OPTDecoderLayer"],
        "offload": ["--fsdp", "full_shard auto_wrap offload", "--save_strategy", "steps", "--save_steps", "2"],
        "resumed": ["--fsdp", "full_shard auto_wrap offload"],
        "zero3": ["--deepspeed", str(tmp_path / "zero3.json")],
        "lora": [*fsdp, "OPTDecoderLayer", "--lora_r", "4"],
    }
    ways["resumed"] += ["--resume_from_checkpoint", str(tmp_path / "offload" / "checkpoint-2")]
    kinds = {name: models["opt" if name == "opt" else "llama"] for name in ways}
    commands = [arguments(kinds[name], data, tmp_path / name, *w, batch=2) for name, w in ways.items()]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = launch(os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    run(monkeypatch, models["llama"], data, tmp_path / "one", batch=2, accumulation=4)
    for name in ("plain", "fsdp", "offload", "resumed", "zero3"):
        assert_same(tmp_path / name, tmp_path / "one", 1e-5)
    run(monkeypatch, models["opt"], data, tmp_path / "one_opt", batch=2, accumulation=4)
    assert_same(tmp_path / "opt", tmp_path / "one_opt", 1e-5)
    lines = done.stdout.splitlines()
    assert sum("accelerate shards only across GPUs; going on data-parallel" in line for line in lines) == 1
    assert "FSDP2 wraps LlamaDecoderLayer (as asked)" in lines
    assert "FSDP2 wraps LlamaDecoderLayer (OPTDecoderLayer is not in this model)" in lines
    assert any("WarmupDecayLR gives way to --lr_scheduler_type cosine" in line for line in lines)
    assert any("stage3_gather_16bit_weights_on_model_save set to true" in line for line in lines)
    assert os.path.isfile(tmp_path / "lora" / "adapter_model.safetensors")
    assert losses(tmp_path / "lora")[-1] < losses(tmp_path / "lora")[0]
    assert "deprecated. Please use `torch.distributed" not in done.stderr, "said of DeepSpeed, many times a step"


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_only_the_first_rank_of_fsdp_loads_weights(models, monkeypatch, kind):
    args = SimpleNamespace(
        fsdp=True,
        fsdp_config={},
        fsdp_plugin_args={},
        fsdp_transformer_layer_cls_to_wrap=None,
        bf16=False,
        pure_bf16=False,
        cache_dir=None,
    )
    chosen = train.ModelArguments(model_name_or_path=models[kind])
    tokenizer, skeleton = train.load_skeleton(chosen, SimpleNamespace(model_max_length=512, cache_dir=None))
    sharding_module.fit_fsdp(args, skeleton)
    assert args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    loaded = train.load_model(chosen, args, tokenizer, skeleton.config)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    empty = train.load_model(chosen, args, tokenizer, skeleton.config)
    assert model_loading.tensor_shapes(empty) == model_loading.tensor_shapes(loaded)
    for ours, theirs in zip(empty.buffers(), loaded.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    skeleton.register_buffer("statistics", torch.zeros(1))
    sharding_module.fit_fsdp(args, skeleton)
    assert not args.fsdp_plugin_args["cpu_ram_efficient_loading"], "accelerate sends no buffers"


def readme_commands(root: str) -> list[list[str]]:
    """The train.py commands of README.md and docs/training.md, as argument lists."""
    return [shlex.split(c) for c in documented.commands("README.md", "docs/training.md") if "train.py" in c]


def toy(command: list[str], models: dict[str, str], data: str, output_dir: str) -> list[str]:
    """A README command with a toy's model, data and folder; every other flag stays as printed."""
    command = list(command[command.index("train.py") + 1 :])
    kind = "opt" if "opt" in command[command.index("--model_name_or_path") + 1] else "llama"
    for flag, value in {"model_name_or_path": models[kind], "data_path": data, "output_dir": output_dir}.items():
        command[command.index(f"--{flag}") + 1] = value
    return command


def test_every_command_of_the_readme_runs(models, data, tmp_path, root):
    commands = readme_commands(root)
    trainings = [c for c in commands if c[0] == "torchrun" and not any(part.startswith("--nnodes") for part in c)]
    assert len(trainings) >= 6
    toys = [["--plain", *toy(c, models, data, str(tmp_path / str(i)))] for i, c in enumerate(trainings)]
    (tmp_path / "commands.json").write_text(json.dumps(toys))
    done = launch(os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json"), cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    for i in range(len(trainings)):
        assert len(losses(tmp_path / str(i))) > 0
    [merge] = [c for c in commands if "merge" in c]
    assert set(merge[merge.index("merge") + 1 :: 2]) == {"--adapter_dir", "--output_dir"}


def test_two_machines_meet_on_loopback(models, data, tmp_path, root):
    """The README's command for several machines, as two torchrun agents with a process each."""
    [command] = [c for c in readme_commands(root) if any(part.startswith("--nnodes") for part in c)]
    launcher, port = command[1 : command.index("train.py")], free_port()
    for flag, value in {"--nproc_per_node": "1", "--rdzv_endpoint": f"127.0.0.1:{port}"}.items():
        launcher = [f"{flag}={value}" if part.startswith(flag + "=") else part for part in launcher]
    agents = []
    for rank in range(2):
        parts = [f"--node_rank={rank}" if part.startswith("--node_rank=") else part for part in launcher]
        argv = [sys.executable, "-m", "torch.distributed.run", *parts, "--local_addr=127.0.0.1", "train.py"]
        argv += [*toy(command, models, data, str(tmp_path / "out")), "--num_train_epochs", "1"]
        agents.append(
            subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        )  # fmt: skip
    outputs = [agent.communicate(timeout=280)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert len(losses(tmp_path / "out")) == 1
    assert weights(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Runs that survive


def start(flags: list[str], root: str) -> subprocess.Popen:
    """Starts train.py in a process of its own, where openai cannot be imported."""
    code = "import sys, runpy; sys.modules['openai'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); "
    argv = [sys.executable, "-c", code + "runpy.run_path('train.py', run_name='__main__')", "train.py", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as the run that it is compared with
    return subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def test_run_killed_in_a_save_continues_exactly(models, data, tmp_path, monkeypatch, root):
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")
    uninterrupted = run(monkeypatch, models["opt"], data, tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(arguments(models["opt"], data, out, *saves), root)
    wait_for(lambda: os.path.isdir(out / saving.STAGING / "checkpoint-3"), process)
    process.kill()
    process.communicate()
    if os.path.isdir(out / "checkpoint-3"):  # the save was quicker than the signal: put it back to half a save
        os.makedirs(out / saving.STAGING, exist_ok=True)
        os.rename(out / "checkpoint-3", out / saving.STAGING / "checkpoint-3")
    assert saving.last_checkpoint(str(out)).endswith("checkpoint-2")
    assert run(monkeypatch, models["opt"], data, out, *saves, "--resume_from_checkpoint", "True") == uninterrupted
    assert_same(out, tmp_path / "whole", 1e-7)
    assert not os.path.exists(out / saving.STAGING)


def test_model_whose_files_name_tensors_otherwise_continues_exactly(models, data, tmp_path, monkeypatch):
    """GPT-NeoX's output layer is lm_head in memory and embed_out in its files; the Trainer resumes by the former."""
    folder, out = tmp_path / "neox", tmp_path / "out"
    config = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("gpt_neox", **config, num_attention_heads=2, max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(os.path.join(models["llama"], name), folder)
    whole = run(monkeypatch, str(folder), data, out, "--save_strategy", "steps", "--save_steps", "2")
    assert "embed_out.weight" in weights(out)
    more = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert run(monkeypatch, str(folder), data, tmp_path / "continued", *more) == whole
    assert_same(tmp_path / "continued", out, 1e-7)
    shutil.copy(out / "model.safetensors", out / "checkpoint-2")  # names that the Trainer doesn't know
    with pytest.raises(UserError, match=r"the checkpoint lacks 1 of this model's tensors, lm_head.weight first"):
        run(monkeypatch, str(folder), data, tmp_path / "other", *more)


def test_checkpoint_that_is_not_whole_is_not_continued_from(models, data, tmp_path, monkeypatch):
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "2")
    run(monkeypatch, models["llama"], data, out, *saves)
    whole = out / "checkpoint-4"
    saving.check_whole(str(whole))
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        cut = tmp_path / f"cut-{name}"
        shutil.copytree(whole, cut)
        os.truncate(cut / name, os.path.getsize(cut / name) - 9)
        with pytest.raises(UserError, match=re.escape(name)):
            run(monkeypatch, models["llama"], data, tmp_path / "new", "--resume_from_checkpoint", cut)
    os.remove(whole / "optimizer.pt")
    with pytest.raises(UserError, match="checkpoint-4 holds no optimizer state"):
        run(monkeypatch, models["llama"], data, out, "--resume_from_checkpoint", "True")


def test_checkpoint_of_another_run_is_refused_or_told(models, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, models["llama"], data, out, "--save_strategy", "steps", "--save_steps", "2")
    resume = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert "processes differ" not in capsys.readouterr().out
    run(monkeypatch, models["llama"], data, tmp_path / "again", *resume)
    run(monkeypatch, models["llama"], data, tmp_path / "longer", *resume, "--num_train_epochs", "2")
    assert "processes differ" not in capsys.readouterr().out
    run(monkeypatch, models["llama"], data, tmp_path / "smaller", *resume, batch=2)
    assert (
        "is of a run of 4 steps, this one has 8: data, batch or number of processes differ" in capsys.readouterr().out
    )
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match="its lora_r is 0, this run's 4; continue with the flags that the run was"):
        run(monkeypatch, models["llama"], data, tmp_path / "lora", *resume, "--lora_r", "4")
    with pytest.raises(UserError, match="its model_type is llama, this run's opt; "):
        run(monkeypatch, models["opt"], data, tmp_path / "opt", *resume)


def test_sigterm_saves_and_says_how_to_continue(models, data, tmp_path, monkeypatch, root):
    out = tmp_path / "out"
    process = start(arguments(models["llama"], data, out, "--max_steps", "500"), root)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    [line] = [line for line in output.splitlines() if line.startswith("SIGTERM")]
    step = int(re.search(r"checkpoint-(\d+); the same command with --resume_from_checkpoint True", line).group(1))
    assert 1 <= step < 500
    more = ("--max_steps", step + 1, "--resume_from_checkpoint", "True")
    assert len(run(monkeypatch, models["llama"], data, out, *more)) == step + 1
    assert not [line for line in lines if "openai" in line]


def test_sigterm_after_the_last_step_waits_for_the_model(models, data, tmp_path, monkeypatch):
    """The original's command saves nothing before its end: a signal then would take the whole run with it."""
    save, evaluate = train.AlpacaTrainer.save_verified, train.AlpacaTrainer.evaluate
    there = []

    def save_under_fire(self, *shapes):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, *shapes)

    def look_and_evaluate(self, *args, **kwargs):
        there.append(os.path.isfile(tmp_path / "out" / "model.safetensors"))
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(train.AlpacaTrainer, "save_verified", save_under_fire)
    monkeypatch.setattr(train.AlpacaTrainer, "evaluate", look_and_evaluate)
    previous = signal.signal(signal.SIGTERM, lambda *args: pytest.fail("the signal ends the run before its save"))
    try:
        run(monkeypatch, models["llama"], data, tmp_path / "out", "--eval_fraction", "0.25")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert there == [True], "evaluated when the model is on the disk, and not before"


def test_full_disk_is_told_in_one_line_and_leaves_the_last_good_checkpoint(models, data, tmp_path, monkeypatch):
    """A limit on the size of files, which the second save meets: once in the weights, once in the optimizer's state."""
    out, saves = tmp_path / "out", ("--save_strategy", "steps", "--save_steps", "2")
    no_more = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = train.AlpacaTrainer._save_checkpoint
    for name, size in (("weights", 500_000), ("optimizer", 1_000_000)):

        def save_until_full(self, *args, size=size):
            if self.state.global_step > 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            return save(self, *args)

        monkeypatch.setattr(train.AlpacaTrainer, "_save_checkpoint", save_until_full)
        try:
            with pytest.raises(UserError, match=rf"cannot save .* free \(.*\)\. The last good .*{name}/checkpoint-2$"):
                run(monkeypatch, models["llama"], data, out / name, *saves)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saving.check_whole(str(out / name / "checkpoint-2"))
    signal.signal(signal.SIGXFSZ, no_more)


def test_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(models, data, tmp_path, monkeypatch):
    more = ("--learning_rate", "1e30", "--max_grad_norm", "0", "--save_strategy", "steps", "--save_steps", "1")
    with pytest.raises(UserError) as stop:
        run(monkeypatch, models["llama"], data, tmp_path / "out", *more, "--warmup_ratio", "0.5")
    assert re.search(r"stopped at step \d: the loss is (nan|inf) on records \[\d+, \d+, \d+, \d+\]", str(stop.value))
    kept = re.search(r"The last good checkpoint is (\S+)", str(stop.value)).group(1)
    assert all(tensor.isfinite().all() for tensor in weights(kept).values())
    assert not os.path.exists(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_batch_without_a_label_stops_with_its_records(models, data, tmp_path, monkeypatch, padding_free, capsys):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:8]
    for number in (4, 5):
        examples[number]["instruction"] = "much too long " * 200
    path = tmp_path / "long.json"
    path.write_text(json.dumps(examples))
    more = ("--train_sampling_strategy", "sequential", "--padding_free", padding_free)
    with pytest.raises(UserError, match=r"stopped at step 2: nothing to learn on records \[4, 5\]"):
        run(monkeypatch, models["llama"], str(path), tmp_path / "out", *more, batch=2)
    output = capsys.readouterr().out
    assert "2 example(s) have nothing to learn, their prompt alone fills --model_max_length: records 4, 5" in output


def test_batch_that_cannot_have_a_label_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:2]
    examples[1]["instruction"] = "much too long " * 200
    monkeypatch.setattr(train, "load_model", None)
    for name, chosen, batch in (("all", examples[1:], 4), ("one", examples, 1)):
        (tmp_path / name).write_text(json.dumps(chosen))
        with pytest.raises(UserError, match=r"1 example\(s\) have nothing to learn.* records \d; a batch needs one"):
            run(monkeypatch, models["llama"], str(tmp_path / name), tmp_path / "out", batch=batch)
    more = ("--eval_data_path", tmp_path / "one", "--per_device_eval_batch_size", "1")  # its loss would be NaN
    with pytest.raises(UserError, match="one: 1 example"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *more)


# ---------------------------------------------------------------------------------------------------------------------
# The end: a model that loads, answers, chats


def test_saved_model_answers_what_it_learned(models, data, tmp_path, monkeypatch, capsys):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:4]
    (tmp_path / "four.json").write_text(json.dumps(examples))
    more = ("--max_steps", "150", "--learning_rate", "1e-2", "--logging_steps", "50", "--report_to", "tensorboard")
    more += ("--eval_data_path", str(tmp_path / "four.json"))
    out = tmp_path / "out"
    run(monkeypatch, models["llama"], str(tmp_path / "four.json"), out, *more, batch=4, accumulation=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    for example in examples:
        content = example["instruction"] + (f"\n\n### Input:\n{example['input']}" if example["input"] else "")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], return_tensors="pt")
        assert chat["input_ids"].tolist() == tokenizer([format_prompt(example)])["input_ids"]
        answer = model.generate(**chat, max_new_tokens=200, do_sample=False)[0, chat["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == example["output"] + "</s>"
    printed = capsys.readouterr().out
    assert f"--- answer (learned):\n{examples[0]['output']}</s>" in printed
    for row in ("tokens/s", "MFU", "peak memory", "21 tensors saved and read back"):
        assert row in printed
    with open(out / "trainer_state.json") as file:
        history = json.load(file)["log_history"]
    speed = {"tokens_per_s", "useful_tokens_per_s", "mfu", "hardware_mfu", "peak_memory_gib", "hours_left"}
    assert all(speed <= entry.keys() for entry in history if "loss" in entry)
    assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) < 0.1
    assert os.stat(out / "model.safetensors").st_mode == os.stat(out / "config.json").st_mode, "others may serve it too"
    assert list(out.rglob("events.out.tfevents.*"))


def test_lora_learns_and_merges_to_equal_logits(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    more = ("--lora_r", "8", "--learning_rate", "2e-2", "--num_train_epochs", "4")
    found = run(monkeypatch, models["llama"], data, out, *more)
    assert sum(found[-4:]) / 4 < found[0] - 0.08
    assert os.path.getsize(out / "adapter_model.safetensors") < os.path.getsize(models["llama"] + "/model.safetensors")
    lora.merge(str(out), str(tmp_path / "merged"))
    import peft

    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    adapted, merged = (
        peft.PeftModel.from_pretrained(base, out),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    with pytest.raises(UserError, match="is not empty"):
        lora.merge(str(out), str(tmp_path / "merged"))
    with pytest.raises(UserError, match="is not empty, or no folder"):
        lora.merge(str(out), data)
    with pytest.raises(UserError, match=r"out is no adapter of .*opt: .*; name its model with --base_model"):
        lora.merge(str(out), str(tmp_path / "other"), base_model=models["opt"])
    monkeypatch.setattr(model_loading, "verify", lambda folder, *shapes: [] / 0)
    with pytest.raises(TypeError):
        lora.merge(str(out), str(tmp_path / "broken"))
    assert os.listdir(tmp_path / "broken") == [saving.STAGING], "what was not read back looks like no model"


def test_checkpoint_that_was_not_saved_right_is_not_passed_as_done(models, tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    shapes = model_loading.tensor_shapes(model)
    assert model_loading.verify(models["llama"], *shapes) == 21
    whole = load_file(models["llama"] + "/model.safetensors")
    norm = "model.norm.weight"
    for wrong, words in (
        ({name: tensor for name, tensor in whole.items() if name != norm}, "lacks 1 of 21 tensors, model.norm.weight"),
        ({**whole, norm: whole[norm][:3].clone()}, r"has shape \(3,\), the model \(64,\)"),
        ({**whole, norm: whole[norm] / 0}, "is not finite"),
        ({**whole, "extra": whole[norm].clone()}, "holds extra, which the model does not have"),
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=words):
            model_loading.verify(str(tmp_path), *shapes)
    tied = model_loading.tensor_shapes(AutoModelForCausalLM.from_pretrained(models["opt"]))
    assert model_loading.verify(models["opt"], *tied) == len(tied[0]) - 1, "one of two tied tensors is enough"


def test_chat_template_starts_with_bos_only_where_the_tokenizer_does():
    assert alpaca_chat_template(True).startswith("{{ bos_token }}")
    assert "bos_token" not in alpaca_chat_template(False)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


def test_rows_are_added_as_the_mean_and_never_taken_away(models):
    for kind, added in (("llama", 1), ("opt", 0)):
        model = AutoModelForCausalLM.from_pretrained(models[kind])
        tokenizer = AutoTokenizer.from_pretrained(models[kind])
        before = model.get_input_embeddings().weight.detach().clone()
        head = model.get_output_embeddings().weight.detach().clone()
        tokens = {} if kind == "opt" else {"pad_token": "[PAD]"}
        assert train.smart_tokenizer_and_embedding_resize(tokens, tokenizer, model) == added
        for rows, old in ((model.get_input_embeddings(), before), (model.get_output_embeddings(), head)):
            assert rows.weight.shape[0] == 700 + added, "OPT keeps rows beyond its tokens"
            torch.testing.assert_close(rows.weight[:700], old)
            torch.testing.assert_close(rows.weight[700:], old.mean(0, keepdim=True).expand(added, -1))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, found before weights load


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"output": None}, "record 1: 'output' must be text, found NoneType None"),
        ({"output": " "}, "record 1: 'output' is empty"),
        ({"input": 7}, "record 1: 'input' must be text, found int 7"),
        ("output", "record 1: no 'output'; found the fields 'instruction', 'input'"),
    ],
)
def test_wrong_record_is_named(models, data, tmp_path, monkeypatch, broken, words):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:3]
    if isinstance(broken, str):
        del examples[1][broken]
    else:
        examples[1].update(broken)
    (tmp_path / "wrong.json").write_text(json.dumps(examples))
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match=re.escape(words)):
        run(monkeypatch, models["llama"], str(tmp_path / "wrong.json"), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval_fraction", "1.5"], "--eval_fraction must be at least 0 and below 1, found 1.5"),
        (["--eval_fraction", "0.5", "--eval_data_path", "x.json"], "both name data to evaluate on"),
        (["--loss_reduction", "sum"], "--loss_reduction must be micro_batch or global, found 'sum'"),
        (["--model_max_length", "4096"], "--model_max_length 4096 exceeds the model's 512 positions"),
        (["--fsdp", "full_shard", "--deepspeed", "x.json"], "--fsdp and --deepspeed both shard the model"),
        (["--bf16", "maybe"], "--bf16"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--lora_r", "-1"], "--lora_r must be 0"),
        (["--resume_from_checkpoint", "True"], "holds no whole checkpoint; leave the flag away"),
        (["--model_name_or_path", "no/such-model"], "cannot load no/such-model"),
        (["--model_name_or_path", "../no/such"], "--model_name_or_path ../no/such: no such folder"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be above 0, found 0"),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0, found -1.0"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0, found nan"),
        (["--num_train_epochs", "inf"], "--num_train_epochs must be above 0, found inf"),
        (["--lora_r", "4", "--lora_alpha", "nan"], "--lora_alpha must be above 0, found nan"),
        (["--seed", "4294967296"], "--seed must be below 4294967296, found 4294967296"),
        (["--warmup_ratio", "2"], "--warmup_ratio must be at least 0 and below 1, found 2.0"),
        (["--lora_r", "4", "--lora_dropout", "1.5"], "--lora_dropout must be at least 0 and below 1, found 1.5"),
        (["--bf16", "True", "--fp16", "True"], "--bf16 and --fp16 are two types to compute in; give one"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor needs --padding_free false"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha needs --padding_free false"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules needs --lora_r, the adapter's rank"),
        (["--remove_unused_columns", "True"], "--remove_unused_columns True would drop the records' numbers"),
        (["--save_strategy", "best"], "--save_strategy best needs --eval_data_path or --eval_fraction"),
        (["--report_to", "paper"], "--report_to paper is not supported"),
        (["--output_dir", __file__ + "/out"], "test_train.py is a file; name a folder"),
        (["--deepspeed", "no/such.json"], "cannot read no/such.json"),
        (["--deepspeed", BUNDLED], "alpaca_data.json holds a list; expected a JSON object of settings"),
        (["--fsdp", "fullshard"], "--fsdp fullshard: FSDP2 knows full_shard, shard_grad_op"),
        (["--fsdp", "full_shard", "--fsdp_config", "no/such.json"], "cannot read no/such.json"),
        (["--max_tokens_per_pass", "-1"], "--max_tokens_per_pass must be at least 0, found -1"),
        (["--max_tokens_per_pass", "20"], "--max_tokens_per_pass 20 is too few for the longest example"),
        (["--lora_r", "4", "--lora_target_modules", "q_prj"], "--lora_target_modules q_prj: the model has no 'q_prj'"),
    ],
)
def test_wrong_flag_is_refused_in_one_line(models, data, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError) as refusal:
        run(monkeypatch, models["llama"], data, tmp_path / "out", *flags)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_output_dir_that_is_a_file_is_refused(models, data, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"notes\.txt is a file; name a folder"):
        run(monkeypatch, models["llama"], data, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_weight_diff_is_not_trained(models, data, tmp_path, monkeypatch):
    diff = tmp_path / "diff"
    shutil.copytree(models["llama"], diff)
    config = json.loads((diff / "config.json").read_text())
    (diff / "config.json").write_text(json.dumps({**config, "alpaca_weight_diff": True}))
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match="is a weight diff, not a model"):
        run(monkeypatch, str(diff), data, tmp_path / "out")


def test_unknown_flag_is_refused_before_anything_loads(root):
    command = [sys.executable, "train.py", "--data_path", "x", "--warmup_ration", "0.1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --warmup_ration; did you mean --warmup_ratio?\n")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:2], "--help"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--fsdp_transformer_layer_cls_to_wrap" in done.stdout
    assert not re.search(r"\| +(torch|transformers)$", done.stderr, re.M)


def test_torchruns_report_ends_with_what_went_wrong(root):
    done = launch(os.path.join(root, "train.py"), "--warmup_ration", "0.1")
    assert done.returncode == 1, "torchrun's own"
    assert done.stderr.count("\nerror: unknown flag --warmup_ration") <= 1, "not once for each rank"
    assert re.search(
        r"traceback : error: unknown flag --warmup_ration; did you mean --warmup_ratio\?\n=+\n$", done.stderr
    )


def test_known_flags_are_the_parsers(root):
    from transformers import HfArgumentParser

    from alpaca.training import arguments

    own, inherited = arguments.known_flags(os.path.join(root, "train.py"))
    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    assert {*own, *inherited} == {action.dest for action in parser._actions} - {"help"}


def test_earlier_run_is_not_written_over(models, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(models["llama"], out)
    with pytest.raises(
        UserError, match=r"already holds model.safetensors; continue that run with .*--overwrite_output"
    ):
        run(monkeypatch, models["llama"], data, out)


def test_folder_of_a_run_at_work_is_left_alone(models, data, tmp_path, monkeypatch):
    out, train_it = tmp_path / "out", train.AlpacaTrainer.train

    def start_another(self, **kwargs):
        (out / saving.STAGING).mkdir()
        monkeypatch.setattr(train.AlpacaTrainer, "train", train_it)
        with pytest.raises(UserError, match=r"another run is writing .*out; wait for it, or"):
            run(monkeypatch, models["llama"], data, out, "--overwrite_output_dir", "True")
        assert (out / saving.STAGING).is_dir(), "the other run's save goes on"
        return train_it(self, **kwargs)

    monkeypatch.setattr(train.AlpacaTrainer, "train", start_another)
    run(monkeypatch, models["llama"], data, out)
    run(monkeypatch, models["llama"], data, out, "--overwrite_output_dir", "True")


def test_single_record_is_not_divided(models, data, tmp_path, monkeypatch):
    with open(data, encoding="utf-8") as file:
        (tmp_path / "one.json").write_text(json.dumps(json.load(file)[:1]))
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match=r"--eval_fraction 0.5: .*one.json has but one record"):
        run(monkeypatch, models["llama"], str(tmp_path / "one.json"), tmp_path / "out", "--eval_fraction", "0.5")


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (("--report_to", "wandb"), "wandb"),
        (("--report_to", "tensorboard"), "tensorboard"),
        (("--optim", "adamw_bnb_8bit"), "bitsandbytes"),
        (("--optim", "adamw_torch_8bit"), "torchao"),
        (("--lora_r", "4"), "peft"),
    ],
)
def test_what_is_not_installed_is_refused_before_anything_loads(models, data, tmp_path, monkeypatch, flags, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{' '.join(flags)}: {package} is not installed here; pip install {package}$"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_model_whose_files_are_not_whole_is_refused(models, tmp_path):
    def broken(name: str, config=None) -> str:
        model = AutoModelForCausalLM.from_pretrained(models["llama"])
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
        settings = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**settings, **(config or {})}))
        return str(tmp_path / name)

    os.remove(os.path.join(broken("missing"), "model-00002-of-00004.safetensors"))
    os.truncate(os.path.join(broken("cut"), "model-00002-of-00004.safetensors"), 5000)
    broken("deeper", {"num_hidden_layers": 3})
    broken("wider", {"vocab_size": 800})
    for name, words in (
        ("missing", r"cannot load .*missing: No such file or directory: .*model-00002-of-00004"),
        ("cut", "cannot load .*cut: Error while deserializing header"),
        ("deeper", r"deeper lacks 9 tensor\(s\) that its config.json asks for: model.layers.2.input_layernorm.weight"),
        ("wider", r"lm_head.weight has shape \(700, 64\), its config.json says \(800, 64\)"),
    ):
        with pytest.raises(UserError, match=words):
            model_loading.load_model(str(tmp_path / name), torch.float32)
    assert model_loading.load_model(models["opt"], torch.float32), "a tied output layer lacks nothing"


def test_lora_in_bfloat16_learns_what_float32_learns(models, data, tmp_path, monkeypatch):
    """Frozen weights in bfloat16, adapters in float32, under autocast, with dropout and without."""
    more = ("--lora_r", "4", "--lora_dropout", "0", "--padding_free", "false")
    exact = run(monkeypatch, models["llama"], data, tmp_path / "float32", *more)
    monkeypatch.setattr(sharding_module, "has_bfloat16", lambda: True)
    seen = set()
    linear = torch.nn.functional.linear

    def spy(x, weight, *args):
        seen.add((x.dtype, weight.dtype))
        return linear(x, weight, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    found = run(monkeypatch, models["llama"], data, tmp_path / "bfloat16", "--bf16", "True", *more)
    assert found == pytest.approx(exact, rel=2e-3)
    assert found != exact
    assert (torch.bfloat16, torch.float32) in seen, "adapters read what the layer before them wrote"
    assert (torch.float32, torch.float32) not in seen
    more = ("--lora_r", "4", "--bf16", "True", "--gradient_checkpointing", "True")
    noisy = run(monkeypatch, models["llama"], data, tmp_path / "dropout", *more)
    assert noisy == pytest.approx(exact, rel=2e-2)


def test_merging_without_peft_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^merging an adapter needs peft: pip install peft$"):
        lora.merge(models["llama"], str(tmp_path / "merged"))


def test_lora_targets_are_all_found(models):
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert lora.target_names(lora.add_adapter(model, 2, 4, 0.0, "q_proj, v_proj")) == ["q_proj", "v_proj"]
    with pytest.raises(UserError, match="--lora_target_modules q_proj,u_proj: the model has no 'u_proj'"):
        lora.add_adapter(AutoModelForCausalLM.from_pretrained(models["llama"]), 2, 4, 0.0, "q_proj,u_proj")


def test_evaluation_without_data_is_said_and_left_out(models, data, tmp_path, monkeypatch, capsys):
    more = ("--evaluation_strategy", "steps", "--eval_steps", "2", "--eval_on_start", "True", "--fp16", "True")
    run(monkeypatch, models["llama"], data, tmp_path / "none", *more)
    printed = capsys.readouterr().out
    assert "no --eval_data_path or --eval_fraction; not evaluating" in printed
    assert (
        torch.accelerator.is_available()
        or "--fp16: this machine (no GPU) has no float16 arithmetic; going on in float32" in printed
    )
    more = ("--eval_strategy", "epoch", "--eval_fraction", "0.25")
    run(monkeypatch, models["llama"], data, tmp_path / "some", *more)
    assert "data: 24 examples, 8 to evaluate on" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Estimates


LLAMA_7B = memory_estimate.ModelShape(6_738e6, 6_738e6, 6_607e6, 202e6, 4096, 32, 32001, 46 * 4096)
LLAMA_7B_LORA = memory_estimate.replace(LLAMA_7B, trainable=40e6, kept=67 * 4096)


def test_7b_needs_what_the_original_needed():
    plan = memory_estimate.Plan("fsdp", world=4, local=4, batch=4, length=512, half=True)
    device, host = memory_estimate.estimate(LLAMA_7B, plan)
    assert 25 < (6738e6 * 16 / 4) / 2**30 < device / 2**30 < 40, "4 A100s of 80 GB held it, with room"
    assert host == 4 * 6738e6, "one rank loads the float32 weights"
    alone, _ = memory_estimate.estimate(LLAMA_7B, memory_estimate.Plan("none", 1, 1, 4, 512, half=True))
    assert alone / 2**30 > 100
    stepping, _ = memory_estimate.estimate(LLAMA_7B, memory_estimate.Plan("none", 1, 1, 4, 512, half=True, scratch=4))
    assert stepping == 6738e6 * (16 + 4), "the roots of the second moments outweigh the activations, freed by then"


@pytest.fixture
def memory(root, monkeypatch):
    """benchmarks/memory.py."""
    monkeypatch.syspath_prepend(os.path.join(root, "benchmarks"))
    return importlib.import_module("memory")


def test_memory_table_of_the_readme_is_the_estimate(root, memory):
    with open(os.path.join(root, "README.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| (.+) \| (\d+) GiB \| (\d+) GiB \|$", file.read(), re.M)
    ways = ("none", "fsdp", "offload", "zero3_offload", "none")
    found = []
    for (label, *_), way in zip(rows, ways, strict=True):
        plan = memory_estimate.Plan(way, 4, 4, 4, 512, half=True, scratch=4)
        model = memory.make_model(memory.LLAMA_7B, True, 16 if "lora" in label else 0)
        found.append(memory_estimate.estimate(memory_estimate.model_shape(model, plan), plan))
    assert [(int(a), int(b)) for _, a, b in rows] == [(round(a / 2**30), round(b / 2**30)) for a, b in found]


@pytest.mark.parametrize(
    ("model", "sharding", "world", "changes"),
    [
        ("LLAMA_7B", "fsdp", 4, {}),
        ("LLAMA_7B", "fsdp", 4, {"reshards": False}),
        ("LLAMA_7B", "fsdp", 4, {"checkpointing": True}),
        ("LLAMA_7B", "offload", 4, {}),
        ("LLAMA_7B", "none", 1, {}),
        ("LLAMA_7B", "none", 1, {"half": False}),
        ("LLAMA_7B", "none", 1, {"lora_r": 16}),
        ("OPT_67B", "fsdp", 4, {}),
    ],
)
def test_estimate_is_what_a_step_holds_at_most(memory, model, sharding, world, changes):
    """Against a count of all tensors of two passes and a step: layers as wide as 7B's, but four."""
    config = {**getattr(memory, model), "num_hidden_layers": 4}
    settings = {"batch": 8, "length": 512, "half": True, "scratch": 4, **changes}
    lora_r = settings.pop("lora_r", 0)
    plan = memory_estimate.Plan(sharding, world, world, **settings)
    shape = memory_estimate.model_shape(memory.make_model(config, plan.half, lora_r), plan)
    assert 0.95 < memory_estimate.estimate(shape, plan)[0] / memory.count_step(config, plan, lora_r) < 1.1


def test_layer_that_cannot_be_counted_is_estimated_in_silence(memory, caplog):
    """Experts' grouped matmuls know no float32 on tensors without data."""
    experts = {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    experts |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    plan = memory_estimate.Plan("none", 1, 1, 4, 512, half=False)
    kept = memory_estimate.bytes_kept(memory.make_model(experts, False, 0), plan)
    assert 34 * 32 < kept < 200 * 32
    assert not caplog.records


def test_recipe_that_fits_is_named():
    gib, plan = 2**30, memory_estimate.Plan("none", world=4, local=4, batch=4, length=512, half=True)

    def advice(device: int, host: int) -> str:
        return memory_estimate.fitting_recipe(LLAMA_7B, LLAMA_7B_LORA, plan, device * gib, host * gib)

    assert advice(80, 500).startswith('--fsdp "full_shard auto_wrap" fits')
    assert advice(16, 500).startswith('--fsdp "full_shard auto_wrap offload" fits')
    assert "--lora_r 16" in advice(24, 60)
    assert advice(1, 1).startswith("no recipe fits this machine")


def test_too_little_memory_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    monkeypatch.setattr(memory_estimate, "host_memory", lambda: 2**20)
    with pytest.raises(UserError, match=r"memory: about .* MiB for 1 process\(es\), 1.0 MiB free: too little\. "):
        run(monkeypatch, models["llama"], data, tmp_path / "out")


def test_too_little_disk_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    with pytest.raises(UserError, match=r"has 1.0 MiB free and this run needs .*2 checkpoint\(s\) of .*lower --save"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *saves)


def test_folder_that_cannot_be_written_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    (tmp_path / "out").mkdir()

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(UserError, match=r"cannot write into .*out: Permission denied; name another --output_dir"):
        run(monkeypatch, models["llama"], data, tmp_path / "out")


def test_batch_that_no_example_is_left_for_is_refused(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(UserError, match=r"--dataloader_drop_last True drops all of the 32 example\(s\)"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", "--dataloader_drop_last", "True", batch=64)
