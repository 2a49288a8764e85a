"""The plan of the house, held by its imports: which file may know which, and what each script loads."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ["generate_instruction", "inference", "parse_analysis", "train", "weight_diff"]
WINGS = ["analysis", "generation", "inference", "training", "weight_diff"]


def modules() -> dict[str, str]:
    """Dotted name -> path, for the root's files and the package's."""
    found = {name[:-3]: os.path.join(ROOT, name) for name in os.listdir(ROOT) if name.endswith(".py")}
    for folder, _, names in os.walk(os.path.join(ROOT, "alpaca")):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                dotted = os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".")
                found[dotted.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: str) -> Iterator[str]:
    """Every module of the project that a file imports: anywhere in it, under TYPE_CHECKING and in functions too."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively, which this test does not follow"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module in MODULES:
                    yield node.module


EDGES = {name: sorted(set(imports(path))) for name, path in MODULES.items()}


def wing(module: str) -> str | None:
    """The wing that a module belongs to: "training" for alpaca.training.packing.model, None for alpaca.files."""
    parts = module.split(".")
    return parts[1] if parts[0] == "alpaca" and len(parts) > 1 and parts[1] in WINGS else None


def test_six_python_files_lie_at_the_root():
    assert sorted(name for name in MODULES if not name.startswith("alpaca")) == sorted([*SCRIPTS, "utils"])


def test_every_folder_of_the_package_is_a_wing():
    folders = {name.split(".")[1] for name in MODULES if name.count(".") > 1}
    assert folders == set(WINGS)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("alpaca")))
def test_the_package_knows_no_script_and_not_utils(module):
    assert not [other for other in EDGES[module] if other in (*SCRIPTS, "utils")]


@pytest.mark.parametrize("module", sorted(filter(wing, MODULES)))
def test_a_wing_imports_no_other_wing(module):
    assert not [other for other in EDGES[module] if wing(other) not in (None, wing(module))]


@pytest.mark.parametrize("module", sorted(n for n in MODULES if n.startswith("alpaca.") and not wing(n)))
def test_a_shared_room_imports_no_wing(module):
    assert not [other for other in EDGES[module] if wing(other)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_other_script_and_one_wing_at_most(script):
    own = {"generate_instruction": "generation", "parse_analysis": "analysis", "train": "training"}.get(script, script)
    assert not [other for other in EDGES[script] if other in SCRIPTS]
    assert {wing(other) for other in EDGES[script]} - {None} <= {own}


def test_there_is_no_circle_of_imports():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in EDGES[module]:
                if other != module:
                    visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("utils", {"torch", "transformers", "openai"}),
        ("generate_instruction", {"torch", "transformers", "openai"}),
        ("weight_diff", {"torch", "transformers", "openai"}),
        ("inference", {"torch", "transformers", "openai"}),
        ("parse_analysis", {"torch", "transformers", "openai", "matplotlib"}),
        ("train", {"openai", "fire", "rapidfuzz"}),
    ],
)
def test_importing_a_script_loads_no_more_than_its_help_needs(script, absent):
    program = f"import sys, {script}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_train_runs_without_openai_installed():
    """Its whole import chain, with openai, fire and rapidfuzz hidden as on a machine that only trains."""
    program = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('openai', 'fire', 'rapidfuzz', 'rouge_score'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import train\n"
        "print(train.PROMPT_DICT.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_two_classes_or_public_functions_of_the_package_share_a_name():
    """One name, one thing: `Journal` or `Progress` must not mean two."""
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        with open(path, encoding="utf-8") as file:
            for node in ast.parse(file.read()).body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_":
                    places.setdefault(node.name, []).append(module)
    twice = {name: where for name, where in places.items() if len(where) > 1 and name not in ("main",)}
    assert not twice


def test_no_function_is_longer_than_a_main_loop():
    """50 lines, docstring and signature left out; 70 for main loops, which are named here."""
    main_loops = {"train", "ask_live"}
    long = []
    for module, path in MODULES.items():
        with open(path, encoding="utf-8") as file:
            for node in ast.walk(ast.parse(file.read())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
                    lines = node.end_lineno - body[0].lineno + 1
                    if lines > (70 if node.name in main_loops else 50):
                        long.append(f"{module}.{node.name}: {lines}")
    assert not long
