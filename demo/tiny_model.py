"""Makes a tiny checkpoint with random weights, so that the pipeline can be tried without a download or a GPU.

    python -m demo.tiny_model make --config configs/tiny_llama.json --data_path alpaca_data.json --output_dir tiny_llama

The tokenizer is trained on the data and saved in the same files as those of the original checkpoints: sentencepiece
BPE with byte fallback for LLaMA, byte-level BPE for OPT. The model knows nothing until `train.py` has trained it.
"""

import io
import os

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump, jload
from alpaca.prompts import PROMPT_DICT
from alpaca.records import load_examples

MIN_VOCAB_SIZE = 260  # 256 bytes and OPT's four special tokens


def make(
    config: str, data_path: str, output_dir: str, vocab_size: int = 0, seed: int = 0, dtype: str = "float32"
) -> None:
    """Writes a checkpoint with random weights and a tokenizer trained on `data_path`.

    Args:
        config: A transformers config.json whose `model_type` is llama or opt.
        data_path: The data to train the tokenizer on, in Alpaca's format.
        output_dir: The folder to write, which must be new or empty.
        vocab_size: The number of tokens and embedding rows; 0 takes the config's.
        seed: The seed for the weights.
        dtype: The type of the saved weights (float32, float16 or bfloat16).
    """
    if os.path.exists(output_dir) and not (os.path.isdir(output_dir) and not os.listdir(output_dir)):
        raise UserError(f"{output_dir} exists and is not an empty folder; name a new one")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype must be float32, float16 or bfloat16, found {dtype!r}")
    settings = jload(config)
    trainers = {"llama": _train_sentencepiece, "opt": _train_byte_level_bpe}
    kind = settings.pop("model_type", None) if isinstance(settings, dict) else None
    if kind not in trainers:
        raise UserError(f"{config}: model_type must be llama or opt, found {kind!r}")
    settings["vocab_size"] = vocab_size or settings.get("vocab_size")
    if not isinstance(settings["vocab_size"], int) or settings["vocab_size"] < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size must be {MIN_VOCAB_SIZE} or more, found {settings['vocab_size']!r}")
    texts = [text for example in load_examples(data_path) for text in (example["instruction"], example["output"])]

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{config}: cannot make this {kind} model ({' '.join(str(error).split())})") from error
    trainers[kind]([*PROMPT_DICT.values(), *texts], settings["vocab_size"], output_dir)
    model.to(getattr(torch, dtype)).save_pretrained(output_dir)
    print(f"{output_dir}: {kind} with {model.num_parameters():,} random parameters, {settings['vocab_size']:,} tokens")


def _train_sentencepiece(texts: list[str], vocab_size: int, output_dir: str) -> None:
    """Trains a tokenizer like LLaMA's: BPE, byte fallback, split digits, <unk> 0, <s> 1, </s> 2, no padding token."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9995,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:  # the single characters alone need more tokens
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(f"{vocab_size} tokens are too few for this data ({reason}); raise --vocab_size") from error
    os.makedirs(output_dir, exist_ok=True)
    with open(os.path.join(output_dir, "tokenizer.model"), "wb") as file:
        file.write(model.getvalue())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    jdump(
        {
            **tokens,
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "legacy": True,
        },
        os.path.join(output_dir, "tokenizer_config.json"),
    )
    jdump(tokens, os.path.join(output_dir, "special_tokens_map.json"))


def _train_byte_level_bpe(texts: list[str], vocab_size: int, output_dir: str) -> None:
    """Trains a tokenizer like OPT's: GPT-2's byte-level BPE with <s> 0, <pad> 1, </s> 2, <unk> 3.

    </s> serves as BOS, EOS and UNK at once.
    """
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    os.makedirs(output_dir, exist_ok=True)
    tokenizer.save_model(output_dir)
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    jdump(
        {
            **tokens,
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
        os.path.join(output_dir, "tokenizer_config.json"),
    )
    jdump(tokens, os.path.join(output_dir, "special_tokens_map.json"))


if __name__ == "__main__":
    run_cli({"make": make})
