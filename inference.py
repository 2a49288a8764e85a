"""Asks a model: one instruction, a prompt in the terminal, a file of instructions, a web page.

    python inference.py answer --model_path DIR --instruction "Name three colors." [--input "..."]
    python inference.py chat --model_path DIR
    python inference.py batch --model_path DIR --data FILE --output FILE
    python inference.py demo --model_path DIR
    python inference.py compare --a FILE --b FILE --output judged.jsonl

The first four ask a server instead if they get `--base_url http://127.0.0.1:8000/v1` in place of `--model_path`: for a
few prompts the model in this process will do, for many an engine such as vLLM is faster.

Every command puts the instruction into the training template and returns only the model's new text. Answers go to
stdout, everything else to stderr. Answers are greedy unless `--temperature` is given; Stanford's web demo sampled with
temperature 0.7 and top_p 0.9, up to 600 new tokens (https://github.com/tatsu-lab/stanford_alpaca/issues/35).
"""

import contextlib
import os
from typing import Any

from alpaca.cli import UserError, run_cli, say
from alpaca.files import jdump
from alpaca.inference import batch as batches
from alpaca.inference.answering import Alpaca
from alpaca.inference.batch import AnswerJournal, load_instances
from alpaca.inference.engine import Engine
from alpaca.inference.loading import load
from alpaca.inference.sampling import check_seed
from alpaca.inference.terminal import read_line


def load_or_connect(
    model_path: str | None, base_url: str | None, model_name: str | None, device: str | None, dtype: str | None
) -> Alpaca | Engine:
    """Loads the model, or connects to the server that has it.

    Raises:
        UserError: Neither or both are named, a flag of the one is given with the other, or it can't be used.
    """
    if (model_path is None) == (base_url is None):
        found = "found neither" if base_url is None else "found both"
        raise UserError(f"name the model with --model_path, or a server that has it with --base_url; {found}")
    if base_url is None:
        if model_name is not None:
            raise UserError("--model_name is a model's name at a server; give the server's --base_url, too")
        return load(model_path, device, dtype)
    if device is not None or dtype is not None:
        raise UserError("--device and --dtype are the server's own business; leave them out with --base_url")
    return Engine(base_url, model_name)


def answer(
    instruction: str,
    input: str = "",
    model_path: str | None = None,
    base_url: str | None = None,
    model_name: str | None = None,
    max_new_tokens: int = 600,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Prints the model's answer to one instruction while the model writes it.

    Args:
        instruction: What the model should do.
        input: Further context, like the `input` field of the training data.
        model_path: The folder of a model or a LoRA adapter.
        base_url: Instead, an OpenAI-compatible server that has the model, such as http://127.0.0.1:8000/v1.
        model_name: The model's name at that server; its only model by default.
        max_new_tokens: The most tokens that the answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling; the same seed gives the same answer.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    if not instruction.strip():
        raise UserError("--instruction is empty; say what the model should do")
    check_seed(seed)
    alpaca = load_or_connect(model_path, base_url, model_name, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    _print_answer(alpaca, {"instruction": instruction, "input": input}, settings, seed)


def _print_answer(alpaca: Alpaca | Engine, example: dict[str, str], settings: Any, seed: int | None) -> None:
    ids, notice = alpaca.encode(example, settings.max_new_tokens)
    if notice:
        say(f"warning: {notice}")
    try:
        with contextlib.closing(alpaca.stream(ids, settings, seed)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        print(flush=True)


def chat(
    model_path: str | None = None,
    base_url: str | None = None,
    model_name: str | None = None,
    max_new_tokens: int = 600,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Answers instructions typed at a prompt. Ctrl-C interrupts an answer, Ctrl-D leaves.

    The model was trained on single instructions, so it doesn't see earlier ones.

    Args:
        model_path: The folder of a model or a LoRA adapter.
        base_url: Instead, an OpenAI-compatible server that has the model, such as http://127.0.0.1:8000/v1.
        model_name: The model's name at that server; its only model by default.
        max_new_tokens: The most tokens that an answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling, used anew for each instruction.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    check_seed(seed)
    alpaca = load_or_connect(model_path, base_url, model_name, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    say("Each instruction is answered on its own: the model doesn't see earlier ones. Ctrl-D leaves.")
    while (instruction := read_line("\nInstruction: ")) is not None:
        if not instruction.strip():
            continue
        if (context := read_line("Input (Enter for none): ")) is None:
            break
        try:
            _print_answer(alpaca, {"instruction": instruction, "input": context}, settings, seed)
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("interrupted")
    say("")


def batch(
    data: str,
    output: str,
    model_path: str | None = None,
    base_url: str | None = None,
    model_name: str | None = None,
    batch_size: int | None = None,
    in_flight: int | None = None,
    max_new_tokens: int = 600,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int = 42,
    generator: str | None = None,
    fold_input: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Answers a file of instructions and writes a file that AlpacaEval can read.

    If a run is interrupted, the same command continues it.

    Args:
        data: JSON or JSON Lines with `instruction` and an optional `input`, or Self-Instruct tasks with `instances`.
        output: The JSON list to write: `instruction`, `input`, `output` and `generator`, in the order of the data.
        model_path: The folder of a model or a LoRA adapter.
        base_url: Instead, an OpenAI-compatible server that has the model, such as http://127.0.0.1:8000/v1.
        model_name: The model's name at that server; its only model by default.
        batch_size: The number of prompts answered at once in this process; 16 by default.
        in_flight: The number of requests that a server gets at once; 64 by default.
        max_new_tokens: The most tokens that an answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling.
        generator: The name to write in the `generator` field; the model's name by default.
        fold_input: Write each instruction with its input after it, as AlpacaEval's judge needs them.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
        overwrite: Replace the output if it exists.
    """
    if not output:
        raise UserError("--output is empty; name the file to write")
    if os.path.isdir(output) or (os.path.exists(output) and not overwrite):
        hint = "" if os.path.isdir(output) else " or give --overwrite"
        raise UserError(f"{output} exists; name another --output{hint}")
    for flag, value, needed in (("--batch_size", batch_size, model_path), ("--in_flight", in_flight, base_url)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be 1 or more, found {value}")
        if value is not None and needed is None:
            raise UserError("--batch_size belongs to --model_path, and --in_flight to --base_url")
    check_seed(seed)
    examples = load_instances(data)
    written = list(map(batches.fold, examples)) if fold_input else examples
    batches.warn_of_shared_instructions(written)
    with AnswerJournal(output) as journal:
        alpaca = load_or_connect(model_path, base_url, model_name, device, dtype)
        settings = alpaca.settings(max_new_tokens, temperature, top_p)
        prompts = batches.encode_all(alpaca, examples, settings)
        if isinstance(alpaca, Engine):
            journal.begin(batches.describe_run(alpaca, prompts, settings, seed), len(prompts))
            answers = batches.answer_all_by_engine(alpaca, prompts, settings, seed, in_flight or 64, journal)
        else:
            size = batch_size or 16
            journal.begin(batches.describe_run(alpaca, prompts, settings, seed, batch_size=size), len(prompts))
            answers = batches.answer_all(alpaca, prompts, settings, seed, size, journal)
        name = generator or alpaca.name
        jdump([{**e, "output": a, "generator": name} for e, a in zip(written, answers, strict=True)], output)
        os.unlink(journal.path)
    say(f"{output}: {len(answers)} answers")


def demo(
    model_path: str | None = None,
    base_url: str | None = None,
    model_name: str | None = None,
    port: int = 7860,
    host: str = "127.0.0.1",
    share: bool = False,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serves a web page on which a person can ask the model. It starts with the sampling of Stanford's demo.

    Args:
        model_path: The folder of a model or a LoRA adapter.
        base_url: Instead, an OpenAI-compatible server that has the model, such as http://127.0.0.1:8000/v1.
        model_name: The model's name at that server; its only model by default.
        port: The port to listen on.
        host: The address to listen on; 127.0.0.1 can only be reached from this machine.
        share: Let Gradio make a public address for the page, which goes through Gradio's servers.
        seed: The seed for sampling; the same seed gives the same answers.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    from alpaca.inference import pages

    check_seed(seed)
    pages.check_port(host, port)
    alpaca = load_or_connect(model_path, base_url, model_name, device, dtype)
    with contextlib.closing(alpaca):
        pages.serve(pages.build_demo(alpaca, seed), host, port, share)


def compare(a: str, b: str, output: str, seed: int = 42, page: bool = False, port: int = 7860) -> None:
    """Lets a person judge two models' answers pair by pair, without showing which model wrote which.

    Each verdict is saved at once. The same command continues with the pairs that are left.

    Args:
        a: The file that `batch` wrote with one model.
        b: The file that `batch` wrote with the other model for the same data.
        output: The JSON Lines file for the verdicts.
        seed: The seed for the order of the pairs and for the answer shown first.
        page: Judge in a browser instead of the terminal.
        port: The port of that page.
    """
    from alpaca.inference import judging

    if page:
        from alpaca.inference import pages

        pages.check_port("127.0.0.1", port)
    with judging.Verdicts(output, *judging.load_pairs(a, b, seed)) as verdicts:
        if page:
            pages.serve(pages.build_judging(verdicts), "127.0.0.1", port, share=False)
            print(verdicts.summary())
        else:
            judging.judge_in_terminal(verdicts)


if __name__ == "__main__":
    run_cli({"answer": answer, "chat": chat, "batch": batch, "demo": demo, "compare": compare})
