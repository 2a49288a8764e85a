"""packing.py: the padded batch's loss and gradients, from passes without padding and with shared prefixes."""

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.cli import UserError
from alpaca.prompts import format_prompt
from alpaca.training import memory
from alpaca.training.packing import model as packed_model
from alpaca.training.packing import passes as packing_passes

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "llama": {**LLAMA_LIKE, "num_key_value_heads": 4},
    "llama, grouped queries": LLAMA_LIKE,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512, "dropout": 0.0},
    "mistral": {**LLAMA_LIKE, "sliding_window": None},
    "qwen2": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
}


def make_model(name: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.partition(",")[0], pad_token_id=1, **CONFIGS[name])
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    for parameter in model.parameters():  # biases and norms that start at 0 and 1 hide mistakes
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def examples(root) -> list[dict]:
    """16 seed tasks as tokens of 512 kinds: words, with their first letter merged into the space before."""
    return load_examples(root)


def load_examples(root: str, count: int = 16) -> list[dict]:
    with open(os.path.join(root, "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file][:count]
    records = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    texts = [(format_prompt(record), record["output"]) for record in records]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([p + o for p, o in texts]), model_writer=model, vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = []
    for prompt, output in texts:
        prompt, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + output)
        ids = torch.tensor([1, *whole, 2])[:200]
        labels = ids.clone()
        labels[: len(prompt) + 1] = packing_passes.IGNORE_INDEX
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(examples: list[dict]) -> dict:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=1),
        "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
    }


def micro_batches(examples: list[dict], size: int) -> list[dict]:
    return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def padded_loss(model, batches: list[dict], reduction: str) -> torch.Tensor:
    """The reference: the model's own padded forward pass and cross-entropy in float64."""
    sums, counts = [], []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        sums.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))
        counts.append((labels != packing_passes.IGNORE_INDEX).sum())
    if reduction == "global":
        return torch.stack(sums).sum() / torch.stack(counts).sum()
    return (torch.stack(sums) / torch.stack(counts)).mean()


def packed_loss(model, batches: list[dict], reduction: str, shared: bool, max_tokens: int, world_size: int = 1, **more):
    """Runs the passes of a step, each with its backward pass.

    `agree` goes to make_passes, `step_supervised` counts all ranks' tokens, `before(last)` is called before each pass.
    """
    before = more.pop("before", None)
    counts = [int((batch["labels"][:, 1:] != packing_passes.IGNORE_INDEX).sum()) for batch in batches]
    total = more.pop("step_supervised", sum(counts))
    flat = [example for batch in batches for example in unpadded(batch)]
    prefixes = packing_passes.find_prefixes(flat, len(flat)) if shared else []
    documents = []
    for batch, count in zip(batches, counts, strict=True):
        weight = packing_passes.token_weight(reduction, count, len(batches), total, world_size)
        documents += packing_passes.documents_of(batch, weight, prefixes)
    passes = packing_passes.make_passes(documents, max_tokens, **more)
    loss = 0.0
    for one in passes:
        if before:
            before(one is passes[-1])
        part = model(packed=one)
        part.backward()
        loss += part.detach()
    return loss, passes


def unpadded(batch: dict) -> list[dict]:
    return [{"input_ids": d.input_ids, "labels": d.labels} for d in packing_passes.documents_of(batch, 1.0)]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def worst(found: dict, expected: dict) -> float:
    """The largest relative error among all parameters' gradients."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)


@pytest.fixture(scope="module")
def reference(examples):
    """The padded path's loss and gradients, computed once for each model and reduction."""
    known = {}

    def compute(name: str, reduction: str):
        if (name, reduction) not in known:
            model = make_model(name)
            loss = padded_loss(model, micro_batches(examples, 4), reduction)
            loss.backward()
            known[name, reduction] = loss.item(), gradients(model)
        return known[name, reduction]

    return compute


ALL_WAYS = list(itertools.product(("micro_batch", "global"), (False, True), (100_000, 600)))
CASES = [(name, *way) for name in CONFIGS for way in (ALL_WAYS if name in ("llama", "opt") else ALL_WAYS[1:3])]


@pytest.mark.parametrize(("name", "reduction", "shared", "max_tokens"), CASES)
def test_loss_and_every_gradient_equal_the_padded_batches(examples, reference, name, reduction, shared, max_tokens):
    expected_loss, expected = reference(name, reduction)
    model = make_model(name)
    packed_model.install(model)
    loss, passes = packed_loss(model, micro_batches(examples, 4), reduction, shared, max_tokens)
    assert (len(passes) == 1) == (max_tokens == 100_000)
    assert shared == any(one.layout.copies for one in passes)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_two_ranks_under_fsdp2_get_the_padded_gradients(tmp_path, root):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python"]
    command += [sys.executable, os.path.join(root, "tests", "packing_ranks.py"), str(tmp_path / "errors.json")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "errors.json").read_text())
    assert {errors["passes"] > 1 for errors in results.values()} == {True, False}
    for case, errors in results.items():
        assert errors["loss"] < 1e-7, case
        assert errors["gradient"] < 1e-7, case


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


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("shared", [False, True], ids=["padding-free", "shared-prefix"])
def test_changing_one_document_changes_no_others_logits(examples, name, shared):
    model = make_model(name)
    packed_model.install(model)
    prefixes = packing_passes.find_prefixes(examples, 16) if shared else []
    changed = {**examples[5], "input_ids": examples[5]["input_ids"].clone()}
    changed["input_ids"][60:] = 7
    logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for batch in (examples, [*examples[:5], changed, *examples[6:]]):
        documents = packing_passes.documents_of(collate(batch), 1.0, prefixes)
        documents[5] = dataclasses.replace(documents[5], weight=5.0)
        (one,) = packing_passes.make_passes(documents, 10**6)
        model(packed=one)
    others = one.weights != 5.0
    assert torch.equal(logits[0][others], logits[1][others])
    assert not torch.equal(logits[0][~others], logits[1][~others])


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


def test_chunked_logits_give_the_same_loss_and_gradients(examples, reference, monkeypatch):
    monkeypatch.setattr(packed_model, "CHUNK_LOGITS", 512 * 50)
    expected_loss, expected = reference("llama", "global")
    model = make_model()
    packed_model.install(model)
    loss, _ = packed_loss(model, micro_batches(examples, 4), "global", True, 100_000)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_gradient_checkpointing_gives_the_same_gradients(examples, reference):
    expected_loss, expected = reference("llama", "micro_batch")
    model = make_model()
    packed_model.install(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
    assert worst(gradients(model), expected) < 1e-7


def test_a_padded_batch_gets_the_same_logits_as_before(examples):
    batch = collate(examples[:4])
    model = make_model()
    before = model(**batch)
    packed_model.install(model)
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_a_saved_config_names_no_attention_of_ours(tmp_path):
    model = make_model()
    packed_model.install(model)
    model.save_pretrained(tmp_path)
    assert packed_model.ATTENTION not in (tmp_path / "config.json").read_text()


def test_flex_attentions_mask_is_the_same_rule(examples):
    from torch.nn.attention.flex_attention import flex_attention

    documents = packing_passes.documents_of(collate(examples[:6]), 1.0, packing_passes.find_prefixes(examples, 16))
    (one,) = packing_passes.make_passes(documents, 10**6)
    states = [torch.randn(1, 4, one.input_ids.shape[1], 16) for _ in range(3)]
    expected = packed_model._per_document(*states, one.layout, None)
    found = flex_attention(*states, block_mask=one.layout.block_mask).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_gathered_keys_give_the_gradient_of_index_select(examples):
    documents = packing_passes.documents_of(collate(examples), 1.0, packing_passes.find_prefixes(examples, 16))
    layout = packing_passes.make_passes(documents, 10**6)[0].layout
    states = torch.randn(int(layout.cu_seqlens_q[-1]), 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(int(layout.cu_seqlens_k[-1]), 2, 4, dtype=torch.float64)
    gathered = packed_model._Gather.apply(states, layout.kv_index, layout.own, layout.copies)
    (found,) = torch.autograd.grad((gathered * weights).sum(), states)
    (expected,) = torch.autograd.grad((states[layout.kv_index] * weights).sum(), states)
    torch.testing.assert_close(found, expected)


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
    *chosen, why_not = packing_passes.choose(config, padding_free, shared_prefix)
    assert tuple(chosen) == expected
    assert reason in why_not
    assert bool(reason) == bool(why_not)


@pytest.mark.parametrize(
    ("kind", "settings", "padding_free", "shared_prefix", "message"),
    [
        ("gpt_neox", {}, "true", "auto", "--padding_free true: gpt_neox is not among"),
        ("llama", {}, "false", "true", "--shared_prefix true needs --padding_free"),
        ("opt", {"dropout": 0.1}, "true", "true", "--shared_prefix true: dropout is 0.1"),
        ("opt", {"dropout": 0.0, "attention_dropout": 0.1}, "true", "auto", "attention_dropout"),
        ("llama", {}, "maybe", "auto", "--padding_free must be auto, true or false, found 'maybe'"),
    ],
)
def test_true_is_refused_in_one_line_where_it_cannot_be(kind, settings, padding_free, shared_prefix, message):
    with pytest.raises(UserError, match=message) as error:
        packing_passes.choose(AutoConfig.for_model(kind, **settings), padding_free, shared_prefix)
    assert "\n" not in str(error.value)


def test_one_process_that_drives_several_gpus_goes_on_padded():
    """torch.nn.DataParallel would hand every GPU the whole pass."""
    *chosen, why_not = packing_passes.choose(AutoConfig.for_model("llama"), "auto", "auto", gpus=4)
    assert chosen == [False, False]
    assert "torchrun --nproc_per_node=4" in why_not
    with pytest.raises(UserError, match="--padding_free true: one process drives 4 GPUs"):
        packing_passes.choose(AutoConfig.for_model("llama"), "true", "auto", gpus=4)


def test_lora_dropout_counts_as_dropout():
    config = AutoConfig.for_model("llama")
    assert packing_passes.choose(config, "auto", "auto", lora_dropout=0.05)[:2] == (False, False)
    assert packing_passes.choose(config, "auto", "auto", lora_dropout=0.0)[:2] == (True, True)


def test_compiled_layers_give_the_same_gradients_from_few_graphs(examples, monkeypatch):
    from torch._dynamo.utils import counters

    def stand_in(query, key, value, *seqlens, scale, window_size):
        """Same shapes as varlen_attn, which no CPU runs; what it computes does not matter here."""
        return query + key.mean(0) + value.sum(0) / seqlens[-1]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    monkeypatch.setattr(packed_model, "_per_document", packed_model._varlen)
    prefixes = packing_passes.find_prefixes(examples, 16)
    plain, compiled = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    packed_model.install(plain)
    packed_model.install(compiled)
    torch._dynamo.reset()
    counters.clear()
    packed_model.compile_layers(compiled, backend="aot_eager")
    for chosen in (examples, examples[:7], examples[3:9], examples[1:], examples[4:]):
        (one,) = packing_passes.make_passes(packing_passes.documents_of(collate(chosen), 0.01, prefixes), 10**6)
        plain(packed=one).backward()
        compiled(packed=one).backward()
    assert worst(gradients(compiled), gradients(plain)) < 1e-6
    assert counters["graph_break"] == {}
    assert 1 <= counters["stats"]["unique_graphs"] <= 3  # not one per pass, and not one per layer


def test_varlen_attentions_arguments_mean_the_same_documents(examples, reference, monkeypatch):
    kinds = set()

    def varlen_by_definition(query, key, value, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, -1)):
        """What PyTorch documents, document by document: (-1, 0) is causal, the last query at the last key."""
        assert window_size == (-1, 0)
        kinds.update((query.dtype, key.dtype, value.dtype))
        outputs = []
        for i in range(len(cu_q) - 1):
            q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
            k, v = (states[cu_k[i] : cu_k[i + 1]].transpose(0, 1) for states in (key, value))
            assert q.shape[1] <= max_q
            assert k.shape[1] <= max_k
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
        return torch.cat(outputs, 1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    monkeypatch.setattr(packed_model, "_per_document", packed_model._varlen)
    for name in ("llama", "llama, grouped queries", "opt"):
        expected_loss, expected = reference(name, "micro_batch")
        model = make_model(name)
        packed_model.install(model)
        loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-7)
        assert worst(gradients(model), expected) < 1e-7
    assert kinds == {torch.float64}
    kinds.clear()
    model = make_model(dtype=torch.float32)
    packed_model.install(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = packed_loss(model, micro_batches(examples, 4), "micro_batch", True, 600)
    assert kinds == {torch.bfloat16}
    assert loss.item() == pytest.approx(reference("llama", "micro_batch")[0], rel=1e-2)


def test_a_world_of_one_under_fsdp2_holds_the_masters_of_adamw(examples, monkeypatch):
    """bfloat16 compute, float32 masters: what AdamW does to them is what it does to plain float32 weights.

    Neither tokens' weights on their way in nor the loss on its way out are rounded.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import fully_shard

    from alpaca.training import sharding

    args = SimpleNamespace(bf16=True, fp16=False, fsdp_plugin_args={"fsdp_version": 2})
    args.accelerator_config = SimpleNamespace(gradient_accumulation_kwargs=None)
    sharding.spare_accuracy(args)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
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


@pytest.mark.parametrize("reshards", [True, False])
def test_fsdp2_keeps_what_the_estimate_says_between_forward_and_backward(examples, reshards):
    """In a world of one as well: there, gathering is a copy of the float32 masters in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_model(dtype=torch.float32)
        packed_model.install(model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (*model.model.layers, model.model.embed_tokens, model.lm_head, model):
            fully_shard(part, mp_policy=policy, reshard_after_forward=reshards)
        (one,) = packing_passes.make_passes(packing_passes.documents_of(collate(examples[:2]), 0.1), 10**6)
        model(packed=one)
        kept = [p for p in model.parameters() if not isinstance(p, DTensor)]
        copies = sum(p.numel() * p.element_size() for p in kept)
        assert copies == (0 if reshards else 2 * sum(p.numel() for p in model.parameters()))
    finally:
        torch.distributed.destroy_process_group()


def test_steps_of_2e_5_vanish_in_pure_bfloat16():
    for dtype, moved in ((torch.float32, True), (torch.bfloat16, False)):
        weight = torch.nn.Parameter(torch.full((8,), 0.02, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=2e-5, weight_decay=0.0).step()
        assert bool((weight.float() != torch.tensor(0.02, dtype=dtype).float()).all()) == moved


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["_varlen", "_flex"])
def test_attention_on_a_gpu_agrees_with_float64_on_the_cpu(examples, attention):
    documents = packing_passes.documents_of(collate(examples), 1.0, packing_passes.find_prefixes(examples, 16))
    layout = packing_passes.make_passes(documents, 10**6)[0].layout
    torch.manual_seed(0)
    states = [torch.randn(1, 4, int(layout.cu_seqlens_q[-1]), 64, dtype=torch.float64) for _ in range(3)]
    upstream = torch.randn(1, states[0].shape[2], 4, 64, dtype=torch.float64)
    dtype = torch.bfloat16 if attention == "_varlen" else torch.float32
    results = []
    for attend, kind, device in ((packed_model._per_document, torch.float64, "cpu"), (attention, dtype, "cuda")):
        attend = getattr(packed_model, attend) if isinstance(attend, str) else attend
        inputs = [one.to(device, kind).requires_grad_() for one in states]
        output = attend(*inputs, packed_model.to_device(layout, device), None)
        found = torch.autograd.grad(output, inputs, upstream.to(device, kind))
        results.append([one.detach().double().cpu() for one in (output, *found)])
    for expected, found in zip(*results, strict=True):
        assert float((found - expected).norm() / expected.norm()) < (1e-2 if attention == "_varlen" else 2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Through train.py


@pytest.fixture(scope="module")
def trainee(root, tmp_path_factory) -> list[str]:
    """A tiny LLaMA, 40 seed tasks, and flags for steps of 12 examples, the last one of 4."""
    from demo import tiny_model

    folder = tmp_path_factory.mktemp("trainee")
    with open(os.path.join(root, "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    records = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    records = sorted(records, key=lambda r: len(format_prompt(r) + r["output"]))[:40]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIGS["llama"], "vocab_size": 700}))
    tiny_model.make(str(folder / "config.json"), str(folder / "data.json"), str(folder / "model"))
    flags = f"--model_name_or_path {folder}/model --data_path {folder}/data.json --num_train_epochs 1 --seed 42 "
    flags += "--learning_rate 1e-3 --logging_steps 1 --save_strategy no --report_to none --disable_tqdm True "
    flags += "--overwrite_output_dir True --model_max_length 256 --per_device_train_batch_size 2"
    return flags.split()


def logged(folder, name: str = "loss") -> list[float]:
    with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
        return [entry[name] for entry in json.load(file)["log_history"] if name in entry]


def assert_same_run(folder, expected, steps: int = 4) -> None:
    """Every step's loss and all weights at the end agree to float32's error."""
    from safetensors.torch import load_file

    assert len(logged(folder)) == steps
    assert logged(folder) == pytest.approx(logged(expected), abs=2e-5)
    name = next(name for name in ("model.safetensors", "adapter_model.safetensors") if (expected / name).exists())
    found, weights = load_file(folder / name), load_file(expected / name)
    assert found.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-3, atol=2e-5)


UNEVEN = ["--eval_fraction", "0.075", "--eval_strategy", "steps", "--eval_steps", "1"]
UNEVEN += ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "1"]
WAYS = {
    "ddp": ["--plain"],
    "ddp, global": ["--plain", "--loss_reduction", "global"],
    "fsdp": ["--fsdp", "full_shard auto_wrap"],  # memory is plenty: gathered weights are kept
    "fsdp, resharded": ["--fsdp", "full_shard auto_wrap", "--fsdp_config", '{"fsdp_reshard_after_forward": true}'],
    "fsdp, checkpointing": ["--fsdp", "full_shard auto_wrap", "--gradient_checkpointing", "True"],
    "lora": ["--plain", "--lora_r", "4", "--lora_dropout", "0.0"],
    # 37 examples: ranks repeat some, and each epoch's last step has one micro-batch; evaluated after every step
    "uneven": ["--plain", *UNEVEN, "--num_train_epochs", "2", "--loss_reduction", "global"],
    "dropped": ["--plain", *UNEVEN, "--dataloader_drop_last", "True"],
    # weights are whole after an evaluation, and sharded again in what is saved
    "fsdp, uneven": [
        "--fsdp",
        "full_shard auto_wrap",
        *UNEVEN,
        "--num_train_epochs",
        "2",
        "--loss_reduction",
        "global",
    ],
}
STEPS = {"uneven": 8, "dropped": 3, "fsdp, uneven": 8}


def test_two_ranks_of_train_py_end_with_the_padded_runs_weights(trainee, tmp_path, root):
    commands = []
    for way, flags in WAYS.items():
        common = [*trainee, *flags, "--gradient_accumulation_steps", "3"]
        commands.append([*common, "--output_dir", str(tmp_path / way), "--max_tokens_per_pass", "300"])
        if not way.startswith("fsdp"):  # those must end where data-parallel ranks do
            commands.append([*common, "--output_dir", str(tmp_path / f"padded {way}"), "--padding_free", "false"])
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "padding-free: passes of at most 300 tokens, shared prefixes of" in run.stdout
    assert run.stdout.count("FSDP2 keeps gathered weights") == 3  # said once each where the choice was free
    assert [line for line in run.stdout.splitlines() if line.startswith("resharding: ")] == [
        f"resharding: {way}" for way in ("False", "True", "False", "False")
    ]
    assert "gradients wait whole" not in run.stdout  # FSDP2 would hold all of them on each device
    for way in WAYS:
        padded = f"padded {way.removeprefix('fsdp, ')}"
        padded = padded if (tmp_path / padded).exists() else "padded ddp"
        assert_same_run(tmp_path / way, tmp_path / padded, STEPS.get(way, 4))
        assert logged(tmp_path / way, "eval_loss") == pytest.approx(logged(tmp_path / padded, "eval_loss"), abs=2e-5)
    assert len(logged(tmp_path / "uneven", "eval_loss")) == 8 + 1


def test_losses_are_those_of_the_original_over_32_steps(reference_dir, tmp_path, root):
    fidelity = os.path.join(reference_dir, "fidelity")
    model = str(tmp_path / "model")
    subprocess.run([sys.executable, os.path.join(fidelity, "build_tiny.py"), "llama", model], check=True)
    with open(os.path.join(fidelity, "reference_lr1e-3.json"), encoding="utf-8") as file:
        original = json.load(file)
    with open(os.path.join(fidelity, "alpaca_256.json"), encoding="utf-8") as file:
        records = json.load(file)
    (tmp_path / "ordered.json").write_text(json.dumps([records[i] for i in original["order"]]))
    flags = f"--model_name_or_path {model} --data_path {tmp_path}/ordered.json --output_dir {tmp_path}/out "
    flags += (
        "--num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-3 "
    )
    flags += "--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --seed 42 --logging_steps 1 "
    flags += "--save_strategy no --report_to none --disable_tqdm True --train_sampling_strategy sequential "
    run = subprocess.run(
        [sys.executable, os.path.join(root, "train.py"), *flags.split()], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "padding-free: passes of at most" in run.stdout
    assert "shared prefixes of 29 and 39 tokens" in run.stdout
    micro = original["micro"]
    steps = [micro[i] + micro[i + 1] for i in range(0, len(micro), 2)]  # each was divided by 2 already
    assert len(steps) == 32
    assert logged(tmp_path / "out") == pytest.approx(steps, abs=1e-4)


def test_a_single_process_under_fsdp2_ends_with_the_padded_runs_weights(trainee, tmp_path, root, monkeypatch):
    import train

    common = [*trainee, "--gradient_accumulation_steps", "6"]
    flags = ["--output_dir", str(tmp_path / "one"), "--fsdp", "full_shard auto_wrap"]
    half = [
        "--output_dir",
        str(tmp_path / "half"),
        "--fsdp",
        "full_shard auto_wrap",
        "--half",
        "--bf16",
        "True",
        "--use_cpu",
        "True",
    ]
    (tmp_path / "commands.json").write_text(json.dumps([[*common, *flags], [*common, *half]]))
    # No torchrun: train.py makes its own world.
    script = [sys.executable, os.path.join(root, "tests", "cpu_sharding.py"), str(tmp_path / "commands.json")]
    run = subprocess.run(script, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "FSDP2 wraps LlamaDecoderLayer" in run.stdout
    flags = ["--output_dir", str(tmp_path / "padded"), "--padding_free", "false"]
    monkeypatch.setattr(sys, "argv", ["train.py", *common, *flags])
    train.train()
    assert_same_run(tmp_path / "one", tmp_path / "padded")
    assert logged(tmp_path / "half") == pytest.approx(logged(tmp_path / "one"), rel=2e-2)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss in logged(tmp_path / "half"))


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
        return memory.tokens_per_pass(SEVEN_BILLION, on_a_gpu(**changes))

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
    line = memory.choose_resharding(SEVEN_BILLION, args, packed=True)
    assert args.fsdp_plugin_args["reshard_after_forward"] == reshards
    assert line.startswith("FSDP2 gathers weights for forward and backward each" if reshards else "FSDP2 keeps")
    assert "12.2 GiB" in line  # 2 bytes per parameter, less the layer that a run gathers in either case
    empty = memory.replace(memory.plan_of(args), batch=0, scratch=0)
    kept, freed = (memory.estimate(SEVEN_BILLION, memory.replace(empty, reshards=r))[0] for r in (False, True))
    assert kept - freed == 2 * (SEVEN_BILLION.parameters - SEVEN_BILLION.largest_unit)


def test_padded_batches_leave_more_room_for_gathered_weights(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 2**30, 80 * 2**30))
    args = on_a_gpu(fsdp=True, world_size=4)
    assert memory.choose_resharding(SEVEN_BILLION, args, packed=False).startswith("FSDP2 keeps")


@pytest.mark.parametrize(("share", "keeps"), [(0.89, True), (0.95, False)])
def test_a_tenth_of_the_free_memory_stays_free_where_gathered_weights_are_kept(monkeypatch, share, keeps):
    args = on_a_gpu(fsdp=True, world_size=4)
    need = memory.estimate(SEVEN_BILLION, memory.replace(memory.plan_of(args), reshards=False))[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (need / share, need / share))
    assert memory.choose_resharding(SEVEN_BILLION, args, packed=False).startswith("FSDP2 keeps") == keeps


def test_speed_is_trainings_alone_and_the_time_left_everythings(trainee, tmp_path, monkeypatch):
    """A clock that only evaluations (100 s), saves (1,000 s) and passes (1 s) move."""
    import train
    from alpaca.training import throughput, trainer

    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def taking(seconds, function):
        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return slow

    monkeypatch.setattr(throughput, "peak_flops", lambda device: (1e9, "a test"))
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(trainer, "time", clock)
    for name, seconds in (("evaluation_loop", 100), ("_save_checkpoint", 1000)):
        monkeypatch.setattr(packing_passes.Trainer, name, taking(seconds, getattr(packing_passes.Trainer, name)))
    monkeypatch.setattr(packed_model, "_packed_loss", taking(1, packed_model._packed_loss))
    flags = ["--max_steps", "4", "--eval_fraction", "0.2", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--gradient_accumulation_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, *flags, "--output_dir", str(tmp_path / "out")])
    train.train()
    rates = logged(tmp_path / "out", "useful_tokens_per_s")
    assert len(rates) == 4
    assert all(20 < rate < 2 * 256 for rate in rates)  # the tokens of two examples in a second
    left = logged(tmp_path / "out", "hours_left")
    assert left == [round(s / 3600, 3) for s in (3 * 1, 2 * 1, 1103 / 3, 0)]


@pytest.mark.parametrize(("layers_that_fit", "forward_passes"), [(2.1, 1), (1.5, 2)], ids=["plenty", "too little"])
def test_activations_are_recomputed_where_the_estimate_has_no_room_for_them(
    trainee, tmp_path, monkeypatch, capsys, layers_that_fit, forward_passes
):
    import train

    plan = memory.Plan("none", 1, 1, batch=2, length=256, half=False)
    shape = memory.model_shape(AutoModelForCausalLM.from_pretrained(trainee[1]), plan)
    room = memory.estimate(memory.replace(shape, layers=layers_that_fit), plan)[0]
    monkeypatch.setattr(memory, "host_memory", lambda: int(room) + 1)
    load, calls = train.load_model, {"layer": 0, "lm_head": 0}

    def load_and_count(*args):
        model = load(*args)
        for name, module in (("layer", model.model.layers[0].mlp), ("lm_head", model.lm_head)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        return model

    monkeypatch.setattr(train, "load_model", load_and_count)
    flags = ["--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, *flags])
    train.train()
    said = "going on as with --gradient_checkpointing True" in capsys.readouterr().out
    assert said == (forward_passes == 2)
    assert calls["layer"] == forward_passes * calls["lm_head"] > 0


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
    import train
    from alpaca.training import sharding

    monkeypatch.setattr(sharding, "can_shard", lambda: True)
    args = train.TrainingArguments(output_dir=str(tmp_path), fsdp=words, fsdp_config=config, use_cpu=True)
    before = dict(args.fsdp_plugin_args)
    monkeypatch.setattr(memory, "free_memory", lambda device: (2**50, 2**50))
    line = memory.choose_resharding(SEVEN_BILLION, args, packed=True)
    if expected is None:
        assert before["reshard_after_forward"] is True
        assert line
        assert args.fsdp_plugin_args == {**before, "reshard_after_forward": False}
    else:
        assert not line
        assert args.fsdp_plugin_args["reshard_after_forward"] == before["reshard_after_forward"] == expected


def test_two_ranks_see_the_same_least_free_memory(tmp_path, root):
    """Each rank has another figure; both decide by the smallest."""
    script = """
import os, torch
from alpaca.training import memory
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
memory.host_memory = lambda: [2**34, 2**33][rank]
there, host = memory.free_memory(torch.device("cpu"))
assert (there, host) == (2**32, 2**33), (there, host)
torch.distributed.destroy_process_group()
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    run = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--padding_free", "yes"], "--padding_free must be auto, true or false, found 'yes'"),
        (["--compile_layers", "maybe"], "--compile_layers must be auto, true or false, found 'maybe'"),
        (["--pure_bf16", "True", "--lora_r", "4"], "--pure_bf16 is for full fine-tuning"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_in_one_line(trainee, tmp_path, monkeypatch, flags, message):
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *trainee, "--output_dir", str(tmp_path / "out"), *flags])
    with pytest.raises(UserError, match=message):
        train.train()


def test_ligers_kernels_leave_the_packed_forward_pass_alone(trainee, tmp_path, monkeypatch):
    import train

    seen = []

    def stand_in(model, config):
        """What Liger does to a model unless told not to: puts a forward pass with its own loss there."""
        seen.append(config)
        if (config or {}).get("fused_linear_cross_entropy", True):
            model.forward = None

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", stand_in)
    flags = [*trainee, "--max_steps", "1", "--eval_fraction", "0.2"]  # the Trainer evaluates in Liger's way, too
    for name, more in (("liger", ["--use_liger_kernel", "True"]), ("plain", [])):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more, "--output_dir", str(tmp_path / name)])
        train.train()
    assert seen == [{"fused_linear_cross_entropy": False}]
    assert logged(tmp_path / "liger", "eval_loss") == logged(tmp_path / "plain", "eval_loss") != []
    assert_same_run(tmp_path / "liger", tmp_path / "plain", steps=1)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_liger_itself_replaces_the_layers_parts_only(monkeypatch, name):
    """The real package, where it can be imported (it needs triton): no kernel runs here."""
    pytest.importorskip("liger_kernel.transformers")
    from transformers.integrations.liger import apply_liger_kernel

    model = make_model(name, dtype=torch.float32)
    modeling = sys.modules[type(model).__module__]
    for part in vars(modeling).copy():  # Liger replaces functions and classes of the module for good
        monkeypatch.setattr(modeling, part, getattr(modeling, part))
    rotate = modeling.apply_rotary_pos_emb
    packed_model.install(model)
    forward, args = model.forward, SimpleNamespace(compile_layers="false", use_liger_kernel=True)
    args.device, args.liger_kernel_config = torch.device("cpu"), None
    packed_model.choose_kernels(args, packed=True)
    apply_liger_kernel(model, args.liger_kernel_config)
    assert model.forward == forward
    layer = model.model.layers[0]
    assert modeling.apply_rotary_pos_emb is not rotate
    for module, kernel in ((layer.mlp, "LigerSwiGLUMLP"), (layer.input_layernorm, "LigerRMSNorm")):
        assert module.forward.__func__.__qualname__ == f"{kernel}.forward"


@pytest.mark.gpu
def test_ligers_kernels_give_the_same_gradients_on_a_gpu(examples, monkeypatch):
    pytest.importorskip("liger_kernel.transformers")
    from transformers.integrations.liger import apply_liger_kernel

    plain, liger = (make_model(dtype=torch.float32).cuda() for _ in range(2))
    modeling = sys.modules[type(plain).__module__]
    for part in vars(modeling).copy():
        monkeypatch.setattr(modeling, part, getattr(modeling, part))
    (one,) = packing_passes.make_passes(
        packing_passes.documents_of(collate(examples), 0.01, packing_passes.find_prefixes(examples, 16)), 10**6
    )
    one = packed_model.to_device(one, torch.device("cuda"))
    for model in (plain, liger):
        packed_model.install(model)
        if model is liger:
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        model(packed=one).backward()
    assert worst(gradients(liger), gradients(plain)) < 1e-3


def test_weights_in_16_bits_are_not_trained_unless_asked_for(trainee, tmp_path, monkeypatch):
    import train

    flags = [*trainee, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--gradient_accumulation_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    load = train.load_model
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_model", lambda *args: load(*args).to(torch.bfloat16))
        with pytest.raises(UserError, match="would be trained in 16 bits"):
            train.train()
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--pure_bf16", "True"])
    train.train()
