"""FSDP2's mixed precision."""

from types import SimpleNamespace

import torch
from packing_models import (
    make_model,
    micro_batches,
    packed_loss,
)

from alpaca.training import sharding
from alpaca.training.packing import model as packed_model


def test_a_world_of_one_under_fsdp2_holds_the_masters_of_adamw(examples, monkeypatch):
    """bfloat16 compute, float32 master weights: what AdamW does to them is what it does to plain float32 weights.

    Neither tokens' weights on their way in nor the loss on its way out are rounded.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import fully_shard

    args = SimpleNamespace(bf16=True, fp16=False, fsdp_plugin_args={"fsdp_version": 2})
    args.accelerator_config = SimpleNamespace(gradient_accumulation_kwargs=None)
    settings = sharding.fsdp_precision(args)
    assert settings["accelerator_config"].gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert args.fsdp_plugin_args == {"fsdp_version": 2}, "decided, not yet written"
    plugin = FullyShardedDataParallelPlugin(**settings["fsdp_plugin_args"])
    plugin.set_mixed_precision("bf16")  # as the Accelerator does
    policy, kinds, weigh = plugin.mixed_precision_policy, set(), packed_model.supervised_loss

    def supervised_loss(hidden_states, lm_head, targets, weights):
        kinds.add((hidden_states.dtype, weights.dtype))
        return weigh(hidden_states, lm_head, targets, weights)

    monkeypatch.setattr(packed_model, "supervised_loss", supervised_loss)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, plain = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
        packed_model.install(model)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        seen = []
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
        optimizers = [torch.optim.AdamW(m.parameters(), lr=2e-5, weight_decay=0.01) for m in (model, plain)]
        for step in range(3):
            loss, _ = packed_loss(model, micro_batches(examples[step:][:8], 4), "micro_batch", True, 600)
            assert loss.dtype == torch.float32
            for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
                other.grad = mine.grad.full_tensor().clone()
                assert mine.dtype == mine.grad.dtype == torch.float32
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert set(seen) == {torch.bfloat16}
        assert kinds == {(torch.bfloat16, torch.float64)}
        states = optimizers[0].state.values()
        assert {state[name].dtype for state in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.full_tensor(), other)
    finally:
        torch.distributed.destroy_process_group()
