"""Run by torchrun from training/packing/test_model.py: how far sharded passes are from the padded batch, as JSON."""

import json
import os
import sys

import torch
import torch.distributed as dist
from packing_models import gradients, load_examples, make_model, micro_batches, packed_loss, padded_loss, worst
from torch.distributed.fsdp import fully_shard

from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes as packing_passes

TINY = 300  # tokens per pass: ranks need different numbers of passes


def most(passes: int) -> int:
    count = torch.tensor(passes)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def sharded_errors(examples: list[dict], name: str, reduction: str, max_tokens: int, no_sync: bool) -> dict:
    """Runs one step on all ranks and compares it with the padded step of all their micro-batches."""
    batches = micro_batches(examples, 2)
    reference = make_model(name)
    expected = padded_loss(reference, batches, reduction)
    expected.backward()
    model = make_model(name)
    packed_model.install(model)
    decoder = model.model.decoder if name == "opt" else model.model
    for layer in decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    mine = batches[dist.get_rank() :: dist.get_world_size()]
    total = sum(int((batch["labels"][:, 1:] != packing_passes.IGNORE_INDEX).sum()) for batch in batches)
    loss, passes = packed_loss(
        model, mine, reduction, True, max_tokens, dist.get_world_size(), agree=most, step_supervised=total,
        before=(lambda last: model.set_requires_gradient_sync(last)) if no_sync else None,
    )  # fmt: skip
    dist.all_reduce(loss)
    found = {n: grad.full_tensor() for n, grad in gradients(model).items()}
    return {
        "passes": len(passes),
        "loss": abs(float(loss / dist.get_world_size() / expected.detach()) - 1),
        "gradient": worst(found, gradients(reference)),
    }


def main() -> None:
    dist.init_process_group("gloo")
    examples = load_examples(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    cases = [
        ("llama", reduction, tokens, True) for reduction in ("micro_batch", "global") for tokens in (100_000, TINY)
    ]
    cases += [("llama", "micro_batch", TINY, False), ("opt", "global", TINY, True)]
    results = {" ".join(map(str, case)): sharded_errors(examples, *case) for case in cases}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
