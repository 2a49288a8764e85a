"""Runs train.py for the tests, on tiny models: helpers, and fixtures that the test files share."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from packing_models import CONFIGS

import train
from alpaca.prompts import format_prompt
from demo import tiny_model

BUNDLED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "alpaca_data.json")


CONFIG = {
    "llama": {"num_key_value_heads": 4, "intermediate_size": 172, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}


SHORT = "--num_train_epochs 1 --learning_rate 1e-3 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
SHORT = (SHORT + "--disable_tqdm True --save_strategy no --weight_decay 0.").split()


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices are quicker on one thread than on two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(root, tmp_path_factory) -> str:
    """32 short seed tasks."""
    with open(os.path.join(root, "recordings", "paper", "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    examples = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    examples = sorted(examples, key=lambda e: len(format_prompt(e) + e["output"]))[:32]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(examples), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def trainee(root, tmp_path_factory) -> list[str]:
    """A tiny LLaMA, 40 seed tasks, and flags for steps of 12 examples, the last one of 4."""
    folder = tmp_path_factory.mktemp("trainee")
    with open(os.path.join(root, "recordings", "paper", "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    records = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    records = sorted(records, key=lambda r: len(format_prompt(r) + r["output"]))[:40]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIGS["llama"], "vocab_size": 700}))
    tiny_model.make(str(folder / "config.json"), str(folder / "data.json"), str(folder / "model"))
    flags = f"--model_name_or_path {folder}/model --data_path {folder}/data.json --num_train_epochs 1 --seed 42 "
    flags += "--learning_rate 1e-3 --logging_steps 1 --save_strategy no --report_to none --disable_tqdm True "
    flags += "--overwrite_output_dir True --model_max_length 256 --per_device_train_batch_size 2"
    return flags.split()


def logged(folder, name: str = "loss") -> list[float]:
    with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
        return [entry[name] for entry in json.load(file)["log_history"] if name in entry]


def assert_same_run(folder, expected, steps: int = 4) -> None:
    """Every step's loss and all weights at the end agree to float32's error."""
    from safetensors.torch import load_file

    assert len(logged(folder)) == steps
    assert logged(folder) == pytest.approx(logged(expected), abs=2e-5)
    name = next(name for name in ("model.safetensors", "adapter_model.safetensors") if (expected / name).exists())
    found, weights = load_file(folder / name), load_file(expected / name)
    assert found.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-3, atol=2e-5)
