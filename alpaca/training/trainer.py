"""The Hugging Face Trainer with the original's loss, complete checkpoints, and a stop at a non-finite loss."""

import math
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from alpaca import models, tokenizers
from alpaca.cli import UserError
from alpaca.files import jdump
from alpaca.training import resuming, saving, throughput
from alpaca.training.data import IGNORE_INDEX
from alpaca.training.memory import ModelShape


class StopSignal:
    """Notes a SIGTERM inside a `with` block, so that the step or save in progress can finish.

    Attributes:
        received: Whether it has come.
    """

    received = False

    def __enter__(self):
        """Starts listening."""
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame) -> None:
        self.received = True

    def __exit__(self, *error):
        """Stops listening."""
        signal.signal(signal.SIGTERM, self._previous)


class AlpacaTrainer(Trainer):
    """The Trainer with the original's loss, complete checkpoints, and a stop at a non-finite loss.

    Attributes:
        stop_signal: Listens for SIGTERM once the caller enters it.
        stopped: Whether SIGTERM ended the run early.
        throughput: Counts tokens and time.
        record: What every checkpoint says of its run.
    """

    def __init__(self, *args, shape: ModelShape, record: Mapping[str, Any] | None = None, **kwargs):
        """Decides how the losses of a step's micro-batches are averaged."""
        super().__init__(*args, **kwargs)
        self.record = record
        self._rehearsed_steps = 0
        short = [name for name, p in self.model.named_parameters() if p.requires_grad and p.element_size() < 4]
        if short and not self.args.pure_bf16:
            raise UserError(
                f"{short[0]} would be trained in 16 bits, where small updates vanish; load the model with "
                "dtype=torch.float32 (--bf16 computes in bfloat16 all the same), or give --pure_bf16"
            )
        # The one place that decides it. True: the Trainer divides by the tokens of the whole step, over accumulation
        # and ranks. False: each micro-batch is averaged over its own tokens, then the micro-batches over each other.
        self.model_accepts_loss_kwargs = self.args.loss_reduction == "global"
        self.stopped, self.stop_signal = False, StopSignal()
        recomputes = bool(self.args.gradient_checkpointing)
        self.throughput = throughput.Throughput(shape, self.args.device, self.args.world_size, recomputes)
        self._first_step: int | None = None  # of this run, which may continue another
        self._step: list[tuple[torch.Tensor, ...]] = []  # loss, labels and records of the step's micro-batches so far
        self._staging: str | None = None
        self._saved_at = -1

    def describe(self) -> str:
        """Says what a step is made of."""
        return "padded micro-batches"

    def rehearse(self, steps: int) -> None:
        """Does all that training does before its first step, so that flags that don't fit show up.

        Args:
            steps: Steps of the run.

        Raises:
            ValueError: The learning rate would not be a finite number.
            Exception: Whatever transformers, accelerate or torch raise for the flags.
        """
        self._rehearsed_steps = steps
        super().train()  # as far as _inner_training_loop

    def _build(self, steps: int) -> None:
        """Builds the loaders, the optimizer and the schedule, and looks at the schedule."""
        self.get_train_dataloader()
        if self.eval_dataset is not None:
            self.get_eval_dataloader()
        self.create_optimizer_and_scheduler(steps)
        for step in sorted({0, 1, steps // 2, steps}) if hasattr(self.lr_scheduler, "lr_lambdas") else ():
            for factor in self.lr_scheduler.lr_lambdas:
                if not math.isfinite(factor(step)):
                    raise ValueError(f"the learning rate of step {step} would be {factor(step)}")

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def train(self, *args, **kwargs):
        """Trains. A stop signal ends it after the current step, with a checkpoint."""
        result = super().train(*args, **kwargs)
        self.throughput.report(self._sum_over_ranks)  # what came after the last log line
        return result

    def _inner_training_loop(self, *args, **kwargs):
        if self._rehearsed_steps:
            return self._build(self._rehearsed_steps)
        self.throughput.restart()
        self._started = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "records"})

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Runs a micro-batch forward and backward; after the last one of a step, checks all of the step's losses."""
        self.throughput.add(*self.positions(inputs), inputs["attention_mask"].sum(dim=1))
        self._first_step = self.state.global_step if self._first_step is None else self._first_step
        loss = self.forward_backward(model, inputs, num_items_in_batch)
        self._step.append((loss, inputs["labels"], inputs["records"]))
        if self.accelerator.sync_gradients:
            self.check_step()
        return loss

    def positions(self, inputs: Mapping) -> tuple[int, int]:
        """Counts the positions that a micro-batch computes, and those whose logits it computes: all, padding included.

        A trainer that lays out micro-batches otherwise overrides this, `forward_backward` and `step_losses`.
        """
        return inputs["input_ids"].numel(), inputs["input_ids"].numel()

    def forward_backward(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Runs a micro-batch forward and backward, and returns its loss."""
        return super().training_step(model, inputs, num_items_in_batch)

    def step_losses(self) -> torch.Tensor:
        """Gets the losses of the step's micro-batches, [micro-batches]."""
        return torch.stack([loss.float() for loss, *_ in self._step])

    def check_step(self) -> None:
        """Stops all ranks together, before the weights change, if the model can't learn from a loss of this step.

        Raises:
            UserError: A loss is NaN, infinite or 0, or a micro-batch has no label; names the records.
        """
        losses = self.step_losses()
        empty = torch.stack([(labels[:, 1:] == IGNORE_INDEX).all() for _, labels, _ in self._step])
        is_bad = ~losses.isfinite() | (losses == 0) | empty.to(losses.device)
        flags = torch.stack([is_bad.any(), torch.tensor(self.stop_signal.received, device=losses.device)]).int()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        bad, stop = flags.tolist()
        if bad:
            raise UserError(self._describe(losses.tolist(), is_bad.tolist(), empty.tolist()))
        self._step.clear()
        self.stopped |= bool(stop)
        self.control.should_training_stop |= self.stopped

    def _describe(self, losses: list[float], is_bad: list[bool], empty: list[bool]) -> str:
        found = []
        for (_, _, records), loss, bad, nothing in zip(self._step, losses, is_bad, empty, strict=True):
            where = f"on records {records.flatten().tolist()}"
            if nothing:
                found.append(f"nothing to learn {where}: their prompts alone fill --model_max_length")
            elif bad:
                found.append(f"the loss is {loss:g} {where}")
        if self.args.world_size > 1:
            everyone: list = [None] * self.args.world_size
            torch.distributed.all_gather_object(everyone, found)
            found = [line for lines in everyone for line in lines]
        last_good = saving.last_good(self.args.output_dir)
        return f"stopped at step {self.state.global_step + 1}: {'; '.join(found)}. {last_good}"

    # -----------------------------------------------------------------------------------------------------------------
    # Logs

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.stopped and self._saved_at != self.state.global_step:
            self.control.should_save = self.control.should_log = True
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """Adds speed, memory and the remaining time to the lines that carry a training loss."""
        if "loss" in logs:
            logs.update(self.throughput.report(self._sum_over_ranks))
            so_far = time.perf_counter() - self._started  # what evaluations and saves took, they will take again
            per_step = so_far / max(1, self.state.global_step - (self._first_step or 0))
            logs["hours_left"] = round(per_step * (self.state.max_steps - self.state.global_step) / 3600, 3)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluates; its time doesn't count as training."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def _sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return counts
        return self.accelerator.reduce(counts.to(self.args.device), "sum")

    # -----------------------------------------------------------------------------------------------------------------
    # Saves

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save(self, output_dir=None, state_dict=None):
        if state_dict:  # gathered from shards, where tied tensors no longer share memory: each would be written twice
            state_dict = {k: tensor for k, tensor in state_dict.items() if k not in self.model.all_tied_weights_keys}
        conversions = getattr(self.model, "_weight_conversions", None)
        if (
            self._staging
        ):  # the Trainer resumes a checkpoint by the names in memory; the final model has its files' names
            self.model._weight_conversions = []
        super()._save(output_dir, state_dict)
        self.model._weight_conversions = conversions
        if self.args.should_save and self.processing_class is not None:
            tokenizers.save_sentencepiece(
                self.processing_class, output_dir or self.args.output_dir, cache_dir=self.args.cache_dir
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with resuming.damage_in_one_line(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with resuming.damage_in_one_line(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with resuming.damage_in_one_line(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result):
        if missing := sorted(set(load_result.missing_keys) - set(self.model.all_tied_weights_keys)):
            raise UserError(f"the checkpoint lacks {len(missing)} of this model's tensors, {missing[0]} first")
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model, trial):
        target = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        writers = (self.is_world_process_zero(), self.is_local_process_zero())
        staged = saving.staged(target, writers, self.accelerator.wait_for_everyone)
        with self.throughput.paused(), staged as folder:
            self._staging = os.path.dirname(folder)
            super()._save_checkpoint(model, trial)
            self._staging = None
            if self.args.should_save and self.record is not None:
                jdump(dict(self.record), os.path.join(folder, resuming.RECORD))
            if self.state.best_model_checkpoint == folder:
                self.state.best_model_checkpoint = target
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(folder, "trainer_state.json"))
        self._saved_at = self.state.global_step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            saving.rotate(self.args.output_dir, self.args.save_total_limit, target, best)

    def save_verified(self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> int:
        """Saves the final model, reloads and checks it, and only then moves it into the output folder.

        Args:
            shapes: Name -> shape of every tensor.
            aliases: Tensors that share memory with another.

        Returns:
            The number of tensors checked; 0 on ranks that write nothing.
        """
        staging = os.path.join(self.args.output_dir, saving.STAGING)
        self.save_model(staging)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return 0
        count = models.check_saved(staging, shapes, aliases)
        if self.record is not None:
            jdump(dict(self.record), os.path.join(staging, resuming.RECORD))
        saving.publish(staging, self.args.output_dir)
        return count
