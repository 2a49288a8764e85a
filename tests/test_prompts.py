"""The training templates, byte for byte."""

import pytest

from alpaca.prompts import format_prompt


def test_prompt_with_an_input_is_the_originals_to_the_byte():
    assert format_prompt({"instruction": "Add.", "input": "1, 2"}).encode() == (
        b"Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        b"response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        b"### Response:"
    )


@pytest.mark.parametrize("example", [{"instruction": "Rhyme."}, {"instruction": "Rhyme.", "input": ""}])
def test_prompt_without_an_input_is_the_originals_to_the_byte(example):
    assert format_prompt(example).encode() == (
        b"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        b"### Instruction:\nRhyme.\n\n### Response:"
    )


def test_braces_and_placeholders_in_the_data_stay_as_they_are():
    prompt = format_prompt({"instruction": "Fill {input} and {0} in {instruction}.", "input": "{instruction} {input}"})
    assert "### Instruction:\nFill {input} and {0} in {instruction}.\n" in prompt
    assert "### Input:\n{instruction} {input}\n" in prompt
