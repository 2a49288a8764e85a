"""The trainer whose optimizer steps are padding-free passes."""

import contextlib

import torch

from alpaca.training.data import IGNORE_INDEX
from alpaca.training.packing.model import Pass, install, to_device
from alpaca.training.packing.passes import documents_of, find_prefixes, make_passes, token_weight
from alpaca.training.trainer import AlpacaTrainer


class PackedTrainer(AlpacaTrainer):
    """An AlpacaTrainer whose optimizer steps are passes over the same examples without padding.

    The loop, the sampler, the collator and their random numbers stay the Trainer's. All passes of a step run when its
    last micro-batch is due; the micro-batches before it cost nothing.

    Attributes:
        tokens_per_pass: Tokens of a pass at most.
        prefixes: The token prefixes that the examples of a pass share.
    """

    def __init__(self, *args, tokens_per_pass: int, shared_prefix: bool, **kwargs):
        """Teaches the model to compute passes, and looks for prefixes in the training data."""
        super().__init__(*args, **kwargs)
        install(self.model)
        self.tokens_per_pass = tokens_per_pass
        documents = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.prefixes = find_prefixes(self.train_dataset, documents) if shared_prefix else []

    def describe(self) -> str:
        """Says what a step is made of."""
        lengths = " and ".join(map(str, sorted(map(len, self.prefixes))))
        shares = f", shared prefixes of {lengths} tokens" if lengths else ", no shared prefix"
        return f"padding-free: passes of at most {self.tokens_per_pass:,} tokens{shares}"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetches a step's micro-batches, and gives the last of them all passes."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            passes = self._make_passes(batches, num_items_in_batch)
            batches = [{**batch, "passes": []} for batch in batches]
            batches[-1]["passes"] = passes
        return batches, num_items_in_batch

    def _make_passes(self, batches: list[dict], step_supervised: torch.Tensor | None) -> list[Pass]:
        averaged = self.args.world_size if self.args.average_tokens_across_devices else 1
        documents = []
        for batch in batches:
            supervised = max(1, int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()))  # check_step refuses 0
            reduction = "micro_batch" if step_supervised is None else "global"
            weight = token_weight(reduction, supervised, len(batches), step_supervised, averaged)
            documents += documents_of(batch, float(weight), self.prefixes)
        return make_passes(documents, self.tokens_per_pass, self._most_of_all_ranks)

    def _most_of_all_ranks(self, passes: int) -> int:
        if self.args.world_size == 1:
            return passes
        return int(self.accelerator.gather(torch.tensor([passes], device=self.args.device)).max())

    def positions(self, inputs) -> tuple[int, int]:
        """Counts the positions that a micro-batch's passes compute, and those whose logits they compute."""
        passes = inputs["passes"]
        return sum(one.input_ids.numel() for one in passes), sum(one.targets.numel() for one in passes)

    def step_losses(self) -> torch.Tensor:
        """Gets the loss of the whole step, which came with the last micro-batch, once for each of them."""
        losses = super().step_losses()
        return losses[-1:].expand_as(losses)

    def forward_backward(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Runs a micro-batch's passes forward and backward."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, one in enumerate(inputs["passes"], start=1):
            with self._no_exchange(model) if number < len(inputs["passes"]) else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    loss = model(packed=to_device(one, self.args.device))
                self._backward(loss, last=number == len(inputs["passes"]))
            total += loss.detach()
        return total

    def _no_exchange(self, model: torch.nn.Module) -> contextlib.AbstractContextManager:
        """Delays the exchange of gradients to the last pass, where each rank holds all of them anyway."""
        alone = self.args.world_size == 1  # nothing to exchange, and FSDP2 would hold a second copy of the gradients
        every_pass = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return contextlib.nullcontext() if alone or every_pass else self.accelerator.no_sync(model)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.is_deepspeed_enabled:  # its engine steps when gradients are due
            self.accelerator.gradient_state._set_sync_gradients(last)
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)
