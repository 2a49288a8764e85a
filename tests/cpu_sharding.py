"""Starts train.py with FSDP2 and DeepSpeed really at work on CPU processes. For tests only.

    torchrun --nproc_per_node=2 tests/cpu_sharding.py COMMANDS.json

accelerate 1.15 never promotes its multi-CPU mode to FSDP and hands DeepSpeed no backend without an accelerator. Both
are fixed here, outside the shipped script, which says that it goes on data-parallel instead. COMMANDS.json is a list
of train.py's argument lists; they run one after another in the same processes, which saves their start-up. With
--plain in a list nothing is fixed for it; with --half, --bf16 True is obeyed as on a GPU.
"""

import importlib
import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import train
from alpaca.training import sharding

# Would be compiled first, for minutes; gloo does it. (`deepspeed.comm.torch` as a name is PyTorch itself.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
state_init, prepare_backend = AcceleratorState.__init__, PartialState._prepare_backend
set_gradient_sync = FSDPModule.set_requires_gradient_sync


def init_promoting_cpu_to_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    state_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if fsdp_plugin.cpu_offload:
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # only an accelerator pins memory
        if os.environ["RANK"] == "0":
            print(f"resharding: {fsdp_plugin.reshard_after_forward}")


def set_requires_gradient_sync(self, requires: bool, **kwargs) -> None:
    if not requires:
        print("gradients wait whole")
    set_gradient_sync(self, requires, **kwargs)


def prepare_gloo_backend(self, cpu=False, sagemaker_dp=False, backend=None):
    return ("gloo", DistributedType.MULTI_CPU) if not cpu else prepare_backend(self, cpu, sagemaker_dp, backend)


def run(argv: list[str]) -> None:
    plain = "--plain" in argv
    unset_hf_deepspeed_config()  # an earlier command's would have this one load its weights for ZeRO-3, and hang
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)  # an earlier command's
    AcceleratorState.__init__ = state_init if plain else init_promoting_cpu_to_fsdp
    PartialState._prepare_backend = prepare_backend if plain else prepare_gloo_backend
    FSDPModule.set_requires_gradient_sync = set_requires_gradient_sync
    sharding.has_accelerator = lambda: not plain
    sharding.has_bfloat16 = lambda: "--half" in argv
    sys.argv = ["train.py", *(argument for argument in argv if argument not in ("--plain", "--half"))]
    train.train()


if __name__ == "__main__":
    try:
        with open(sys.argv[1]) as file:
            for argv in json.load(file):
                run(argv)
    finally:  # as train.main does; without it gloo's threads may abort a process that ended well
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
