"""Lays out an optimizer step without padding, with the prompts' common prefixes computed once.

A padded batch computes every token up to the longest example's length, the template's opening words once per example,
and a row of logits for each of them, though only the answer's are used. Here the same examples are laid end to end:

    [prefix with input] [prefix without] [rest of example 1] [rest of example 2] ...

with `position_ids` that say where each token stands in its example. Attention keeps the examples apart and lets each of
them see its prefix, whose states are the same in every example because a causal model without dropout computes them
from the prefix alone. Loss and gradients are the padded batch's, to rounding.

`find_prefixes` looks for prefixes worth sharing, `documents_of` takes the padding off, `make_passes` lays out a step.
`model.py` computes it, and `trainer.py` brings it into the Trainer's loop.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from alpaca.cli import UserError
from alpaca.training.data import IGNORE_INDEX
from alpaca.training.packing.model import Pass, make_layout


def check_pass(max_tokens: int, examples: Sequence[dict]) -> None:
    """Checks that a padding-free pass holds the longest example.

    Args:
        max_tokens: The value of `--max_tokens_per_pass`; passes of 0, the default, always hold it.
        examples: Have `input_ids`, [length].

    Raises:
        UserError: The pass is too short.
    """
    if not max_tokens:
        return
    longest = max(len(example["input_ids"]) for example in examples)
    if max_tokens < longest:
        raise UserError(f"--max_tokens_per_pass {max_tokens} is too few for the longest example, {longest} tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The documents of a step and their prefixes


@dataclasses.dataclass(frozen=True)
class Document:
    """One example without padding.

    Attributes:
        input_ids: Its tokens, [length].
        labels: Its labels, [length].
        weight: The weight of each of its supervised tokens in the step's loss.
        prefix: The shared prefix that it starts with, or ().
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weight: float
    prefix: tuple[int, ...] = ()


@dataclasses.dataclass
class _Branch:
    """A prefix after which examples part or end, and the examples that start with it, by number."""

    prefix: tuple[int, ...]
    members: Sequence[int]


def find_prefixes(examples: Sequence[dict], documents_per_pass: int, sample: int = 4096) -> list[tuple[int, ...]]:
    """Finds the token prefixes that save more than they cost if each is computed once per pass.

    Say a pass holds 32 examples of Alpaca in LLaMA's tokens, 13 with an input and 19 without. All start with the same
    9 tokens, those with an input with the same 39, the others with the same 29. Computed once instead of once per
    example, they save

        13 x 39 - 39 = 468 tokens        19 x 29 - 29 = 522        32 x 9 - 9 = 279

    so the 29 tokens come first. Their 19 examples gain nothing from the 9 tokens any more, which save
    13 x 9 - 9 = 108 from now on; the 39 tokens come next. Then the 9 tokens save nothing, and the
    search ends.

    Token ids are compared, so where the template's last character merges with an instruction's first into another
    token, the prefix ends before it. No prefix reaches an example's last unsupervised token, which predicts its answer.

    Args:
        examples: Have `input_ids` and `labels`, both [length].
        documents_per_pass: About how many examples share a pass.
        sample: How many examples, evenly spread, the search looks at.

    Returns:
        Prefixes, the one that saves most first.
    """
    step = max(1, len(examples) // sample)
    chosen = [examples[i] for i in range(0, len(examples), step)]
    per_pass = min(documents_per_pass, len(examples)) / len(chosen)
    branches = _branches(chosen, per_pass)
    prefixes, shared = [], [0] * len(chosen)

    def saving(branch: _Branch) -> float:
        more = sum(max(0, len(branch.prefix) - shared[i]) for i in branch.members)
        return more * per_pass - len(branch.prefix)

    while saving(best := max(branches, key=saving)) > 0:
        prefixes.append(best.prefix)
        for i in best.members:
            shared[i] = max(shared[i], len(best.prefix))
    return prefixes


def _branches(examples: Sequence[dict], per_pass: float) -> list[_Branch]:
    """Lists the candidates: the longest prefix of each group of examples that share it.

    The examples form a tree of tokens. A node is a candidate if its examples part or end there. (10, 11, 12) is one for
    the examples 10 11 12 20, 10 11 12 21 and 10 11 12 22; (10, 11) is not, since all three go on with 12.
    """
    tokens = [example["input_ids"].tolist() for example in examples]
    limits = [_shareable(example["labels"]) for example in examples]
    branches, frontier = [_Branch((), ())], [_Branch((), range(len(examples)))]
    while frontier:
        node = frontier.pop()
        by_token = defaultdict(list)
        for i in node.members:
            if len(node.prefix) < limits[i]:
                by_token[tokens[i][len(node.prefix)]].append(i)
        if [len(group) for group in by_token.values()] != [len(node.members)]:
            branches.append(node)
        # With less than one example per pass, computing the prefix once saves nothing.
        frontier += [
            _Branch((*node.prefix, token), group) for token, group in by_token.items() if len(group) * per_pass > 1
        ]
    return branches


def _shareable(labels: torch.Tensor) -> int:
    """Counts the leading tokens that may be shared: none may predict a supervised token, and one must be left.

    For the labels -100 -100 -100 13 2 it is 2: the third token predicts 13, the first supervised one.
    """
    supervised = (labels != IGNORE_INDEX).nonzero()
    return max(0, (int(supervised[0]) if len(supervised) else len(labels)) - 1)


def documents_of(batch: dict, weight: float, prefixes: Sequence[tuple[int, ...]] = ()) -> list[Document]:
    """Takes the padding off a right-padded micro-batch.

    Args:
        batch: `input_ids`, `labels` and `attention_mask`, each [examples, longest].
        weight: The weight of each supervised token in the step's loss.
        prefixes: What `find_prefixes` found; each document takes the longest that it starts with.
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
    """Gets the weight of a micro-batch's supervised tokens in this rank's loss, whose gradient the ranks average.

    With 8 micro-batches, 300 supervised tokens in this one and 10,000 in the step on 4 ranks, it is 1 / (8 x 300) for
    "micro_batch" and 4 / 10,000 for "global".

    Args:
        reduction: "micro_batch", the original's mean over micro-batches of their token means, or "global", the mean
            over all of the step's supervised tokens.
        supervised: Supervised tokens of the micro-batch.
        accumulation: Micro-batches of a step on one rank.
        step_supervised: Supervised tokens of the whole step on all ranks.
        world_size: Ranks that the gradient is averaged over.
    """
    if reduction == "micro_batch":
        return 1 / (accumulation * supervised)
    return world_size / step_supervised


# ---------------------------------------------------------------------------------------------------------------------
# Passes


def make_passes(
    documents: Sequence[Document], max_tokens: int, agree: Callable[[int], int] = lambda passes: passes
) -> list[Pass]:
    """Lays out a rank's documents of one optimizer step in few passes: first fit, longest documents first.

    Documents of 300, 250, 200 and 100 tokens without prefixes make two passes of at most 500: 300 + 200 and 250 + 100.

    Args:
        documents: This rank's share of the step.
        max_tokens: Tokens of a pass, shared prefixes counted once; a longer document gets a pass of its own.
        agree: Turns this rank's number of passes into the largest of all ranks. Ranks that need fewer split theirs, so
            that collective operations in the model meet their counterparts.
    """
    bins = []
    for document in sorted(documents, key=lambda d: len(d.input_ids), reverse=True):
        home = next((bin for bin in bins if _tokens([*bin, document]) <= max_tokens), None)
        if home is None:
            bins.append([document])
        else:
            home.append(document)
    count = agree(len(bins))
    while len(bins) < count:
        largest = max(bins, key=lambda bin: (len(bin) > 1, _tokens(bin)))
        if len(largest) > 1:
            bins.append([largest.pop() for _ in range(len(largest) // 2)])
        else:  # nothing left to split: a pass with weight 0
            bins.append([dataclasses.replace(min(documents, key=lambda d: len(d.input_ids)), weight=0.0)])
    return [_lay_out(bin) for bin in bins]


def _tokens(documents: Sequence[Document]) -> int:
    """Counts the tokens of a pass, shared prefixes once."""
    own = sum(len(document.input_ids) - len(document.prefix) for document in documents)
    return own + sum(map(len, {document.prefix for document in documents}))


def _lay_out(documents: Sequence[Document]) -> Pass:
    """Lays out one pass: the prefixes, then what is left of each document."""
    prefixes = sorted({document.prefix for document in documents if document.prefix})
    order = {prefix: i for i, prefix in enumerate(prefixes)}
    ids = [torch.tensor(prefix) for prefix in prefixes]
    positions = [torch.arange(len(prefix)) for prefix in prefixes]
    supervised, targets, weights = [], [], []
    start = sum(map(len, prefixes))
    for document in documents:
        skip = len(document.prefix)
        rest = document.input_ids[skip:]
        # The label of token i is token i itself; token i - 1 predicts it.
        at = (document.labels[skip + 1 :] != IGNORE_INDEX).nonzero()[:, 0]
        ids.append(rest)
        positions.append(torch.arange(skip, skip + len(rest)))
        supervised.append(start + at)
        targets.append(document.labels[skip + 1 :][at])
        weights.append(torch.full((len(at),), document.weight, dtype=torch.float64))
        start += len(rest)
    if not any(map(len, supervised)):  # weight 0, so that the backward pass and its collective operations still run
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
