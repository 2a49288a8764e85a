"""Small runs of generate_instruction.py for tests: a working folder, a server, the command and what it wrote."""

import json
import subprocess
import sys

import pytest
from openai_server import WORDS, Server

import generate_instruction

OUTPUTS = ("regen.json", "alpaca_data.json", "rejected.jsonl")
SEEDS = [
    ("Explain why the sky is blue at noon.", "", "Air scatters blue light most."),
    ("Sort  these\nnumbers from low to high:", "3 1 2", "1 2 3"),
    ("Write a haiku about autumn rain.", "", "Rain on the last leaf"),
    ("Translate the sentence into French.", "Good day", "Bonjour"),
    ("Name three uses of vinegar at home.", "", "Cleaning, cooking, pickling"),
    *((f"Rhyme with {word} {other}.", "", "...") for word, other in zip(WORDS[:20], WORDS[20:40], strict=True)),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a prompt and seed tasks under their default names."""
    (tmp_path / "prompt.txt").write_text("Come up with tasks.\n\nList of 20 tasks:\n")
    seeds = [
        {"id": f"seed_{i}", "name": f"n{i}", "instruction": a, "instances": [{"input": b, "output": c}]}
        for i, (a, b, c) in enumerate(SEEDS)
    ]
    (tmp_path / "seed_tasks.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server():
    with Server() as server:
        yield server


def flags(server, output_dir="out", **more) -> list[str]:
    """The command line of a small run."""
    given = {"output_dir": output_dir, "num_instructions_to_generate": 50, **more}
    if server:
        given.setdefault("base_url", server.base_url)
    return ["generate_instruction_following_data", *(f"--{name}={value}" for name, value in given.items())]


def generate(server, output_dir="out", **more) -> None:
    """Runs the command in this process."""
    generate_instruction.main(flags(server, output_dir, **more))


def start(server, output_dir="out", **more) -> subprocess.Popen:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "generate_instruction", *flags(server, output_dir, **more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fails(capsys, server, output_dir="out", **more) -> str:
    """Runs the command, expects exit status 2 and gives the last line that it printed."""
    with pytest.raises(SystemExit) as caught:
        generate(server, output_dir, **more)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def outputs(folder) -> dict[str, bytes]:
    """The bytes of the three files that are made from the journal."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def journal(folder) -> list[dict]:
    """The records of a journal."""
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
