"""Asks a model: one instruction, a prompt in the terminal, a file of instructions, a web page.

    python inference.py answer --model_path DIR --instruction "Name three colors." [--input "..."]
    python inference.py chat --model_path DIR
    python inference.py batch --model_path DIR --data FILE --output FILE
    python inference.py demo --model_path DIR
    python inference.py compare --a FILE --b FILE --output judged.jsonl

Every command puts the instruction into the training template and returns only the model's new text. Answers go to
stdout, everything else to stderr. Answers are greedy unless `--temperature` is given; Stanford's web demo sampled with
temperature 0.7 and top_p 0.9, up to 600 new tokens (https://github.com/tatsu-lab/stanford_alpaca/issues/35).
"""

import contextlib
import os
import sys
from typing import Any

from alpaca.cli import UserError, run_cli, say
from alpaca.files import jdump
from alpaca.inference.answering import Alpaca
from alpaca.inference.batch import AnswerJournal, answer_all, describe_run, encode_all, load_instances
from alpaca.inference.loading import load


def answer(
    model_path: str,
    instruction: str,
    input: str = "",
    max_new_tokens: int = 600,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Prints the model's answer to one instruction while the model writes it.

    Args:
        model_path: The folder of a model or a LoRA adapter.
        instruction: What the model should do.
        input: Further context, like the `input` field of the training data.
        max_new_tokens: The most tokens that the answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling; the same seed gives the same answer.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    if not instruction.strip():
        raise UserError("--instruction is empty; say what the model should do")
    alpaca = load(model_path, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    _print_answer(alpaca, {"instruction": instruction, "input": input}, settings, seed)


def _print_answer(alpaca: Alpaca, example: dict[str, str], settings: Any, seed: int | None) -> None:
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
    model_path: str,
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
        max_new_tokens: The most tokens that an answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling, used anew for each instruction.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    alpaca = load(model_path, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    say("Each instruction is answered on its own: the model doesn't see earlier ones. Ctrl-D leaves.")
    while (instruction := _read_line("\nInstruction: ")) is not None:
        if not instruction.strip():
            continue
        if (context := _read_line("Input (Enter for none): ")) is None:
            break
        try:
            _print_answer(alpaca, {"instruction": instruction, "input": context}, settings, seed)
        except KeyboardInterrupt:
            say("interrupted")
    say("")


def _read_line(prompt: str) -> str | None:
    """Reads a line, with history and editing in a terminal; None at the end of the input (Ctrl-D)."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401
    else:
        print(prompt, end="", file=sys.stderr, flush=True)
    try:
        return input(prompt if in_terminal else "")
    except EOFError:
        return None


def batch(
    model_path: str,
    data: str,
    output: str,
    batch_size: int = 16,
    max_new_tokens: int = 600,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int = 42,
    generator: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Answers a file of instructions and writes a file that AlpacaEval can read.

    If a run is interrupted, the same command continues it.

    Args:
        model_path: The folder of a model or a LoRA adapter.
        data: JSON or JSON Lines with `instruction` and an optional `input`, or Self-Instruct tasks with `instances`.
        output: The JSON list to write: `instruction`, `input`, `output` and `generator`, in the order of the data.
        batch_size: The number of prompts answered at once.
        max_new_tokens: The most tokens that an answer may have.
        temperature: The sampling temperature; 0 always takes the likeliest token. Stanford's demo used 0.7.
        top_p: Sample only from the likeliest tokens that together have this probability.
        seed: The seed for sampling.
        generator: The name to write in the `generator` field; the model folder's name by default.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
        overwrite: Replace the output if it exists.
    """
    if not output:
        raise UserError("--output is empty; name the file to write")
    if os.path.isdir(output) or (os.path.exists(output) and not overwrite):
        hint = "" if os.path.isdir(output) else " or give --overwrite"
        raise UserError(f"{output} exists; name another --output{hint}")
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, found {batch_size}")
    examples = load_instances(data)
    with AnswerJournal(output) as journal:
        alpaca = load(model_path, device, dtype)
        settings = alpaca.settings(max_new_tokens, temperature, top_p)
        prompts = encode_all(alpaca, examples, settings)
        journal.begin(describe_run(alpaca, prompts, settings, seed, batch_size))
        answers = answer_all(alpaca, prompts, settings, seed, batch_size, journal)
        name = generator or alpaca.name
        jdump([{**e, "output": a, "generator": name} for e, a in zip(examples, answers, strict=True)], output)
        os.unlink(journal.path)
    say(f"{output}: {len(answers)} answers")


def demo(
    model_path: str,
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
        port: The port to listen on.
        host: The address to listen on; 127.0.0.1 can only be reached from this machine.
        share: Let Gradio make a public address for the page, which goes through Gradio's servers.
        seed: The seed for sampling; the same seed gives the same answers.
        device: The device to run on (cpu, cuda, cuda:1, mps); the best one available by default.
        dtype: The type to compute in (float32, bfloat16, float16); chosen to suit the device by default.
    """
    from alpaca.inference import pages

    pages.check_port(host, port)
    alpaca = load(model_path, device, dtype)
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
