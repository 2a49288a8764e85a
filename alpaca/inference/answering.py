"""Asks a loaded model in the format that it was trained on: one answer as a stream, or several at once."""

import bisect
import copy
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from alpaca.cli import UserError
from alpaca.inference.sampling import check_example_text, check_sampling
from alpaca.prompts import format_prompt

# A batch of another size rounds float32 matrix products differently, and two tokens that nearly tie may change places.
# "Nearly" means that the best token leads by less than this share of the largest logit: with a largest logit of 20, by
# less than 0.0002. benchmarks/inference.py measures how much rounding really moves the lead.
TIE = 1e-5


def context_length(config: Any) -> int:
    """Returns how many tokens, prompt and answer together, a model can take."""
    return getattr(config.get_text_config(), "max_position_embeddings", 2048)


class Alpaca:
    """A model with its tokenizer, asked in the format that it was trained on.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        path: The folder or Hub id that it was loaded from.
        name: The last part of that path.
        context: How many tokens fit, prompt and answer together.
        fingerprint: Tells this checkpoint's files from others'.
        eos_token_ids: The tokens that end an answer.
        pad_token_id: The token that fills up a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, path: str, fingerprint: str = ""):
        """Checks that the model and its tokenizer fit each other.

        Raises:
            UserError: The model has too few rows for the tokenizer, or the tokenizer has no EOS token.
        """
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"{path}: the tokenizer has {len(tokenizer):,} tokens but the model only {rows:,} rows; "
                "they come from different checkpoints"
            )
        if not tokenizer.eos_token:
            raise UserError(
                f"{path}: the tokenizer has no EOS token, so no answer would ever end; "
                'set "eos_token" in its tokenizer_config.json'
            )
        self.model, self.tokenizer, self.path, self.fingerprint = model, tokenizer, path, fingerprint
        self._streams: dict[threading.Thread, threading.Event] = {}  # what is being written -> what stops it
        self.name = os.path.basename(os.path.normpath(path))
        eos = model.generation_config.eos_token_id
        # Some models end a turn with a token other than the EOS of their texts. Either one ends the answer.
        self.eos_token_ids = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context = context_length(model.config)

    def answer_length(self, max_new_tokens: int) -> int:
        """Limits an answer so that a prompt of 256 tokens, or of half the context if that is less, always fits.

        Example:
            with a context of 2048: 600 -> 600, 5000 -> 1792
        """
        return min(max_new_tokens, self.context - min(256, self.context // 2))

    def encode(self, example: Mapping[str, str], max_new_tokens: int) -> tuple[list[int], str | None]:
        """Turns an example into the token ids of its prompt, shortened if they don't fit.

        The end of the input is cut first, then the end of the instruction. The prompt's own end, "### Response:", has
        to stay, so the fields are cut before they go into the template.

        Args:
            example: Has `instruction` and may have `input`.
            max_new_tokens: How many tokens of the context to reserve for the answer.

        Returns:
            The token ids, and one line that says what was cut, or None.

        Raises:
            UserError: A field is not valid text, or not even the template fits the context.
        """
        check_example_text(example)
        ids = whole = self._prompt_ids(example)
        available = self.context - self.answer_length(max_new_tokens)
        cut = []
        for field in ("input", "instruction"):
            text = example.get(field) or ""
            if len(ids) > available and text:
                example = {**example, field: self._fitting_start(example, field, available)}
                cut.append(f"{len(text) - len(example[field]):,} of {len(text):,} characters of the {field}")
                ids = self._prompt_ids(example)
        if len(ids) > available:
            raise UserError(f"the model's context of {self.context} tokens is too small for the prompt's template")
        notice = (
            f"the prompt has {len(whole):,} tokens but only {available:,} fit beside the answer's "
            f"{self.answer_length(max_new_tokens):,}: cut the last {' and '.join(cut)}"
        )
        return ids, notice if cut else None

    def _prompt_ids(self, example: Mapping[str, str]) -> list[int]:
        return self.tokenizer(format_prompt(example))["input_ids"]

    def _fitting_start(self, example: Mapping[str, str], field: str, available: int) -> str:
        """Finds the longest start of a field, at least 1 character, whose prompt has at most `available` tokens."""
        text = example[field]

        def is_too_long(characters: int) -> bool:
            return len(self._prompt_ids({**example, field: text[:characters]})) > available

        return text[: max(bisect.bisect(range(1, len(text)), 0, key=is_too_long), 1)]

    def settings(self, max_new_tokens: int, temperature: float, top_p: float) -> Any:
        """Checks the sampling parameters and returns them as a `GenerationConfig`.

        Raises:
            UserError: A parameter is outside its range.
        """
        from transformers import GenerationConfig

        check_sampling(max_new_tokens, temperature, top_p)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.answer_length(max_new_tokens),
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            **(sampling if temperature else {"do_sample": False}),
        )

    def describe(self, settings: Any) -> dict[str, Any]:
        """Lists what an answer depends on besides its prompt and the seed."""
        return {"model": self.fingerprint, "dtype": str(self.model.dtype), "settings": settings.to_diff_dict()}

    def decode(self, ids: list[int]) -> str:
        """Turns an answer's token ids into text, without the special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, ids: list[int], settings: Any, seed: int | None = None) -> Iterator[str]:
        """Generates one answer and yields its text piece by piece. Closing the iterator stops the model.

        Args:
            ids: The prompt's token ids.
            settings: What `self.settings` returned.
            seed: The seed for sampling; a random one when None.

        Yields:
            Pieces that make up the decoded answer when joined.
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

        thread = threading.Thread(target=work, name="answer", daemon=True)
        self._streams[thread] = stop
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()
            thread.join()
            self._streams.pop(thread, None)

    def close(self) -> None:
        """Stops every answer that is being written. Python must not exit while a thread still computes in torch."""
        for thread, stop in list(self._streams.items()):
            stop.set()
            thread.join()

    def generate(self, prompts: list[list[int]], settings: Any, seed: int | None = None) -> list[list[int]]:
        """Generates the answers to several prompts at once.

        In float32, a greedy answer is the one that its prompt would get alone: prompts for which the batch's rounding
        may have decided between two tokens are asked again, one by one.

        Args:
            prompts: Token ids. They are padded here on the left, so that all answers start in the same column.
            settings: What `self.settings` returned.
            seed: The seed for sampling.

        Returns:
            The answers' token ids without EOS and padding, in the order of the prompts.
        """
        import torch
        from transformers import set_seed

        if seed is not None:
            set_seed(seed)
        watch_ties = len(prompts) > 1 and not settings.do_sample and self.model.dtype == torch.float32
        answers: list[list[int]] = [[] for _ in prompts]
        waiting, tied = list(range(len(prompts))), set()
        while waiting:
            # All that wait have answers of the same length so far. Those that have ended would only be padded on: once
            # they are the larger part, the others go on in a batch of their own.
            left = settings.max_new_tokens - len(answers[waiting[0]])
            asked = [prompts[row] + answers[row] for row in waiting]
            rows, unsure = self._generate_until_most_have_ended(asked, settings, left, watch_ties)
            tied |= {row for row, near in zip(waiting, unsure, strict=True) if near}
            for row, ids in zip(waiting, rows, strict=True):
                answers[row] += ids
            length = len(rows[0])
            waiting = [
                row
                for row, ids in zip(waiting, rows, strict=True)
                if length < left and not self._has_ended(ids) and row not in tied
            ]
        answers = [self._until_eos(ids) for ids in answers]
        for row in tied:
            answers[row] = self.generate([prompts[row]], settings)[0]
        return answers

    def _generate_until_most_have_ended(
        self, prompts: list[list[int]], settings: Any, max_new_tokens: int, watch_ties: bool
    ) -> tuple[list[list[int]], list[bool]]:
        """Generates until half of the rows have ended; returns their new ids, and which rows came near a tie."""
        import torch
        from transformers import StoppingCriteriaList

        width = max(map(len, prompts))
        padded = [[self.pad_token_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        ties = _Ties(width, self.eos_token_ids)
        config = copy.copy(settings)
        config.max_new_tokens = max_new_tokens
        rows = self.model.generate(
            input_ids=torch.tensor(padded, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            generation_config=config,
            logits_processor=[ties] if watch_ties else None,
            stopping_criteria=StoppingCriteriaList([_MostEnded(width, self.eos_token_ids)]),
        )[:, width:].tolist()
        return rows, ties.rows() if watch_ties else [False] * len(rows)

    def _has_ended(self, ids: list[int]) -> bool:
        return not set(self.eos_token_ids).isdisjoint(ids)

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids))]


class _Streamer:
    """Passes on an answer's text as it grows, with the interface of transformers' streamers.

    transformers' TextStreamer forgets the tokens before a line break, and LLaMA's tokenizer then drops the first space
    of the next line, which damages indented code. This one decodes the whole answer every time, which costs little at
    these lengths.
    """

    def __init__(self, decode: Any, emit: Any):
        self.decode, self.emit = decode, emit
        self.ids: list[int] = []
        self.emitted = 0
        self.prompt_passed = False

    def put(self, value: Any) -> None:
        if not self.prompt_passed:  # generate() puts the prompt first
            self.prompt_passed = True
            return
        self.ids.extend(value.tolist())
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):  # the last character still lacks some of its bytes
            self._emit(text)

    def end(self) -> None:
        self._emit(self.decode(self.ids))

    def _emit(self, text: str) -> None:
        if len(text) > self.emitted:
            self.emit(text[self.emitted :])
            self.emitted = len(text)


class _Stopped:
    """A stopping criterion that stops every row once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Ties:
    """A logits processor that changes nothing and notes the rows in which the best two tokens nearly tied."""

    def __init__(self, prompt_width: int, eos_token_ids: list[int]):
        self.prompt_width, self.eos_token_ids = prompt_width, eos_token_ids
        self.tied: Any = None  # (rows,) bool

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        best = scores.topk(2).values
        eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        unfinished = ~torch.isin(input_ids[:, self.prompt_width :], eos).any(dim=1)
        tied = (best[:, 0] - best[:, 1] < TIE * scores.abs().amax(dim=1)) & unfinished
        self.tied = tied if self.tied is None else self.tied | tied
        return scores

    def rows(self) -> list[bool]:
        return self.tied.tolist()


class _MostEnded:
    """A stopping criterion that stops every row once half of them have ended."""

    def __init__(self, prompt_width: int, eos_token_ids: list[int]):
        self.prompt_width, self.eos_token_ids = prompt_width, eos_token_ids

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        eos = torch.tensor(self.eos_token_ids, device=input_ids.device)
        ended = torch.isin(input_ids[:, self.prompt_width :], eos).any(dim=1).sum()
        return torch.full((input_ids.shape[0],), bool(2 * ended >= len(input_ids)), device=input_ids.device)
