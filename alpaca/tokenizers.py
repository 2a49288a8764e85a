"""Loads tokenizers that give the original's tokens, and adds special tokens.

transformers 5 rebuilds a LLaMA tokenizer from `tokenizer.model` in a way that changes tokens; this module fixes it.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

# What a tokenizer gets if it has none (the original's names and values).
DEFAULT_PAD_TOKEN = "[PAD]"
DEFAULT_EOS_TOKEN = "</s>"
DEFAULT_BOS_TOKEN = "<s>"
DEFAULT_UNK_TOKEN = "<unk>"

# Reserved tokens of known tokenizers. Padding takes the first that exists, so that the vocabulary needn't grow.
RESERVED_FOR_PADDING = (
    r"<\|finetune_right_pad_id\|>|<pad>|\[PAD\]|<\|pad\|>|<\|endoftext\|>",
    r"<\|reserved_special_token_\d+\|>|\[control_\d+\]|<SPECIAL_\d+>|<unused\d+>|<\|extra_\d+\|>",
)


def load_tokenizer(name_or_path: str, model_max_length: int | None = None, cache_dir: str | None = None):
    """Loads a tokenizer and fixes what transformers 5 breaks in LLaMA's.

    - Empty-string special tokens of old conversions become LLaMA's own.
    - A tokenizer made from `tokenizer.model` adds BOS unless its config says otherwise.
    - BPE merges are ordered by sentencepiece's scores. transformers orders them by token id, which splits runs of
      spaces differently.

    Args:
        name_or_path: A folder or a Hub id.
        model_max_length: Tokens per example, longer ones are cut; the tokenizer's own limit if None.
        cache_dir: Folder for downloads.

    Returns:
        The tokenizer (padding on the right) and a list of lines that say what was fixed.
    """
    from transformers import AutoTokenizer

    settings = dict(padding_side="right", cache_dir=cache_dir, trust_remote_code=False)
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    spm_file = _find_file(name_or_path, "tokenizer.model", cache_dir)
    proto = _read_sentencepiece(spm_file) if spm_file else None
    config = _tokenizer_config(name_or_path, cache_dir) if proto else {}
    named = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer", None)
    if proto and named and proto.trainer_spec.model_type == 2:  # BPE
        return _load_llama_tokenizer(name_or_path, proto, config, settings)
    return AutoTokenizer.from_pretrained(name_or_path, **settings), []


def _load_llama_tokenizer(name_or_path: str, proto, config: dict, settings: dict):
    from transformers import LlamaTokenizer

    notes, spec = [], proto.trainer_spec
    for name, piece_id in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("unk_token", spec.unk_id)):
        if not _content(config.get(name)) and piece_id >= 0:
            settings[name] = proto.pieces[piece_id].piece
            if name in config:
                notes.append(f"{name} is empty in the tokenizer's config; taking {settings[name]}")
    if config.get("add_bos_token") is None:
        settings["add_bos_token"] = True
    tokenizer = LlamaTokenizer.from_pretrained(name_or_path, legacy=True, **settings)
    # transformers would not save this setting with the checkpoint. Without it the text after a chat template's <s>
    # loses its prefix space, and a server's prompt begins "Bel|ow" instead of "▁Below".
    tokenizer.init_kwargs["legacy"] = True
    if _fix_merges(tokenizer, proto):
        notes.append("BPE merges put into the order of sentencepiece's scores (double spaces tokenized differently)")
    return tokenizer, notes


def continuation_tokenizer(tokenizer):
    """Makes a tokenizer for text in the middle of a sequence: one that adds no space and no special token in front.

    LLaMA's tokenizer reads "Yes" as `▁Yes`, as after a space. After "### Response:" the answer is `Yes`, without one.

    Returns:
        A tokenizer of the `tokenizers` library.
    """
    import tokenizers

    def without_space(part):
        if isinstance(part, list):
            return [without_space(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        never = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: never.get(key, without_space(value)) for key, value in part.items()}

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        [settings[name]] = without_space([settings[name]]) or [None]
    settings |= {"post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(settings))


def save_sentencepiece(tokenizer, folder: str, source: str | None = None, cache_dir: str | None = None) -> None:
    """Puts the `tokenizer.model` that a tokenizer comes from beside a saved one, and what was added in a file.

    transformers 5 saves tokenizer.json alone. llama.cpp's converter reads the scores of pieces from tokenizer.model
    where there is one, else it gives every piece -1000 and the converted model splits text otherwise. Tokens above
    the sentencepiece vocabulary, such as `[PAD]`, it reads from added_tokens.json.

    Args:
        tokenizer: The saved tokenizer.
        folder: Where it was saved.
        source: The folder or Hub id that may have a tokenizer.model; the one that it was loaded from if None.
        cache_dir: Folder for downloads.
    """
    path = _find_file(source or tokenizer.name_or_path, "tokenizer.model", cache_dir)
    proto = _read_sentencepiece(path) if path else None
    vocabulary = tokenizer.get_vocab()
    if proto is None or any(vocabulary.get(piece.piece) != i for i, piece in enumerate(proto.pieces)):
        return  # none, or not this tokenizer's
    added = {token: i for token, i in vocabulary.items() if i >= len(proto.pieces)}
    shutil.copyfile(path, os.path.join(folder, "tokenizer.model"))
    if added:
        with open(os.path.join(folder, "added_tokens.json"), "w", encoding="utf-8") as file:
            json.dump(dict(sorted(added.items(), key=lambda item: item[1])), file, ensure_ascii=False, indent=2)


def _content(token) -> str:
    return (token.get("content", "") if isinstance(token, dict) else token) or ""


def _find_file(name_or_path: str, filename: str, cache_dir: str | None) -> str | None:
    from transformers.utils.hub import cached_file

    return cached_file(
        name_or_path,
        filename,
        cache_dir=cache_dir,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _tokenizer_config(name_or_path: str, cache_dir: str | None) -> dict:
    config = {}
    for filename in ("special_tokens_map.json", "tokenizer_config.json"):
        if path := _find_file(name_or_path, filename, cache_dir):
            with open(path, encoding="utf-8") as file:
                config.update(json.load(file))
    return config


def _read_sentencepiece(path: str):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        with open(path, "rb") as file:
            proto.ParseFromString(file.read())
    except Exception:  # tiktoken's files have the same name
        return None
    return proto if proto.pieces else None


def sentencepiece_merges(proto) -> list[tuple[str, str]]:
    """Lists BPE merges so that the `tokenizers` library splits text as sentencepiece does.

    sentencepiece joins the pair whose piece scores best and, among equals, the leftmost. `tokenizers` follows the
    order of this list, so pieces are sorted by score. LLaMA's runs of spaces all have the same score; longer ones come
    first, so that the leftmost run grows before another one starts.
    """
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for text, i in ids.items():
        piece = proto.pieces[i]
        if piece.type == 1:  # NORMAL
            for cut in range(1, len(text)):
                if text[:cut] in ids and text[cut:] in ids:
                    merges.append((-piece.score, -len(text), i, -cut, text[:cut], text[cut:]))
    return [(left, right) for *_, left, right in sorted(merges)]


def _fix_merges(tokenizer, proto) -> bool:
    """Makes the tokenizer split as sentencepiece does. Returns True if its merges had another order."""
    from tokenizers import normalizers
    from tokenizers.models import BPE

    backend, merges = tokenizer.backend_tokenizer, sentencepiece_merges(proto)
    loaded = json.loads(backend.to_str())["model"]
    if loaded["vocab"] != (vocab := {piece.piece: i for i, piece in enumerate(proto.pieces)}):
        return False  # tokenizer.json is in use, and its vocabulary is not tokenizer.model's
    backend.model = BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return [tuple(pair) for pair in loaded["merges"]] != merges


def special_tokens_to_add(tokenizer, may_grow: bool = True) -> dict[str, str]:
    """Chooses the special tokens that a tokenizer lacks for training.

    The tokenizer keeps the tokens it has. Padding takes a reserved token of the vocabulary (Llama 3, Mistral, Qwen),
    or else the original's new `[PAD]`. It never takes EOS, which the model has to learn.

    Args:
        tokenizer: The tokenizer.
        may_grow: Whether `[PAD]` may be added to the vocabulary. A LoRA adapter has no row for it; it pads with UNK.

    Returns:
        Arguments for `tokenizer.add_special_tokens`, such as {"pad_token": "[PAD]"}; empty if nothing is missing.
    """
    missing = {}
    if not tokenizer.eos_token:
        missing["eos_token"] = DEFAULT_EOS_TOKEN
    if not tokenizer.pad_token:
        taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        reserved = (
            token
            for pattern in RESERVED_FOR_PADDING
            for token, _ in vocabulary
            if token not in taken and re.fullmatch(pattern, token)
        )
        new = DEFAULT_PAD_TOKEN if may_grow else tokenizer.unk_token or tokenizer.bos_token or DEFAULT_PAD_TOKEN
        missing["pad_token"] = next(reserved, new)
    return missing


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, str], tokenizer: Any, model: Any) -> int:
    """Adds special tokens, and rows for them if the tokenizer has outgrown the model.

    New input and output rows are the mean of the old ones, as in the original. Unlike the original it never removes
    rows: OPT has 50,272 for 50,265 tokens, and keeps them. It also works on parameters that DeepSpeed ZeRO-3 has
    partitioned; FSDP shards only afterwards.

    Args:
        special_tokens_dict: The tokens, such as {"pad_token": "[PAD]"}; empty adds none.
        tokenizer: Gets the tokens.
        model: Gets the rows, in place.

    Returns:
        The number of rows added.
    """
    tokenizer.add_special_tokens(special_tokens_dict)
    embeddings = [model.get_input_embeddings().weight]
    rows = getattr(embeddings[0], "ds_shape", embeddings[0].shape)[0]
    if len(tokenizer) <= rows:
        return 0
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = [model.get_input_embeddings().weight]
    if model.get_output_embeddings() is not None and model.get_output_embeddings().weight is not embeddings[0]:
        embeddings.append(model.get_output_embeddings().weight)
    with _gathered(embeddings):
        for weight in embeddings:
            if weight.shape[0] > rows:  # under ZeRO-3 only the rank that modifies sees all rows
                weight.data[rows:] = weight.data[:rows].float().mean(dim=0, keepdim=True).to(weight.dtype)
    return len(tokenizer) - rows


@contextlib.contextmanager
def _gathered(parameters: list) -> Iterator[None]:
    """Gathers parameters that ZeRO-3 has partitioned, for rank 0 to modify; does nothing to others."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield
