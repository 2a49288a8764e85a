"""Looks into a trainer at work: what every driver of this folder shares.

It runs inside a peer's environment and therefore imports torch and transformers only. `watch` hooks
`transformers.Trainer.train`, which all trainers compared here end up in. When a driver has built its trainer by the
peer's own entry point and starts it, the hook writes down tokens and labels, the gradient before the first optimizer
step, the loss, times and memory. Facts go to a JSON file; the verdict is made elsewhere, by one rule for all.
"""

import io
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback

import torch
import transformers
from safetensors.torch import save_file

IGNORE_INDEX = -100


class Recorder(transformers.TrainerCallback):
    """Writes down the gradient of the first step, and the seconds and CPU seconds of every step."""

    def __init__(self, job: dict, facts: dict):
        """Remembers where to write."""
        self.job, self.facts = job, facts
        facts["seconds"], facts["cpu_seconds"] = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clocks."""
        self.start = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Saves the gradient; clipping is off in every job that asks for it."""
        if self.job.get("gradient") and state.global_step == 0 and args.process_index == 0:
            gradient = {
                name.removeprefix("module."): parameter.grad.detach().clone().contiguous()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
            save_file(gradient, os.path.join(self.job["out"], "gradient.safetensors"))

    def on_step_end(self, args, state, control, **kwargs):
        """Stops the clocks."""
        self.facts["seconds"].append(time.perf_counter() - self.start[0])
        self.facts["cpu_seconds"].append(time.process_time() - self.start[1])


def starts_of(labels: list[int]) -> list[int]:
    """Lists where documents begin: at 0, and where a prompt follows a learned token. Not every template has a BOS."""
    later = [i for i in range(1, len(labels)) if labels[i] == IGNORE_INDEX != labels[i - 1]]
    return [0, *later]


def documents(trainer) -> list[dict[str, list[int]]]:
    """Lists the documents that a trainer trains on, in order; rows that are packed already are split."""
    pad, found = trainer.processing_class.pad_token_id, []
    for row in trainer.train_dataset:
        ids, labels = (torch.as_tensor(row[name]).flatten().tolist() for name in ("input_ids", "labels"))
        starts = starts_of(labels)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            while end > start and labels[end - 1] == IGNORE_INDEX and ids[end - 1] in (pad, 0):
                end -= 1
            if end > start:
                found.append({"input_ids": ids[start:end], "labels": labels[start:end]})
    return found


def leak(trainer) -> dict:
    """Changes the first document of the row that holds most of them, and measures how far all other logits move.

    Returns:
        `others`, the largest change of a logit outside the document; `own`, the largest one inside of it; `beside`,
        the number of tokens of other documents in the same row.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    batch = {name: value for name, value in batch.items() if name not in ("labels", "records")}
    ids = batch["input_ids"]
    others = (labels != IGNORE_INDEX).flip(1).cumsum(1).flip(1) > 0  # up to the last learned token: no padding
    starts = [starts_of(one[kept].tolist()) for one, kept in zip(labels, others, strict=True)]
    row = max(range(len(starts)), key=lambda i: len(starts[i]))
    end = [*starts[row], ids.shape[1]][1]
    changed = ids.clone()
    changed[row, 1:end] = (ids[row, 1:end] + 7) % 200 + 20
    model = trainer.model.eval()
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        after = model(**{**batch, "input_ids": changed}, use_cache=False).logits
    model.train()
    others[row, :end] = False
    moved = (after - before).abs().amax(dim=-1)
    print("batch:", {name: list(value.shape) for name, value in batch.items() if hasattr(value, "shape")}, flush=True)
    return {
        "others": float(moved[others].max()) if others.any() else 0.0,
        "own": float(moved[row, :end].max()),
        "beside": int(others[row].sum()),
    }


def half_a_save(step: int) -> None:
    """Kills this process with SIGKILL half-way through the optimizer state of a checkpoint."""
    save = torch.save

    def save_half(state, path, *args, **kwargs):
        name = str(path)
        if f"checkpoint-{step}" in name and os.path.basename(name).startswith("optimizer"):
            whole = io.BytesIO()
            save(state, whole)
            with open(name, "wb") as file:
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                os.fsync(file.fileno())
            os.kill(os.getpid(), signal.SIGKILL)
        return save(state, path, *args, **kwargs)

    torch.save = save_half


def in_float64(module, args, kwargs):
    """Casts a model's inputs: SDPA on a CPU takes a float32 mask beside float64 queries, and misreads it."""
    return args, {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


def look(trainer, job: dict, facts: dict, find_leak) -> None:
    """Writes down what there is to see before the first step."""
    tokenizer = trainer.processing_class
    if job.get("float64"):
        trainer.model.double()
        trainer.model.register_forward_pre_hook(in_float64, with_kwargs=True)
    if job.get("kill_at"):
        half_a_save(job["kill_at"])
    facts["tokens"] = documents(trainer)
    facts["rows"] = len(trainer.train_dataset)
    facts["special"] = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    facts["attention"] = getattr(trainer.model.config, "_attn_implementation", None)
    if job.get("texts"):
        with open(job["texts"], encoding="utf-8") as file:
            facts["text_ids"] = [tokenizer(text)["input_ids"] for text in json.load(file)]
    if job.get("leak"):
        trainer.model.save_pretrained(os.path.join(job["out"], "initial"))
        facts["leak"] = find_leak(trainer)


def watch(job: dict, facts: dict, find_leak=leak) -> None:
    """Hooks `Trainer.train` for the next run in this process."""
    train = getattr(transformers.Trainer.train, "__wrapped__", transformers.Trainer.train)

    def watched(self, *args, **kwargs):
        look(self, job, facts, find_leak)
        self.add_callback(Recorder(job, facts))
        result = train(self, *args, **kwargs)
        facts["losses"] = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        facts["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return result

    watched.__wrapped__ = train
    transformers.Trainer.train = watched


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def resolve(size: int | str, rows: int) -> int:
    """Turns "all", "half" or "quarter" of a step's rows into a number; 0 if that is no whole number."""
    parts = {"all": 1, "half": 2, "quarter": 4}
    return size if isinstance(size, int) else 0 if rows % parts[size] else rows // parts[size]


def chat_prompts(job: dict) -> dict:
    """Loads the saved tokenizer, as a server would, and formats one user message after another.

    Returns:
        `ids`, one list for each message, or the `error` that the tokenizer raises.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(os.path.join(job["out"], "model"))
    try:
        return {
            "ids": [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
                )["input_ids"]
                for text in job["messages"]
            ]
        }
    except ValueError as error:
        return {"error": str(error)}


def run_job(job: dict, run, find_leak) -> None:
    """Runs one job; writes its facts or the error that stopped it, and what it printed."""
    os.makedirs(job["out"], exist_ok=True)
    is_main = os.environ.get("RANK", "0") == "0"
    log = os.open(os.path.join(job["out"], "log.txt") if is_main else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    facts: dict = {}
    try:
        if "copy" in job:
            shutil.copytree(job["copy"], os.path.join(job["out"], "model"))
        if "remove" in job:
            shutil.rmtree(job["remove"])
        if job.get("rows"):
            with open(job["rows"], encoding="utf-8") as file:
                rows = json.load(file)["rows"]
            job["batch"], job["accumulation"] = (resolve(job[name], rows) for name in ("batch", "accumulation"))
        facts["split"] = [job["batch"], job["accumulation"]]
        if all(facts["split"]):
            watch(job, facts, find_leak)
            run(job)
            if "messages" in job:
                facts["chat"] = chat_prompts(job)
    except (Exception, SystemExit) as error:
        facts["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    if is_main:
        with open(os.path.join(job["out"], "facts.json"), "w", encoding="utf-8") as file:
            json.dump(facts, file)


def main(run, find_leak=leak) -> None:
    """Runs the groups of jobs of the file that the command line names, each group in processes of its own.

    The processes are forked, so that a peer is imported once. One of them may be killed by its own job.

    Args:
        run: Builds a trainer by its own entry point as a job says, and trains.
        find_leak: Measures check 2, where a trainer's batches are not the model's inputs.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        groups = json.load(file)
    for group in groups:
        children = []
        ports = [free_port() for _ in group["jobs"]]  # one each: a rank may still reach the store of the job before
        for rank in range(group["processes"]):
            child = os.fork()
            if child:
                children.append(child)
                continue
            if group["processes"] > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group["processes"]}
                ranks |= {"LOCAL_WORLD_SIZE": group["processes"], "MASTER_ADDR": "127.0.0.1"}
                os.environ.update({name: str(value) for name, value in ranks.items()})
            torch.set_num_threads(group["threads"])
            for job, port in zip(group["jobs"], ports, strict=True):
                if group["processes"] > 1:
                    os.environ["MASTER_PORT"] = str(port)
                run_job(job, run, find_leak)
            sys.stdout.flush()
            os._exit(0)
        wait(children, group["limit"])


def free_port() -> int:
    """Finds a free port on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(children: list[int], limit: float) -> None:
    """Waits for processes, and kills them after `limit` seconds."""
    end = time.monotonic() + limit
    while children:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        if time.monotonic() > end:
            for child in children:
                os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.02)
