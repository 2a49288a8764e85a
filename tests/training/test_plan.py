"""The plan: what it decides, why, and that nothing else changes the Trainer's arguments."""

import ast
import dataclasses
import glob
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from packing_models import make_model
from training_runs import run
from transformers import AutoConfig, AutoModelForCausalLM

import train
from alpaca.cli import UserError
from alpaca.training import memory, plan, sharding

pytest_plugins = ["training_runs"]

CHOICES = [
    ("llama", {}, "auto", "auto", (True, True), ""),
    ("llama", {}, "auto", "false", (True, False), ""),
    ("llama", {}, "false", "auto", (False, False), ""),
    ("opt", {"dropout": 0.0}, "auto", "auto", (True, True), ""),
    ("opt", {"dropout": 0.1}, "auto", "auto", (False, False), "dropout is 0.1"),
    ("opt", {"dropout": 0.1}, "true", "auto", (True, False), "shared prefix is off: dropout is 0.1"),
    ("gpt_neox", {}, "auto", "auto", (False, False), "gpt_neox is not among the tested"),
    ("mistral", {"sliding_window": 4096}, "auto", "auto", (False, False), "sliding window"),
]


@pytest.mark.parametrize(("kind", "settings", "padding_free", "shared_prefix", "expected", "reason"), CHOICES)
def test_auto_takes_what_leaves_the_losses_alone(kind, settings, padding_free, shared_prefix, expected, reason):
    config = AutoConfig.for_model(kind, **settings)
    chosen = plan.choose_packing(config, padding_free, shared_prefix)
    assert (chosen.padding_free, chosen.shared_prefix) == expected
    assert reason in chosen.why_not
    assert bool(reason) == bool(chosen.why_not)


@pytest.mark.parametrize(
    ("kind", "settings", "padding_free", "shared_prefix", "message"),
    [
        ("gpt_neox", {}, "true", "auto", "--padding_free true: gpt_neox is not among"),
        ("llama", {}, "false", "true", "--shared_prefix true needs --padding_free"),
        ("opt", {"dropout": 0.1}, "true", "true", "--shared_prefix true: dropout is 0.1"),
        ("opt", {"dropout": 0.0, "attention_dropout": 0.1}, "true", "auto", "attention_dropout"),
    ],
)
def test_true_is_refused_in_one_line_where_it_cannot_be(kind, settings, padding_free, shared_prefix, message):
    with pytest.raises(UserError, match=message) as error:
        plan.choose_packing(AutoConfig.for_model(kind, **settings), padding_free, shared_prefix)
    assert "\n" not in str(error.value)


def test_one_process_that_drives_several_gpus_goes_on_padded():
    """torch.nn.DataParallel would hand every GPU the whole pass."""
    chosen = plan.choose_packing(AutoConfig.for_model("llama"), "auto", "auto", gpus=4)
    assert (chosen.padding_free, chosen.shared_prefix) == (False, False)
    assert "torchrun --nproc_per_node=4" in chosen.why_not
    with pytest.raises(UserError, match="--padding_free true: one process drives 4 GPUs"):
        plan.choose_packing(AutoConfig.for_model("llama"), "true", "auto", gpus=4)


def test_lora_dropout_counts_as_dropout():
    config = AutoConfig.for_model("llama")
    assert plan.choose_packing(config, "auto", "auto", lora_dropout=0.05)[:2] == (False, False)
    assert plan.choose_packing(config, "auto", "auto", lora_dropout=0.0)[:2] == (True, True)


SEVEN_BILLION = memory.ModelShape(6_738_423_808, 6_738_423_808, 6_607_343_616, 202_383_360, 4096, 32, 32_001, 46 * 4096)


def on_a_gpu(**changes) -> SimpleNamespace:
    """What the estimates read of train.py's arguments."""
    flags = {"deepspeed": None, "fsdp": None, "fsdp_config": {}, "world_size": 1, "bf16": True, "fp16": False}
    flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "model_max_length": 512}
    flags |= {"pure_bf16": False, "gradient_checkpointing": False, "max_tokens_per_pass": 0}
    flags |= {"optim": "adamw_torch"}
    flags |= {"fsdp_plugin_args": {"reshard_after_forward": True}, "device": torch.device("cuda"), **changes}
    return SimpleNamespace(**flags)


def test_passes_are_as_long_as_the_estimate_leaves_room_for():
    def tokens(**changes):
        args = on_a_gpu(**changes)
        return plan.tokens_per_pass(SEVEN_BILLION, plan.workload(args), args.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (139 * 2**30, 141 * 2**30))  # an H200's
        assert 2_000 < tokens(fsdp=True) < 8_000
        assert tokens(fsdp=True, gradient_checkpointing=True) == 16_384
        assert tokens() < tokens(fsdp=True)  # autocast takes 18 bytes per parameter
        keeping = {"fsdp_plugin_args": {"reshard_after_forward": False}}
        assert tokens(fsdp=True, **keeping) < tokens(fsdp=True)  # and so do gathered weights that are kept
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
        assert tokens(fsdp=True) == 512  # nothing is left: one example at a time, and the estimate refuses elsewhere
        assert tokens(device=torch.device("cpu"), model_max_length=4096) == 4096


@pytest.mark.parametrize(
    ("free", "world", "changes", "reshards"),
    [
        (139, 1, {}, True),  # a world of one: a whole copy in bfloat16 would take the passes' room
        (80, 4, {}, True),  # the longest passes need it
        (80, 4, {"max_tokens_per_pass": 2048}, False),
        (80, 4, {"gradient_checkpointing": True}, False),
        (80, 8, {"gradient_accumulation_steps": 4}, True),
        (80, 8, {"gradient_accumulation_steps": 2}, False),
        (80, 16, {}, True),
        (140, 16, {}, False),
    ],
)
def test_gathered_weights_are_kept_where_the_longest_pass_fits_beside_them(monkeypatch, free, world, changes, reshards):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, free * 2**30))
    args = on_a_gpu(fsdp=True, world_size=world, **changes)
    chosen = plan.choose_resharding(SEVEN_BILLION, plan.workload(args), args, padding_free=True)
    assert chosen.reshards == reshards
    assert chosen.reason.startswith("FSDP2 gathers weights for forward and backward" if reshards else "FSDP2 keeps")
    assert "12.2 GiB" in chosen.reason  # 2 bytes per parameter, less the layer that a run gathers in either case
    empty = memory.replace(plan.workload(args), batch=0, scratch=0)
    kept, freed = (memory.estimate(SEVEN_BILLION, memory.replace(empty, reshards=r))[0] for r in (False, True))
    assert kept - freed == 2 * (SEVEN_BILLION.parameters - SEVEN_BILLION.largest_unit)


def test_padded_batches_leave_more_room_for_gathered_weights(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    args = on_a_gpu(fsdp=True, world_size=4)
    assert not plan.choose_resharding(SEVEN_BILLION, plan.workload(args), args, padding_free=False).reshards


@pytest.mark.parametrize(("share", "keeps"), [(0.89, True), (0.95, False)])
def test_a_tenth_of_the_free_memory_stays_free_where_gathered_weights_are_kept(monkeypatch, share, keeps):
    args = on_a_gpu(fsdp=True, world_size=4)
    need = memory.estimate(SEVEN_BILLION, memory.replace(plan.workload(args), reshards=False))[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (need / share, need / share))
    assert plan.choose_resharding(SEVEN_BILLION, plan.workload(args), args, padding_free=False).reshards != keeps


@pytest.mark.parametrize(
    ("words", "config", "expected"),
    [
        ("full_shard auto_wrap", None, None),
        ("shard_grad_op auto_wrap", None, False),
        ("full_shard auto_wrap", '{"fsdp_reshard_after_forward": false}', False),
        ("full_shard auto_wrap", {"reshard_after_forward": True}, True),
        ("shard_grad_op auto_wrap", {"reshard_after_forward": True}, True),
    ],
)
def test_what_the_command_line_says_about_resharding_stands(monkeypatch, tmp_path, words, config, expected):
    args = under_fsdp(monkeypatch, tmp_path, fsdp=words, fsdp_config=config)
    before = dict(args.fsdp_plugin_args)
    made = plan.make_plan(train.ModelArguments(), train.DataArguments("x.json"), args, make_model())
    assert args.fsdp_plugin_args == before, "decided, not yet written"
    plan.write(args, made.settings)
    said = [note for note in made.notes if note.startswith("FSDP2 keeps")]
    if expected is None:
        assert before["reshard_after_forward"] is True
        assert said
        assert args.fsdp_plugin_args["reshard_after_forward"] is made.work.reshards is False
    else:
        assert not said
        assert args.fsdp_plugin_args["reshard_after_forward"] == before["reshard_after_forward"] == expected
        assert made.work.reshards == expected


def under_fsdp(monkeypatch, tmp_path, **flags):
    """Arguments as on a GPU with plenty of memory, in a process that joins no world."""
    monkeypatch.setattr(sharding, "can_shard", lambda: True)
    monkeypatch.setattr(sharding, "_join_world", lambda: None)
    monkeypatch.setattr(memory, "free_memory", lambda device: (2**50, 2**50))
    return train.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)


def test_plan_is_frozen_and_prints_itself_in_a_few_lines(monkeypatch, tmp_path):
    args = under_fsdp(monkeypatch, tmp_path, fsdp="full_shard auto_wrap", eval_strategy="epoch")
    made = plan.make_plan(train.ModelArguments(), train.DataArguments("x.json"), args, make_model())
    first, second, *notes = str(made).splitlines()
    assert first == "plan: FSDP2 on 1 process(es), float32, all weights trained,"
    assert second == "      passes of at most 2,048 tokens with shared prefixes, activations saved, layers not compiled"
    assert [note.partition(":")[0] for note in notes] == [
        "--eval_strategy epoch",
        "FSDP2 wraps LlamaDecoderLayer (the model's own layer)",
        "memory",
        notes[-1],
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.padding_free = False


def test_only_write_assigns_to_the_trainers_arguments(root):
    found = [
        f"{os.path.relpath(path, root)}:{line}"
        for path in (
            os.path.join(root, "train.py"),
            *glob.glob(os.path.join(root, "alpaca/training/**/*.py"), recursive=True),
        )
        for line in changes_to_args(path)
    ]
    assert found == []


def changes_to_args(path: str) -> list[int]:
    """Lines where a file changes `args`, `self.args` or a TrainingArguments' self: by =, del, setattr or a method."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    own = {
        n for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and c.name.endswith("Arguments") for n in ast.walk(c)
    }
    allowed = {n for f in tree.body if getattr(f, "name", "") == "write" for n in ast.walk(f)}

    def is_args(node) -> bool:
        return (
            (isinstance(node, ast.Name) and (node.id == "args" or (node.id == "self" and node in own)))
            or (isinstance(node, ast.Attribute) and (node.attr == "args" or is_args(node.value)))
            or (isinstance(node, ast.Subscript) and is_args(node.value))
        )

    lines = []
    for node in ast.walk(tree):
        if node in allowed:
            continue
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            changed = is_args(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            changed = node.func.id in ("setattr", "delattr") and is_args(node.args[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed = node.func.attr in ("update", "pop", "setdefault", "append", "clear") and is_args(node.func.value)
        else:
            changed = False
        if changed:
            lines.append(node.lineno)
    return lines


def test_changes_to_args_are_found(tmp_path):
    (tmp_path / "code.py").write_text(
        "args.bf16 = False\nself.args.x |= 1\nargs.fsdp_config['a'] = 1\nargs.fsdp_config.update(a=1)\n"
        "setattr(args, 'x', 1)\ndel args.x\nargs = 1\nself.other = args.x\n"
        "class TrainingArguments:\n    def f(self):\n        self.x = 1\n"
    )
    assert changes_to_args(str(tmp_path / "code.py")) == [1, 2, 3, 4, 5, 6, 11]


@pytest.mark.parametrize(("layers_that_fit", "forward_passes"), [(2.1, 1), (1.5, 2)], ids=["plenty", "too little"])
def test_activations_are_recomputed_where_the_estimate_has_no_room_for_them(
    trainee, tmp_path, monkeypatch, capsys, layers_that_fit, forward_passes
):
    plan = memory.Workload("none", 1, 1, batch=2, length=256, half=False)
    shape = memory.model_shape(AutoModelForCausalLM.from_pretrained(trainee[1]), plan)
    room = memory.estimate(memory.replace(shape, layers=layers_that_fit), plan)[0]
    monkeypatch.setattr(memory, "host_memory", lambda: int(room) + 1)
    load, calls = train.load_for_training, {"layer": 0, "lm_head": 0}

    def load_and_count(*args):
        model = load(*args)
        for name, module in (("layer", model.model.layers[0].mlp), ("lm_head", model.lm_head)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        return model

    monkeypatch.setattr(train, "load_for_training", load_and_count)
    flags = ["--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, *flags])
    train.train()
    said = "going on as with --gradient_checkpointing True" in capsys.readouterr().out
    assert said == (forward_passes == 2)
    assert calls["layer"] == forward_passes * calls["lm_head"] > 0


def test_batch_that_no_example_is_left_for_is_refused(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=r"--dataloader_drop_last True drops all of the 32 example\(s\)"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", "--dataloader_drop_last", "True", batch=64)
