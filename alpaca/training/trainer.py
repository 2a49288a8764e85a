"""The Hugging Face Trainer with the original's loss, whole checkpoints and a stop when the loss is no number."""

import os
import time
from collections.abc import Mapping

import torch
from transformers.trainer_utils import rotate_checkpoints

from alpaca import models
from alpaca.cli import UserError
from alpaca.ranks import announce
from alpaca.training import saving, throughput
from alpaca.training.memory import ModelShape
from alpaca.training.packing import passes as packing_passes


def check_labels(dataset, batch_size: int) -> None:
    """Says which examples have nothing to learn, and refuses those that are sure to make a batch of their own.

    Args:
        dataset: train.py's SupervisedDataset, or None.
        batch_size: examples of a micro-batch.

    Raises:
        UserError: training would stop at such a batch; in an evaluation the loss would be NaN.
    """
    empty = dataset.unlearnable() if dataset else []
    if not empty:
        return
    shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
    found = f"{dataset.data_path}: {len(empty)} example(s) have nothing to learn, their prompt alone fills "
    found += f"--model_max_length: records {shown}"
    if batch_size == 1 or len(empty) == len(dataset):
        raise UserError(f"{found}; a batch needs one that has: raise --model_max_length, or leave these records out")
    announce(found)


class AlpacaTrainer(packing_passes.PackedTrainer):
    """The Trainer with the original's loss, saves that are whole or not there, and a stop when the loss is no number.

    Attributes:
        stop_signal: listens for SIGTERM where the caller enters it.
        stopped: whether SIGTERM ended the run early.
        throughput: counts tokens and time.
    """

    def __init__(self, *args, shape: ModelShape, **kwargs):
        """Chooses how the losses of a step's micro-batches are weighed."""
        super().__init__(*args, **kwargs)
        halves = [name for name, p in self.model.named_parameters() if p.requires_grad and p.element_size() < 4]
        if halves and not self.args.pure_bf16:
            raise UserError(
                f"{halves[0]} would be trained in 16 bits, where small updates vanish; load the model with "
                "dtype=torch.float32 (--bf16 computes in bfloat16 all the same), or give --pure_bf16"
            )
        # The one place that decides it. True: the Trainer divides by the tokens of the whole step, over accumulation
        # and ranks. False: each micro-batch is averaged over its own tokens, then the micro-batches over each other.
        self.model_accepts_loss_kwargs = self.args.loss_reduction == "global"
        self.stopped, self.stop_signal = False, saving.StopSignal()
        recomputes = bool(self.args.gradient_checkpointing)
        self.throughput = throughput.Throughput(shape, self.args.device, self.args.world_size, recomputes)
        self._first_step: int | None = None  # of this run, which may continue another
        self._step: list[tuple[torch.Tensor, ...]] = []  # loss, labels and records of its micro-batches so far
        self._staging: str | None = None
        self._saved_at = -1

    def train(self, *args, **kwargs):
        """Trains; a stop signal ends it after the step under way, with a checkpoint."""
        result = super().train(*args, **kwargs)
        self.throughput.report(self._sum_over_ranks)  # what came after the last log line
        return result

    def _inner_training_loop(self, *args, **kwargs):
        self.throughput.restart()
        self._started = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Computes a micro-batch's loss."""
        inputs = {name: value for name, value in inputs.items() if name != "records"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluates a batch."""
        inputs = {name: value for name, value in inputs.items() if name != "records"}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Runs a micro-batch forward and backward; after a step's last one, checks all of the step's losses."""
        passes = inputs.get("passes")  # padding-free: all of the step's, on its last micro-batch
        computed = sum(one.input_ids.numel() for one in passes) if passes is not None else inputs["input_ids"].numel()
        logits = sum(one.targets.numel() for one in passes) if passes is not None else computed
        self.throughput.add(computed, logits, inputs["attention_mask"].sum(dim=1))
        self._first_step = self.state.global_step if self._first_step is None else self._first_step
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.append((loss, inputs["labels"], inputs["records"]))
        if self.accelerator.sync_gradients:
            self.check_step(padding_free=passes is not None)
        return loss

    def check_step(self, padding_free: bool) -> None:
        """Stops all ranks together, before the weights change, when a loss of this step is no number to learn from.

        Args:
            padding_free: whether the last micro-batch's loss is the whole step's.

        Raises:
            UserError: a loss is NaN, infinite or 0, or a micro-batch has no label; with the records' numbers.
        """
        losses = torch.stack([loss.float() for loss, *_ in self._step])
        losses = losses[-1:].expand_as(losses) if padding_free else losses
        empty = torch.stack([(labels[:, 1:] == packing_passes.IGNORE_INDEX).all() for _, labels, _ in self._step])
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

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.stopped and self._saved_at != self.state.global_step:
            self.control.should_save = self.control.should_log = True
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """Adds speed, memory and the time that is left to the lines that carry a training loss."""
        if "loss" in logs:
            logs.update(self.throughput.report(self._sum_over_ranks))
            so_far = time.perf_counter() - self._started  # evaluations and saves take their time again
            per_step = so_far / max(1, self.state.global_step - (self._first_step or 0))
            logs["hours_left"] = round(per_step * (self.state.max_steps - self.state.global_step) / 3600, 3)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluates; the time it takes is not training's."""
        with self.throughput.paused():
            return super().evaluate(*args, **kwargs)

    def _sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return counts
        return self.accelerator.reduce(counts.to(self.args.device), "sum")

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save(self, output_dir=None, state_dict=None):
        if state_dict:  # gathered from shards, where tied tensors no longer share memory: each would be written twice
            state_dict = {k: tensor for k, tensor in state_dict.items() if k not in self.model.all_tied_weights_keys}
        conversions = getattr(self.model, "_weight_conversions", None)
        if self._staging:  # a checkpoint: the Trainer resumes by the names in memory; the final model's are its files'
            self.model._weight_conversions = []
        super()._save(output_dir, state_dict)
        self.model._weight_conversions = conversions

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
            if self.state.best_model_checkpoint == folder:
                self.state.best_model_checkpoint = target
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(folder, "trainer_state.json"))
        self._saved_at = self.state.global_step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, best, use_mtime=True)

    def save_verified(self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> int:
        """Saves the final model, reads it back, and only then puts it into the output folder.

        Args:
            shapes: name -> shape of every tensor.
            aliases: tensors that share memory with another.

        Returns:
            How many tensors were checked; 0 on ranks that write nothing.
        """
        staging = os.path.join(self.args.output_dir, saving.STAGING)
        self.save_model(staging)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return 0
        count = models.verify(staging, shapes, aliases)
        saving.publish(staging, self.args.output_dir)
        return count
