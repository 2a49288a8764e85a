"""Tokens and label masks: what the original computed record by record, on tokenizers trained here."""

import json
import os
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from alpaca import tokenizers
from alpaca.cli import UserError
from alpaca.prompts import PROMPT_DICT, format_prompt
from alpaca.training import data as training_data
from demo import tiny_model

IGNORE = -100
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The traps: runs of spaces, a first character that joins the prompt's last colon, special tokens, no ASCII.
OUTPUTS = [
    "def f(x):\n    return  x  +  1" + " " * 19 + "# done",
    "- first\n- second",
    "//example.org/a?b=c",
    "Γειά σου κόσμε 🙂 日本",
    "{'a': 1,  'b':   2}\t\tend",
]


def records(root: str) -> list[dict]:
    """The seed tasks and the traps, with and without an input."""
    with open(os.path.join(root, "seed_tasks.jsonl"), encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    found = [{"instruction": task["instruction"], **task["instances"][0]} for task in tasks]
    return found + [{"instruction": "Do it:", "input": i, "output": o} for o in OUTPUTS for i in ("", "this  one:")]


@pytest.fixture(scope="module")
def examples(root) -> list[dict]:
    return records(root)


@pytest.fixture(scope="module")
def llama_dir(examples, tmp_path_factory) -> str:
    """LLaMA's kind of sentencepiece model: runs of spaces score lowest although their ids are low."""
    folder = str(tmp_path_factory.mktemp("llama"))
    texts = [format_prompt(example) + example["output"] for example in examples]
    tiny_model._train_sentencepiece([*texts, *[":- a :// b"] * 200, "a" + " " * 16] * 2, 900, folder)
    path = os.path.join(folder, "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path, "rb") as file:
        proto.ParseFromString(file.read())
    pieces = [piece for piece in proto.pieces if piece.type == 1]
    for length in range(2, 17):  # LLaMA has a piece for every run of up to 16 spaces
        if "▁" * length not in {piece.piece for piece in pieces}:
            pieces[-length].piece = "▁" * length
    for piece in pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9
    with open(path, "wb") as file:
        file.write(proto.SerializeToString())
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "llama"}, file)
    return folder


@pytest.fixture(scope="module")
def opt_dir(examples, tmp_path_factory) -> str:
    """OPT's kind: byte-level BPE, `</s>` in front."""
    folder = str(tmp_path_factory.mktemp("opt"))
    tiny_model._train_byte_level_bpe([example["output"] for example in examples], 600, folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "opt"}, file)
    return folder


def variant(source: str, target, **changes) -> str:
    """A copy of a tokenizer's folder with another tokenizer_config.json; None removes a key."""
    shutil.copytree(source, target)
    os.unlink(os.path.join(target, "special_tokens_map.json"))
    path = os.path.join(target, "tokenizer_config.json")
    with open(path) as file:
        config = {**json.load(file), **changes}
    with open(path, "w") as file:
        json.dump({key: value for key, value in config.items() if value is not None}, file)
    return str(target)


def load(folder: str, limit: int = 512):
    tokenizer, notes = tokenizers.load_tokenizer(folder, limit)
    tokenizer.add_special_tokens(tokenizers.special_tokens_to_add(tokenizer))
    return tokenizer, notes


def original_preprocess(sources, targets, encode, limit=512) -> list[tuple[list[int], list[int]]]:
    """What the original did: whole text and prompt tokenized apart, one at a time, the prompt's length masked."""
    found = []
    for source, target in zip(sources, targets, strict=True):
        ids, prompt = encode(source + target)[:limit], encode(source)[:limit]
        found.append((ids, [IGNORE] * len(prompt) + ids[len(prompt) :]))
    return found


def ours(tokenized) -> list[tuple[list[int], list[int]]]:
    starts = tokenized.ends - tokenized.lengths()
    found = []
    for start, end, prompt in zip(starts, tokenized.ends, tokenized.prompt_lengths, strict=True):
        ids = tokenized.input_ids[start:end].tolist()
        found.append((ids, [IGNORE] * int(prompt) + ids[prompt:]))
    return found


def test_ids_and_labels_are_the_originals_with_sentencepiece(llama_dir, examples):
    tokenizer, notes = load(llama_dir)
    assert any("double spaces" in note for note in notes), "the trap must be there to be mended"
    reference = sentencepiece.SentencePieceProcessor(model_file=os.path.join(llama_dir, "tokenizer.model"))
    sources, targets = [format_prompt(e) for e in examples], [e["output"] for e in examples]
    # EOS is a token of its own, never text, to 4.28's tokenizer.
    expected = original_preprocess(
        sources,
        [t + "</s>" for t in targets],
        lambda text: [1, *reference.encode(text.removesuffix("</s>")), *([2] if text.endswith("</s>") else [])],
    )
    assert ours(training_data.tokenize_examples(sources, targets, tokenizer)) == expected


def test_tokens_stay_sentencepieces_after_saving_and_loading(llama_dir, examples, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, _ = load(llama_dir)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [format_prompt(example) + example["output"] for example in examples]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.pad_token == "[PAD]"


def test_ids_and_labels_are_the_originals_with_byte_level_bpe(opt_dir, examples):
    tokenizer, _ = load(opt_dir)
    sources, targets = [format_prompt(e) for e in examples], [e["output"] for e in examples]
    one_at_a_time = original_preprocess(
        sources, [t + tokenizer.eos_token for t in targets], lambda text: tokenizer(text)["input_ids"]
    )
    assert ours(training_data.tokenize_examples(sources, targets, tokenizer)) == one_at_a_time
    assert one_at_a_time[0][0][0] == tokenizer.bos_token_id


def test_token_that_straddles_prompt_and_answer_is_not_learned(llama_dir):
    tokenizer, _ = load(llama_dir)
    source = PROMPT_DICT["prompt_no_input"].replace("{instruction}", "List.")
    [(ids, labels)] = ours(training_data.tokenize_examples([source], ["- one"], tokenizer))
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert tokenizer.convert_ids_to_tokens(ids)[first - 1] == ":-"
    assert tokenizer.decode(ids[first:]) == "one</s>"


def test_missing_add_bos_token_keeps_bos(llama_dir, tmp_path):
    for name, changes in (("missing", {"add_bos_token": None}), ("null class", {"tokenizer_class": None})):
        tokenizer, _ = load(variant(llama_dir, tmp_path / name, **changes))
        assert tokenizer("Below")["input_ids"][0] == 1, name


def test_empty_special_tokens_become_llamas_own(llama_dir, tmp_path, examples):
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    tokenizer, notes = load(variant(llama_dir, tmp_path / "empty", **empty))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert len([note for note in notes if "is empty" in note]) == 3
    good, _ = load(llama_dir)
    assert tokenizer(examples[0]["output"])["input_ids"] == good(examples[0]["output"])["input_ids"]


def test_tokenizer_without_bos_gets_none(opt_dir, tmp_path, examples):
    tokenizer, _ = load(variant(opt_dir, tmp_path / "no_bos", add_bos_token=False, bos_token=None))
    sources, targets = [format_prompt(examples[0])], [examples[0]["output"]]
    [(ids, _)] = ours(training_data.tokenize_examples(sources, targets, tokenizer))
    assert tokenizer.decode(ids) == sources[0] + targets[0] + "</s>"


def test_eos_that_the_tokenizer_adds_itself_is_not_doubled(llama_dir, tmp_path):
    tokenizer, _ = load(variant(llama_dir, tmp_path / "eos", add_eos_token=True))
    assert tokenizer("a")["input_ids"][-1] == 2
    [(ids, _)] = ours(training_data.tokenize_examples(["a"], ["b"], tokenizer))
    assert ids.count(2) == 1


def test_lengths_are_true_where_pad_is_eos(opt_dir, tmp_path, examples):
    import train

    tokenizer, _ = load(variant(opt_dir, tmp_path / "pad_eos", pad_token="</s>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "what a tokenizer has is kept"
    fields = train.preprocess([format_prompt(e) for e in examples[:3]], [e["output"] for e in examples[:3]], tokenizer)
    instances = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    batch = train.DataCollatorForSupervisedDataset(tokenizer)(instances)
    for i, ids in enumerate(fields["input_ids"]):
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (batch["input_ids"].shape[1] - len(ids))
        assert batch["labels"][i][len(ids) - 1] == tokenizer.eos_token_id, "EOS is learned although it is the padding"
        assert (batch["labels"][i][len(ids) :] == IGNORE).all()


def test_truncated_examples_are_counted_and_lose_eos(llama_dir):
    tokenizer, _ = load(llama_dir, limit=40)
    tokenized = training_data.tokenize_examples(["one ", "two "], ["short", "long " * 50], tokenizer)
    assert tokenized.truncated == 1
    (short, _), (long, _) = ours(tokenized)
    assert short[-1] == tokenizer.eos_token_id
    assert len(long) == 40
    assert tokenizer.eos_token_id not in long


def test_padding_takes_a_reserved_token_and_never_eos():
    class Tokenizer:
        bos_token, eos_token, unk_token, pad_token = "<s>", "</s>", "<unk>", None

        def __init__(self, *more, **changes):
            self.tokens = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *more])}
            vars(self).update(changes)

        def get_vocab(self):
            return self.tokens

    choose = tokenizers.special_tokens_to_add
    assert choose(Tokenizer()) == {"pad_token": "[PAD]"}
    assert choose(Tokenizer(), may_grow=False) == {"pad_token": "<unk>"}
    assert choose(Tokenizer(pad_token="<unk>")) == {}
    llama3 = Tokenizer("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", eos_token="<|end_of_text|>")
    assert choose(llama3) == {"pad_token": "<|finetune_right_pad_id|>"}
    assert choose(Tokenizer("[control_8]")) == {"pad_token": "[control_8]"}
    assert choose(Tokenizer("<|endoftext|>", eos_token="<|im_end|>")) == {"pad_token": "<|endoftext|>"}
    assert choose(Tokenizer("<|endoftext|>", eos_token="<|endoftext|>")) == {"pad_token": "[PAD]"}


def test_second_run_reads_tokens_from_the_cache(llama_dir, examples, tmp_path, monkeypatch):
    tokenizer, _ = load(llama_dir)
    first = training_data.tokenize_once(examples, tokenizer, str(tmp_path))
    monkeypatch.setattr(training_data, "tokenize_examples", None)
    assert ours(training_data.tokenize_once(examples, tokenizer, str(tmp_path))) == ours(first)
    with pytest.raises(TypeError):  # other content, other name: it has to be tokenized
        training_data.tokenize_once(examples[1:], tokenizer, str(tmp_path))


def test_broken_cache_is_tokenized_again(llama_dir, examples, tmp_path):
    tokenizer, _ = load(llama_dir)
    first = training_data.tokenize_once(examples[:5], tokenizer, str(tmp_path))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    assert ours(training_data.tokenize_once(examples[:5], tokenizer, str(tmp_path))) == ours(first)


def test_hub_id_without_a_network_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot load nobody/nothing from the Hub"):
        training_data.load_dataset_examples("nobody/nothing")
    with pytest.raises(UserError, match=r"cannot read data/missing.jsonl: No such file"):
        training_data.load_dataset_examples("data/missing.jsonl")


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
    found = ours(training_data.tokenize_examples(sources, targets, tokenizer))
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a[1] != b[1]]
    assert not wrong
