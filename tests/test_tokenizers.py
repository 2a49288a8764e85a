"""Tokenizers: LLaMA's give sentencepiece's tokens, special tokens are chosen, and the model gets rows for them."""

import json
import os

import gguf
import sentencepiece
import torch
from toy_tokenizers import load, variant
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca import tokenizers
from alpaca.prompts import format_prompt

pytest_plugins = ["toy_tokenizers", "training_runs"]


def test_rows_are_added_as_the_mean_and_never_taken_away(models):
    for kind, added in (("llama", 1), ("opt", 0)):
        model = AutoModelForCausalLM.from_pretrained(models[kind])
        tokenizer = AutoTokenizer.from_pretrained(models[kind])
        before = model.get_input_embeddings().weight.detach().clone()
        head = model.get_output_embeddings().weight.detach().clone()
        tokens = {} if kind == "opt" else {"pad_token": "[PAD]"}
        assert tokenizers.smart_tokenizer_and_embedding_resize(tokens, tokenizer, model) == added
        for rows, old in ((model.get_input_embeddings(), before), (model.get_output_embeddings(), head)):
            assert rows.weight.shape[0] == 700 + added, "OPT keeps rows beyond its tokens"
            torch.testing.assert_close(rows.weight[:700], old)
            torch.testing.assert_close(rows.weight[700:], old.mean(0, keepdim=True).expand(added, -1))


def test_tokens_stay_sentencepieces_after_saving_and_loading(llama_dir, traps, tmp_path):
    tokenizer, _ = load(llama_dir)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [format_prompt(example) + example["output"] for example in traps]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.pad_token == "[PAD]"


def test_saved_tokenizer_has_its_sentencepiece_scores_beside_it(llama_dir, opt_dir, traps, tmp_path):
    """What llama.cpp's converter reads, by the class of its own package: pieces, scores, and what was added above."""
    tokenizer, _ = load(llama_dir)
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizers.save_sentencepiece(tokenizer, str(tmp_path / "saved"))
    pieces, reference = (
        sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
        for folder in (tmp_path / "saved", llama_dir)
    )
    count = reference.get_piece_size()
    assert pieces.get_piece_size() == count
    for i in range(count):
        assert pieces.get_score(i) == reference.get_score(i)
        assert pieces.id_to_piece(i) == tokenizer.convert_ids_to_tokens(i)
    assert json.loads((tmp_path / "saved" / "added_tokens.json").read_text()) == {"[PAD]": count}
    *converted, pad = gguf.SentencePieceVocab(tmp_path / "saved").all_tokens()
    assert [score for _, score, _ in converted] == [reference.get_score(i) for i in range(count)]
    assert pad[0] == b"[PAD]"
    texts = [format_prompt(example) + example["output"] for example in traps]
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load(str(tmp_path / "saved"))[0]):
        assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
        assert (again.pad_token, len(again)) == ("[PAD]", count + 1)
    byte_level, _ = load(opt_dir)
    byte_level.save_pretrained(tmp_path / "opt")
    tokenizers.save_sentencepiece(byte_level, str(tmp_path / "opt"))
    tokenizers.save_sentencepiece(byte_level, str(tmp_path / "opt"), source=llama_dir)
    assert not (tmp_path / "opt" / "tokenizer.model").exists(), "there is none, or it is another tokenizer's"


def test_missing_add_bos_token_keeps_bos(llama_dir, tmp_path):
    for name, changes in (("missing", {"add_bos_token": None}), ("null class", {"tokenizer_class": None})):
        tokenizer, _ = load(variant(llama_dir, tmp_path / name, **changes))
        assert tokenizer("Below")["input_ids"][0] == 1, name


def test_empty_special_tokens_become_llamas_own(llama_dir, tmp_path, traps):
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    tokenizer, notes = load(variant(llama_dir, tmp_path / "empty", **empty))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert len([note for note in notes if "is empty" in note]) == 3
    good, _ = load(llama_dir)
    assert tokenizer(traps[0]["output"])["input_ids"] == good(traps[0]["output"])["input_ids"]


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
