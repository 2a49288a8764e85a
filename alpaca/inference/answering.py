"""Loads a checkpoint and asks it in the format that it was trained on: what `inference.py`'s commands stand on."""

import bisect
import contextlib
import os
import queue
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from alpaca.cli import UserError, say
from alpaca.files import jload
from alpaca.models import host_memory, load_model
from alpaca.prompts import format_prompt
from alpaca.records import check_text
from alpaca.tokenizers import load_tokenizer

DTYPES = ("float32", "bfloat16", "float16")
# In another batch, float32 matrix products round differently, and two tokens that nearly tie may change places. Nearly:
# the best token's lead is below this share of the largest logit. benchmarks/inference.py measures what rounding does.
TIE = 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def check_model_folder(model_path: str) -> None:
    """Refuses a path that holds no model, before torch is loaded.

    Raises:
        UserError: nothing there, no config.json, or a weight diff.
    """
    if not os.path.isdir(model_path):
        if os.path.exists(model_path) or model_path.count("/") != 1 or model_path.startswith((".", "/", "~")):
            raise UserError(f"{model_path} is no folder; --model_path takes the folder that train.py wrote")
        return  # may be a model's name on the Hub
    if os.path.exists(os.path.join(model_path, "adapter_config.json")):
        return
    config = os.path.join(model_path, "config.json")
    if not os.path.exists(config):
        inner = sorted(name for name in os.listdir(model_path) if name.startswith("checkpoint-"))
        hint = f"did you mean {os.path.join(model_path, inner[-1])}?" if inner else "expected a model's folder"
        raise UserError(f"{model_path} has no config.json; {hint}")
    if jload(config).get("alpaca_weight_diff"):
        raise UserError(
            f"{model_path} is a weight diff, not a model; make the model first: python weight_diff.py recover "
            f"--path_raw RAW --path_diff {model_path} --path_tuned OUT"
        )


def pick_device(device: str | None) -> str:
    """Names the device to use: the one asked for, else a GPU, else Apple's, else the CPU."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def pick_dtype(dtype: str | None, device: str, parameters: int) -> Any:
    """Names the torch dtype to compute in.

    Half the bits where the device computes in them: bfloat16 on GPUs that have it, else float16. On a CPU float32,
    which is exact and fast there, unless the weights would not fit into the machine's memory.
    """
    import torch

    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype must be {', '.join(DTYPES)}, found {dtype!r}")
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device != "cpu":
        return torch.float16
    return torch.float32 if 4 * parameters < 0.9 * host_memory(total=True) else torch.bfloat16


def load(model_path: str, device: str | None = None, dtype: str | None = None) -> "Alpaca":
    """Loads a checkpoint, or a LoRA adapter with its base, and checks that it is whole.

    Args:
        model_path: a folder with a model, or with an adapter whose config names its base; or a name on the Hub.
        device: cpu, cuda, cuda:1, mps; the machine's best when None.
        dtype: float32, bfloat16 or float16; what fits device and memory when None.

    Raises:
        UserError: the folder holds no model, tensors are missing, tokenizer and model don't fit each other.
    """
    check_model_folder(model_path)
    from safetensors import SafetensorError

    adapter = os.path.join(model_path, "adapter_config.json")
    base = _base_of_adapter(adapter) if os.path.exists(adapter) else model_path
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries log to stdout when they are first imported
            model = _load_model(base, device, dtype)
        own = os.path.exists(os.path.join(model_path, "tokenizer_config.json"))
        tokenizer, _ = load_tokenizer(model_path if own else base, model_max_length=_context(model.config))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        asked = "" if os.path.exists(base) else "there is no such folder, and the Hub was asked in vain; "
        raise UserError(f"cannot load {base}: {asked}{' '.join(str(error).split())[:300]}") from error
    if os.path.exists(adapter):
        model = _with_adapter(model, model_path, len(tokenizer))
    alpaca = Alpaca(model.eval(), tokenizer, model_path)
    say(f"{alpaca.name}: {model.num_parameters():,} parameters, {str(model.dtype)[6:]} on {model.device}")
    return alpaca


def _load_model(path: str, device: str | None, dtype: str | None) -> Any:
    """Loads the weights in the type that fits, quietly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = pick_device(device)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).num_parameters()
    model = load_model(path, pick_dtype(dtype, device, parameters), device=device)
    # What the checkpoint says about sampling would fill whatever a command leaves open; only its ends of text count.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


def _context(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", 2048)


def _base_of_adapter(adapter_config: str) -> str:
    base = jload(adapter_config).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter_config} names no base model (base_model_name_or_path)")
    try:
        check_model_folder(base)
    except UserError as error:
        raise UserError(f"{adapter_config} names a base model that is not there: {error}") from error
    return base


def _with_adapter(model: Any, adapter_path: str, tokens: int) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{adapter_path} is a LoRA adapter, which needs peft: pip install peft") from error
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens)  # the padding token that train.py added; padding is never attended to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        return PeftModel.from_pretrained(model, adapter_path)


# ---------------------------------------------------------------------------------------------------------------------
# Generating


class Alpaca:
    """A model with its tokenizer, asked in the format that it was trained on."""

    def __init__(self, model: Any, tokenizer: Any, model_path: str):
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"{model_path}: the tokenizer has {len(tokenizer):,} tokens, the model {rows:,} rows; "
                "they come from different checkpoints"
            )
        if not tokenizer.eos_token:
            raise UserError(
                f"{model_path}: the tokenizer has no EOS token, so no answer would ever end; "
                'set "eos_token" in its tokenizer_config.json'
            )
        self.model, self.tokenizer = model, tokenizer
        self.name = os.path.basename(os.path.normpath(model_path))
        eos = model.generation_config.eos_token_id
        # Some models end a turn with another token than the text's end; either ends the answer.
        self.eos_token_ids = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context = _context(model.config)

    def answer_length(self, max_new_tokens: int) -> int:
        """Bounds the answer so that a prompt of 256 tokens, or half the context if that is less, always fits."""
        return min(max_new_tokens, self.context - min(256, self.context // 2))

    def encode(self, example: Mapping[str, str], max_new_tokens: int) -> tuple[list[int], str | None]:
        """Turns an example into the token ids of its prompt; one too long for the context loses its input's end.

        Args:
            example: `instruction` and an optional `input`.
            max_new_tokens: how much of the context is kept for the answer.

        Returns:
            The ids, and None or one line that says what was cut.

        Raises:
            UserError: the example is no text, or the context too small for the template.
        """

        def tokens(fields: Mapping[str, str]) -> list[int]:
            return self.tokenizer(format_prompt(fields))["input_ids"]

        for field in ("instruction", "input"):
            check_text(f"the {field}", example.get(field) or "")
        ids = whole = tokens(example)
        room = self.context - self.answer_length(max_new_tokens)
        cut = []
        for field in ("input", "instruction"):
            text = example.get(field) or ""
            if len(ids) <= room or not text:
                continue
            # The template's own tail, "### Response:", must stay, so the user's text is cut and not the prompt.
            fits = bisect.bisect(range(1, len(text)), 0, key=lambda n: len(tokens({**example, field: text[:n]})) > room)
            example = {**example, field: text[: max(fits, 1)]}
            cut.append(f"{len(text) - len(example[field]):,} of {len(text):,} characters of the {field}")
            ids = tokens(example)
        if len(ids) > room:
            raise UserError(f"the model's context of {self.context} tokens is too small for the prompt's template")
        notice = (
            f"the prompt has {len(whole):,} tokens and the model has room for {room:,} beside the answer's "
            f"{self.answer_length(max_new_tokens):,}: cut the last {' and '.join(cut)}"
        )
        return ids, notice if cut else None

    def settings(self, max_new_tokens: int, temperature: float, top_p: float) -> Any:
        """Checks the sampling parameters and makes a generation config of them."""
        from transformers import GenerationConfig

        if max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be 1 or more, found {max_new_tokens}")
        if temperature < 0:
            raise UserError(f"--temperature must be 0 (greedy) or more, found {temperature}")
        if not 0 < top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, found {top_p}")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.answer_length(max_new_tokens),
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            **(sampling if temperature else {"do_sample": False}),
        )

    def decode(self, ids: list[int]) -> str:
        """Turns an answer's token ids into its text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, ids: list[int], settings: Any, seed: int | None = None) -> Iterator[str]:
        """Generates one answer and yields its text piece by piece; closing the iterator stops the model.

        Args:
            ids: the prompt's token ids.
            settings: from `settings`.
            seed: of the sampling; a random one when None.

        Yields:
            Pieces whose concatenation is the decoded answer.
        """
        import torch
        from transformers import StoppingCriteriaList, set_seed

        pieces: queue.Queue = queue.Queue()
        stop = threading.Event()
        prompt = torch.tensor([ids], device=self.model.device)

        def work() -> None:
            try:
                if seed is not None:
                    set_seed(seed)
                self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    streamer=_Streamer(self.decode, pieces.put),
                    stopping_criteria=StoppingCriteriaList([_Stopped(stop)]),
                )
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()
            thread.join()

    def generate(self, prompts: list[list[int]], settings: Any, seed: int | None = None) -> list[list[int]]:
        """Generates the answers to several prompts at once.

        Greedy answers in float32 are those that each prompt gives alone: rows in which two tokens came so close that
        the batch's rounding may have decided between them are asked again, alone.

        Args:
            prompts: token ids, padded here on the left so that every answer starts at the same column.
            settings: from `settings`.
            seed: of the sampling.

        Returns:
            The answers' token ids, EOS and padding left out, in the order of the prompts.
        """
        import torch
        from transformers import set_seed

        width = max(map(len, prompts))
        padded = [[self.pad_token_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        ties = _Ties(len(prompts), width, self.eos_token_ids)
        if seed is not None:
            set_seed(seed)
        exact = len(prompts) > 1 and not settings.do_sample and self.model.dtype == torch.float32
        rows = self.model.generate(
            input_ids=torch.tensor(padded, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=settings,
            logits_processor=[ties] if exact else None,
        )[:, width:].tolist()
        answers = [self._until_eos(row) for row in rows]
        for row in ties.rows() if exact else ():
            answers[row] = self.generate([prompts[row]], settings)[0]
        return answers

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids))]


class _Streamer:
    """Hands over an answer's text as it grows, in the shape of transformers' streamers.

    transformers' own TextStreamer forgets the tokens before a line break, and LLaMA's tokenizer then drops the first
    space of the next line: indented code arrives damaged. Decoding everything each time costs little at these lengths.
    """

    def __init__(self, decode: Any, emit: Any):
        self.decode, self.emit = decode, emit
        self.ids: list[int] = []
        self.emitted = 0
        self.prompt_passed = False

    def put(self, value: Any) -> None:
        if not self.prompt_passed:
            self.prompt_passed = True
            return
        self.ids.extend(value.tolist())
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self._emit(text)

    def end(self) -> None:
        self._emit(self.decode(self.ids))

    def _emit(self, text: str) -> None:
        if len(text) > self.emitted:
            self.emit(text[self.emitted :])
            self.emitted = len(text)


class _Stopped:
    """A stopping criterion: someone has had enough."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Ties:
    """A logits processor that changes nothing and notes in which rows the best two tokens nearly tied."""

    def __init__(self, rows: int, prompt_width: int, eos_token_ids: list[int]):
        self.prompt_width, self.eos_token_ids = prompt_width, eos_token_ids
        self.tied: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        best = scores.topk(2).values
        eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        unfinished = ~torch.isin(input_ids[:, self.prompt_width :], eos).any(dim=1)
        tied = (best[:, 0] - best[:, 1] < TIE * scores.abs().amax(dim=1)) & unfinished
        self.tied = tied if self.tied is None else self.tied | tied
        return scores

    def rows(self) -> list[int]:
        return self.tied.nonzero().flatten().tolist()
