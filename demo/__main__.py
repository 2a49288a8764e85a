"""The paper's whole story at toy size, on a CPU, without a key or a download of weights: `make demo`.

Generate data, fine-tune on it, publish and recover the weights as a diff, ask the recovered model. Every step is the
script and the flags that a user would type, printed before it runs. Standard library only, so that `python -m demo
check` can look at a machine before anything is installed there.
"""

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
TASKS = 100  # what generate_instruction.py makes by default
NEEDED_GIB = {"install": 6, "run": 1}  # torch and its friends: 2 GiB as a CPU build, more with CUDA's libraries
GENERATE = "python -m generate_instruction generate_instruction_following_data"


def refuse(message):
    """Ends the program with one line and exit status 2."""
    sys.stderr.write("error: " + message + "\n")
    sys.exit(2)


def check(stage):
    """Refuses a Python that is too old (and so must stay readable to one) and a disk that is too full."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 10):  # noqa: UP036
        refuse(f"Python {found} found, 3.10 or newer needed; name yours: make PYTHON=python3.12 {stage}")
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_GIB[stage]:
        refuse(f"{free:.1f} GiB free on this disk, {NEEDED_GIB[stage]} GiB needed to {stage}; make room and try again")


def step(title, why):
    """Prints a step's heading and what it does."""
    print(f"\n=== {title}\n    {why}", flush=True)


def run(command):
    """Prints a command and runs it; one that fails ends the demo, with what it printed above.

    Returns:
        What it printed on stdout, which is also shown.
    """
    words = shlex.split(command)
    print(f"\n$ {command}", flush=True)
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if module else str(os.cpu_count() or 1)}
    process = subprocess.Popen(
        [sys.executable, *module, *words[1:]], stdout=subprocess.PIPE, text=True, env=environment
    )
    printed = []
    for line in process.stdout:
        print(line, end="", flush=True)
        printed.append(line)
    if process.wait():
        refuse(f"the command above ended with exit status {process.returncode}; the demo stops here")
    return "".join(printed)


def load(path):
    """Reads a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def free_port():
    """Finds a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_replay(port):
    """Starts the server of recorded completions and waits until it serves; a server that cannot ends the demo."""
    command = f"python -m demo.replay --port {port}"
    print(f"\n$ {command} &", flush=True)
    server = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    if not line:
        sys.exit(server.wait())  # it has said why
    print(line, end="", flush=True)
    return server


def generate(port):
    """Step 1: the pipeline of generate_instruction.py over recorded completions, over real HTTP."""
    step(
        "1 of 4 · Generate instruction data",
        "A loopback server replays completions that a large model once wrote: no key, no cost, nothing is generated\n"
        "    anew. Client, parser, filters and ROUGE-L de-duplication are those of a paid run.",
    )
    server = start_replay(port)
    try:
        run(
            f"{GENERATE} --output_dir {OUTPUT}/generated --base_url http://127.0.0.1:{port}/v1 --model_name recorded "
            f"--seed 0 --num_instructions_to_generate {TASKS} --price_input 0 --price_output 0"
        )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    if load(DATA) != load("alpaca_data.json")[:TASKS]:
        refuse(f"{DATA} is not the beginning of the bundled alpaca_data.json; has a file of the project changed?")
    print(
        f"\nThese are the first {TASKS} of the bundled alpaca_data.json, made by the same command with a larger number."
    )


def fine_tune(port):
    """Step 2: train.py under torchrun with the flags of the paper, at toy size."""
    step(
        "2 of 4 · Fine-tune",
        "A tiny LLaMA with random weights and a tokenizer trained on the data: it can learn these answers by heart,\n"
        "    and nothing else. The flags are the paper's; model, batch, epochs and learning rate are toy-sized.",
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
    """Step 3: weight_diff.py both ways, and the comparison of the two folders."""
    step(
        "3 of 4 · Publish and recover the weights",
        "A diff alone is of no use without the base model; base and diff together give back the tuned model.",
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
    print(f"Every one equals its twin in {TUNED}, byte for byte.")


def answer():
    """Step 4: inference.py on the recovered model, asked something that it was trained on."""
    step(
        "4 of 4 · Ask the recovered model",
        "An instruction from its training data. A tiny model repeats what it has seen; it knows nothing of the world.",
    )
    example = next(example for example in load(DATA) if not example["input"])
    said = run(
        f"python inference.py answer --model_path {RECOVERED} --instruction {shlex.quote(example['instruction'])}"
    )
    print(f"\nIts training data says: {example['output']}")
    print("The same, word for word." if said.strip() == example["output"].strip() else "Not the same, this time.")


def main():
    """Runs the four steps in a new folder and tells what to do next."""
    check("run")
    port = os.environ.get("PORT") or str(free_port())
    if not port.isdigit():
        refuse(f"PORT must be a number, found {port!r}")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", int(port))) == 0:
            refuse(f"port {port} is occupied; leave PORT out or name another: make demo PORT=8765")
    if os.path.exists(OUTPUT):
        print(f"Removing {OUTPUT}, made by an earlier demo.")
        shutil.rmtree(OUTPUT)
    started = time.monotonic()
    generate(port)
    steps = fine_tune(free_port())
    diff_and_recover()
    answer()
    print(f"""
=== Done in {time.monotonic() - started:.0f} seconds. What was made, under {OUTPUT}:
    generated/   regen.json, alpaca_data.json, and the journal of every request
    tiny_llama/  the base model, random weights
    tuned/       the same after {steps} optimizer steps
    diff/        tuned minus base, and what makes the recovery exact
    recovered/   base plus diff: the tuned model again

Next, with a real model (README.md has the rest):
    export OPENAI_API_KEY=...    # or a local server: --base_url http://127.0.0.1:8000/v1
    .venv/bin/{GENERATE} --dry_run
    .venv/bin/torchrun --nproc_per_node=4 train.py --model_name_or_path ... (README, Fine-tuning)""")


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check("install")
    elif sys.argv[1:]:
        refuse(f"unknown argument {sys.argv[1]}; there is check, or none")
    else:
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
