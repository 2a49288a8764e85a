"""alpaca/generation/config.py: the command's flags as one checked value."""

import dataclasses
import inspect

import generate_instruction
from alpaca.generation.config import Config


def test_every_flag_is_a_field_with_the_same_default():
    command = generate_instruction.generate_instruction_following_data
    flags = {name: flag.default for name, flag in inspect.signature(command).parameters.items()}
    assert flags == {field.name: field.default for field in dataclasses.fields(Config)}


def test_replay_takes_the_same_rules_by_default():
    flags = inspect.signature(generate_instruction.replay).parameters
    for name in ("num_cpus", "similarity_threshold", "min_words", "max_words", "keywords", "seed_tasks_path"):
        assert flags[name].default == getattr(Config, name)


def test_keywords_are_one_pattern_and_none_is_no_pattern():
    assert Config(keywords=" c++, map ,,").keyword_pattern == r"c\+\+|map"
    assert Config(keywords=" ,").keyword_pattern == ""
    assert generate_instruction.find_objection("Name two odd maps", "ok", Config(keywords="")) is None
