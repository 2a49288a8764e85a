"""Every test runs offline, without keys, and away from the user's caches."""

import os
import shutil
import signal

import pytest

pytest_plugins = ["generation_runs"]  # its fixtures serve both generate_instruction.py's tests and its wing's

# Helper modules whose assertions should explain themselves.
pytest.register_assert_rewrite("packing_models", "toy_tokenizers", "training_runs")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GIVEN = ("ALPACA_REFERENCE_DIR", "ALPACA_REAL_WHEEL")  # what a machine may have to test with


def pytest_configure():
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_", "HF_", "WANDB_", "ALPACA_")) and name not in GIVEN:
            del os.environ[name]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_PROXY="127.0.0.1,localhost")
    # Scripts that the tests start find the project and the tests' own modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    # A shell's background jobs ignore Ctrl-C, and so would the scripts that are to be tested with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _private_home(tmp_path_factory):
    """Points every cache into a folder of this test run."""
    home = tmp_path_factory.mktemp("home")
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"), HF_HOME=str(home / "hf"))


@pytest.fixture(scope="session")
def root() -> str:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def reference_dir() -> str:
    """Files that may not be shipped (real tokenizers, the original's recorded losses), where a machine has them."""
    folder = os.environ.get("ALPACA_REFERENCE_DIR")
    if not folder:
        pytest.skip("ALPACA_REFERENCE_DIR is not set: no reference files on this machine")
    return folder


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, root) -> str:
    """A tiny model that has learned taught_model.LESSONS by heart."""
    import taught_model

    return taught_model.make(root, tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="session")
def alpaca(model_path):
    """The same model, loaded as inference.py loads it."""
    from alpaca.inference import loading

    return loading.load(model_path)


@pytest.fixture
def model_copy(model_path, tmp_path):
    """A copy of its folder, which a test may damage."""
    return shutil.copytree(model_path, tmp_path / "copy")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if "gpu" in item.keywords]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; there is none here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
