"""The checks: what each one measures, the bound that makes it right, and the verdict on what a column's runs found.

A verdict is one of

    right     within the bound
    option    outside of it by default, within it with an option that is named
    told      wrong or refused, and the user is told
    silent    wrong, and nothing says so
    same      packing doesn't touch this check; the peer's column without packing answers it
    none      there is nothing to measure
    not run   a run failed, or the peer doesn't run here; the note is the line that stopped it
"""

import dataclasses
import os
import re
from collections.abc import Callable

import torch

from benchmarks.correctness.running import SPLITS, Runner, split_name

IGNORE_INDEX = -100
GRADIENT = 1e-5  # relative
LOGIT = 1e-6
WEIGHT = 1e-6
STOPS = 0.9  # probability of EOS
UNTOUCHED_BY_PACKING = ("tokens", "killed", "chat", "bad")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a check found in a column.

    Attributes:
        text: The number, as the tables show it.
        verdict: See the top of this file.
        note: What explains it: a message, an option, an error.
        value: The number.
    """

    text: str
    verdict: str
    note: str = ""
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: Short, for code.
        title: For the tables.
        bound: What is right, in words.
        judge: Finds the cell of a column, given its runner and that of its base.
        ours: The test of this project that asserts it, or "".
    """

    name: str
    title: str
    bound: str
    judge: Callable[[Runner, Runner], Cell]
    ours: str = ""


def judge(check: Check, runner: Runner, base: Runner) -> Cell:
    """Judges one check; a run that failed gives "not run" with its error."""
    if runner is not base and check.name in UNTOUCHED_BY_PACKING:
        return Cell("", "same")
    try:
        cell = check.judge(runner, base)
    except FailedRun as failed:
        cell = Cell("", "not run", str(failed))
    return dataclasses.replace(cell, note=cell.note.replace(os.path.dirname(runner.folder) + os.sep, ""))


class FailedRun(Exception):
    """A run that a check needs has failed; the message is its error."""


def facts_of(runner: Runner, name: str) -> dict:
    """Gets what a job found.

    Raises:
        FailedRun: It stopped with an error.
    """
    facts = runner.facts.get(name, {"error": f"no run {name!r}"})
    if "error" in facts:
        raise FailedRun(" ".join(facts["error"].split())[:300])
    return facts


def warning_in(text: str, pattern: str) -> str:
    """Finds the line of a run's output that warns of something; progress bars don't count."""
    for line in text.splitlines():
        if re.search(pattern, line, re.IGNORECASE) and "%|" not in line:
            return line.strip()[:300]
    return ""


def tail(line: str, start: str = "", length: int = 150) -> str:
    """Shortens a line to its end, or to what follows `start`, at a blank."""
    if start and start in line:
        line, cut = line[line.index(start) :], line[line.index(start) :][:length]
        return cut if cut == line else cut.rpartition(" ")[0] + " …"
    return line if len(line) <= length else "… " + line[-length:].partition(" ")[2]


def news(runner: Runner, name: str, control: str) -> str:
    """Gets the lines that a run prints and its control run doesn't, but for times and the names of jobs."""

    def lines(job: str) -> list[str]:
        text = runner.output.get(job, "").replace(f"{os.sep}{job}{os.sep}", os.sep)
        return [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(,\d+)?", "", line) for line in text.splitlines()]

    known = set(lines(control))
    return "\n".join(line for line in lines(name) if line not in known)


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Measures how far two sets of tensors are apart: the norm of the difference over the norm, of all together."""
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def reference_gradient(folder: str, documents: list[dict]) -> dict[str, torch.Tensor]:
    """Computes the mean gradient of all learned tokens, one example at a time, in float64: no padding, no packing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    count = sum(label != IGNORE_INDEX for document in documents for label in document["labels"][1:])
    for document in documents:
        logits = model(torch.tensor([document["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(document["labels"][1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        (loss / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def load_tensors(path: str) -> dict[str, torch.Tensor]:
    """Reads a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def judge_gradient(runner: Runner, base: Runner) -> Cell:
    """Compares a step's gradient with that of the same examples, one at a time."""
    if facts_of(runner, "step")["leak"]["beside"] == 0 and runner is not base:
        return Cell("", "none", "the batch held no pack")
    folder = os.path.join(runner.folder, "step")
    expected = reference_gradient(os.path.join(folder, "initial"), facts_of(base, "step")["tokens"])
    found = load_tensors(os.path.join(folder, "gradient.safetensors"))
    error = relative(found, {name: tensor for name, tensor in expected.items() if name in found})
    return bounded(error, GRADIENT, runner.output["step"], r"contaminat|cross.?attention|not recommended")


def judge_leak(runner: Runner, base: Runner) -> Cell:
    """Looks at how far other documents' logits move."""
    leak = facts_of(runner, "step")["leak"]
    assert leak["own"] > 0.01, "the change must show in its own document"
    return bounded(leak["others"], LOGIT, runner.output["step"], r"contaminat|cross.?attention|not recommended")


def bounded(value: float, bound: float, output: str, warns: str) -> Cell:
    """Makes the cell of a number that must be below its bound; a line of `output` that warns makes it "told"."""
    text = f"{value:.1e}" if value else "0"
    if value < bound:
        return Cell(text, "right", value=value)
    line = warning_in(output, warns)
    return Cell(text, "told" if line else "silent", line, value)


def judge_stop(runner: Runner, base: Runner) -> Cell:
    """Counts the examples whose answer is followed by a learned EOS, and asks a trained model for EOS."""
    from transformers import AutoModelForCausalLM

    facts = facts_of(runner, "fit")
    eos, found = facts["special"]["eos"], []
    model = AutoModelForCausalLM.from_pretrained(os.path.join(runner.folder, "fit", "model"), dtype=torch.float32)
    for document in facts["tokens"]:
        ids, labels = document["input_ids"], document["labels"]
        end = next((i for i, label in enumerate(labels) if i and label == eos), None)
        if end is not None:
            with torch.no_grad():
                logits = model(torch.tensor([ids[:end]])).logits[0, -1]
            found.append(float(logits.softmax(-1)[eos]))
    share = len(found) / len(facts_of(base, "fit")["tokens"])
    mean = sum(found) / len(found) if found else 0.0
    right = share == 1 and mean > STOPS
    return Cell(f"{share:.0%}, p {mean:.3f}", "right" if right else "silent", value=mean)


def judge_splits(runner: Runner, base: Runner) -> Cell:
    """Compares gradient and loss of the same step, split in different ways."""
    if not runner.column.splits:
        return Cell("", "none", "a step is counted in packs, not in examples")
    worst, ways = _worst_split(runner, False)
    cell = Cell(f"{worst:.1e}", "right" if worst < GRADIENT else "silent", ways, worst)
    if cell.verdict == "silent" and (cure := runner.column.cures.get("splits")):
        cured, _ = _worst_split(runner, True)
        option = ", ".join(f"{name} {value}" for name, value in cure.items())
        return Cell(
            f"{worst:.1e}; {cured:.1e}", "option" if cured < GRADIENT else "silent", f"with {option}; {ways}", worst
        )
    return cell


def _worst_split(runner: Runner, cured: bool) -> tuple[float, str]:
    losses, gradients, ways = [], [], []
    for processes, splits in SPLITS.items():
        for batch, accumulation in splits:
            name = split_name(processes, batch, accumulation, cured)
            facts = facts_of(runner, name)
            if all(facts["split"]):
                losses.append(facts["losses"][0])
                gradients.append(load_tensors(os.path.join(runner.folder, name, "gradient.safetensors")))
                ways.append(" x ".join(map(str, facts["split"])) + (" on each of two" if processes == 2 else ""))
    errors = [relative(gradient, gradients[0]) for gradient in gradients[1:]]
    errors += [abs(loss / losses[0] - 1) for loss in losses[1:]]
    return max(errors), "batch x accumulation: " + ", ".join(ways)


def judge_tokens(runner: Runner, base: Runner) -> Cell:
    """Compares token ids with sentencepiece's."""
    import sentencepiece

    from alpaca.files import jload

    facts = facts_of(runner, "step")
    spm = sentencepiece.SentencePieceProcessor(model_file=os.path.join(runner.inputs["model"], "tokenizer.model"))
    texts = jload(runner.inputs["texts"])
    bos = facts["special"]["bos"]
    found = [ids[1:] if ids[:1] == [bos] else ids for ids in facts["text_ids"]]
    wrong = [i for i, (text, ids) in enumerate(zip(texts, found, strict=True)) if spm.encode(text) != ids]
    note = f"first: {texts[wrong[0]]!r:.80}" if wrong else ""
    text = f"{len(wrong):,} of {len(texts):,} differ"
    return Cell(text, "silent" if wrong else "right", note, len(wrong))


def judge_mask(runner: Runner, base: Runner) -> Cell:
    """Counts learned tokens of prompts, and tokens of answers that are not learned."""
    import sentencepiece

    from alpaca.files import jload

    facts = facts_of(runner, "step")
    spm = sentencepiece.SentencePieceProcessor(model_file=os.path.join(runner.inputs["model"], "tokenizer.model"))
    answers = {record["output"] for record in jload(runner.inputs["uneven"]["alpaca"])}
    prompt_learned = answer_lost = across = seen = 0
    for document in facts["tokens"]:
        pieces = [
            ""
            if i >= spm.vocab_size() or spm.is_control(i)
            else spm.id_to_piece(i).replace("▁", " ").replace("<0x0A>", "\n")
            for i in document["input_ids"]
        ]
        text = "".join(pieces)
        answer = next((a for a in answers if text.rstrip().endswith(a)), None)
        if answer is None:
            continue
        seen += 1
        start, place = text.rindex(answer), 0
        end = start + len(answer)
        for piece, label in zip(pieces, document["labels"], strict=True):
            is_learned = label != IGNORE_INDEX
            if piece and place + len(piece) <= start:
                prompt_learned += is_learned
            elif piece and place < start and piece.strip() != piece[start - place :].strip():
                across += is_learned
            elif piece and place < end:
                answer_lost += not is_learned
            place += len(piece)
    note = f"{seen} whole examples; a token across prompt and answer is {'' if across else 'not '}learned"
    printed = "\n".join(runner.output.get(name, "") for name in ("limit 80", "limit 512", "step"))  # said once for all
    if across and (line := warning_in(printed, r"not a prefix of")):
        note += f", with a warning: {tail(line, 'The tokenized')}"
    text = f"{prompt_learned} and {answer_lost}"
    return Cell(
        text, "right" if not prompt_learned and not answer_lost else "silent", note, prompt_learned + answer_lost
    )


def judge_cut(runner: Runner, base: Runner) -> Cell:
    """Counts truncated examples and looks for a line that tells of them."""
    whole, facts = facts_of(base, "limit 512"), facts_of(runner, "limit 80")
    eos = facts["special"]["eos"]
    ends = sum(eos in document["labels"][1:] for document in facts["tokens"])
    count = len(whole["tokens"]) - ends
    if not count:
        return Cell("0 cut", "right", "examples are not cut in this mode", 0)
    said = warning_in(
        news(runner, "limit 80", "limit 512"),
        r"truncat|longer than|too long|(cut|dropp)\w* .*(example|sample|sequence)",
    )
    counted = bool(said and re.search(rf"\b{count}\b", said))
    return Cell(f"{count} cut", "right" if counted else "told" if said else "silent", said, count)


def judge_killed(runner: Runner, base: Runner) -> Cell:
    """Compares the weights of a killed and resumed run with those of an uninterrupted one."""
    facts_of(runner, "whole")
    whole = load_tensors(os.path.join(runner.folder, "whole", "model", "model.safetensors"))

    def apart(name: str) -> float:
        return relative(load_tensors(os.path.join(runner.folder, name, "model", "model.safetensors")), whole)

    resumed = runner.facts["resumed"]
    if "error" not in resumed:
        error = apart("resumed")
        return Cell(f"{error:.1e}" if error else "0", "right" if error < WEIGHT else "silent", value=error)
    note = "stops: " + " ".join(resumed["error"].split())[:160]
    if "error" not in runner.facts["resumed by hand"]:
        error = apart("resumed by hand")
        note += (
            f"; difference {error:.1e} if the half one is deleted by hand"
            if error
            else "; equal if it is deleted by hand"
        )
    return Cell("stops", "told", note)


def judge_chat(runner: Runner, base: Runner) -> Cell:
    """Compares the ids of a chat prompt, from the saved folder, with the prompt that was trained on."""
    cell = _chat(facts_of(runner, "fit"))
    if cell.verdict == "right" or "chat" not in runner.column.cures:
        return cell
    try:
        cured = _chat(facts_of(runner, "chat"))
    except FailedRun as failed:
        cured = Cell("fails", cell.verdict, str(failed)[:150])
    verdict = "option" if cured.verdict == "right" else cured.verdict
    option = ", ".join(runner.column.cures["chat"])
    note = "; ".join(part for part in (cell.note, f"with {option}: {cured.note or cured.text}") if part)
    return Cell(f"{cell.text}; {cured.text}", verdict, note, cured.value)


def _chat(facts: dict) -> Cell:
    if "error" in facts["chat"]:
        return Cell("no template", "told", tail(" ".join(facts["chat"]["error"].split()), "Cannot", 110), 0)
    prompts = []
    for document in facts["tokens"]:
        first = next(i for i, label in enumerate(document["labels"]) if label != IGNORE_INDEX)
        prompts.append(document["input_ids"][:first])
    # The last token may have joined the answer's first character: it was trained on as another, or is learned.
    found = facts["chat"]["ids"]
    same = sum(any(ids[:-1] == prompt[: len(ids) - 1] for prompt in prompts) for ids in found)
    note = "" if same else f"begins with the ids {found[0][:4]}, trained on {prompts[0][:4]}"
    return Cell(f"{same} of {len(found)} equal", "right" if same == len(found) else "silent", note, same)


PLACE = r"\b(record|row|line|index|example)s?\b\D{0,12}\b[78]\b"  # counted from 0 or from 1


def judge_bad(runner: Runner, base: Runner) -> Cell:
    """Looks at what became of a bad record 7. A run that stops may name the place anywhere in what it prints."""
    placed = told = 0
    notes = []
    for name in runner.inputs["bad"]:
        job = f"bad: {name}"
        facts, output = runner.facts[job], runner.output[job]
        said, place = facts.get("error", ""), ""
        if said:
            lines = [line for line in output.splitlines() if not line.lstrip().startswith('File "')]  # of a traceback
            place = warning_in("\n".join([said, *lines]), PLACE)
        else:
            said = warning_in(news(runner, job, "limit 512"), r"\b(invalid|empty|dropp|bad\b|skipp)")
            place = said if re.search(PLACE, said) else ""
        placed, told = placed + bool(place), told + bool(said)
        line = " ".join((place or said).replace(os.path.dirname(runner.folder) + os.sep, "").split())
        count = len(facts.get("tokens", []))
        notes.append(f"{name}: {tail(line) if line else f'trains on {count} of 12 without a word'}")
    total = len(runner.inputs["bad"])
    verdict = "right" if placed == total else "told" if told == total else "silent"
    return Cell(f"{placed} placed, {told} told of {total}", verdict, "; ".join(notes), placed)


CHECKS = [
    Check(
        "gradient",
        "1. Gradient of a batch against its examples alone",
        f"relative difference below {GRADIENT:.0e}, float64",
        judge_gradient,
        "tests/training/packing/test_model.py: test_loss_and_every_gradient_equal_the_padded_batches",
    ),
    Check(
        "leak",
        "2. Other documents' logits when one changes",
        f"no logit moves by {LOGIT:.0e} or more",
        judge_leak,
        "tests/training/packing/test_model.py: test_changing_one_document_changes_no_others_logits",
    ),
    Check(
        "stop",
        "3. EOS learned, and its probability after a trained answer",
        f"all examples, probability above {STOPS}",
        judge_stop,
    ),
    Check(
        "splits",
        "4. Loss and gradient, however a step is split",
        f"relative differences below {GRADIENT:.0e}",
        judge_splits,
        "tests/test_train.py: test_global_reduction_is_the_same_however_a_batch_is_split",
    ),
    Check("tokens", "5. Token ids against sentencepiece, 2,000 texts", "all equal", judge_tokens),
    Check("mask", "6. Prompt tokens learned, and answer tokens not", "none and none", judge_mask),
    Check("cut", "7. Truncated examples", "counted and told", judge_cut),
    Check(
        "killed",
        "8. Weights after SIGKILL in mid save, and resuming",
        f"relative difference below {WEIGHT:.0e}",
        judge_killed,
        "tests/test_train.py: test_run_killed_in_a_save_continues_exactly",
    ),
    Check("chat", "9. Ids of the saved chat template against those trained on", "all equal", judge_chat),
    Check("bad", "10. A bad record 7: empty, wrong type, half a surrogate", "told, with its place", judge_bad),
]


def is_right(cells: dict[str, Cell]) -> bool:
    """Whether a column is right everywhere: by default, or by an option that the table names."""
    return all(cell.verdict in ("right", "option") for cell in cells.values())
