"""train.py as its user drives it: the original's losses, the seed's commands, runs that survive, models that answer."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import documented
import pytest
import sentencepiece
import torch
from toy_tokenizers import IGNORE, LLAMA, load, original_preprocess, ours, variant
from training_runs import arguments, assert_same, free_port, launch, logged, losses, run, start, wait_for, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca.prompts import PROMPT_DICT, format_prompt
from alpaca.training import data as training_data
from alpaca.training import saving
from alpaca.training.trainer import AlpacaTrainer

pytest_plugins = ["toy_tokenizers", "training_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and labels


def test_ids_and_labels_are_the_originals_with_sentencepiece(llama_dir, traps):
    tokenizer, notes = load(llama_dir)
    assert any("double spaces" in note for note in notes), "the trap must be there to be fixed"
    reference = sentencepiece.SentencePieceProcessor(model_file=os.path.join(llama_dir, "tokenizer.model"))
    sources, targets = [format_prompt(e) for e in traps], [e["output"] for e in traps]
    # EOS is a token of its own, never text, to 4.28's tokenizer.
    expected = original_preprocess(
        sources,
        [t + "</s>" for t in targets],
        lambda text: [1, *reference.encode(text.removesuffix("</s>")), *([2] if text.endswith("</s>") else [])],
    )
    assert ours(train.preprocess(sources, targets, tokenizer)) == expected


def test_ids_and_labels_are_the_originals_with_byte_level_bpe(opt_dir, traps):
    tokenizer, _ = load(opt_dir)
    sources, targets = [format_prompt(e) for e in traps], [e["output"] for e in traps]
    one_at_a_time = original_preprocess(
        sources, [t + tokenizer.eos_token for t in targets], lambda text: tokenizer(text)["input_ids"]
    )
    assert ours(train.preprocess(sources, targets, tokenizer)) == one_at_a_time
    assert one_at_a_time[0][0][0] == tokenizer.bos_token_id


def test_token_that_straddles_prompt_and_answer_is_not_learned(llama_dir):
    tokenizer, _ = load(llama_dir)
    source = PROMPT_DICT["prompt_no_input"].replace("{instruction}", "List.")
    [(ids, labels)] = ours(train.preprocess([source], ["- one"], tokenizer))
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert tokenizer.convert_ids_to_tokens(ids)[first - 1] == ":-"
    assert tokenizer.decode(ids[first:]) == "one</s>"


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_separate_boundary_learns_all_of_an_answer_after_the_prompt_of_inference(request, kind, traps):
    """LLaMA's toy joins ":" and "-"; OPT's is byte-level. Both get the very prompt tokens that inference sends."""
    tokenizer, _ = load(request.getfixturevalue(f"{kind}_dir"))
    sources, targets = [format_prompt(e) for e in traps], [e["output"] for e in traps]
    found = ours(train.preprocess(sources, targets, tokenizer, "separate"))
    for (ids, labels), source, target in zip(found, sources, targets, strict=True):
        prompt = tokenizer(source)["input_ids"]
        if len(prompt) >= 512 or len(ids) == 512:
            continue  # cut
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]
        assert tokenizer.decode(ids[len(prompt) :]) == target + tokenizer.eos_token
        assert tokenizer.decode(ids, skip_special_tokens=True) == source + target, "no space in between"


def test_boundaries_differ_only_where_a_token_joins_prompt_and_answer(llama_dir):
    tokenizer, _ = load(llama_dir)
    source = PROMPT_DICT["prompt_no_input"].replace("{instruction}", "List.")
    joint, apart = (ours(train.preprocess([source] * 2, ["- one", "one"], tokenizer, b)) for b in ("joint", "separate"))
    assert joint[1] == apart[1], "nothing joins"
    prompt = tokenizer(source)["input_ids"]
    names = tokenizer.convert_ids_to_tokens
    assert names(joint[0][0][len(prompt) - 1]) == ":-"
    assert names(apart[0][0][len(prompt) - 1 : len(prompt) + 1]) == [":", "-"]
    assert next(label for label in apart[0][1] if label != IGNORE) == tokenizer.convert_tokens_to_ids("-")
    assert joint[0][1][: len(prompt)] == apart[0][1][: len(prompt)] == [IGNORE] * len(prompt)


def test_start_of_a_run_says_how_many_answers_the_boundary_touches(llama_dir, traps, tmp_path, capsys):
    tokenizer, _ = load(llama_dir)
    (tmp_path / "data.json").write_text(json.dumps([{**e, "output": e["output"]} for e in traps]))
    datasets = [
        train.SupervisedDataset(str(tmp_path / "data.json"), tokenizer, boundary=b) for b in ("joint", "separate")
    ]
    reference = sentencepiece.SentencePieceProcessor(model_file=os.path.join(llama_dir, "tokenizer.model"))
    prompts = [(format_prompt(e), reference.encode(format_prompt(e))) for e in traps]
    joins = [reference.encode(p + e["output"])[: len(ids)] != ids for (p, ids), e in zip(prompts, traps, strict=True)]
    touched = sum(joins)
    assert touched >= 4
    assert [training_data.straddled(dataset, tokenizer) for dataset in datasets] == [touched, 0]
    training_data.describe_data({"train_dataset": datasets[0], "eval_dataset": None}, tokenizer)
    said = f"{touched:,} answer(s) of {len(traps):,} begin inside the prompt's last token"
    assert said in capsys.readouterr().out
    training_data.describe_data({"train_dataset": datasets[1], "eval_dataset": None}, tokenizer)
    assert "begin inside" not in capsys.readouterr().out


def test_tokenizer_without_bos_gets_none(opt_dir, tmp_path, traps):
    tokenizer, _ = load(variant(opt_dir, tmp_path / "no_bos", add_bos_token=False, bos_token=None))
    sources, targets = [format_prompt(traps[0])], [traps[0]["output"]]
    [(ids, _)] = ours(train.preprocess(sources, targets, tokenizer))
    assert tokenizer.decode(ids) == sources[0] + targets[0] + "</s>"


def test_eos_that_the_tokenizer_adds_itself_is_not_doubled(llama_dir, tmp_path):
    tokenizer, _ = load(variant(llama_dir, tmp_path / "eos", add_eos_token=True))
    assert tokenizer("a")["input_ids"][-1] == 2
    [(ids, _)] = ours(train.preprocess(["a"], ["b"], tokenizer))
    assert ids.count(2) == 1


def test_lengths_are_true_where_pad_is_eos(opt_dir, tmp_path, traps):
    tokenizer, _ = load(variant(opt_dir, tmp_path / "pad_eos", pad_token="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "what a tokenizer has is kept"
    fields = train.preprocess([format_prompt(e) for e in traps[:3]], [e["output"] for e in traps[:3]], tokenizer)
    instances = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    batch = train.DataCollatorForSupervisedDataset(tokenizer)(instances)
    for i, ids in enumerate(fields["input_ids"]):
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (batch["input_ids"].shape[1] - len(ids))
        assert batch["labels"][i][len(ids) - 1] == tokenizer.eos_token_id, "EOS is learned although it is the padding"
        assert (batch["labels"][i][len(ids) :] == IGNORE).all()


def test_truncated_examples_lose_eos(llama_dir):
    tokenizer, _ = load(llama_dir, limit=40)
    (short, _), (long, _) = ours(train.preprocess(["one ", "two "], ["short", "long " * 50], tokenizer))
    assert short[-1] == tokenizer.eos_token_id
    assert len(long) == 40
    assert tokenizer.eos_token_id not in long


def test_real_llama_tokenizer_gives_sentencepieces_ids_on_real_records(reference_dir, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(os.path.join(reference_dir, "tokenizers", "llama"), folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    tokenizer, _ = load(str(folder))
    assert len(tokenizer) == 32001
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    with open(os.path.join(reference_dir, "data", "alpaca_en_demo.json"), encoding="utf-8") as file:
        data = json.load(file)
    sources, targets = [format_prompt(e) for e in data], [e["output"] for e in data]
    expected = original_preprocess(
        sources,
        [t + "</s>" for t in targets],
        lambda text: [1, *reference.encode(text.removesuffix("</s>")), *([2] if text.endswith("</s>") else [])],
    )
    found = ours(train.preprocess(sources, targets, tokenizer))
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a[1] != b[1]]
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def plain_loop(model_dir: str, data: str, batch: int, accumulation: int) -> list[float]:
    """The original's training in plain PyTorch: micro-batch means averaged, AdamW, cosine with warmup, clipping."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    if model.config.model_type == "llama":
        spm = sentencepiece.SentencePieceProcessor(model_file=os.path.join(model_dir, "tokenizer.model"))
        model.resize_token_embeddings(701, mean_resizing=False)
        for rows in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
            rows[700] = rows[:700].mean(dim=0)
    else:
        bpe = AutoTokenizer.from_pretrained(model_dir)

    def encode(text: str) -> list[int]:
        return [1, *spm.encode(text)] if model.config.model_type == "llama" else bpe(text)["input_ids"]

    with open(data, encoding="utf-8") as file:
        examples = json.load(file)
    rows = []
    for example in examples:
        prompt = format_prompt(example)
        rows.append(([*encode(prompt + example["output"]), 2], len(encode(prompt))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    steps, found = len(rows) // (batch * accumulation), []
    for step in range(steps):
        warmup = -(-steps * 3 // 100)
        progress = (step - warmup) / max(1, steps - warmup)
        scale = step / warmup if step < warmup else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        optimizer.param_groups[0]["lr"] = 1e-3 * scale
        total = 0.0
        for micro in range(accumulation):
            start = (step * accumulation + micro) * batch
            parts = []
            for ids, prompt in rows[start : start + batch]:  # one at a time: no padding to go wrong
                logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
                parts.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="none"))
            loss = torch.cat(parts).mean() / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_losses_are_a_plain_loops(models, data, tmp_path, monkeypatch, kind):
    more = ("--train_sampling_strategy", "sequential", "--padding_free", "false")
    found = run(monkeypatch, models[kind], data, tmp_path / "out", *more)
    assert found == pytest.approx(plain_loop(models[kind], data, 4, 2), abs=2e-5)


def test_padded_losses_are_the_originals(reference_dir, tmp_path, monkeypatch):
    """Twelve steps of the 32; the run without padding goes through all of them, below."""
    fidelity = os.path.join(reference_dir, "fidelity")
    subprocess.run(
        [sys.executable, os.path.join(fidelity, "build_tiny.py"), "llama", str(tmp_path / "model")], check=True
    )
    with open(os.path.join(fidelity, "reference_lr1e-3.json")) as file:
        reference = json.load(file)
    with open(os.path.join(fidelity, "alpaca_256.json"), encoding="utf-8") as file:
        examples = json.load(file)
    ordered = tmp_path / "ordered.json"
    ordered.write_text(json.dumps([examples[i] for i in reference["order"]]))

    def stop_early(self, args, state, control, **kwargs):
        control.should_log, control.should_training_stop = True, state.global_step == 12
        return control

    monkeypatch.setattr("transformers.trainer_callback.DefaultFlowCallback.on_step_end", stop_early)
    more = ("--train_sampling_strategy", "sequential", "--padding_free", "false", "--seed", "42")
    found = run(monkeypatch, str(tmp_path / "model"), str(ordered), tmp_path / "out", *more)
    micro = reference["micro"]
    exact = [micro[i] + micro[i + 1] for i in range(0, len(micro), 2)]
    assert len(found) == 12
    assert found == pytest.approx(exact[:12], abs=1e-4)
    assert found == pytest.approx([step["loss"] for step in reference["steps"] if "loss" in step][:12], abs=1e-4)
    assert weights(tmp_path / "out")["lm_head.weight"].shape[0] == 32001


def test_global_reduction_is_the_same_however_a_batch_is_split(models, data, tmp_path, monkeypatch):
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        split = {"batch": batch, "accumulation": accumulation}
        more = ("--loss_reduction", "global", "--padding_free", "false")
        run(monkeypatch, models["llama"], data, tmp_path / str(batch), *more, **split)
    assert_same(tmp_path / "4", tmp_path / "8", 1e-5)
    assert_same(tmp_path / "2", tmp_path / "8", 1e-5)


def test_two_processes_train_as_one(models, data, tmp_path, monkeypatch, root):
    """Data-parallel, FSDP2, FSDP2 with offload and ZeRO-3 with offload against a single process, in one launch."""
    with open(os.path.join(root, "configs", "default_offload_opt_param.json")) as file:
        zero3 = json.load(file)
    # DeepSpeed's own Adam for the CPU is compiled for a minute, once for each such folder; PyTorch's is there.
    zero3["optimizer"]["params"]["torch_adam"] = "TORCH_EXTENSIONS_DIR" not in os.environ
    zero3["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False  # as in 2023's file
    zero3["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto"}}  # likewise
    for part in ("offload_optimizer", "offload_param"):
        zero3["zero_optimization"][part]["pin_memory"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap"]
    ways = {
        "plain": ["--plain", *fsdp, "LlamaDecoderLayer"],
        "fsdp": [*fsdp, "LlamaDecoderLayer", "--padding_free", "false"],
        "opt": [*fsdp, "OPTDecoderLayer"],
        "offload": ["--fsdp", "full_shard auto_wrap offload", "--save_strategy", "steps", "--save_steps", "2"],
        "resumed": ["--fsdp", "full_shard auto_wrap offload"],
        "zero3": ["--deepspeed", str(tmp_path / "zero3.json")],
        "lora": [*fsdp, "OPTDecoderLayer", "--lora_r", "4"],
    }
    ways["resumed"] += ["--resume_from_checkpoint", str(tmp_path / "offload" / "checkpoint-2")]
    kinds = {name: models["opt" if name == "opt" else "llama"] for name in ways}
    commands = [arguments(kinds[name], data, tmp_path / name, *w, batch=2) for name, w in ways.items()]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = launch(os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    run(monkeypatch, models["llama"], data, tmp_path / "one", batch=2, accumulation=4)
    for name in ("plain", "fsdp", "offload", "resumed", "zero3"):
        assert_same(tmp_path / name, tmp_path / "one", 1e-5)
    run(monkeypatch, models["opt"], data, tmp_path / "one_opt", batch=2, accumulation=4)
    assert_same(tmp_path / "opt", tmp_path / "one_opt", 1e-5)
    lines = done.stdout.splitlines()
    assert sum("accelerate shards only across GPUs; going on data-parallel" in line for line in lines) == 1
    assert "FSDP2 wraps LlamaDecoderLayer (as asked)" in lines
    assert "FSDP2 wraps LlamaDecoderLayer (OPTDecoderLayer is not in this model)" in lines
    assert any("WarmupDecayLR gives way to --lr_scheduler_type cosine" in line for line in lines)
    assert any("stage3_gather_16bit_weights_on_model_save set to true" in line for line in lines)
    assert os.path.isfile(tmp_path / "lora" / "adapter_model.safetensors")
    assert losses(tmp_path / "lora")[-1] < losses(tmp_path / "lora")[0]
    assert "deprecated. Please use `torch.distributed" not in done.stderr, "said of DeepSpeed, many times a step"


def readme_commands(root: str) -> list[list[str]]:
    """The train.py commands of README.md and docs/training.md, as argument lists."""
    return [shlex.split(c) for c in documented.commands("README.md", "docs/training.md") if "train.py" in c]


def toy(command: list[str], models: dict[str, str], data: str, output_dir: str) -> list[str]:
    """A README command with a toy's model, data and folder; every other flag stays as printed."""
    command = list(command[command.index("train.py") + 1 :])
    kind = "opt" if "opt" in command[command.index("--model_name_or_path") + 1] else "llama"
    for flag, value in {"model_name_or_path": models[kind], "data_path": data, "output_dir": output_dir}.items():
        command[command.index(f"--{flag}") + 1] = value
    return command


def test_every_command_of_the_readme_runs(models, data, tmp_path, root):
    commands = readme_commands(root)
    trainings = [c for c in commands if c[0] == "torchrun" and not any(part.startswith("--nnodes") for part in c)]
    assert len(trainings) >= 6
    toys = [["--plain", *toy(c, models, data, str(tmp_path / str(i)))] for i, c in enumerate(trainings)]
    (tmp_path / "commands.json").write_text(json.dumps(toys))
    done = launch(os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json"), cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    for i in range(len(trainings)):
        assert len(losses(tmp_path / str(i))) > 0
    [merge] = [c for c in commands if "merge" in c]
    assert set(merge[merge.index("merge") + 1 :: 2]) == {"--adapter_dir", "--output_dir"}


def test_two_machines_meet_on_loopback(models, data, tmp_path, root):
    """The README's command for several machines, as two torchrun agents with a process each."""
    [command] = [c for c in readme_commands(root) if any(part.startswith("--nnodes") for part in c)]
    launcher, port = command[1 : command.index("train.py")], free_port()
    for flag, value in {"--nproc_per_node": "1", "--rdzv_endpoint": f"127.0.0.1:{port}"}.items():
        launcher = [f"{flag}={value}" if part.startswith(flag + "=") else part for part in launcher]
    agents = []
    for rank in range(2):
        parts = [f"--node_rank={rank}" if part.startswith("--node_rank=") else part for part in launcher]
        argv = [sys.executable, "-m", "torch.distributed.run", *parts, "--local_addr=127.0.0.1", "train.py"]
        argv += [*toy(command, models, data, str(tmp_path / "out")), "--num_train_epochs", "1"]
        agents.append(
            subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        )  # fmt: skip
    outputs = [agent.communicate(timeout=280)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert len(losses(tmp_path / "out")) == 1
    assert weights(tmp_path / "out")


def test_run_killed_in_a_save_continues_exactly(models, data, tmp_path, monkeypatch, root):
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")
    uninterrupted = run(monkeypatch, models["opt"], data, tmp_path / "whole")
    out = tmp_path / "killed"
    process = start(arguments(models["opt"], data, out, *saves), root)
    wait_for(lambda: os.path.isdir(out / saving.STAGING / "checkpoint-3"), process)
    process.kill()
    process.communicate()
    if os.path.isdir(out / "checkpoint-3"):  # the save was quicker than the signal: put it back to half a save
        os.makedirs(out / saving.STAGING, exist_ok=True)
        os.rename(out / "checkpoint-3", out / saving.STAGING / "checkpoint-3")
    assert saving.last_checkpoint(str(out)).endswith("checkpoint-2")
    assert run(monkeypatch, models["opt"], data, out, *saves, "--resume_from_checkpoint", "True") == uninterrupted
    assert_same(out, tmp_path / "whole", 1e-7)
    assert not os.path.exists(out / saving.STAGING)


def test_sigterm_saves_and_says_how_to_continue(models, data, tmp_path, monkeypatch, root):
    out = tmp_path / "out"
    process = start(arguments(models["llama"], data, out, "--max_steps", "500"), root)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    [line] = [line for line in output.splitlines() if line.startswith("SIGTERM")]
    step = int(re.search(r"checkpoint-(\d+); the same command with --resume_from_checkpoint True", line).group(1))
    assert 1 <= step < 500
    more = ("--max_steps", step + 1, "--resume_from_checkpoint", "True")
    assert len(run(monkeypatch, models["llama"], data, out, *more)) == step + 1
    assert not [line for line in lines if "openai" in line]


def test_sigterm_after_the_last_step_waits_for_the_model(models, data, tmp_path, monkeypatch):
    """The original's command saves nothing before its end: a signal then would take the whole run with it."""
    save, evaluate = AlpacaTrainer.save_verified, AlpacaTrainer.evaluate
    there = []

    def save_under_fire(self, *shapes):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(self, *shapes)

    def look_and_evaluate(self, *args, **kwargs):
        there.append(os.path.isfile(tmp_path / "out" / "model.safetensors"))
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(AlpacaTrainer, "save_verified", save_under_fire)
    monkeypatch.setattr(AlpacaTrainer, "evaluate", look_and_evaluate)
    previous = signal.signal(signal.SIGTERM, lambda *args: pytest.fail("the signal ends the run before its save"))
    try:
        run(monkeypatch, models["llama"], data, tmp_path / "out", "--eval_fraction", "0.25")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert there == [True], "evaluated when the model is on the disk, and not before"


def test_saved_model_answers_what_it_learned(models, data, tmp_path, monkeypatch, capsys):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:4]
    (tmp_path / "four.json").write_text(json.dumps(examples))
    more = ("--max_steps", "150", "--learning_rate", "1e-2", "--logging_steps", "50", "--report_to", "tensorboard")
    more += ("--eval_data_path", str(tmp_path / "four.json"))
    out = tmp_path / "out"
    run(monkeypatch, models["llama"], str(tmp_path / "four.json"), out, *more, batch=4, accumulation=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    for example in examples:
        content = example["instruction"] + (f"\n\n### Input:\n{example['input']}" if example["input"] else "")
        chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], return_tensors="pt")
        assert chat["input_ids"].tolist() == tokenizer([format_prompt(example)])["input_ids"]
        answer = model.generate(**chat, max_new_tokens=200, do_sample=False)[0, chat["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == example["output"] + "</s>"
    printed = capsys.readouterr().out
    assert f"--- answer (learned):\n{examples[0]['output']}</s>" in printed
    for row in ("tokens/s", "MFU", "peak memory", "saved and reloaded 21 tensors"):
        assert row in printed
    with open(out / "trainer_state.json") as file:
        history = json.load(file)["log_history"]
    speed = {"tokens_per_s", "useful_tokens_per_s", "mfu", "hardware_mfu", "peak_memory_gib", "hours_left"}
    assert all(speed <= entry.keys() for entry in history if "loss" in entry)
    assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) < 0.1
    assert os.stat(out / "model.safetensors").st_mode == os.stat(out / "config.json").st_mode, "others may serve it too"
    assert list(out.rglob("events.out.tfevents.*"))


def test_unknown_flag_is_refused_before_anything_runs(root):
    command = [sys.executable, "train.py", "--data_path", "x", "--warmup_ration", "0.1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --warmup_ration; did you mean --warmup_ratio?\n")


def test_help_starts_with_the_commands_and_explains_every_flag(root):
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, _, flags = done.stdout.partition("options:")
    assert "    torchrun --nproc_per_node=4 --master_port=29500 train.py \\\n" in head
    assert "python train.py merge --adapter_dir OUT --output_dir MERGED" in head
    for name in ("lora_r", "data_path", "fsdp_transformer_layer_cls_to_wrap", "warmup_ratio", "learning_rate"):
        assert f"  --{name} " in flags


def test_torchruns_report_ends_with_what_went_wrong(root):
    done = launch(os.path.join(root, "train.py"), "--warmup_ration", "0.1")
    assert done.returncode == 1, "torchrun's own"
    assert done.stderr.count("\nerror: unknown flag --warmup_ration") <= 1, "not once for each rank"
    assert re.search(
        r"traceback : error: unknown flag --warmup_ration; did you mean --warmup_ratio\?\n=+\n$", done.stderr
    )


def test_evaluation_without_data_is_said_and_left_out(models, data, tmp_path, monkeypatch, capsys):
    more = ("--evaluation_strategy", "steps", "--eval_steps", "2", "--eval_on_start", "True", "--fp16", "True")
    run(monkeypatch, models["llama"], data, tmp_path / "none", *more)
    printed = capsys.readouterr().out
    assert "no --eval_data_path or --eval_fraction; not evaluating" in printed
    assert (
        torch.accelerator.is_available()
        or "--fp16: this machine (no GPU) has no float16 arithmetic; going on in float32" in printed
    )
    more = ("--eval_strategy", "epoch", "--eval_fraction", "0.25")
    run(monkeypatch, models["llama"], data, tmp_path / "some", *more)
    assert "data: 24 examples, 8 to evaluate on" in capsys.readouterr().out


def test_losses_are_those_of_the_original_over_32_steps(reference_dir, tmp_path, root):
    fidelity = os.path.join(reference_dir, "fidelity")
    model = str(tmp_path / "model")
    subprocess.run([sys.executable, os.path.join(fidelity, "build_tiny.py"), "llama", model], check=True)
    with open(os.path.join(fidelity, "reference_lr1e-3.json"), encoding="utf-8") as file:
        original = json.load(file)
    with open(os.path.join(fidelity, "alpaca_256.json"), encoding="utf-8") as file:
        records = json.load(file)
    (tmp_path / "ordered.json").write_text(json.dumps([records[i] for i in original["order"]]))
    flags = f"--model_name_or_path {model} --data_path {tmp_path}/ordered.json --output_dir {tmp_path}/out😀 "
    flags += (
        "--num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-3 "
    )
    flags += "--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --seed 42 --logging_steps 1 "
    flags += "--save_strategy no --report_to none --disable_tqdm True --train_sampling_strategy sequential "
    run = subprocess.run(
        [sys.executable, os.path.join(root, "train.py"), *flags.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "out\\U0001f600" in run.stdout, "what a terminal lacks is escaped and ends nothing"
    assert "padding-free: passes of at most" in run.stdout
    assert "shared prefixes of 29 and 39 tokens" in run.stdout
    micro = original["micro"]
    steps = [micro[i] + micro[i + 1] for i in range(0, len(micro), 2)]  # each was divided by 2 already
    assert len(steps) == 32
    assert logged(tmp_path / "out😀") == pytest.approx(steps, abs=1e-4)
