"""Tasks kept per second against a server that takes a second per answer, at 1, 8 and 64 requests in flight.

    python -m benchmarks.generation run

The script and the server (tests/openai_server.py) run as separate processes. The share of capacity is the share of
time that the server's slots were busy between its first request and its last answer; the script's warm-up with a
single request counts against it. CPU time is the script's own per answer, start-up excluded.
Writes benchmarks/results/generation.json.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import urllib.request

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump
from alpaca.records import load_examples
from benchmarks.provenance import RESULTS, ROOT, provenance
from tests.openai_server import WORDS


def write_inputs(folder: str) -> None:
    """Writes a prompt and 60 seed tasks."""
    rng = random.Random(0)
    with open(f"{folder}/prompt.txt", "w") as file:
        file.write("List of 20 tasks:\n")
    with open(f"{folder}/seed_tasks.jsonl", "w") as file:
        for _ in range(60):
            instance = {"input": "", "output": " ".join(rng.sample(WORDS, 8))}
            file.write(json.dumps({"instruction": " ".join(rng.sample(WORDS, 9)), "instances": [instance]}) + "\n")


def generate(folder: str, base_url: str, in_flight: int, requests: int) -> tuple[int, float]:
    """Runs the script for a number of requests; returns the number of tasks kept and the CPU seconds."""
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
    """Measures one row of the table."""
    _, start_cpu = generate(folder, base_url, in_flight, 1)
    served_times(base_url)  # resets the server's clock
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
    """Asks the server for `seconds` (first request to last answer), `busy` (slot-seconds of work) and `answers`."""
    with urllib.request.urlopen(f"{base_url}/times") as response:
        return json.load(response)


def run(seconds_per_answer: float = 1.0, seconds: float = 30.0, in_flight: str = "1,8,64") -> None:
    """Measures each number of requests in flight, prints a table and writes the result.

    Args:
        seconds_per_answer: Seconds that the server takes for one answer.
        seconds: Seconds that each row should take, approximately.
        in_flight: Comma-separated numbers of requests in flight.
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
        os.path.join(RESULTS, "generation.json"),
    )


if __name__ == "__main__":
    run_cli({"run": run})
