"""Runs the scripts against the servers that are installed here, and writes the table of docs/generation.md.

    python -m benchmarks.servers run --model_path demo_output/real/tuned --gguf tuned.gguf \
        --vllm .venv-vllm/bin/vllm --llama_server llama-server --litellm .venv-litellm/bin/litellm

The model is a folder that train.py saved, with its chat template, and the same model as GGUF for llama.cpp. Each server
is started on a free port with a context of 2,048 tokens, and ended by process id. A server that isn't named or found is
left out, and one that fails has its last line in the table. Writes benchmarks/results/servers.json.
"""

import asyncio
import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump, jload
from alpaca.inference.batch import load_instances
from alpaca.inference.engine import NEUTRAL
from alpaca.prompts import format_prompt
from alpaca.records import load_records
from benchmarks.data_quality import update_tables
from benchmarks.inference import only_model
from benchmarks.provenance import RESULTS, ROOT, provenance
from demo.__main__ import free_port

CONTEXT = 2048  # tokens
PROMPTS, NEW_TOKENS = 16, 64
PATIENCE = 600  # seconds until a server must answer
GENERATE = "generate_instruction.py generate_instruction_following_data --api completions --request_batch_size 2"


class Server(NamedTuple):
    """A way to serve the model."""

    name: str
    command: list[str]
    model: str
    version: list[str]


def run(
    model_path: str,
    gguf: str = "",
    vllm: str = "vllm",
    llama_server: str = "llama-server",
    litellm: str = "litellm",
    transformers: str = "transformers",
    update: str = os.path.join(ROOT, "docs", "generation.md"),
) -> None:
    """Tries each server that is installed.

    Args:
        model_path: A folder that train.py saved.
        gguf: The same model, converted by llama.cpp's convert_hf_to_gguf.py.
        vllm: The program that starts vLLM.
        llama_server: The program that starts llama.cpp's server.
        litellm: The program that starts litellm's proxy; it stands before vLLM.
        transformers: The program that starts `transformers serve`.
        update: Markdown file whose table between `<!-- servers -->` and `<!-- end of servers -->` is replaced.
    """
    if not os.path.isfile(os.path.join(model_path, "chat_template.jinja")):
        raise UserError(f"{model_path} has no chat_template.jinja; name a folder that train.py saved")
    path = os.path.abspath(model_path)
    vllm, llama_server, litellm, transformers = map(_program, (vllm, llama_server, litellm, transformers))
    limits = ["--host", "127.0.0.1", "--port", "PORT"]
    servers = [
        Server(
            "vLLM",
            [vllm, "serve", path, *limits, "--max-model-len", str(CONTEXT), "--dtype", "float32", "--enforce-eager"],
            path,
            [vllm, "--version"],
        ),
        Server(
            "llama.cpp",
            [llama_server, "-m", os.path.abspath(gguf), *limits, "-c", str(2 * CONTEXT), "-np", "2"],
            "",
            [llama_server, "--version"],
        ),
        Server(
            "`transformers serve`",
            [transformers, "serve", *limits, "--device", "cpu", "--dtype", "float32"],
            path,
            [transformers, "version"],
        ),
    ]
    servers = [s for s in servers if s.command[0] and (gguf or s.name != "llama.cpp")]
    if not servers:
        raise UserError("none of the servers is installed here; name one, for instance --vllm PATH")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the servers, too
    with tempfile.TemporaryDirectory() as folder:
        tasks = load_instances(os.path.join(ROOT, "seed_tasks.jsonl"))
        tasks = tasks[:: len(tasks) // PROMPTS][:PROMPTS]
        jdump(tasks, os.path.join(folder, "data.json"))
        expected = batch(folder, "process", "--model_path", path, "--device", "cpu", "--dtype", "float32")
        found = {"rows": [], **provenance("transformers", "openai")}
        for row in (row for server in servers for row in attempt(server, folder, expected, litellm)):
            found["rows"].append(row | {"date": datetime.date.today().isoformat()})
            jdump(found, os.path.join(RESULTS, "servers.json"))  # a later server may take for ever
            print(servers_table(found["rows"][-1:]), flush=True)
    update_tables(update, {"servers": servers_table(found["rows"])})


def _program(name: str) -> str:
    """Finds a program; gives its whole path, or "" if it isn't there."""
    found = shutil.which(name)
    return os.path.abspath(found) if found else ""


def attempt(server: Server, folder: str, expected: list[str], litellm: str) -> Iterator[dict]:
    """Starts a server, and the proxy before vLLM; yields a row for each."""
    print(f"starting {server.name}", flush=True)
    with started(server.command, folder) as (url, process):
        row = {"server": server.name, "version": version(server.version)}
        if complaint := wait_for(url, process):
            yield row | {"failed": complaint}
            return
        yield row | measure(url, server.model, folder, expected)
        if server.name != "vLLM" or not litellm:
            return
        settings = {"model": f"hosted_vllm/{server.model}", "api_base": url, "api_key": "none"}
        config = os.path.join(folder, "litellm.yaml")
        keyless = {"dangerously_permit_weak_or_unset_master_key": True}  # it listens on 127.0.0.1 alone
        models = [{"model_name": "small", "litellm_params": settings}]
        jdump({"model_list": models, "general_settings": keyless}, config)  # JSON is YAML
        print("starting litellm", flush=True)
        command = [litellm, "--config", config, "--host", "127.0.0.1", "--port", "PORT"]
        with started(command, folder) as (proxy, process):
            row = {"server": "litellm's proxy, before vLLM", "version": version([litellm, "--version"])}
            complaint = wait_for(proxy, process)
            yield row | ({"failed": complaint} if complaint else measure(proxy, "small", folder, expected))


def measure(url: str, model: str, folder: str, expected: list[str]) -> dict:
    """Runs the generator, a prompt that is too long, a batch of answers and the chat template against a server.

    Returns:
        `generator`: the exit status and what it said of the context. `too_long`: requests with a prompt that leaves no
        room, as the journal has them. `equal`: greedy answers equal to those in process. `template`: prompts that chat
        and the training template answer alike.
    """
    name = model or asyncio.run(only_model(url))
    return {
        "generator": generate(url, name, os.path.join(ROOT, "prompt.txt"), folder),
        "too_long": generate(url, name, long_prompt(folder), folder)["reasons"].get("prompt_too_long", 0),
        "equal": sum(map(str.__eq__, batch(folder, "server", "--base_url", url, "--model_name", name), expected)),
        "template": asyncio.run(same_by_chat(url, name, jload(os.path.join(folder, "data.json")))),
    }


def generate(url: str, model: str, prompt_path: str, folder: str) -> dict:
    """Asks for two answers by generate_instruction.py; gives its exit status, its journal's reasons, its words."""
    output = tempfile.mkdtemp(dir=folder)
    flags = ["--base_url", url, "--model_name", model, "--prompt_path", prompt_path, "--output_dir", output]
    flags += ["--max_requests", "2", "--max_outage", "60"]
    done = subprocess.run([sys.executable, *GENERATE.split(), *flags], cwd=ROOT, capture_output=True, text=True)
    journal = os.path.join(output, "requests.jsonl")
    reasons = [record["finish_reason"] for _, record in load_records(journal)] if os.path.exists(journal) else []
    said = re.findall(r"^(?:The model's context|This server).*$", done.stdout + done.stderr, re.MULTILINE)
    counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    return {"status": done.returncode, "reasons": counts, "said": said or done.stderr.strip().splitlines()[-1:]}


def long_prompt(folder: str) -> str:
    """Writes rules that alone are longer than the context."""
    path = os.path.join(folder, "long_prompt.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write("Write tasks. " * CONTEXT + "\n\nList of 20 tasks:\n")
    return path


def batch(folder: str, name: str, *where: str) -> list[str]:
    """Asks for greedy answers by inference.py batch."""
    output = os.path.join(folder, f"{name}-{time.monotonic_ns()}.json")
    flags = ["--data", os.path.join(folder, "data.json"), "--output", output, "--max_new_tokens", str(NEW_TOKENS)]
    command = [sys.executable, "inference.py", "batch", *where, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, flush=True)
        return [""] * PROMPTS
    return [record["output"] for record in jload(output)]


async def same_by_chat(url: str, model: str, tasks: list[dict]) -> int:
    """Counts the tasks whose greedy answer by chat is that of the training template by completion."""
    import httpx

    fixed = {"model": model, "max_tokens": 24, "temperature": 0.0}
    same = 0
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        for task in tasks:
            text = task["instruction"] + (f"\n\n### Input:\n{task['input']}" if task["input"] else "")
            user = [{"role": "user", "content": text}]
            chat = await client.post(f"{url}/chat/completions", json={"messages": user, **fixed})
            plain = await client.post(f"{url}/completions", json={"prompt": format_prompt(task), **fixed, **NEUTRAL})
            if plain.status_code == 422:  # knows no such fields
                plain = await client.post(f"{url}/completions", json={"prompt": format_prompt(task), **fixed})
            if chat.is_success and plain.is_success:
                answers = chat.json()["choices"][0]["message"]["content"], plain.json()["choices"][0]["text"]
                same += answers[0].strip() == answers[1].strip()
    return same


@contextlib.contextmanager
def started(command: list[str], folder: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs a server during the block, with what it prints in a file; gives its URL and its process."""
    port = free_port()
    command = [str(port) if part == "PORT" else part for part in command]
    with open(os.path.join(folder, f"{port}.log"), "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        process.log = log.name
        try:
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(url: str, process: subprocess.Popen) -> str:
    """Waits until a server answers; gives its last line if it ends or takes too long."""
    import httpx

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/models", timeout=5).status_code not in (502, 503):
                return ""
        time.sleep(1)
    with open(process.log, encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    return lines[-1] if lines else f"exit status {process.poll()}"


def version(command: list[str]) -> str:
    """Gets a version from what a program prints: the first number with a dot, or a build number."""
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    found = re.search(r"\d+\.\d+(?:\.\d+)*|version: (\d+) ", text)
    return (found[1] and f"build {found[1]}") or found[0] if found else "unknown"


def servers_table(rows: list[dict]) -> str:
    """Formats what was found, one row a server."""
    lines = [
        "| server | version | date | generator | prompt too long | answers equal | chat = template |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            cells = [f"did not start: {row['failed'][:100]}", "", "", ""]
        else:
            made = row["generator"]
            outcomes = ", ".join(f"{count} {reason}" for reason, count in made["reasons"].items())
            cells = [outcomes or " ".join(made["said"]), f"{row['too_long']} of 2 journaled"]
            cells += [f"{row[name]} of {PROMPTS}" for name in ("equal", "template")]
        lines.append(f"| {' | '.join([*(row[name] for name in ('server', 'version', 'date')), *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli({"run": run})
