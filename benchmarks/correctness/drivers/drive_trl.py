"""Runs TRL's SFTTrainer as its documentation shows it for prompt-completion data."""

import os

import probe
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def make(job: dict, batch: int, accumulation: int) -> SFTTrainer:
    """Builds the trainer from a model's folder and a JSON Lines file of prompts and completions."""
    args = SFTConfig(
        output_dir=os.path.join(job["out"], "model"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="steps" if job.get("save_steps") else "no",
        save_steps=job.get("save_steps") or 500,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        seed=42,
        model_init_kwargs={"dtype": "float32"},
        **{"max_length": job["max_length"], **job["settings"]},
    )
    dataset = load_dataset("json", data_files=job["data"], split="train", cache_dir=os.path.join(job["out"], "cache"))
    return SFTTrainer(model=job["model"], args=args, train_dataset=dataset)


def run(job: dict) -> None:
    """Trains and saves."""
    trainer = make(job, job["batch"], job["accumulation"])
    trainer.train(resume_from_checkpoint={"True": True}.get(job.get("resume"), job.get("resume")))
    trainer.save_model()


if __name__ == "__main__":
    probe.main(run)
