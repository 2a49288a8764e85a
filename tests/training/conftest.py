"""Fixtures of the training wing."""

import pytest
from packing_models import gradients, load_examples, make_model, micro_batches, padded_loss
from toy_tokenizers import llama_dir, opt_dir, traps  # noqa: F401
from training_runs import data, models, one_thread, trainee  # noqa: F401


@pytest.fixture(scope="session")
def examples(root) -> list[dict]:
    """16 seed tasks as tokens of 512 kinds: words, with their first letter merged into the space before."""
    return load_examples(root)


@pytest.fixture(scope="session")
def reference(examples):
    """The padded path's loss and gradients, computed once for each model and reduction."""
    known = {}

    def compute(name: str, reduction: str):
        if (name, reduction) not in known:
            model = make_model(name)
            loss = padded_loss(model, micro_batches(examples, 4), reduction)
            loss.backward()
            known[name, reduction] = loss.item(), gradients(model)
        return known[name, reduction]

    return compute


@pytest.fixture(scope="module", autouse=True)
def _quick(request):
    """All tests of this wing are quicker on one thread."""
    request.getfixturevalue("one_thread")
