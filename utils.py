"""What more than one script needs: prompt templates, JSON in and out, the special-token resize.

Importing this module loads neither torch, transformers nor openai, so that every `--help` answers at once.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from command_line import UserError as UserError
from command_line import run_cli as run_cli

# The format that Alpaca models were trained on. A byte changed here changes every model trained with it.
PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}

# What a tokenizer is given where it has none (the original's names and values).
DEFAULT_PAD_TOKEN = "[PAD]"
DEFAULT_EOS_TOKEN = "</s>"
DEFAULT_BOS_TOKEN = "<s>"
DEFAULT_UNK_TOKEN = "<unk>"


def format_prompt(example: Mapping[str, Any]) -> str:
    """Puts an example into the training template that fits it.

    Args:
        example: has `instruction` and may have `input`; an empty, null or absent input selects the no-input template.

    Returns:
        The prompt up to and including `### Response:`, to which the model adds its answer.
    """
    # str.replace, not str.format: braces in the data are data.
    template = PROMPT_DICT["prompt_input" if example.get("input") else "prompt_no_input"]
    head, _, tail = template.partition("{instruction}")
    return head + example["instruction"] + tail.replace("{input}", example.get("input") or "")


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Opens a file that appears under `path` whole, when the block ends without an error, or not at all.

    The bytes go to a temporary file in the same folder, are fsynced and then renamed over `path`, so that neither a
    crash nor a full disk leaves half a file or destroys the one that was there.

    Args:
        path: the target; its folder is made where it is missing. A symbolic link is followed, not replaced, and a
            file that stands there keeps its mode; what is no file, like /dev/stdout, is written to directly.
        mode: "w" for UTF-8 text or "wb" for bytes.

    Yields:
        The open temporary file.

    Raises:
        UserError: the folder or file can't be written, or the disk is full.
    """
    direct = os.path.exists(path) and not os.path.isfile(path)  # /dev/stdout can't be renamed over
    path = os.fspath(path) if direct else os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    with _refusing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        name, mode = (path, mode) if direct else (temporary, mode.replace("w", "x"))
        file = open(name, mode, encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
    try:
        with _refusing(path, only_full_disk=True), file:
            yield file
            file.flush()
            if not direct:
                os.fsync(file.fileno())
        if os.path.isfile(path):
            shutil.copymode(path, temporary)
        if not direct:
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _refusing(path: str, only_full_disk: bool = False) -> Iterator[None]:
    """Says in one line that a file can't be written; a caller's own OSErrors inside the block pass."""
    try:
        yield
    except OSError as error:
        if only_full_disk and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; what stood there before is unchanged") from error


def nearest_existing(path: str) -> str:
    """Gets the deepest part of a path that is there: itself, or the nearest folder above it."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def jdump(obj: Any, f: str | os.PathLike | IO, mode: str = "w", indent: int = 4, default: Callable = str) -> None:
    """Writes a dict or list as JSON, or a string as it is.

    Args:
        obj: a dict, a list or a str.
        f: a path (written atomically; with mode "a" appended to) or an open text file, which is closed afterwards.
        mode: "w" or "a".
        indent: spaces per level.
        default: what JSON does with a value that it doesn't know.

    Raises:
        ValueError: `obj` is of another type; nothing is written.
    """
    if not isinstance(obj, (dict, list, str)):
        raise ValueError(f"jdump writes a dict, list or str; got {type(obj).__name__}")
    text = obj
    if not isinstance(obj, str):
        text = json.dumps(obj, indent=indent, default=default, ensure_ascii=False)
        # Half a surrogate pair, which JSON can hold and UTF-8 can't, stays the escape as which it came.
        text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match.group()):04x}", text)
    if hasattr(f, "write"):
        with f:
            f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def jload(f: str | os.PathLike | IO, mode: str = "r") -> Any:
    """Reads one JSON value from a path or an open file, which is closed afterwards.

    Raises:
        UserError: the file is missing, is no UTF-8 text or no JSON; the message has file, line and column.
    """
    is_file = hasattr(f, "read")
    name = getattr(f, "name", "the open file") if is_file else f
    try:
        with f if is_file else open(f, mode, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}); expected JSON") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error


def load_records(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """Reads a list of JSON objects, from a JSON array or from JSON Lines (one object a line, blank lines skipped).

    Returns:
        A pair for each object: where it stands, for messages ("data.json, record 3" counted from 0 as
        `json.load(...)[3]` is, or "data.jsonl, line 4" counted from 1 as editors do), and the object.

    Raises:
        UserError: the file is missing, empty, not JSON, or holds something else than objects.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON or JSON Lines") from error
    if text.lstrip().startswith("["):
        try:
            found = [(f"{path}, record {i}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a string
            if line.strip():
                try:
                    found.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    if not found and _is_json(text):
                        raise UserError(f"{path} holds one JSON object; expected a list or one a line") from error
                    raise UserError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})") from error
    for where, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
    if not found:
        raise UserError(f"{path} holds no records; expected a JSON list or one JSON object a line")
    return found


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def load_examples(path: str | os.PathLike, *, require_output: bool = True) -> list[dict[str, str]]:
    """Reads instruction-following data in Alpaca's format and checks it record by record.

    Args:
        path: JSON (a list) or JSON Lines of objects with `instruction`, an optional `input`, and `output`.
        require_output: whether a record without an `output`, or with an empty one, is refused.

    Returns:
        The records in file order, further fields kept; a missing or null `input` becomes "".

    Raises:
        UserError: names the first record that is wrong and what was found there.
    """
    return [check_example(where, record, require_output=require_output) for where, record in load_records(path)]


def check_example(where: str, record: Mapping[str, Any], *, require_output: bool = True) -> dict[str, Any]:
    """Checks one record of instruction-following data.

    Args:
        where: where the record stands, for the message.
        record: the record.
        require_output: whether a missing or empty `output` is refused.

    Returns:
        The record, further fields kept; a missing or null `input` becomes "".

    Raises:
        UserError: says where, which field, and what was found there.
    """
    example = {**record, "input": "" if record.get("input") is None else record["input"]}
    for field in ("instruction", "input", "output") if require_output else ("instruction", "input"):
        if field not in example:
            raise UserError(f"{where}: no '{field}'; found the fields {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(example[field], str):
            found = type(example[field]).__name__
            raise UserError(f"{where}: '{field}' must be text, found {found} {example[field]!r:.40}")
        if field != "input" and not example[field].strip():
            raise UserError(f"{where}: '{field}' is empty")
        check_text(f"{where}: '{field}'", example[field])
    return example


def check_text(what: str, text: str) -> None:
    """Refuses a text with half a surrogate pair, which JSON and a command line can hold and no tokenizer reads."""
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{what} is no text: character {half.start()} is {half.group()!a}, half of a surrogate pair")


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, str], tokenizer: Any, model: Any) -> int:
    """Adds special tokens and, where the tokenizer has outgrown the model's rows, rows for them.

    New input and output rows are the mean of the old ones, as in the original. Unlike the original it never shrinks:
    OPT has 50,272 rows for 50,265 tokens, and they stay. Right for parameters that DeepSpeed ZeRO-3 has partitioned
    too; FSDP shards only afterwards.

    Args:
        special_tokens_dict: such as {"pad_token": "[PAD]"}; empty adds none.
        tokenizer: gets the tokens.
        model: gets the rows, in place.

    Returns:
        How many rows were added.
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
    """Makes parameters whole that ZeRO-3 has partitioned, for rank 0 to modify; leaves others alone."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield


def alpaca_chat_template(adds_bos: bool) -> str:
    r"""Writes the training templates as a chat template: chat servers then prompt an Alpaca model as it was trained.

    One user turn, optionally answered. Content "X" takes the template without an input, and content
    "X\n\n### Input:\nY" the one with it.

    Args:
        adds_bos: whether the tokenizer starts a text with BOS. Templates render special tokens themselves.

    Returns:
        A Jinja template.
    """
    with_input, without = (
        json.dumps(PROMPT_DICT[name].partition("### Instruction:")[0]) for name in ("prompt_input", "prompt_no_input")
    )
    return (
        ("{{ bos_token }}" if adds_bos else "")
        + "{%- set first = messages[0] -%}"
        + "{%- if first.role != 'user' or messages | length > 2 -%}"
        + "{{- raise_exception('Alpaca takes one user message: it was trained on single instructions') -}}{%- endif -%}"
        + "{%- set text = first.content if first.content is string "
        + "else first.content | map(attribute='text') | join('') -%}"
        + f"{{{{- {with_input} if '\\n\\n### Input:\\n' in text else {without} -}}}}"
        + "{{- '### Instruction:\\n' + text + '\\n\\n### Response:' -}}"
        + "{%- if messages | length > 1 -%}{{- messages[1].content + eos_token -}}{%- endif -%}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processes that torchrun started


def is_main() -> bool:
    """Whether this is the first of all ranks."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line, once for all ranks."""
    if is_main():
        print(line, flush=True)


def refuse(error: UserError) -> None:
    """Ends this rank with exit status 2, having said why: once for all ranks, and in torchrun's closing report.

    torchrun prints a traceback of its own below any rank's failure. The last lines of that are what it finds here
    (`torch.distributed.elastic.multiprocessing.errors`), or else a hint on how to get tracebacks.

    Raises:
        SystemExit: always.
    """
    if is_main():
        print(f"error: {error}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        jdump({"message": {"message": f"error: {error}", "extraInfo": {"timestamp": int(time.time())}}}, report)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Completions


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How to sample, by OpenAI's names; what stands at its default here isn't sent, the first three aside."""

    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


def openai_completion(
    prompts: str | dict | Sequence,
    decoding_args: OpenAIDecodingArguments,
    model_name: str | None = None,
    sleep_time: int = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    **decoding_kwargs: Any,
) -> Any:
    """Completes prompts at the server that OPENAI_BASE_URL names, or at OpenAI, with one request for each completion.

    Args:
        prompts: a text, a chat message (a dict with role and content), or a list of texts, messages or conversations
            (lists of messages).
        decoding_args: `stream` isn't supported; `n` completions take n requests.
        model_name: the model at the server; the served one, where there is just one, when None.
        sleep_time: unused; waits are what the server asks for.
        batch_size: requests in flight together.
        max_instances: prompts after that many are left out.
        max_batches: likewise after `max_batches * batch_size` prompts.
        return_text: texts instead of completions.
        decoding_kwargs: further parameters of the request, `logit_bias` for instance.

    Returns:
        For each prompt a completion (`.text` or `["text"]`, `finish_reason`, `usage`) or its text; a list of `n` such
        where n > 1. For a single prompt its own, without a list around.

    Raises:
        UserError: in one line, why the server gives no answer.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from completions import complete_all

    if decoding_args.stream:
        raise ValueError("openai_completion gives whole completions; stream must be False")
    single = isinstance(prompts, (str, dict))
    chosen = [prompts] if single else list(prompts)[: min(max_instances, max_batches * batch_size)]
    n = decoding_args.n
    asked = [[prompt] if isinstance(prompt, dict) else prompt for prompt in chosen for _ in range(n)]
    default, always = OpenAIDecodingArguments(), ("max_tokens", "temperature", "top_p")
    parameters = {name: value for name, value in vars(decoding_args).items() if name not in ("n", "stream")}
    parameters = {k: v for k, v in parameters.items() if k in always or v != getattr(default, k)} | decoding_kwargs
    with ThreadPoolExecutor(1) as thread:  # asyncio.run needs a thread without a loop; a notebook's has one
        completions = thread.submit(asyncio.run, complete_all(asked, model_name, batch_size, parameters)).result()
    if return_text:
        completions = [completion.text for completion in completions]
    if n > 1:
        completions = [completions[i : i + n] for i in range(0, len(completions), n)]
    return completions[0] if single else completions
