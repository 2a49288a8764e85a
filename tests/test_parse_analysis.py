"""The diversity figure: counts checked by hand, labels inside their wedges, files that a browser opens."""

import json
import math
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest

import parse_analysis
from alpaca.analysis import words
from alpaca.analysis.root_verbs import parse_by_rules
from alpaca.cli import UserError


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> str:
    texts = ["Write a poem.", "Write a long poem about rain.", "Please write two letters.", "Write about rain."]
    texts += ["List three rivers.", "What is rain?", "List the largest rivers and lakes.", "List some cities."]
    return _dump(tmp_path_factory.mktemp("data") / "small.json", texts)


def _dump(path, instructions: list) -> str:
    path.write_text(json.dumps([{"instruction": text, "input": "", "output": "x"} for text in instructions]))
    return str(path)


def _run(root, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(root, "parse_analysis.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_the_counts_and_writes_png_and_svg(root, data_path, tmp_path):
    done = _run(root, "plot", "--data_path", data_path, "--output_path", str(tmp_path / "new" / "figure"))
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    # "What is rain?" has no root verb, "Write about rain." no object; ties stand in alphabetical order.
    assert lines[:4] == [
        "small.json",
        "root verb count top direct objects",
        "list 3 river 2, city 1",
        "write 3 poem 2, letter 1",
    ]
    for line in (
        "instructions 8",
        "with a root verb 7 (87.5%)",
        "with a direct object too 6 (75.0%)",
        "distinct root verbs 2",
        "distinct verb-object pairs 4",
    ):
        assert line in lines
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG\r\n")
    svg = ElementTree.parse(tmp_path / "new" / "figure.svg")
    assert svg.getroot().tag.endswith("svg")


def _labels(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that `draw` makes, as matplotlib has them when they are saved."""
    from matplotlib.figure import Figure

    made, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (made.append(self), savefig(self, *a, **k))[1])
    return made


VERBS = [
    "write",
    "describe",
    "summarize",
    "translate",
    "read",
    "edit",
    "rewrite",
    "improve",
    "explain",
    "compare",
    "copy",
]
VERBS += ["draft", "review", "check", "correct", "discuss", "finish", "memorize", "publish", "quote", "revise", "send"]
NOUNS = ["poem", "letter", "story", "table", "recipe", "speech"]


def test_rings_hold_twenty_verbs_and_four_objects_each_and_labels_stay_in_their_wedges(figures, tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    texts = [f"{verb.capitalize()} the {noun}." for i, verb in enumerate(VERBS) for noun in NOUNS[: 2 + i % 5]]
    texts += ["Write the poem."] * 150
    found = parse_analysis.measure_diversity("many.json", texts, parse_by_rules)
    parse_analysis.draw([found], str(tmp_path / "many"))
    axes = figures[0].axes[0]
    assert "many.json" in axes.get_title()
    assert f"n = {len(texts)} " in axes.get_title()
    outer = [wedge for wedge in axes.patches if wedge.r == 1]
    assert len(axes.patches) - len(outer) == 20
    assert len(outer) == sum(min(4, 2 + i % 5) for i in range(22)) - 2 - 2  # the two verbs with fewest objects are out
    assert sum(wedge.theta2 - wedge.theta1 for wedge in outer) == pytest.approx(360)
    # Every label lies along the radius inside its own wedge, so no two overlap.
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    middle = axes.transData.transform((0, 0))
    unit = axes.transData.transform((1, 0))[0] - middle[0]
    for text, wedge in zip(axes.texts, axes.patches, strict=True):
        text.set_rotation(0)  # lying flat, its box is its length and height
        box = text.get_window_extent(renderer)
        assert box.width / unit < wedge.width
        inner_end = wedge.r - 0.02 - box.width / unit
        letters = 0.75 * text.get_fontsize() * figures[0].dpi / 72
        assert letters < math.radians(wedge.theta2 - wedge.theta1) * inner_end * unit, text.get_text()
        assert text.get_fontsize() >= 4


def test_same_data_gives_the_same_bytes(data_path, tmp_path):
    for name in ("a", "b"):
        parse_analysis.plot(data_path, str(tmp_path / name))
    for ending in ("png", "svg"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_bundled_figure_is_that_of_the_bundled_data(root, tmp_path):
    parse_analysis.plot(os.path.join(root, "alpaca_data.json"), str(tmp_path / "figure"))
    new = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    with open(os.path.join(root, "assets", "parse_analysis.svg"), encoding="utf-8") as file:
        old = file.read()
    # Coordinates may differ in another version of matplotlib; the labels, which it notes as comments, may not.
    assert re.findall("<!-- (.*) -->", new) == re.findall("<!-- (.*) -->", old)
    assert os.path.exists(os.path.join(root, "assets", "parse_analysis.png"))


def test_compare_puts_two_data_sets_side_by_side(figures, data_path, tmp_path, capsys):
    other = _dump(tmp_path / "other.json", ["Sing a song.", "Bake some bread."])
    parse_analysis.plot(data_path, str(tmp_path / "both.png"), compare=other)
    left, right = figures[0].axes
    assert "poem" in _labels(left)
    assert set(_labels(right)) == {"sing", "song", "bake", "bread"}
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "small.json other.json" in lines
    assert "distinct verb-object pairs 4 2" in lines
    assert (tmp_path / "both.png").exists()
    assert not (tmp_path / "both.png.png").exists()


def test_a_file_name_is_no_formula(tmp_path):
    path = _dump(tmp_path / "a$x_{$.json", ["Sing a song."])
    parse_analysis.plot(path, str(tmp_path / "figure"))
    assert (tmp_path / "figure.png").exists()


def test_spacy_model_parses_instead_of_the_rules(monkeypatch, data_path, tmp_path, capsys):
    def word(text, pos, dep, *children):
        return types.SimpleNamespace(lemma_=text, pos_=pos, dep_=dep, children=children)

    def pipeline(text):  # "It rains. Sing <name>, songs" whatever was said
        rains = word("rain", "VERB", "ROOT", word("it", "PRON", "nsubj"))
        sing = word("sing", "VERB", "ROOT", word("Ann", "PROPN", "dobj"), word("Song", "NOUN", "dobj"))
        roots = [("It rains.", rains), ("Sing.", sing)]
        return types.SimpleNamespace(sents=[types.SimpleNamespace(text=t, root=root) for t, root in roots])

    pipeline.pipe_names = ["tagger", "parser"]

    def load(name):
        if name != "en_fake":
            raise OSError("[E050] Can't find model")
        return pipeline

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    parse_analysis.plot(data_path, str(tmp_path / "figure"), spacy_model="en_fake")
    assert "song 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="no model 'en_other'"):
        parse_analysis.plot(data_path, str(tmp_path / "other"), spacy_model="en_other")
    pipeline.pipe_names = ["tagger"]
    with pytest.raises(UserError, match="no dependency parser, only tagger"):
        parse_analysis.plot(data_path, str(tmp_path / "other"), spacy_model="en_fake")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="pip install spacy"):
        parse_analysis.plot(data_path, str(tmp_path / "other"), spacy_model="en_fake")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("package", ["lemminflect", "matplotlib"])
def test_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch, data_path, tmp_path):
    words._lexicon.cache_clear()
    words.parts_of_speech.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{package} is not installed; run pip install -r requirements-analysis.txt"):
        parse_analysis.plot(data_path, str(tmp_path / "figure"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not json", "line 1, column 1: not JSON"),
        ('[{"instruction": "Write a poem."}, {"input": "x"}]', "record 1: no 'instruction'"),
        ('[{"instruction": 7}]', "record 0: 'instruction' must be text, found int 7"),
        ('[{"instruction": "Wer da?"}]', "no instruction has a root verb with a direct object"),
        ("[]", "holds no records"),
    ],
)
def test_malformed_data_is_refused_with_file_and_record(content, complaint, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError) as refusal:
        parse_analysis.plot(str(path), str(tmp_path / "figure"))
    assert str(refusal.value).startswith(str(path))
    assert complaint in str(refusal.value)
    assert not list(tmp_path.glob("figure*"))


def test_mistyped_flag_is_refused_with_the_nearest_name(root, data_path):
    done = _run(root, "plot", "--data_path", data_path, "--comapre", "x.json")
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --comapre; did you mean --compare?\n"


@pytest.mark.parametrize("output_path", ["", ".png", "folder/", "folder/.svg"])
def test_an_output_path_without_a_name_is_refused(data_path, tmp_path, monkeypatch, output_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names no file"):
        parse_analysis.plot(data_path, output_path)
    assert os.listdir(tmp_path) == []
