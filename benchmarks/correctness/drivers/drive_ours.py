"""Runs train.py, from its command line to the saved folder, with the probe in its trainer."""

import dataclasses
import os
import sys

import probe
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

import train
from alpaca.cli import UserError


def find_leak(trainer) -> dict:
    """Measures row 2 in a padding-free pass: the logits that it computes are those of learned tokens."""
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    if "passes" not in batches[-1]:
        return probe.leak(trainer)
    (one,) = batches[-1]["passes"]
    layout = one.layout
    number = next(i for i, parent in enumerate(layout.parents) if i >= len(layout.copies))  # the first document
    start, end = (int(layout.cu_seqlens_q[i]) for i in (number, number + 1))
    changed = one.input_ids.clone()
    changed[0, start + 1 : end] = (changed[0, start + 1 : end] + 7) % 200 + 20
    logits, model = [], trainer.model
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: logits.append(output))
    with torch.no_grad():
        for part in (one, dataclasses.replace(one, input_ids=changed)):
            model(packed=part)
    hook.remove()
    half = len(logits) // 2
    moved = (torch.cat(logits[half:]) - torch.cat(logits[:half])).abs().amax(dim=-1)
    own = (one.supervised >= start) & (one.supervised < end)
    return {
        "others": float(moved[~own].max()),
        "own": float(moved[own].max()),
        "beside": one.input_ids.numel() - (end - start),
    }


def run(job: dict) -> None:
    """Calls train.py's `train` with the job's flags."""
    flags = {
        "model_name_or_path": job["model"],
        "data_path": job["data"],
        "output_dir": os.path.join(job["out"], "model"),
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "model_max_length": job["max_length"],
        "logging_steps": 1,
        "save_strategy": "steps" if job.get("save_steps") else "no",
        "save_steps": job.get("save_steps") or 500,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 42,
        **job["settings"],
    }
    if job.get("resume"):
        flags["resume_from_checkpoint"] = job["resume"]
    sys.argv = ["train.py", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    try:
        train.train()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise


if __name__ == "__main__":
    probe.main(run, find_leak)
