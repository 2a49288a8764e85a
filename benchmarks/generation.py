"""Kept tasks per second against a server that takes a second per answer, at 1, 8 and 64 requests in flight.

    python benchmarks/generation.py run

The script and the server (tests/openai_server.py) are processes of their own. The share of capacity is the time that
the server's slots were busy between its first request and its last answer, the script's warm-up with one request
included. CPU is the script's own by answer, its start apart. Writes benchmarks/results/generation.json.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from alpaca.cli import UserError, run_cli  # noqa: E402
from alpaca.files import jdump  # noqa: E402
from alpaca.records import load_examples  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from tests.openai_server import WORDS  # noqa: E402


def write_inputs(folder: str) -> None:
    """A prompt and 60 seed tasks."""
    rng = random.Random(0)
    with open(f"{folder}/prompt.txt", "w") as file:
        file.write("List of 20 tasks:\n")
    with open(f"{folder}/seed_tasks.jsonl", "w") as file:
        for _ in range(60):
            instance = {"input": "", "output": " ".join(rng.sample(WORDS, 8))}
            file.write(json.dumps({"instruction": " ".join(rng.sample(WORDS, 9)), "instances": [instance]}) + "\n")


def generate(folder: str, base_url: str, in_flight: int, requests: int) -> tuple[int, float]:
    """Runs the script for so many requests; the tasks that it kept and its CPU seconds."""
    output_dir = f"{folder}/{in_flight}-{requests}"
    flags = {
        "base_url": base_url, "output_dir": output_dir, "request_batch_size": in_flight, "max_requests": requests,
        "num_instructions_to_generate": 10**6, "prompt_path": f"{folder}/prompt.txt",
        "seed_tasks_path": f"{folder}/seed_tasks.jsonl",
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    script = [sys.executable, "-m", "generate_instruction", "generate_instruction_following_data", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    kept = len(load_examples(f"{output_dir}/alpaca_data.json"))
    return kept, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: str, base_url: str, in_flight: int, requests: int) -> dict:
    """One row of the table."""
    _, start_cpu = generate(folder, base_url, in_flight, 1)
    served_times(base_url)  # and forget that request
    kept, cpu = generate(folder, base_url, in_flight, requests)
    times = served_times(base_url)
    row = {
        "in_flight": in_flight,
        "answers": times["answers"],
        "kept_tasks_per_s": round(kept / times["seconds"], 1),
        "share_of_capacity": round(times["busy"] / times["seconds"] / in_flight, 3),
        "cpu_ms_per_answer": round(1000 * (cpu - start_cpu) / (requests - 1), 1),
    }
    print("{:>9}{:>9}{:>14}{:>19.1%}{:>18}".format(*row.values()), flush=True)
    return row


def served_times(base_url: str) -> dict:
    """Seconds from the server's first request to its last answer, seconds of work in them, and answers."""
    with urllib.request.urlopen(f"{base_url}/times") as response:
        return json.load(response)


def run(seconds_per_answer: float = 1.0, seconds: float = 30.0, in_flight: str = "1,8,64") -> None:
    """Measures each width for about so many seconds and prints a table.

    Args:
        seconds_per_answer: of the server.
        seconds: that each width should take.
        in_flight: widths, comma-separated.
    """
    server = subprocess.Popen(
        [sys.executable, "tests/openai_server.py", "serve", f"--seconds_per_answer={seconds_per_answer}"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip
    try:
        base_url, rows = server.stdout.readline().strip(), []
        print("in flight  answers  kept tasks/s  share of capacity  CPU ms an answer")
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(folder)
            for width in map(int, in_flight.split(",")):
                rows.append(measure(folder, base_url, width, max(2, int(width * seconds / seconds_per_answer))))
    finally:
        server.terminate()
    jdump(
        {"seconds_per_answer": seconds_per_answer, "rows": rows, **provenance("openai", "rapidfuzz", "numpy")},
        os.path.join(ROOT, "benchmarks", "results", "generation.json"),
    )


if __name__ == "__main__":
    run_cli({"run": run})
