"""Two models' answers to compare, and `inference.py compare` with a person's keystrokes."""

import json
import subprocess
import sys

from alpaca.files import jdump


def write_outputs(folder) -> list[str]:
    """Writes two outputs of batch; returns their paths and one for the verdicts."""
    for name in "ab":
        rows = [{"instruction": f"Task {i}", "input": "", "output": f"{name}-answer {i}"} for i in range(8)]
        jdump([{**row, "generator": f"model-{name}"} for row in rows], str(folder / f"{name}.json"))
    return [str(folder / "a.json"), str(folder / "b.json"), str(folder / "judged.jsonl")]


def compare(root: str, outputs: list[str], keys) -> str:
    """Runs the command with a person's keystrokes; returns what it printed."""
    a, b, judged = outputs
    command = [sys.executable, "inference.py", "compare", "--a", a, "--b", b, "--output", judged]
    keystrokes = "".join(f"{key}\n" for key in keys)
    done = subprocess.run(command, cwd=root, input=keystrokes, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_verdicts(outputs: list[str]) -> list[dict]:
    """Reads the verdicts."""
    with open(outputs[2]) as file:
        return [json.loads(line) for line in file]
