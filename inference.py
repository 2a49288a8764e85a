"""Asks the model: one instruction, a prompt in the terminal, a file of instructions, a page.

    python inference.py answer --model_path DIR --instruction "Name three colors." [--input "..."]
    python inference.py chat --model_path DIR
    python inference.py batch --model_path DIR --data FILE --output FILE
    python inference.py demo --model_path DIR
    python inference.py compare --a FILE --b FILE --output judged.jsonl

Every command puts the training template around the instruction and gives only the model's new text: answers go to
stdout, everything else to stderr. Answers are greedy unless `--temperature` says otherwise; Stanford's web demo
sampled with temperature 0.7 and top_p 0.9, up to 600 new tokens
(https://github.com/tatsu-lab/stanford_alpaca/issues/35).
"""

import contextlib
import hashlib
import json
import os
import sys
from typing import Any

from alpaca.cli import UserError, run_cli, say
from alpaca.files import atomic_write, jdump
from alpaca.inference.answering import Alpaca, load
from alpaca.records import check_text, load_examples


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
    """Prints the model's answer to one instruction, as it is being written.

    Args:
        model_path: a folder with a model or a LoRA adapter.
        instruction: what the model is to do.
        input: further context, as the data's `input` field.
        max_new_tokens: where the answer is cut off if the model doesn't end it.
        temperature: 0 takes the likeliest token each time; Stanford's demo sampled at 0.7.
        top_p: when sampling, only the likeliest tokens that together have this probability.
        seed: of the sampling, for an answer that can be had again.
        device: cpu, cuda, cuda:1, mps; the machine's best when left out.
        dtype: float32, bfloat16, float16; what fits the device when left out.
    """
    if not instruction.strip():
        raise UserError("--instruction is empty; say what the model is to do")
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
    """Answers instructions at a prompt, each on its own, as the model was trained; Ctrl-D leaves, Ctrl-C interrupts.

    Args:
        model_path: a folder with a model or a LoRA adapter.
        max_new_tokens: where an answer is cut off if the model doesn't end it.
        temperature: 0 takes the likeliest token each time; Stanford's demo sampled at 0.7.
        top_p: when sampling, only the likeliest tokens that together have this probability.
        seed: of the sampling, the same for each instruction.
        device: cpu, cuda, cuda:1, mps; the machine's best when left out.
        dtype: float32, bfloat16, float16; what fits the device when left out.
    """
    alpaca = load(model_path, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    say("Each instruction is answered on its own: the model doesn't see earlier ones. Ctrl-D leaves.")
    while (instruction := _ask("\nInstruction: ")) is not None:
        if not instruction.strip():
            continue
        if (context := _ask("Input (Enter for none): ")) is None:
            break
        try:
            _print_answer(alpaca, {"instruction": instruction, "input": context}, settings, seed)
        except KeyboardInterrupt:
            say("interrupted")
    say("")


def _ask(prompt: str) -> str | None:
    """Reads a line, with history and editing in a terminal; None at its end (Ctrl-D)."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
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
    """Answers a file of instructions; the output is what AlpacaEval reads.

    An interrupted run goes on where it stopped when the same command is given again.

    Args:
        model_path: a folder with a model or a LoRA adapter.
        data: JSON or JSON Lines of `instruction` and an optional `input`, or Self-Instruct's tasks with `instances`.
        output: the JSON list to write, of `instruction`, `input`, `output` and `generator`, in the order of the data.
        batch_size: prompts that are answered at once.
        max_new_tokens: where an answer is cut off if the model doesn't end it.
        temperature: 0 takes the likeliest token each time; Stanford's demo sampled at 0.7.
        top_p: when sampling, only the likeliest tokens that together have this probability.
        seed: of the sampling.
        generator: the name in the output's `generator` field; the model folder's when left out.
        device: cpu, cuda, cuda:1, mps; the machine's best when left out.
        dtype: float32, bfloat16, float16; what fits the device when left out.
        overwrite: whether an output that is already there may be replaced.
    """
    if not output:
        raise UserError("--output is empty; name the file to write")
    if os.path.isdir(output) or (os.path.exists(output) and not overwrite):
        raise UserError(
            f"{output} exists; name another --output{'' if os.path.isdir(output) else ' or give --overwrite'}"
        )
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more, found {batch_size}")
    examples = load_instances(data)
    alpaca = load(model_path, device, dtype)
    settings = alpaca.settings(max_new_tokens, temperature, top_p)
    prompts = []
    for number, example in enumerate(examples):
        ids, notice = alpaca.encode(example, settings.max_new_tokens)
        prompts.append(ids)
        if notice:
            say(f"warning: record {number}: {notice}")
    run = {"model": os.path.abspath(model_path), "dtype": str(alpaca.model.dtype), "settings": settings.to_diff_dict()}
    run["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    if temperature:  # what is sampled depends on the batch; a greedy run may go on with smaller batches
        run |= {"seed": seed, "batch_size": batch_size}
    journal = f"{output}.partial.jsonl"
    try:
        answers = _answer_all(alpaca, prompts, settings, seed, batch_size, journal, run)
    except OSError as error:
        raise UserError(
            f"cannot write {journal}: {error.strerror}; the answers in it are safe, and the same command goes on there"
        ) from error
    name = generator or alpaca.name
    jdump([{**e, "output": a, "generator": name} for e, a in zip(examples, answers, strict=True)], output)
    os.unlink(journal)
    say(f"{output}: {len(answers)} answers")


def load_instances(path: str) -> list[dict[str, str]]:
    """Reads instructions to answer; each of a Self-Instruct task's `instances` counts as one.

    Returns:
        `instruction` and `input` of each, in file order; a reference output, where there is one, is left out.
    """
    examples = []
    for number, task in enumerate(load_examples(path, require_output=False)):
        instances = task.get("instances", [task])
        if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
            raise UserError(f"{path}, record {number}: 'instances' must be a list of one object or more")
        for instance in instances:
            text = instance.get("input") or ""
            if not isinstance(text, str):
                raise UserError(f"{path}, record {number}: 'input' must be text, found {type(text).__name__}")
            check_text(f"{path}, record {number}: 'input'", text)
            examples.append({"instruction": task["instruction"], "input": text})
    return examples


def _answer_all(
    alpaca: Alpaca, prompts: list[list[int]], settings: Any, seed: int, batch_size: int, journal: str, run: dict
) -> list[str]:
    """Answers the prompts batch by batch, of similar lengths and the longest first, each batch kept in the journal."""
    import torch
    from tqdm import tqdm

    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers = _read_journal(journal, run)
    tokens = 0
    with open(journal, "a", encoding="utf-8") as file, tqdm(total=len(prompts), unit="answer", file=sys.stderr) as bar:
        bar.update(len(answers))
        for start in range(0, len(order), batch_size):
            rows = [row for row in order[start : start + batch_size] if row not in answers]
            if not rows:
                continue
            try:
                ids = alpaca.generate([prompts[row] for row in rows], settings, seed + start)
            except torch.OutOfMemoryError as error:
                raise UserError(f"out of memory with {len(rows)} prompts at once; lower --batch_size") from error
            new = {row: alpaca.decode(answer) for row, answer in zip(rows, ids, strict=True)}
            answers |= new
            file.write(json.dumps({"answers": list(new.items())}) + "\n")
            file.flush()
            tokens += sum(len(row) + 1 for row in ids)  # with EOS
            bar.set_postfix_str(f"{tokens / bar.format_dict['elapsed']:.0f} tokens/s")
            bar.update(len(rows))
    return [answers[row] for row in range(len(prompts))]


def _read_journal(journal: str, run: dict) -> dict[int, str]:
    """Reads what an earlier run of the same kind has answered, or begins a journal.

    A last line that was cut off in writing is dropped.
    """
    lines = []
    if os.path.exists(journal):
        with open(journal, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
    if lines and lines[0] != json.dumps(run) + "\n":
        raise UserError(f"{journal} was begun with other data or settings; give those again, or delete it")
    with atomic_write(journal) as file:
        file.writelines(lines or [json.dumps(run) + "\n"])
    answers = {row: text for line in lines[1:] for row, text in json.loads(line)["answers"]}
    if answers:
        say(f"{journal}: going on after {len(answers)} answers")
    return answers


def demo(
    model_path: str,
    port: int = 7860,
    host: str = "127.0.0.1",
    share: bool = False,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serves a page on which a person asks the model, with the sampling of Stanford's demo to start from.

    Args:
        model_path: a folder with a model or a LoRA adapter.
        port: to listen on.
        host: to listen on; 127.0.0.1 is reached from this machine only.
        share: whether Gradio makes a public address for the page, through its own servers.
        seed: of the sampling, for answers that can be had again.
        device: cpu, cuda, cuda:1, mps; the machine's best when left out.
        dtype: float32, bfloat16, float16; what fits the device when left out.
    """
    from alpaca.inference import pages

    pages.check_port(host, port)
    alpaca = load(model_path, device, dtype)
    pages.serve(pages.build(alpaca, seed), host, port, share)


def compare(a: str, b: str, output: str, seed: int = 42, page: bool = False, port: int = 7860) -> None:
    """Lets a person judge two models' answers pair by pair, without knowing whose is whose.

    Every verdict is kept at once; the same command goes on with the pairs that are left.

    Args:
        a: an output of `batch`.
        b: another one for the same data.
        output: JSON Lines of the verdicts.
        seed: of the order of the pairs, and of which answer stands first.
        page: whether to judge in a browser rather than in the terminal.
        port: of the page.
    """
    from alpaca.inference import judging

    if page:
        from alpaca.inference import pages

        pages.check_port("127.0.0.1", port)
    journal = judging.Verdicts(output, *judging.load_pairs(a, b, seed))
    if page:
        pages.serve(pages.build_judging(journal), "127.0.0.1", port, share=False)
        print(journal.summary())
    else:
        judging.judge_in_terminal(journal)


if __name__ == "__main__":
    run_cli({"answer": answer, "chat": chat, "batch": batch, "demo": demo, "compare": compare})
