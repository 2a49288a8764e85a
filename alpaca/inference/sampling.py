"""What may be asked of a model, wherever it runs: the ranges of the sampling parameters and of the seed."""

from collections.abc import Mapping

from alpaca.cli import UserError
from alpaca.records import check_text

# Below this the scores, divided by the temperature, overflow float32 for large scores; greedy is what is meant.
SMALLEST_TEMPERATURE = 1e-3
LARGEST_SEED = 2**32 - 1  # numpy's


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Checks the sampling parameters.

    Raises:
        UserError: A parameter is outside its range.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens must be 1 or more, found {max_new_tokens}")
    if temperature and not temperature >= SMALLEST_TEMPERATURE:
        raise UserError(
            f"--temperature must be 0 (greedy) or at least {SMALLEST_TEMPERATURE}, found {temperature}; give 0 if the "
            "likeliest token is meant"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p must be above 0 and at most 1, found {top_p}")


def check_seed(seed: int | None) -> None:
    """Checks a seed.

    Raises:
        UserError: It is outside the range that every random generator takes.
    """
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed must be from 0 to {LARGEST_SEED}, found {seed}")


def check_example_text(example: Mapping[str, str]) -> None:
    """Refuses an example with text that no tokenizer can read.

    Raises:
        UserError: Names the field.
    """
    for field in ("instruction", "input"):
        check_text(f"the {field}", example.get(field) or "")
