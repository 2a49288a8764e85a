"""The paper's story with pretrained weights, on a CPU: `make real`, or `python -m demo.real`.

It converts a LLaMA of 135 million parameters, fine-tunes it on the bundled data, publishes and recovers it as a diff,
and compares base and tuned model on tasks that neither has trained on. Every step is a command that is printed and can
be typed. The last one writes `demo_output/real/report.md`.
"""

import filecmp
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time

from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write, jdump, jload, read_text, size_text
from alpaca.models import host_memory
from alpaca.records import load_examples

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUTPUT = "demo_output/real"
MEMORY, DISK = 7 * 2**30, 4 * 2**30  # training peaks at 5.5 GiB; four folders of 513 MiB and the wheel
HELD_OUT_SHORT, HELD_OUT_LONG = 32, 64  # tasks with an answer of few words, and all others
FEW_WORDS = 3  # answers up to this length are compared word for word
SHOWN = 8  # rows of the side-by-side table
MAX_NEW_TOKENS = 256  # tokens; about 190 words, and four in five of the bundled answers are shorter

TRAIN = (
    "python train.py --model_name_or_path {0}/base --data_path {1} --eval_data_path {0}/held_out.json "
    "--output_dir {0}/tuned --max_steps 24 --per_device_train_batch_size 8 --gradient_accumulation_steps 2 "
    "--max_tokens_per_pass 1024 --per_device_eval_batch_size 1 --learning_rate 2e-5 --weight_decay 0. "
    "--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --eval_strategy steps --eval_steps 12 "
    "--eval_on_start True --save_strategy no"
)
BATCH = (
    "python inference.py batch --model_path {0}/{1} --data {0}/held_out.json --output {0}/{1}_answers.json "
    f"--max_new_tokens {MAX_NEW_TOKENS}"
)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out data


def hold_out(data_path: str = "eval_data.json", output: str = OUTPUT) -> None:
    """Picks the tasks to compare the models on, by rule: of those with an answer of few words 32, of the others 64.

    The ones whose hashes are smallest, so that neither the order of the data nor a person chooses.

    Args:
        data_path: Data in Alpaca's format that nothing is trained on.
        output: The folder that gets held_out.json.
    """
    examples = load_examples(data_path)
    ranked = sorted(range(len(examples)), key=lambda i: _hash(examples[i]))
    short = [i for i in ranked if has_few_words(examples[i])]
    chosen = {*short[:HELD_OUT_SHORT], *[i for i in ranked if i not in set(short)][:HELD_OUT_LONG]}
    jdump([e for i, e in enumerate(examples) if i in chosen], os.path.join(output, "held_out.json"))
    print(f"{output}/held_out.json: {len(chosen)} of the {len(examples)} tasks of {data_path}")


def _hash(example: dict) -> str:
    return hashlib.sha256(f"{example['instruction']}\n{example['input']}".encode()).hexdigest()


def has_few_words(example: dict) -> bool:
    """Tells whether a task has one right answer of few words, so that an answer can be compared with it."""
    return len(example["output"].split()) <= FEW_WORDS


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(held_out: list[dict], answers: list[str], count_tokens) -> dict:
    """Measures a model's answers to the held-out tasks.

    Args:
        held_out: The tasks with their right answers.
        answers: The model's, in the same order.
        count_tokens: text -> number of tokens.

    Returns:
        `ended`: share of the answers that stayed below the limit of tokens. `empty`: share without a word. `words`:
        their mean length. `exact`: share that equals the data's, of the tasks with an answer of few words, compared as
        `plain` says.
    """
    few = [(task, answer) for task, answer in zip(held_out, answers, strict=True) if has_few_words(task)]
    return {
        "ended": sum(count_tokens(answer) < MAX_NEW_TOKENS for answer in answers) / len(answers),
        "empty": sum(not answer.strip() for answer in answers) / len(answers),
        "words": sum(len(answer.split()) for answer in answers) / len(answers),
        "exact": sum(plain(answer) == plain(task["output"]) for task, answer in few) / max(1, len(few)),
    }


def plain(answer: str) -> str:
    """Strips what doesn't count in a comparison: "The pancreas." -> "the pancreas"."""
    return " ".join(answer.split()).strip(" .\"'").casefold()


def side_by_side(held_out: list[dict], *columns: list[str]) -> list[tuple]:
    """Picks evenly spaced held-out tasks, whatever the answers are: (task, answer, answer) for each."""
    count = min(SHOWN, len(held_out))
    rows = [i * len(held_out) // count for i in range(count)]
    return [(held_out[i], *(column[i] for column in columns)) for i in rows]


def changes(held_out: list[dict], base: list[str], tuned: list[str]) -> tuple[list[str], list[str]]:
    """Lists the instructions with an answer of few words that only the tuned model got right, and only the base."""
    gained, lost = [], []
    for task, before, after in zip(held_out, base, tuned, strict=True):
        right = [plain(answer) == plain(task["output"]) for answer in (before, after)]
        if has_few_words(task) and right[0] != right[1]:
            (gained if right[1] else lost).append(task["instruction"])
    return gained, lost


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(folder: str = OUTPUT) -> None:
    """Writes report.md and its picture from the files that the other steps left.

    Args:
        folder: Where they are.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.path.join(folder, "base", "tokenizer.json"))
    held_out = load_examples(os.path.join(folder, "held_out.json"))
    history = jload(os.path.join(folder, "tuned", "trainer_state.json"))["log_history"]
    answers = {
        name: [record["output"] for record in jload(os.path.join(folder, f"{name}_answers.json"))]
        for name in ("base", "tuned")
    }
    measured = {
        name: measure(held_out, texts, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))
        for name, texts in answers.items()
    }
    losses = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    measured["base"]["loss"], measured["tuned"]["loss"] = losses[0][1], losses[-1][1]
    draw(history, held_out, answers, os.path.join(folder, "report.png"))
    costs = os.path.join(folder, "costs.json")
    text = "\n\n".join(
        [
            "# A real model on a laptop: what this run measured",
            _setting(held_out),
            "![Losses of the run, and the lengths of the answers](report.png)",
            _measures_table(measured, held_out),
            "## Answers of few words",
            _changes_text(held_out, answers),
            "## Side by side",
            f"{SHOWN} of the {len(held_out)} held-out tasks, evenly spaced in the file, whatever the answers are. "
            "Long answers are cut at …",
            _side_by_side_table(held_out, answers),
            "## What it cost",
            _costs_table(jload(costs) if os.path.exists(costs) else {}, history),
        ]
    )
    with atomic_write(os.path.join(folder, "report.md")) as file:
        file.write(text + "\n")
    print(f"{folder}/report.md\n\n{_measures_table(measured, held_out)}")


def _setting(held_out: list[dict]) -> str:
    from benchmarks.provenance import provenance

    made = provenance("torch", "transformers")
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        "SmolLM2-135M-Instruct, which its makers had already tuned to chat in another template, fine-tuned on the "
        f"bundled data in Alpaca's. {len(held_out)} tasks of `eval_data.json` are held out. Answers are greedy, "
        f"{MAX_NEW_TOKENS} tokens at most.\n\n`make real` · {made['device']} · {versions} · commit {made['commit']}"
    )


def publish(folder: str = OUTPUT) -> None:
    """Puts a report into README.md and docs/real_model.md, between their marks, and its picture into assets/.

    Args:
        folder: Where the report is.
    """
    text = read_text(os.path.join(folder, "report.md"))
    _, body = text.split("\n\n", 1)
    table = next(part for part in body.split("\n\n") if part.startswith("| on "))
    made = next(part for part in body.split("\n\n") if part.startswith("`make real`"))
    picture = "assets/real_report.png"
    shutil.copyfile(os.path.join(folder, "report.png"), os.path.join(ROOT, picture))
    body = body.replace("(report.png)", f"(../{picture})").replace("\n## ", "\n### ")
    shown = f"![Losses of the run, and the lengths of the answers]({picture})\n\n{table}\n\n{made}"
    for page, content in (("README.md", shown), ("docs/real_model.md", body.strip())):
        path = os.path.join(ROOT, page)
        before, start, rest = read_text(path).partition("<!-- report -->")
        _, end, after = rest.partition("<!-- end of report -->")
        if not end:
            raise UserError(f"{page} has no <!-- report --> and <!-- end of report --> to put the report between")
        with atomic_write(path) as file:
            file.write(f"{before}{start}\n\n{content}\n\n{end}{after}")


def _measures_table(measured: dict, held_out: list[dict]) -> str:
    few = sum(map(has_few_words, held_out))
    rows = [
        ("loss", "loss", "{:.3f}"),
        ("answers that end by themselves", "ended", "{:.0%}"),
        ("empty answers", "empty", "{:.0%}"),
        ("words in an answer, on average", "words", "{:.0f}"),
        (f"exact answers, of the {few} with at most {FEW_WORDS} words", "exact", "{:.0%}"),
    ]
    expected = sum(len(task["output"].split()) for task in held_out) / len(held_out)
    lines = [f"| on {len(held_out)} held-out tasks | base | tuned | data |", "|---|---:|---:|---:|"]
    for title, key, form in rows:
        data = f"{expected:.0f}" if key == "words" else ""
        lines.append(
            f"| {title} | {form.format(measured['base'][key])} | {form.format(measured['tuned'][key])} | {data} |"
        )
    return "\n".join(lines)


def _changes_text(held_out: list[dict], answers: dict) -> str:
    gained, lost = changes(held_out, answers["base"], answers["tuned"])
    parts = []
    for title, found in (("Right only after training", gained), ("Right only before, and lost by it", lost)):
        listed = "".join(f"\n- {' '.join(instruction.split())}" for instruction in found) or "\n- none"
        parts.append(f"{title} ({len(found)}):\n{listed}")
    return "\n\n".join(parts)


def _side_by_side_table(held_out: list[dict], answers: dict) -> str:
    lines = ["| task | data | base | tuned |", "|---|---|---|---|"]
    for task, before, after in side_by_side(held_out, answers["base"], answers["tuned"]):
        asked = task["instruction"] + (f"\n{task['input']}" if task["input"] else "")
        lines.append(f"| {' | '.join(_cell(text) for text in (asked, task['output'], before, after))} |")
    return "\n".join(lines)


def _cell(text: str, limit: int = 240) -> str:
    """Fits a text into a cell of a Markdown table: one line, no markup, cut at `limit` characters."""
    text = text.strip() or "(nothing)"
    text = text if len(text) <= limit else text[:limit].rstrip() + " …"
    for character in "\\`*_[]<>#|$":
        text = text.replace(character, "\\" + character)
    return "<br>".join(line.strip() for line in text.split("\n") if line.strip())


def _costs_table(costs: dict, history: list[dict]) -> str:
    lines = ["| step | time | peak memory |", "|---|---:|---:|"]
    for title, cost in costs.items():
        lines.append(f"| {title} | {cost['seconds']:,.0f} s | {size_text(cost['memory_gib'] * 2**30)} |")
    lines.append(f"| all | {sum(cost['seconds'] for cost in costs.values()) / 60:,.1f} min | |")
    rates = [entry["useful_tokens_per_s"] for entry in history if "useful_tokens_per_s" in entry]
    middle = sorted(rates)[len(rates) // 2] if rates else 0
    return "\n".join(lines) + f"\n\nTraining ran at {middle:,.0f} useful tokens/s, the median of its steps."


def draw(history: list[dict], held_out: list[dict], answers: dict, path: str) -> None:
    """Draws the losses of the run, and how long the answers are.

    Args:
        history: The Trainer's log.
        held_out: The held-out tasks.
        answers: "base" and "tuned" -> answers.
        path: The picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=150)
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        left.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    left.set(xlabel="optimizer step", ylabel="loss")
    columns = {"base": answers["base"], "tuned": answers["tuned"], "data": [task["output"] for task in held_out]}
    for name, texts in columns.items():
        lengths = sorted(len(text.split()) for text in texts)
        shares = [100 * (i + 1) / len(lengths) for i in range(len(lengths))]
        right.step(lengths, shares, where="post", label=name, linewidth=1.2)
    right.set(xlabel="words in an answer", ylabel="% of answers that are no longer")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The story


def step(title: str, why: str) -> None:
    """Prints the heading of a step and what it does."""
    print(f"\n=== {title}\n    {why}", flush=True)


def run(command: str) -> dict[str, float]:
    """Prints a command and runs it.

    Returns:
        `seconds` that it took and `memory_gib` at its peak.

    Raises:
        UserError: It failed; it has said why.
    """
    print(f"\n$ {command}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *shlex.split(command)[1:]])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the command got it too
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the command above ended with exit status {process.returncode}; the story stops here")
    # The kernel counts from this process's own peak, 0.1 GiB at most, because it is what the command's was forked from.
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return {"seconds": time.perf_counter() - started, "memory_gib": usage.ru_maxrss * unit / 2**30}


def story(output: str = OUTPUT, data_path: str = "alpaca_data.json") -> None:
    """Runs all steps in a new folder.

    Args:
        output: The folder; what an earlier run left there is removed.
        data_path: Data in Alpaca's format.
    """
    _check_machine(output)
    if os.path.exists(output):
        print(f"Removing {output}, made by an earlier run.")
        shutil.rmtree(output)
    os.makedirs(output)
    costs = {}
    step("1 of 5 · Fetch and convert", "93 MB the first time. A LLaMA of 135 million parameters; its weights are real.")
    costs["fetch and convert"] = run(f"python -m demo.real_model --output {output}/base")
    step("2 of 5 · Fine-tune", "All weights, as in the paper: its learning rate, schedule and loss. About ten minutes.")
    costs["pick the held-out tasks"] = run(f"python -m demo.real hold_out --output {output}")
    costs["fine-tune"] = run(TRAIN.format(output, data_path))
    step("3 of 5 · Publish and recover the weights", "Base and diff together give back the tuned model to the byte.")
    costs["make_diff"] = run(
        f"python weight_diff.py make_diff --path_raw {output}/base --path_tuned {output}/tuned "
        f"--path_diff {output}/diff"
    )
    costs["recover"] = run(
        f"python weight_diff.py recover --path_raw {output}/base --path_diff {output}/diff "
        f"--path_tuned {output}/recovered --test_inference False"
    )
    _compare_files(f"{output}/tuned", f"{output}/recovered")
    step("4 of 5 · Ask both models", "Tasks that neither has trained on, answered greedily.")
    for name in ("base", "tuned"):
        costs[f"answers of the {name} model"] = run(BATCH.format(output, name))
    jdump(costs, os.path.join(output, "costs.json"))
    step("5 of 5 · Report", "What it measured, eight answers side by side, and what it cost.")
    run(f"python -m demo.real report --folder {output}")


def _check_machine(output: str) -> None:
    if (memory := host_memory()) < MEMORY:
        raise UserError(
            f"{size_text(memory)} of memory free, {size_text(MEMORY)} needed to train; close other programs"
        )
    free = shutil.disk_usage(".").free
    if free < DISK:
        raise UserError(f"{size_text(free)} free on this disk, {size_text(DISK)} needed for {output}; free some")


def _compare_files(tuned: str, recovered: str) -> None:
    """Checks that every recovered file equals the tuned one of the same name, apart from the diff's own manifest."""
    names = sorted(set(os.listdir(recovered)) - {"weight_diff.json"})
    _, different, missing = filecmp.cmpfiles(tuned, recovered, names, shallow=False)
    if different or missing:
        raise UserError(f"{recovered} differs from {tuned}: {', '.join(different + missing)}")
    print(f"\n{', '.join(names)}: each equals the file of the same name in {tuned}, byte for byte.")


if __name__ == "__main__":
    run_cli({"story": story, "hold_out": hold_out, "report": report, "publish": publish}, sys.argv[1:] or ["story"])
