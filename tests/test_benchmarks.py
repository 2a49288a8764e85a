"""The benchmarks run as modules, stamp their results alike, and need no more packages than they measure."""

import json
import os
import subprocess
import sys

import pytest
import torch

from alpaca.cli import UserError
from benchmarks import provenance, train_throughput

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 700,
}


@pytest.fixture
def benchmark(root, tmp_path):
    """Runs a benchmark on a machine that has torch, transformers, accelerate and peft, but hides other packages."""
    hidden = ("openai", "rapidfuzz", "fire", "trl", "deepspeed", "datasets", "gradio", "matplotlib", "liger_kernel")
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(
        f"""
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)
sys.meta_path = [Hidden if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
    )

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
        path = os.pathsep.join([str(tmp_path / "hide"), root])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    return run


@pytest.mark.parametrize("name", ["tokenize", "inference"])  # names that other modules have too
def test_benchmark_runs_as_a_module_from_the_root(name, root):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"],
        capture_output=True,
        text=True,
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr


def test_every_result_carries_device_versions_and_commit(root):
    stamp = provenance.provenance("numpy", "no-such-distribution")
    assert list(stamp) == ["device", "versions", "commit"]
    assert set(stamp["versions"]) == {"python", "numpy"}
    assert provenance.provenance(gpu="H200")["device"] == "H200"
    folder = os.path.join(root, "benchmarks", "results")
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            assert set(stamp) <= json.load(file).keys(), name


def test_commit_says_whether_tracked_files_were_changed(monkeypatch):
    answers = {"rev-parse": "abc1234", "status": ""}
    monkeypatch.setattr(provenance, "_git", lambda command, *arguments: answers[command])
    assert provenance.provenance()["commit"] == "abc1234"
    answers["status"] = " M train.py"
    assert provenance.provenance()["commit"] == "abc1234+"
    answers["rev-parse"] = ""
    assert provenance.provenance()["commit"] is None


@pytest.mark.parametrize("name", ["train_throughput", "gpu_first_call"])
def test_a_benchmarks_help_needs_no_more_than_it_measures_with(benchmark, name):
    for arguments in (["--help"], ["measure", "--help"]):
        done = benchmark(name, *arguments)
        assert done.returncode == 0, done.stderr
        assert "output" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_first_call_says_so_in_one_line(benchmark):
    done = benchmark("gpu_first_call", "measure")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU found; ")
    assert done.stderr.count("\n") == 1


def test_throughput_is_measured_row_by_row(benchmark, root, tmp_path):
    (tmp_path / "toy.json").write_text(json.dumps(SHAPE))
    with open(os.path.join(root, "alpaca_data.json"), encoding="utf-8") as file:
        shortest = sorted(json.load(file), key=lambda r: len("".join(r.values())))[:40]
    (tmp_path / "data.json").write_text(json.dumps(shortest))
    flags = [f"--model={tmp_path}/toy.json", "--rows=padded,shared prefix,TRL packing", "--steps=1", "--rounds=1"]
    flags += [f"--data_path={tmp_path}/data.json"]
    done = benchmark("train_throughput", "measure", *flags, f"--output={tmp_path}/result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["skipped"] == ["TRL packing"]
    assert result["failed"] == {}
    padded, shared = result["rows"]
    assert (padded["row"], shared["row"]) == ("padded", "shared prefix")
    assert padded["work_per_useful_token"] > 1.1
    assert shared["work_per_useful_token"] < 1
    assert padded["ratio"] == 1
    assert shared["notes"][0].startswith("padding-free: passes of at most 2,048 tokens, shared prefixes of")


def test_a_row_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, capsys):
    measured = dict.fromkeys(("useful_tokens_per_s", "seconds_per_step", "peak_tflops", "useful_tflops"), 1.0)
    measured |= dict.fromkeys(
        ("executed_tflops", "work_per_useful_token", "peak_memory_gib", "hours_for_3_epochs"), 1.0
    )

    def run_row(job):
        if job["row"] == "padded":
            raise UserError("padded failed: OutOfMemoryError: CUDA out of memory")
        return measured

    monkeypatch.setattr(train_throughput, "_run_row", run_row)
    train_throughput.measure(rows="padded,padding-free", output=str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["row"] for row in result["rows"]] == ["padding-free"]
    assert result["failed"] == {"padded": "padded failed: OutOfMemoryError: CUDA out of memory"}
    assert capsys.readouterr().out.count("out of memory") == 1  # not tried again
    monkeypatch.setattr(train_throughput, "ROWS", {"padded": {}})
    with pytest.raises(UserError, match="no row ran; padded failed"):
        train_throughput.measure(output=str(tmp_path / "none.json"))


def test_servers_that_fail_have_a_row_and_none_at_all_is_one_line(tmp_path):
    from benchmarks import servers

    made = {"status": 0, "reasons": {"length": 2}, "said": []}
    found = {"version": "0.32.0", "date": "2026-11-24"}
    rows = [
        {"server": "vLLM", **found, "generator": made, "too_long": 2, "equal": 16, "template": 15},
        {"server": "llama.cpp", **found, "failed": "no such model"},
    ]
    assert servers.servers_table(rows).splitlines()[2:] == [
        "| vLLM | 0.32.0 | 2026-11-24 | 2 length | 2 of 2 journaled | 16 of 16 | 15 of 16 |",
        "| llama.cpp | 0.32.0 | 2026-11-24 | did not start: no such model |  |  |  |",
    ]
    with pytest.raises(UserError, match=r"has no chat_template\.jinja; name a folder that train.py saved"):
        servers.run(str(tmp_path))
    (tmp_path / "chat_template.jinja").touch()
    with pytest.raises(UserError, match="none of the servers is installed here"):
        servers.run(str(tmp_path), vllm="no-vllm", llama_server="no-llama", transformers="no-transformers")
    with servers.started([sys.executable, "-c", "print('out of luck')"], str(tmp_path)) as (url, process):
        assert servers.wait_for(url, process) == "out of luck"
