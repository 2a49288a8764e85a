"""Fixtures of the training wing. They import late: Hugging Face reads the tests' environment when it is imported."""

import pytest


@pytest.fixture(scope="session")
def examples(root) -> list[dict]:
    """16 seed tasks as tokens of 512 kinds: words, with their first letter merged into the space before."""
    from packing_models import load_examples

    return load_examples(root)


@pytest.fixture(scope="session")
def reference(examples):
    """The padded path's loss and gradients, computed once for each model and reduction."""
    from packing_models import gradients, make_model, micro_batches, padded_loss

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
def _quick():
    """Tiny matrices are quicker on one thread than on two that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
