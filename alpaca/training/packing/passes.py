"""Padding-free training: the examples of an optimizer step without padding, and their prompt prefix computed once.

A padded batch computes every token up to the longest example's length, the template's opening words once per example,
and a row of logits for each of them, though only the answer's are used. Here the same examples are laid end to end:

    [prefix with input] [prefix without] [rest of example 1] [rest of example 2] ...

with `position_ids` that say where each token stands in its example. Attention keeps the examples apart and lets each of
them see its prefix, whose states are the same in every example because a causal model without dropout computes them
from the prefix alone. Loss and gradients are the padded batch's, to rounding.

`choose` says whether a model fits, `find_prefixes` looks for prefixes worth sharing, `make_passes` lays out a step for
`packed_model.py` to compute, and `PackedTrainer` takes it into the Trainer's loop.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Trainer

from alpaca.cli import UserError
from alpaca.training.packing.model import Pass, install, make_layout, to_device

IGNORE_INDEX = -100
# Decoder-only families whose every layer hands its keyword arguments down to the attention function, and whose loss is
# nothing but cross-entropy of lm_head's output. tests/test_packing.py compares each of them with its padded self.
FAMILIES = ("llama", "opt", "mistral", "qwen2", "qwen3")


# ---------------------------------------------------------------------------------------------------------------------
# Does it fit?


def choose(
    config: Any, padding_free: str, shared_prefix: str, lora_dropout: float = 0.0, gpus: int = 1
) -> tuple[bool, bool, str]:
    """Decides between the padded path, padding-free passes, and passes with shared prefixes.

    Args:
        config: the model's transformers configuration.
        padding_free: "true", "false" or "auto", which switches on what leaves every loss as it was.
        shared_prefix: likewise.
        lora_dropout: of the adapters, where there are any.
        gpus: that this process drives.

    Returns:
        Whether to go padding-free, whether to share prefixes, and why something is off ("" where nothing is).

    Raises:
        UserError: "true" was asked for and cannot be.
    """
    padding_free, shared_prefix = padding_free.lower(), shared_prefix.lower()
    for flag, value in (("padding_free", padding_free), ("shared_prefix", shared_prefix)):
        if value not in ("auto", "true", "false"):
            raise UserError(f"--{flag} must be auto, true or false, found {value!r}")
    dropout = {
        name: p for name, p in {**config.to_dict(), "lora_dropout": lora_dropout}.items() if _is_dropout(name, p)
    }
    noise = ", ".join(f"{name} is {p}" for name, p in dropout.items())
    misfit = _misfit(config, dropout)
    if gpus > 1:
        misfit = f"one process drives {gpus} GPUs; torchrun --nproc_per_node={gpus} starts one for each"
    if padding_free == "false":
        if shared_prefix == "true":
            raise UserError("--shared_prefix true needs --padding_free auto or true, found --padding_free false")
        return False, False, ""
    if padding_free == "true" and misfit:
        raise UserError(f"--padding_free true: {misfit}; give --padding_free false")
    if shared_prefix == "true" and (misfit or noise):
        raise UserError(f"--shared_prefix true: {misfit or noise + ', so no two prefixes are alike'}; give false")
    if misfit:
        return False, False, f"padding-free batches are off: {misfit}"
    if noise and padding_free == "auto":
        return (
            False,
            False,
            (
                f"padding-free batches are off: {noise}, which would fall on other tokens than in a padded batch "
                "(--padding_free true trains so all the same)"
            ),
        )
    if noise:
        return True, False, f"the shared prefix is off: {noise}, so no two prefixes are alike"
    return True, shared_prefix != "false", ""


def _is_dropout(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _misfit(config: Any, dropout: dict[str, float]) -> str:
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among the tested architectures ({', '.join(FAMILIES)})"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(config, "sliding_window", None) and config.model_type == "mistral"):
        return "its attention has a sliding window"
    if dropout.keys() & {"attention_dropout", "layerdrop"}:
        return f"{' and '.join(sorted(dropout.keys() & {'attention_dropout', 'layerdrop'}))} cannot be done in passes"
    return ""


def check_pass(max_tokens: int, examples: Sequence[dict]) -> None:
    """Checks that a padding-free pass has room for the longest example.

    Raises:
        UserError: `--max_tokens_per_pass`, where it isn't 0, is too short.
    """
    if not max_tokens:  # the estimate's passes hold --model_max_length tokens at least
        return
    longest = max(len(example["input_ids"]) for example in examples)
    if max_tokens < longest:
        raise UserError(f"--max_tokens_per_pass {max_tokens} is too few for the longest example, {longest} tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The documents of a step and their prefixes


@dataclasses.dataclass(frozen=True)
class Document:
    """One example: its tokens and labels, both [length], what each supervised token weighs, and its shared prefix."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    weight: float
    prefix: tuple[int, ...] = ()


def find_prefixes(examples: Sequence[dict], documents_per_pass: int, sample: int = 4096) -> list[tuple[int, ...]]:
    """Finds the token prefixes that save more than they cost when each is computed once per pass.

    Token ids are compared, so a template's last character that merges with an instruction's first is a different
    token and ends the prefix there. No prefix reaches an example's last unsupervised token, which predicts its answer.

    Args:
        examples: have `input_ids` and `labels`, both [length].
        documents_per_pass: how many examples share a pass, about.
        sample: how many examples, evenly spread, are looked at.

    Returns:
        Prefixes, the one that saves most first. In LLaMA's tokens those of Alpaca's two templates are 29 and 39 long.
    """
    step = max(1, len(examples) // sample)
    chosen = [examples[i] for i in range(0, len(examples), step)]
    tokens = [example["input_ids"].tolist() for example in chosen]
    limits = [_shareable(example["labels"]) for example in chosen]
    per_pass = min(documents_per_pass, len(examples)) / len(chosen)
    branches, frontier = [((), ())], [((), range(len(chosen)))]
    while frontier:
        prefix, members = frontier.pop()
        by_token = defaultdict(list)
        for i in members:
            if len(prefix) < limits[i]:
                by_token[tokens[i][len(prefix)]].append(i)
        if [len(group) for group in by_token.values()] != [len(members)]:  # some end or part here
            branches.append((prefix, members))
        # Fewer than one example per pass: computing the prefix once is computing it as often as before.
        frontier += [((*prefix, token), group) for token, group in by_token.items() if len(group) * per_pass > 1]

    prefixes, shared = [], [0] * len(chosen)

    def saving(branch: tuple) -> float:
        prefix, members = branch
        return sum(max(0, len(prefix) - shared[i]) for i in members) * per_pass - len(prefix)

    while saving(best := max(branches, key=saving)) > 0:
        prefixes.append(best[0])
        for i in best[1]:
            shared[i] = max(shared[i], len(best[0]))
    return prefixes


def _shareable(labels: torch.Tensor) -> int:
    """How many leading tokens may be shared: none may predict a supervised token, and one must be left."""
    supervised = (labels != IGNORE_INDEX).nonzero()
    return max(0, (int(supervised[0]) if len(supervised) else len(labels)) - 1)


def documents_of(batch: dict, weight: float, prefixes: Sequence[tuple[int, ...]] = ()) -> list[Document]:
    """Takes the padding off a right-padded micro-batch.

    Args:
        batch: `input_ids`, `labels` and `attention_mask`, each [examples, longest].
        weight: of each supervised token in the step's loss.
        prefixes: from `find_prefixes`; each document takes the longest that it starts with.
    """
    documents = []
    lengths = batch["attention_mask"].sum(1).tolist()  # not from pad_token_id, which may be a token of the text
    for ids, labels, length in zip(batch["input_ids"].cpu(), batch["labels"].cpu(), lengths, strict=True):
        ids, labels = ids[:length], labels[:length]
        limit = _shareable(labels)
        start = tuple(ids[: max(map(len, prefixes), default=0)].tolist())
        fitting = [p for p in prefixes if len(p) <= limit and start[: len(p)] == p]
        documents.append(Document(ids, labels, weight, max(fitting, key=len, default=())))
    return documents


def token_weight(reduction: str, supervised: int, accumulation: int, step_supervised: int, world_size: int) -> float:
    """What a supervised token of one micro-batch weighs in this rank's loss, whose gradient the ranks average.

    Args:
        reduction: "micro_batch", the original's mean over micro-batches of their token means, or "global", the mean
            over all of the step's supervised tokens.
        supervised: supervised tokens of the micro-batch.
        accumulation: what the mean over micro-batches divides by on one rank.
        step_supervised: supervised tokens of the whole step, all ranks together.
        world_size: ranks that the gradient is averaged over.
    """
    if reduction == "micro_batch":
        return 1 / (accumulation * supervised)
    return world_size / step_supervised


# ---------------------------------------------------------------------------------------------------------------------
# Passes


def make_passes(
    documents: Sequence[Document], max_tokens: int, agree: Callable[[int], int] = lambda passes: passes
) -> list[Pass]:
    """Lays out a rank's documents of one optimizer step in as few passes as `max_tokens` allows.

    Args:
        documents: this rank's share of the step.
        max_tokens: of a pass, shared prefixes counted once; a longer document gets a pass of its own.
        agree: turns this rank's number of passes into the largest of all ranks'. Ranks that would need fewer split
            theirs, so that collective operations in the model meet their counterparts.
    """
    bins = []
    for document in sorted(documents, key=lambda d: len(d.input_ids), reverse=True):  # first fit decreasing
        fitting = (bin for bin in bins if _tokens([*bin, document]) <= max_tokens)
        home = next(fitting, None)
        if home is None:
            bins.append([document])
        else:
            home.append(document)
    count = agree(len(bins))
    while len(bins) < count:
        largest = max(bins, key=lambda bin: (len(bin) > 1, _tokens(bin)))
        if len(largest) > 1:
            bins.append([largest.pop() for _ in range(len(largest) // 2)])
        else:  # nothing left to split: a pass that weighs nothing
            bins.append([dataclasses.replace(min(documents, key=lambda d: len(d.input_ids)), weight=0.0)])
    return [_lay_out(bin) for bin in bins]


def _tokens(documents: Sequence[Document]) -> int:
    own = sum(len(document.input_ids) - len(document.prefix) for document in documents)
    return own + sum(map(len, {document.prefix for document in documents}))


def _lay_out(documents: Sequence[Document]) -> Pass:
    prefixes = sorted({document.prefix for document in documents if document.prefix})
    order = {prefix: i for i, prefix in enumerate(prefixes)}
    ids = [torch.tensor(prefix) for prefix in prefixes]
    positions = [torch.arange(len(prefix)) for prefix in prefixes]
    supervised, targets, weights = [], [], []
    start = sum(map(len, prefixes))
    for document in documents:
        skip = len(document.prefix)
        rest = document.input_ids[skip:]
        # Labels stand on the token they name; the token before it predicts it.
        at = (document.labels[skip + 1 :] != IGNORE_INDEX).nonzero()[:, 0]
        ids.append(rest)
        positions.append(torch.arange(skip, skip + len(rest)))
        supervised.append(start + at)
        targets.append(document.labels[skip + 1 :][at])
        weights.append(torch.full((len(at),), document.weight, dtype=torch.float64))
        start += len(rest)
    if not any(map(len, supervised)):  # keeps the backward pass, and its collective operations, in step
        supervised, targets = [torch.tensor([start - 1])], [ids[-1][-1:]]
        weights = [torch.zeros(1, dtype=torch.float64)]
    return Pass(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions)[None],
        layout=make_layout(
            [len(part) for part in ids], [-1] * len(prefixes) + [order.get(d.prefix, -1) for d in documents]
        ),
        supervised=torch.cat(supervised),
        targets=torch.cat(targets),
        weights=torch.cat(weights),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The Trainer


class PackedTrainer(Trainer):
    """A Trainer whose optimizer steps, once `pack` was called, are passes over the same examples without padding.

    The loop, the sampler, the collator and their random numbers stay the Trainer's. All passes of a step run when its
    last micro-batch is due; the micro-batches before it cost nothing.
    """

    prefixes: list[tuple[int, ...]] = []  # noqa: RUF012 (replaced by pack, never changed)
    max_tokens_per_pass = 0

    def pack(self, max_tokens_per_pass: int, shared_prefix: bool) -> str:
        """Leaves the padded path; to be called before `train`.

        Returns:
            A line that says what steps are made of.
        """
        install(self.model)
        self.max_tokens_per_pass = max_tokens_per_pass
        documents = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.prefixes = find_prefixes(self.train_dataset, documents) if shared_prefix else []
        lengths = " and ".join(map(str, sorted(map(len, self.prefixes))))
        shares = f", shared prefixes of {lengths} tokens" if lengths else ", no shared prefix"
        return f"padding-free: passes of at most {max_tokens_per_pass:,} tokens{shares}"

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetches a step's micro-batches, and hands the last of them all passes."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.max_tokens_per_pass and batches:
            passes = self._make_passes(batches, num_items_in_batch)
            batches = [{**batch, "passes": []} for batch in batches]
            batches[-1]["passes"] = passes
        return batches, num_items_in_batch

    def _make_passes(self, batches: list[dict], step_supervised: torch.Tensor | None) -> list[Pass]:
        averaged = self.args.world_size if self.args.average_tokens_across_devices else 1
        documents = []
        for batch in batches:
            supervised = max(1, int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()))  # 0 is the caller's to refuse
            reduction = "micro_batch" if step_supervised is None else "global"
            weight = token_weight(reduction, supervised, len(batches), step_supervised, averaged)
            documents += documents_of(batch, float(weight), self.prefixes)
        return make_passes(documents, self.max_tokens_per_pass, self._most_of_all_ranks)

    def _most_of_all_ranks(self, passes: int) -> int:
        if self.args.world_size == 1:
            return passes
        return int(self.accelerator.gather(torch.tensor([passes], device=self.args.device)).max())

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Runs the passes, or, where there are none to run, the padded micro-batch."""
        if "passes" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, one in enumerate(inputs["passes"], start=1):
            with self._gradients_stay_here(model) if number < len(inputs["passes"]) else contextlib.nullcontext():
                with self.compute_loss_context_manager():
                    loss = model(packed=to_device(one, self.args.device))
                self._backward(loss, last=number == len(inputs["passes"]))
            total += loss.detach()
        return total

    def _gradients_stay_here(self, model: torch.nn.Module) -> contextlib.AbstractContextManager:
        """Ranks average their gradients after the last pass only, where each holds all of them anyway."""
        alone = self.args.world_size == 1  # nothing to exchange, and FSDP2 would hold a second copy of the gradients
        eager = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return contextlib.nullcontext() if alone or eager else self.accelerator.no_sync(model)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.is_deepspeed_enabled:  # its engine steps when gradients are due
            self.accelerator.gradient_state._set_sync_gradients(last)
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)
