"""Runs the whole pipeline at toy size, on a CPU, without an API key and without downloading weights: `make demo`.

It generates data, fine-tunes a model on it, publishes and recovers the weights as a diff, and asks the recovered model
a question. Each step prints the command that a user would type and runs it. This file needs only the standard library,
so that `python -m demo check` can check a machine before anything is installed on it.
"""

import contextlib
import filecmp
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

OUTPUT = "demo_output"
DATA = f"{OUTPUT}/generated/alpaca_data.json"
RAW, TUNED, DIFF, RECOVERED = (f"{OUTPUT}/{name}" for name in ("tiny_llama", "tuned", "diff", "recovered"))
PAPER = "recordings/paper"  # short tasks, by the paper's rules: a tiny model learns them in a minute
TASKS = 100  # what generate_instruction.py makes by default
NEEDED_GIB = {"install": 6, "run": 1}  # torch and the rest take 2 GiB as a CPU build, more with CUDA's libraries
GENERATE = "python -m generate_instruction generate_instruction_following_data"


def refuse(message):
    """Prints a one-line error and exits with status 2."""
    sys.stderr.write("error: " + message + "\n")
    sys.exit(2)


def check(stage):
    """Refuses a Python that is too old or a disk that is too full.

    An old Python has to be able to parse this file to say so, so keep its syntax to that of Python 3.6.
    """
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 10):  # noqa: UP036
        refuse(f"Python {found} found, 3.10 or newer needed; name yours: make PYTHON=python3.12 demo")
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_GIB[stage]:
        refuse(f"{free:.1f} GiB free on this disk, {NEEDED_GIB[stage]} GiB needed to {stage}; free some and try again")


def step(title, why):
    """Prints the heading of a step and what it does."""
    print(f"\n=== {title}\n    {why}", flush=True)


def run(command):
    """Prints a command and runs it. A command that fails ends the demo.

    Returns:
        The command's stdout, which is also shown as it arrives.
    """
    words = shlex.split(command)
    print(f"\n$ {command}", flush=True)
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if module else str(os.cpu_count() or 1)}
    process = subprocess.Popen(
        [sys.executable, *module, *words[1:]], stdout=subprocess.PIPE, text=True, env=environment
    )
    printed = []
    with ending(process, signal.SIGTERM):
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
        process.wait()
    if process.returncode:
        refuse(f"the command above ended with exit status {process.returncode}; the demo stops here")
    return "".join(printed)


@contextlib.contextmanager
def ending(process, how):
    """Ends a process with the block, however that ends: by an error, Ctrl-C, or a signal that `main` turns into one."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(how)
        process.wait()


def load(path):
    """Reads a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def free_port():
    """Finds a free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def replay_server(port):
    """Runs the server of recorded completions during the block. If it fails to start, the demo ends."""
    command = f"python -m demo.replay --port {port} --recording {PAPER}/completions.jsonl"
    print(f"\n$ {command} &", flush=True)
    server = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], stdout=subprocess.PIPE, text=True)
    with ending(server, signal.SIGTERM):  # SIGINT is ignored by all that a script starts in the background
        line = server.stdout.readline()
        if not line:
            sys.exit(server.wait())  # it has printed the reason
        print(line, end="", flush=True)
        yield


def generate(port):
    """Step 1: generate_instruction.py, with recorded completions served over real HTTP."""
    step(
        "1 of 4 · Generate instruction data",
        "A local server replays completions that a large model wrote earlier, so this needs no key and costs nothing.\n"
        "    The client, the parser, the filters and the ROUGE-L de-duplication are those of a paid run.",
    )
    with replay_server(port):
        run(
            f"{GENERATE} --output_dir {OUTPUT}/generated --base_url http://127.0.0.1:{port}/v1 --model_name recorded "
            f"--prompt_path configs/prompt_paper.txt --seed_tasks_path {PAPER}/seed_tasks.jsonl "
            f"--seed 0 --num_instructions_to_generate {TASKS} --price_input 0 --price_output 0"
        )
    if load(DATA) != load("alpaca_data.json")[:TASKS]:
        refuse(f"{DATA} differs from the start of the bundled alpaca_data.json; has a file of the project changed?")
    print(
        f"\nThese are the first {TASKS} records of the bundled alpaca_data.json, which the same command made with a "
        "larger number."
    )


def fine_tune(port):
    """Step 2: train.py under torchrun with the paper's flags, at toy size."""
    step(
        "2 of 4 · Fine-tune",
        "A tiny LLaMA with random weights, and a tokenizer trained on the data. It can learn these answers by heart\n"
        "    and nothing else. The flags are the paper's; the model, batch size, epochs and learning rate are not.",
    )
    sizes = "--config configs/tiny_llama.json --data_path alpaca_data.json"
    run(f"python -m demo.tiny_model make {sizes} --output_dir {RAW}")
    run(
        f"torchrun --nproc_per_node=2 --master_port={port} train.py --model_name_or_path {RAW} --data_path {DATA} "
        f"--bf16 True --output_dir {TUNED} --num_train_epochs 24 --per_device_train_batch_size 2 "
        "--per_device_eval_batch_size 4 --gradient_accumulation_steps 2 --evaluation_strategy no "
        "--save_strategy steps --save_steps 2000 --save_total_limit 1 --learning_rate 4e-3 --weight_decay 0. "
        "--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 10 "
        "--fsdp 'full_shard auto_wrap' --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True"
    )
    state = load(f"{TUNED}/trainer_state.json")
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    print("\nTraining loss:")
    for entry in logged[:: max(1, len(logged) // 10)]:
        print(f"  step {entry['step']:4d}  {entry['loss']:6.3f}  {'#' * round(6 * entry['loss'])}")
    return state["global_step"]


def diff_and_recover():
    """Step 3: weight_diff.py in both directions; the recovered files must equal the tuned ones."""
    step(
        "3 of 4 · Publish and recover the weights",
        "The diff is useless without the base model. Base and diff together give back the tuned model.",
    )
    run(f"python weight_diff.py make_diff --path_raw {RAW} --path_tuned {TUNED} --path_diff {DIFF}")
    run(
        f"python weight_diff.py recover --path_raw {RAW} --path_diff {DIFF} --path_tuned {RECOVERED} "
        "--test_inference False"
    )
    run(f"python weight_diff.py verify --path {RECOVERED}")
    names = sorted(set(os.listdir(RECOVERED)) - {"weight_diff.json"})  # the manifest that verify reads
    _, different, missing = filecmp.cmpfiles(TUNED, RECOVERED, names, shallow=False)
    print(f"\n{len(names)} files in {RECOVERED}: {', '.join(names)}")
    if different or missing:
        refuse(f"not equal to {TUNED}: {', '.join(different + missing)}")
    print(f"Each one equals the file of the same name in {TUNED}, byte for byte.")


def answer():
    """Step 4: inference.py asks the recovered model an instruction that it was trained on."""
    step(
        "4 of 4 · Ask the recovered model",
        "The instruction is from its training data: a tiny model repeats what it has seen and knows nothing else.",
    )
    example = next(example for example in load(DATA) if not example["input"])
    said = run(
        f"python inference.py answer --model_path {RECOVERED} --instruction {shlex.quote(example['instruction'])}"
    )
    print(f"\nIts training data says: {example['output']}")
    print("The same, word for word." if said.strip() == example["output"].strip() else "Not the same this time.")


def main():
    """Runs the four steps in a new folder and says what to do next."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    check("run")
    port = os.environ.get("PORT") or str(free_port())
    if not port.isdigit():
        refuse(f"PORT must be a number, found {port!r}")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(port))) == 0:
            refuse(f"port {port} is in use; leave PORT out or choose another: make demo PORT=8765")
    if os.path.exists(OUTPUT):
        print(f"Removing what an earlier demo left in {OUTPUT}.")
        for name in set(os.listdir(OUTPUT)) - {"real"}:  # the results of `make real`
            shutil.rmtree(f"{OUTPUT}/{name}")
    started = time.monotonic()
    generate(port)
    steps = fine_tune(free_port())
    diff_and_recover()
    answer()
    print(f"""
=== Done in {time.monotonic() - started:.0f} seconds. The results are in {OUTPUT}:
    generated/   regen.json, alpaca_data.json and the journal of all requests
    tiny_llama/  the base model with random weights
    tuned/       the same model after {steps} optimizer steps
    diff/        tuned minus base, with what makes the recovery exact
    recovered/   base plus diff: the tuned model again

Next, with a real model (README.md has the rest):
    export OPENAI_API_KEY=...    # or a local server: --base_url http://127.0.0.1:8000/v1
    .venv/bin/{GENERATE} --dry_run
    .venv/bin/torchrun --nproc_per_node=4 train.py --model_name_or_path ... (README, train.py)""")


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check("install")
    elif sys.argv[1:]:
        refuse(f"unknown argument {sys.argv[1]}; the only one is check")
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
