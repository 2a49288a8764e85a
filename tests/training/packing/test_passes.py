"""The layout of a step: prefixes worth sharing, documents, passes."""

import os

import pytest
import sentencepiece
import torch
from packing_models import (
    collate,
    gradients,
    make_model,
    micro_batches,
    packed_loss,
    worst,
)

from alpaca.prompts import format_prompt
from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes as packing_passes


def test_passes_hold_every_document_once_within_their_tokens(examples):
    documents = packing_passes.documents_of(collate(examples), 1.0, packing_passes.find_prefixes(examples, 16))
    longest = max(len(example["input_ids"]) for example in examples)
    passes = packing_passes.make_passes(documents, 2 * longest)
    assert all(one.input_ids.shape[1] <= 2 * longest for one in passes)
    assert sum(len(one.targets) for one in passes) == sum(int((d.labels != -100).sum()) for d in documents)
    shared = sum(sum(len(p) for p in {d.prefix for d in documents}) for _ in passes)
    assert sum(one.input_ids.shape[1] for one in passes) <= shared + sum(
        len(d.input_ids) - len(d.prefix) for d in documents
    )


def test_a_document_longer_than_a_pass_gets_one_of_its_own(examples):
    passes = packing_passes.make_passes(packing_passes.documents_of(collate(examples[:3]), 1.0), 10)
    assert sorted(one.input_ids.shape[1] for one in passes) == sorted(len(e["input_ids"]) for e in examples[:3])


def test_a_tasks_prefix_ends_before_a_merged_token():
    def example(*ids):
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * (len(ids) - 1) + [ids[-1]])}

    # 10 11 12 open every prompt; in the last one the third character became part of token 99.
    plain = [example(10, 11, 12, 20 + i, 50, 2) for i in range(8)]
    assert packing_passes.find_prefixes(plain, 8) == [(10, 11, 12)]
    merged = packing_passes.documents_of(collate([*plain, example(10, 11, 99, 50, 2)]), 1.0, [(10, 11, 12)])
    assert [document.prefix for document in merged] == [(10, 11, 12)] * 8 + [()]


def test_a_prefix_never_reaches_the_token_that_predicts_the_answer():
    ids = torch.tensor([10, 11, 12, 13, 2])
    examples = [{"input_ids": ids, "labels": torch.tensor([-100, -100, -100, 13, 2])} for _ in range(6)]
    assert packing_passes.find_prefixes(examples, 6) == [(10, 11)]


def test_two_templates_give_two_prefixes_and_a_common_word_none(examples):
    prefixes = packing_passes.find_prefixes(examples, 16)
    starts = [{tuple(e["input_ids"][: len(p)].tolist()) == p for e in examples} for p in prefixes]
    assert starts == [{True, False}] * 2
    assert packing_passes.find_prefixes(examples, 1) == []  # alone in its pass, an example shares with nobody


def test_llamas_tokens_have_prefixes_of_29_and_39(reference_dir):
    from alpaca.records import load_examples as load_records

    path = os.path.join(reference_dir, "tokenizers", "llama", "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=path)
    found = []
    for record in load_records(os.path.join(reference_dir, "fidelity", "alpaca_256.json")):
        prompt = [1, *tokenizer.encode(format_prompt(record))]
        ids = torch.tensor(prompt + tokenizer.encode(record["output"]) + [2])
        found.append({"input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < len(prompt), -100, ids)})
    prefixes = packing_passes.find_prefixes(found, 32)
    assert sorted(map(len, prefixes)) == [29, 39]


@pytest.mark.parametrize("count", [3, 40], ids=["split", "more passes than documents"])
def test_passes_added_to_keep_step_with_other_ranks_change_nothing(examples, reference, count):
    expected_loss, expected = reference("llama", "micro_batch")
    model = make_model()
    packed_model.install(model)
    batches = micro_batches(examples, 4)
    loss, passes = packed_loss(model, batches, "micro_batch", True, 100_000, agree=lambda passes: count)
    assert len(passes) == count
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7
