"""Runs axolotl's `do_cli`, what `axolotl train` calls, on data in Alpaca's format."""

import json
import os
import sys

import probe
from axolotl.cli.train import do_cli


def run(job: dict) -> None:
    """Writes the configuration (JSON is YAML too) and trains."""
    config = {
        "base_model": job["model"],
        "datasets": [{"path": os.path.abspath(job["data"]), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": os.path.join(job["out"], "prepared"),
        "sequence_len": job["max_length"],
        "output_dir": os.path.join(job["out"], "model"),
        "micro_batch_size": job["batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "max_steps": job["steps"],
        "num_epochs": 1000,
        "learning_rate": job["learning_rate"],
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "attn_implementation": "sdpa",
        "val_set_size": 0,
        "special_tokens": {"pad_token": "</s>"},
        "seed": 42,
        **job["settings"],
    }
    if job.get("save_steps"):
        config["save_steps"] = job["save_steps"]
    else:
        config["save_strategy"] = "no"
    if job.get("resume") == "True":
        config["auto_resume_from_checkpoints"] = True
    elif job.get("resume"):
        config["resume_from_checkpoint"] = job["resume"]
    path = os.path.join(job["out"], "config.yaml")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    sys.argv = sys.argv[:1]
    do_cli(config=path)


if __name__ == "__main__":
    probe.main(run)
