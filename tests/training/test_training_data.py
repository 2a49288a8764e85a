"""Instruction data on its way into training: wrong records, the token cache, examples with nothing to learn."""

import json
import re

import pytest
from toy_tokenizers import load, ours
from training_runs import run

import train
from alpaca.cli import UserError
from alpaca.prompts import format_prompt
from alpaca.training import data as training_data

pytest_plugins = ["toy_tokenizers", "training_runs"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"output": None}, "record 1: 'output' must be text, found NoneType None"),
        ({"output": " "}, "record 1: 'output' is empty"),
        ({"input": 7}, "record 1: 'input' must be text, found int 7"),
        ("output", "record 1: no 'output'; found the fields 'instruction', 'input'"),
    ],
)
def test_wrong_record_is_named(models, data, tmp_path, monkeypatch, broken, words):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:3]
    if isinstance(broken, str):
        del examples[1][broken]
    else:
        examples[1].update(broken)
    (tmp_path / "wrong.json").write_text(json.dumps(examples))
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=re.escape(words)):
        run(monkeypatch, models["llama"], str(tmp_path / "wrong.json"), tmp_path / "out")


def test_single_record_is_not_divided(models, data, tmp_path, monkeypatch):
    with open(data, encoding="utf-8") as file:
        (tmp_path / "one.json").write_text(json.dumps(json.load(file)[:1]))
    monkeypatch.setattr(train, "load_for_training", None)
    with pytest.raises(UserError, match=r"--eval_fraction 0.5: .*one.json has only one record"):
        run(monkeypatch, models["llama"], str(tmp_path / "one.json"), tmp_path / "out", "--eval_fraction", "0.5")


def test_batch_that_cannot_have_a_label_is_refused_before_weights_load(models, data, tmp_path, monkeypatch):
    with open(data, encoding="utf-8") as file:
        examples = json.load(file)[:2]
    examples[1]["instruction"] = "much too long " * 200
    monkeypatch.setattr(train, "load_for_training", None)
    for name, chosen, batch in (("all", examples[1:], 4), ("one", examples, 1)):
        (tmp_path / name).write_text(json.dumps(chosen))
        with pytest.raises(UserError, match=r"1 example\(s\) have nothing to learn.* records \d; a batch needs one"):
            run(monkeypatch, models["llama"], str(tmp_path / name), tmp_path / "out", batch=batch)
    more = ("--eval_data_path", tmp_path / "one", "--per_device_eval_batch_size", "1")  # its loss would be NaN
    with pytest.raises(UserError, match="one: 1 example"):
        run(monkeypatch, models["llama"], data, tmp_path / "out", *more)


def test_second_run_reads_tokens_from_the_cache(llama_dir, traps, tmp_path):
    tokenizer, _ = load(llama_dir)
    texts, calls = ([format_prompt(e) for e in traps], [e["output"] for e in traps]), []

    def tokenize(*arguments):
        calls.append(arguments)
        return train.preprocess(*arguments)

    first, second = (training_data.tokenize_once(tokenize, *texts, tokenizer, str(tmp_path)) for _ in range(2))
    assert ours(first) == ours(second) == ours(train.preprocess(*texts, tokenizer))
    assert len(calls) == 1
    training_data.tokenize_once(tokenize, texts[0][1:], texts[1][1:], tokenizer, str(tmp_path))
    assert len(calls) == 2, "other content has another name"


def test_a_run_tokenizes_through_preprocess(llama_dir, data, monkeypatch):
    """What users import and change is what the dataset calls, unless the cache holds its result."""
    tokenizer, _ = load(llama_dir, limit=77)
    seen, preprocess = [], train.preprocess
    monkeypatch.setattr(train, "preprocess", lambda *arguments: seen.append(arguments) or preprocess(*arguments))
    dataset = train.SupervisedDataset(data, tokenizer)
    [(sources, targets, _, boundary)] = seen
    assert boundary == "joint"
    assert len(sources) == len(targets) == len(dataset)
    assert targets[0].endswith(tokenizer.eos_token), "as the original called it"


def test_cache_that_others_may_write_into_is_not_read(llama_dir, traps, tmp_path, capsys):
    tokenizer, _ = load(llama_dir)
    texts = ([format_prompt(e) for e in traps[:5]], [e["output"] for e in traps[:5]])
    cache, calls = tmp_path / "cache", []

    def tokenize(*arguments):
        calls.append(arguments)
        return train.preprocess(*arguments)

    training_data.tokenize_once(tokenize, *texts, tokenizer, str(cache))
    assert cache.stat().st_mode & 0o777 == 0o700
    for mode, times in ((0o755, 1), (0o775, 2), (0o757, 3)):
        cache.chmod(mode)
        training_data.tokenize_once(tokenize, *texts, tokenizer, str(cache))
        assert len(calls) == times, oct(mode)
    assert capsys.readouterr().out.count("tokens not cached: others may write into") == 2


def test_each_boundary_has_its_own_tokens_in_the_cache(llama_dir, tmp_path):
    tokenizer, _ = load(llama_dir)
    texts = (["### Response:"], ["- one"])
    joint, separate = (
        training_data.tokenize_once(train.preprocess, *texts, tokenizer, str(tmp_path), boundary)
        for boundary in ("joint", "separate")
    )
    assert ours(joint) != ours(separate)
    assert len(list(tmp_path.iterdir())) == 2


def test_broken_cache_is_tokenized_again(llama_dir, traps, tmp_path):
    tokenizer, _ = load(llama_dir)
    texts = ([format_prompt(e) for e in traps[:5]], [e["output"] for e in traps[:5]])
    first = training_data.tokenize_once(train.preprocess, *texts, tokenizer, str(tmp_path))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    assert ours(training_data.tokenize_once(train.preprocess, *texts, tokenizer, str(tmp_path))) == ours(first)


def test_hub_id_without_a_network_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot load nobody/nothing from the Hub"):
        training_data.load_dataset_examples("nobody/nothing")
    with pytest.raises(UserError, match=r"cannot read data/missing.jsonl: No such file"):
        training_data.load_dataset_examples("data/missing.jsonl")
