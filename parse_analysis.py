"""Shows how diverse instruction data is: its 20 most common root verbs and their top 4 direct objects.

    python parse_analysis.py plot --data_path alpaca_data.json --output_path assets/parse_analysis

This writes assets/parse_analysis.png and .svg and prints the same figures as a table. The chart is that of Figure 2 of
Self-Instruct (Wang et al., 2022, https://arxiv.org/abs/2212.10560) and of Alpaca's parse_analysis.png. Those used a
dependency parser. Here, rules on top of lemminflect's lexicon find the verbs and objects, unless `--spacy_model` names
an installed parser.
"""

import colorsys
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from alpaca.analysis.root_verbs import Parse, parse_by_rules, spacy_parser
from alpaca.cli import UserError, run_cli
from alpaca.files import atomic_write
from alpaca.records import load_examples

NUM_VERBS, NUM_OBJECTS = 20, 4


class Diversity(NamedTuple):
    """What was counted in one data set.

    Attributes:
        name: The data set's name.
        total: How many instructions it has.
        verbs: Root verb lemma -> number of instructions.
        pairs: (root verb, direct object) -> number of instructions.
    """

    name: str
    total: int
    verbs: Counter
    pairs: Counter

    def top(self) -> list[tuple[str, int, list[tuple[str, int]]]]:
        """Ranks the 20 verbs that most often have a direct object.

        Returns:
            For each verb its lemma, how many instructions have it with an object, and its top 4 objects with counts,
            such as ("write", 13, [("code", 2), ("command", 2), ...]). Ties are in alphabetical order.
        """
        objects: dict[str, Counter] = {}
        for (verb, noun), count in self.pairs.items():
            objects.setdefault(verb, Counter())[noun] = count
        ranked = sorted(objects, key=lambda verb: (-objects[verb].total(), verb))[:NUM_VERBS]
        by_count = {verb: sorted(objects[verb].items(), key=lambda item: (-item[1], item[0])) for verb in ranked}
        return [(verb, objects[verb].total(), by_count[verb][:NUM_OBJECTS]) for verb in ranked]


def measure_diversity(name: str, instructions: Iterable[str], parse: Callable[[str], Parse]) -> Diversity:
    """Parses instructions and counts root verbs and verb-object pairs."""
    parses = [parse(instruction) for instruction in instructions]
    verbs = Counter(found.verb for found in parses if found.verb)
    pairs = Counter((found.verb, found.object) for found in parses if found.verb and found.object)
    return Diversity(name, len(parses), verbs, pairs)


def _table(found: Diversity) -> str:
    lines = [f"{'root verb':<12} {'count':>5}  top direct objects"]
    for verb, count, objects in found.top():
        lines.append(f"{verb:<12} {count:>5}  {', '.join(f'{noun} {n}' for noun, n in objects)}")
    return "\n".join(lines)


def _summary(data_sets: list[Diversity]) -> str:
    rows = [
        ("instructions", [f"{found.total:,}" for found in data_sets]),
        ("with a root verb", [_share(found.verbs.total(), found.total) for found in data_sets]),
        ("with a direct object too", [_share(found.pairs.total(), found.total) for found in data_sets]),
        ("distinct root verbs", [f"{len(found.verbs):,}" for found in data_sets]),
        ("distinct verb-object pairs", [f"{len(found.pairs):,}" for found in data_sets]),
        ("among the top 20 verbs", [_share(sum(n for _, n, _ in f.top()), f.total) for f in data_sets]),
    ]
    widths = [max(16, len(found.name)) for found in data_sets]
    lines = [" " * 26 + "".join(f"  {found.name:>{w}}" for found, w in zip(data_sets, widths, strict=True))]
    for title, values in rows:
        lines.append(f"{title:<26}" + "".join(f"  {v:>{w}}" for v, w in zip(values, widths, strict=True)))
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def draw(data_sets: list[Diversity], output_path: str) -> list[str]:
    """Draws a sunburst chart for each data set, side by side, and writes the figure as PNG and SVG.

    Args:
        data_sets: One data set, or two to compare.
        output_path: The path of the files without .png or .svg.

    Returns:
        The paths written.

    Raises:
        UserError: matplotlib is not installed, or a file can't be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run pip install -r requirements-analysis.txt") from error
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 * len(data_sets), 10.6), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(data_sets), squeeze=False)[0], data_sets, strict=True):
        _sunburst(axes, found)
    paths = [f"{output_path}.png", f"{output_path}.svg"]
    # Leave out dates, versions and random ids, so that the same data always gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "alpaca", "svg.fonttype": "path"}):
        for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
            with atomic_write(path, "wb") as file:
                figure.savefig(file, format=path[-3:], dpi=130, metadata=metadata)
    return paths


def _sunburst(axes: Any, found: Diversity) -> None:
    top = found.top()
    shown = sum(n for _, _, objects in top for _, n in objects)
    start = 90.0  # degrees: clockwise from the top, the most common verb first
    for rank, (verb, _, objects) in enumerate(top):
        hue = rank * 0.618 % 1  # steps of the golden ratio give neighbors different colors
        first = start
        for noun, count in objects:
            angle = 360 * count / shown
            _wedge(axes, start, angle, (0.62, 1.0), noun, colorsys.hls_to_rgb(hue, 0.87, 0.36))
            start -= angle
        _wedge(axes, first, first - start, (0.25, 0.62), verb, colorsys.hls_to_rgb(hue, 0.76, 0.32))
    axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal")
    axes.axis("off")
    title = f"Root verbs and their direct objects: {found.name}, n = {found.total:,} instructions"
    axes.set_title(title, fontsize=15, parse_math=False)


def _wedge(axes: Any, start: float, angle: float, radii: tuple[float, float], label: str, color: Any) -> None:
    """Draws a segment of a ring with its label along the radius.

    Args:
        axes: The matplotlib axes.
        start: Where the segment starts, in degrees.
        angle: How far it runs clockwise, in degrees.
        radii: Its inner and outer radius; the whole chart has radius 1.
        label: Its text, which is left out if it would be too small to read.
        color: Its color.
    """
    from matplotlib.patches import Wedge

    inner, outer = radii
    axes.add_patch(Wedge((0, 0), outer, start - angle, start, width=outer - inner, facecolor=color, edgecolor="white"))
    middle = start - angle / 2
    points = 72 * 10 / 2.04  # a radius of 1 in typographic points: the axes are 10 inches wide and 2.04 units across
    height = math.radians(angle) * (outer - 0.6 * (outer - inner)) * points
    length = (outer - inner) * points / (0.6 * len(label))
    fontsize = min(13, 0.85 * height, 0.95 * length)
    if fontsize < 4:  # too small to read; the printed table has the word
        return
    left = math.cos(math.radians(middle)) < 0
    radius = outer - 0.02  # near the rim, where the wedge is widest
    axes.text(
        radius * math.cos(math.radians(middle)),
        radius * math.sin(math.radians(middle)),
        label,
        fontsize=fontsize,
        rotation=middle + 180 if left else middle,
        rotation_mode="anchor",
        ha="left" if left else "right",
        va="center_baseline",
        color="#222222",
        parse_math=False,
    )


def plot(
    data_path: str,
    output_path: str = "parse_analysis",
    compare: str | None = None,
    spacy_model: str | None = None,
) -> None:
    """Draws the root verbs of instruction data and their direct objects, and prints them as a table.

    Args:
        data_path: The data to analyze, in Alpaca's format (JSON or JSON Lines).
        output_path: The path of the figure without .png or .svg; both are written.
        compare: A second data set, drawn beside the first.
        spacy_model: The name of an installed spaCy pipeline to parse with instead of the rules.
    """
    stem = re.sub(r"\.(png|svg)$", "", output_path)
    if not os.path.basename(stem):
        raise UserError(f"--output_path {output_path!r} names no file; expected a path such as assets/parse_analysis")
    parse = spacy_parser(spacy_model) if spacy_model else parse_by_rules
    data_sets = []
    for path in [data_path, compare] if compare else [data_path]:
        examples = load_examples(path, require_output=False)
        name = os.path.basename(path)
        data_sets.append(measure_diversity(name, (example["instruction"] for example in examples), parse))
        if not data_sets[-1].pairs:
            raise UserError(f"{path}: no instruction has a root verb with a direct object; is it English?")
    paths = draw(data_sets, stem)
    for found in data_sets:
        print(f"{found.name}\n{_table(found)}\n")
    print(_summary(data_sets))
    print(f"\nwrote {' and '.join(paths)}")


if __name__ == "__main__":
    run_cli({"plot": plot})
