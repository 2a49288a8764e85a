"""Runs a column's jobs in its peer's environment and collects what they found."""

import json
import os
import subprocess
import sys

from alpaca.cli import UserError
from alpaca.files import jload
from benchmarks.correctness.columns import PEERS, Column, Peer
from benchmarks.provenance import ROOT

DRIVERS = os.path.join(ROOT, "benchmarks", "correctness", "drivers")
FIT_STEPS, KILLED_AT, RUN_STEPS = 60, 3, 4
SPEED_STEP, SPEED_EXAMPLES = 128, 256


class NotRun(Exception):
    """A peer that can't run here; the message is the line that stopped it."""


def last_line(text: str) -> str:
    """Picks the last line that is not blank: of a traceback, what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def error_line(text: str) -> str:
    """Picks pip's or Python's own line about what stopped it."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line.startswith("ERROR:")), last_line(text))


# ---------------------------------------------------------------------------------------------------------------------
# Environments


def python_of(peer: Peer, venvs: str) -> str:
    """Makes a peer's environment, unless it is there already, and returns its Python.

    Raises:
        NotRun: It can't be made; names the line that says why.
    """
    if not peer.distribution:
        return sys.executable
    import torch

    folder = os.path.join(venvs, peer.distribution)
    python = os.path.join(folder, "bin", "python")
    if not os.path.isfile(os.path.join(folder, "ready")):
        version = torch.__version__.partition("+")[0]
        commands = [
            [sys.executable, "-m", "venv", folder],
            [python, "-m", "pip", "install", *peer.install, f"torch=={version}"],
        ]
        if peer.remove and not torch.version.cuda:
            commands.append([python, "-m", "pip", "uninstall", "-y", *peer.remove])
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NotRun(str(error)) from error
            if done.returncode:
                raise NotRun(error_line(done.stdout + done.stderr))
        open(os.path.join(folder, "ready"), "w").close()
    return python


def environment(peer: Peer, venvs: str) -> "str | NotRun":
    """Makes a peer's environment once; returns its Python, or why there is none."""
    try:
        return python_of(peer, venvs)
    except NotRun as stopped:
        return stopped


def versions(python: str) -> dict[str, str]:
    """Asks an environment for the versions that matter."""
    names = ("trl", "llamafactory", "axolotl", "transformers", "torch", "accelerate", "datasets")
    program = (
        "import importlib.metadata as m, json\n"
        f"print(json.dumps({{d.metadata['Name']: d.version "
        f"for d in m.distributions() if d.metadata['Name'] in {names}}}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


# ---------------------------------------------------------------------------------------------------------------------
# Jobs

# A step's rows, split into batch x accumulation: on one process, and on each of two.
SPLITS = {1: [("all", 1), (1, "all"), ("half", 2)], 2: [("half", 1), (1, "half"), ("quarter", 2)]}


def split_name(processes: int, batch: int | str, accumulation: int | str, cured: bool = False) -> str:
    """Names a job of check 4: "split 2 half 1"."""
    return f"{'cured ' if cured else ''}split {processes} {batch} {accumulation}"


class Runner:
    """Runs the jobs of one column.

    Attributes:
        column: The column.
        inputs: The paths of what all columns get.
        folder: Where each job has a folder of its name.
        facts: Name of a job -> what its run found; `error` if it stopped.
        output: Name of a job -> what it printed.
    """

    def __init__(self, column: Column, python: str, inputs: dict, folder: str):
        """Takes the paths of the inputs, as `inputs.py` wrote them."""
        self.column, self.python, self.inputs, self.folder = column, python, inputs, folder
        self.peer = PEERS[column.peer]
        self.facts: dict[str, dict] = {}
        self.output: dict[str, str] = {}

    def job(self, name: str, data: str = "uneven", **more) -> dict:
        """Describes a run for a driver: eight examples in one step, unless `more` says otherwise."""
        settings = {**self.column.settings, **more.pop("settings", {})}
        return {
            "name": name,
            "model": self.inputs["model"],
            "data": self.inputs[data][self.peer.data],
            "out": os.path.join(self.folder, name),
            "batch": self.column.rows or 8,
            "accumulation": 1,
            "steps": 1,
            "learning_rate": 1e-4,
            "max_length": self.column.max_length,
            "settings": settings,
            **more,
        }

    def run(self, groups: list[dict], reuse: bool = False) -> None:
        """Runs groups of jobs by the peer's driver, or with `reuse` only reads what an earlier run of them found.

        Raises:
            NotRun: The driver doesn't start.
        """
        if not reuse:
            self._start(groups)
        for job in (job for group in groups for job in group["jobs"]):
            try:
                self.facts[job["name"]] = jload(os.path.join(job["out"], "facts.json"))
                with open(os.path.join(job["out"], "log.txt"), encoding="utf-8", errors="replace") as file:
                    self.output[job["name"]] = file.read()
            except (OSError, UserError):  # killed, by itself or because it took too long
                self.facts[job["name"]] = {"error": "no result: the process was killed"}

    def _start(self, groups: list[dict]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, "jobs.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(groups, file)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": os.path.join(self.folder, "datasets"),
            "XDG_CACHE_HOME": os.path.join(self.folder, "cache"),
            "TOKENIZERS_PARALLELISM": "false",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's, which would refuse today's torch
        }
        command = [self.python, os.path.join(DRIVERS, self.peer.driver), path]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder)
        if done.returncode:
            raise NotRun(last_line(done.stderr))


def group(*jobs: dict, processes: int = 1, threads: int = 1, limit: float = 600) -> dict:
    """Describes jobs that share a process, or `processes` of them."""
    return {"jobs": list(jobs), "processes": processes, "threads": threads, "limit": limit}


def plan_jobs(runner: Runner, quick: bool = False) -> list[dict]:
    """Lists all groups of jobs of a column.

    Args:
        runner: The column's runner.
        quick: Leave out the step of 128 examples.
    """
    column, job = runner.column, runner.job
    exact = {"float64": True, "gradient": True}
    cut = {} if "max_length" in column.settings else {"max_length": 80}
    groups = [
        group(job("limit 80", **cut), job("limit 512"), job("step", **exact, leak=True, texts=runner.inputs["texts"]))
    ]
    ways = [(False, {})] + [(True, cure) for check, cure in column.cures.items() if check == "splits"]
    for processes in (1, 2) if column.splits else ():
        jobs = [
            job(
                split_name(processes, batch, accumulation, cured),
                batch=batch,
                accumulation=accumulation,
                rows=os.path.join(runner.folder, "step", "facts.json"),
                settings=more,
                **exact,
            )
            for cured, more in ways
            for batch, accumulation in SPLITS[processes]
        ]
        groups.append(group(*jobs, processes=processes))
    messages = runner.inputs["messages"]
    groups.append(group(job("fit", steps=FIT_STEPS, learning_rate=5e-3, messages=messages)))
    if not column.base:
        groups += _jobs_without_packing(runner)
    return groups if quick else [*groups, group(_speed_job(runner))]


def _jobs_without_packing(runner: Runner) -> list[dict]:
    job, folder = runner.job, runner.folder
    groups = [group(*(job(f"bad: {name}", data=f"bad: {name}") for name in runner.inputs["bad"]))]
    if "chat" in runner.column.cures:
        settings = dict(runner.column.cures["chat"])
        if "chat_template_path" in settings:
            settings["chat_template_path"] = runner.inputs["template"]
        groups.append(group(job("chat", data="chat", settings=settings, messages=runner.inputs["messages"])))
    saves = {"steps": RUN_STEPS, "save_steps": 1, "learning_rate": 1e-3}
    half = os.path.join(folder, "killed", "model")
    by_hand = os.path.join(folder, "resumed by hand", "model")
    return [
        *groups,
        group(job("whole", **saves)),
        group(job("killed", **saves, kill_at=KILLED_AT)),
        group(job("resumed", **saves, copy=half, resume="True")),
        group(
            job(
                "resumed by hand",
                **saves,
                copy=half,
                remove=os.path.join(by_hand, f"checkpoint-{KILLED_AT}"),
                resume=os.path.join(by_hand, f"checkpoint-{KILLED_AT - 1}"),
            )
        ),
    ]


def _speed_job(runner: Runner) -> dict:
    """Two steps of 128 examples with the larger model; packs of 512 tokens hold about four examples each."""
    column = runner.column
    batch, accumulation = {8: (4, SPEED_STEP // 4), 0: (4, 8), 1: (1, 16)}[column.rows]
    return runner.job(
        "speed",
        data="many",
        model=runner.inputs["larger model"],
        batch=batch,
        accumulation=accumulation,
        steps=2,
        max_length=column.max_length if column.rows == 1 else 512,
    )


def speed(runner: Runner) -> dict:
    """Works out CPU seconds per 128 examples and useful tokens per CPU second from the job "speed", on one thread.

    CPU time, because it doesn't depend on what else the machine is doing.
    An epoch of packs holds as many tokens as one of examples, so the tokens of a step are its share of the rows.
    """
    facts = runner.facts.get("speed", {"error": "left out"})
    if "error" in facts:
        return {"error": " ".join(facts["error"].split())[:300]}
    job = _speed_job(runner)
    tokens = sum(len(document["input_ids"]) for document in facts["tokens"])
    per_example = tokens / SPEED_EXAMPLES
    seconds = min(facts["cpu_seconds"][1:])
    rows = job["batch"] * job["accumulation"]
    in_step = tokens * min(1.0, rows / facts["rows"])
    return {
        "seconds": round(seconds / in_step * SPEED_STEP * per_example, 3),
        "useful_tokens_per_s": round(in_step / seconds, 1),
        "peak_gib": round(facts["peak_gib"], 3),
        "wall_seconds": round(min(facts["seconds"][1:]) / in_step * SPEED_STEP * per_example, 3),
        "examples_in_step": round(in_step / per_example, 1),
    }
