"""Runs LLaMA-Factory's `run_exp`, what `llamafactory-cli train` calls, on data in Alpaca's format."""

import importlib.machinery
import json
import os
import sys
import types

import probe

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # PyPI's build needs CUDA; it is imported for audio, of which there is none here
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import run_exp


def run(job: dict) -> None:
    """Writes the data set's description and trains with the settings of its examples/train_full."""
    folder = os.path.join(job["out"], "data")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "dataset_info.json"), "w", encoding="utf-8") as file:
        json.dump({"records": {"file_name": os.path.abspath(job["data"])}}, file)
    arguments = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": job["model"],
        "dataset": "records",
        "dataset_dir": folder,
        "template": "alpaca",
        "cutoff_len": job["max_length"],
        "output_dir": os.path.join(job["out"], "model"),
        "per_device_train_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "steps" if job.get("save_steps") else "no",
        "save_steps": job.get("save_steps") or 500,
        "bf16": False,
        "use_cpu": True,
        "disable_gradient_checkpointing": True,
        "report_to": "none",
        "seed": 42,
        "overwrite_cache": True,
        **job["settings"],
    }
    if job.get("resume") not in (None, "True"):  # by itself it continues from the last checkpoint of output_dir
        arguments["resume_from_checkpoint"] = job["resume"]
    run_exp(arguments)


if __name__ == "__main__":
    probe.main(run)
