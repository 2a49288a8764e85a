"""Writes docs/correctness.md and draws assets/correctness.png from a result."""

import json

from alpaca.files import atomic_write
from benchmarks.correctness.columns import COLUMNS, PEERS
from benchmarks.correctness.verdicts import CHECKS

MARKS = {
    "right": "right",
    "option": "with an option",
    "told": "told",
    "silent": "**silent**",
    "same": "=",
    "none": "–",
    "not run": "not run",
}
COLOURS = {"right": "#3a9d5d", "option": "#9ccfa5", "told": "#f2c14e", "silent": "#d1495b"}
MEANING = {
    "right": "within the bound",
    "option": "within the bound with an option",
    "told": "not, and the user is told",
    "silent": "not, and nothing says so",
}
HEAD = """# Silent errors, side by side

Errors in fine-tuning code often say nothing: the loss falls, and the model is worse. This page looks for ten such
errors in this project and in its peers, with the same tiny LLaMA, the same records and one bound for all. One command
runs everything, each peer in an environment of its own, and writes this page, its picture and
`benchmarks/results/correctness.json`:

```bash
python -m benchmarks.correctness
```

![Ten checks of each trainer](../assets/correctness.png)
"""
READING = """
**right**: within the bound. **with an option**: outside of it by default, within it with an option, which is named.
**told**: wrong or refused, and the user is told. **silent**: wrong, and nothing says so. **=**: packing doesn't touch
it; see the same trainer without packing. **–**: nothing to measure. **not run**: the note has the line that stopped it.
A verdict holds for this version, these settings and this machine, a CPU.
"""


def escape(text: str) -> str:
    """Makes a text safe in a cell of a Markdown table, and keeps a code block's marks out of it."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page(result: dict) -> str:
    """Writes the page.

    Args:
        result: What benchmarks/results/correctness.json holds.
    """
    columns = result["columns"]
    checks = {check.name: check for check in CHECKS}
    overview = [
        [check.title, *(MARKS[column["cells"][check.name]["verdict"]] for column in columns)] for check in CHECKS
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        HEAD,
        f"Measured on {result['device']}, commit {result['commit']}; this project with {versions}.\n",
        table(["", *(column["title"] for column in columns)], overview),
        READING,
    ]
    for name, check in checks.items():
        rows = []
        for column in columns:
            cell = column["cells"][name]
            if cell["verdict"] not in ("same", "none"):
                rows.append([column["title"], escape(cell["text"]), MARKS[cell["verdict"]], escape(cell["note"])])
        title = check.title.partition(". ")[2]
        parts.append(f"## {title[0].upper()}{title[1:]}\n\nRight: {check.bound}.\n")
        parts.append(table(["", "measured", "verdict", "note"], rows) + "\n")
        if check.ours:
            path, _, test = check.ours.partition(": ")
            parts.append(f"The suite asserts it for this project: `{test}` in `{path}`.\n")
    parts += ["## Speed and memory\n", speed(columns), SPEED_NOTE, "## Settings and versions\n", settings(columns)]
    return "\n".join(parts)


SPEED_NOTE = """
The same 256 examples of the bundled data in steps of 128, a LLaMA of 2.5 million parameters, float32, one thread,
gradient checkpointing off, the first step not counted; CPU time, which other programs on the machine hardly change. A
step of packs counts as the tokens that it holds. Peak memory is that of the process, its imports included.
Variable-length attention, for which padding_free and packing are made, needs a GPU: these figures say nothing about
one.
"""


def speed(columns: list[dict]) -> str:
    """Formats seconds, memory and tokens per second."""
    rows = []
    for column in columns:
        found = column["speed"]
        if "error" in found:
            rows.append([column["title"], "", "", "", escape(found["error"])])
        else:
            figures = [f"{found['seconds']:.2f}", f"{found['peak_gib']:.2f}", f"{found['useful_tokens_per_s']:,.0f}"]
            rows.append([column["title"], *figures, ""])
    return table(["", "CPU seconds per 128 examples", "peak memory, GiB", "useful tokens per CPU second", "note"], rows)


def settings(columns: list[dict]) -> str:
    """Lists versions and settings, beside what all columns share."""
    lines = [
        "All: the model, the records, batch, learning rate, a constant schedule, no clipping, seed 42, float32 weights",
        "(checks 1, 2 and 4 in float64), no bfloat16, no gradient checkpointing. Everything else is the default.",
        "",
    ]
    rows = []
    for column in columns:
        peer = PEERS[column["peer"]]
        versions = ", ".join(f"{name} {version}" for name, version in column["versions"].items())
        chosen = json.dumps(column["settings"]) if column["settings"] else "defaults"
        length = next(c.max_length for c in COLUMNS if c.title == column["title"])
        rows.append([column["title"], escape(chosen), str(length), escape(peer.shows), escape(versions)])
    lines.append(table(["", "settings", "tokens", "as shown in", "versions"], rows))
    lines.append(NOTES)
    return "\n".join(lines)


NOTES = """
- The tokenizer is of LLaMA's kind: a sentencepiece model without `tokenizer.json`, in which runs of spaces have the
  lowest scores although their ids are low, as in LLaMA's own file.
- TRL gets Alpaca's prompt and answer as `prompt` and `completion`; LLaMA-Factory and axolotl get Alpaca's records and
  apply their own template of that name.
- TRL documents "wrapped" as the strategy that cuts examples where a pack ends, and LLaMA-Factory "neat_packing" as
  packing without attention across examples. A user who has read that knows; "silent" says that a run doesn't tell.
- LLaMA-Factory's template "alpaca" writes no BOS. axolotl's and TRL's columns train on LLaMA's BOS, as this project.
- SIGKILL comes from within, when half of the optimizer state of checkpoint 3 has been written.
- PyPI has torchvision and torchaudio for CUDA only. LLaMA-Factory imports both, for images and audio; beside a torch
  for the CPU they are left out here, and an empty module takes torchaudio's place.
- axolotl's newest releases need Python 3.12; pip picks the newest for this Python. Its protobuf is too old for today's
  sentencepiece, so an earlier sentencepiece is installed beside it.
"""


def draw(result: dict, path: str) -> None:
    """Draws the checks as a grid of colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    columns = result["columns"]
    figure, axes = pyplot.subplots(figsize=(12, 5.6), dpi=110)
    for y, check in enumerate(CHECKS):
        for x, column in enumerate(columns):
            cell = column["cells"][check.name]
            face = COLOURS.get(cell["verdict"], "#eeeeee")
            axes.add_patch(patches.Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, color=face))
            text = {"same": "=", "none": "–", "not run": "not run"}.get(cell["verdict"], short(cell["text"]))
            dark = cell["verdict"] in ("right", "silent")
            axes.text(
                x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color="white" if dark else "#333333"
            )
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(CHECKS), 0)
    names = [column["title"].replace(" ", "\n", 1).replace(", ", ",\n") for column in columns]
    axes.set_xticks([x + 0.5 for x in range(len(columns))], names, fontsize=7)
    axes.set_yticks([y + 0.5 for y in range(len(CHECKS))], [check.title for check in CHECKS], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [patches.Patch(color=COLOURS[verdict], label=MEANING[verdict]) for verdict in COLOURS]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.35, -0.02), ncol=4, frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def short(text: str) -> str:
    """Shortens a cell's text for the picture, over two lines if need be."""
    return text.replace("; ", "\n").replace(", ", "\n").replace(" of ", "/").replace(" differ", "\ndiffer")


def write(result: dict, page_path: str, picture_path: str) -> None:
    """Writes the page and draws the picture."""
    with atomic_write(page_path) as file:
        file.write(page(result))
    draw(result, picture_path)
