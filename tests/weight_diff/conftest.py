"""The pair that most tests of the wing read."""

import pytest
from weight_diff_pairs import whole_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Raw, tuned and diff, not to be changed."""
    return whole_pair(str(tmp_path_factory.mktemp("pair")))
