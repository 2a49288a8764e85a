"""Training steps on the same examples: padded, padding-free, with a shared prefix, and by TRL's SFTTrainer.

    python -m benchmarks.train_throughput measure                                 # tiny LLaMA, minutes on a CPU
    python -m benchmarks.train_throughput measure --data_path alpaca_data.json    # real text, not drawn lengths
    python -m benchmarks.train_throughput measure --model llama-7b --steps 4      # one GPU with 141 GB

Every row runs in its own process, with random weights, on the same examples in steps of 128 (micro-batches of 4, like
the original). Rounds alternate between the rows; a row's time is the mean of its fastest round. Without --data_path,
examples are random tokens of Alpaca's lengths: 127 tokens on average, 1.54 times as many when padded in fours, with
the two templates' prefixes of 29 and 39 tokens.
"""

import dataclasses
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time

from alpaca.cli import UserError, run_cli
from alpaca.files import jdump, jload
from benchmarks.provenance import RESULTS, ROOT, provenance

# LLaMA-7B: Touvron et al. 2023, table 2.
LLAMA_7B = {"model_type": "llama", "vocab_size": 32001, "hidden_size": 4096, "intermediate_size": 11008}
LLAMA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
LLAMA_7B |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ROWS = {
    "padded": {"padding_free": "false", "shared_prefix": "false"},
    "padding-free": {"padding_free": "true", "shared_prefix": "false"},
    "shared prefix": {"padding_free": "true", "shared_prefix": "true"},
    "TRL padding_free": {},
    "TRL packing": {},
}
PACKAGES = ("torch", "transformers", "accelerate", "trl")
STEP = 128  # examples in an optimizer step, like the original's
FULL_RUN = 1218  # such steps in three epochs of 52,002 examples


def measure(
    model: str = "tiny",
    data_path: str | None = None,
    rows: str = "all",
    steps: int = 2,
    rounds: int = 2,
    layers: int = 0,
    max_tokens_per_pass: int = 0,
    output: str = "",
) -> None:
    """Measures rows side by side, prints a table and writes the result.

    Args:
        model: Model to train: tiny (configs/tiny_llama.json), llama-7b, or a configuration file.
        data_path: Alpaca-format data. Its first records are used, with a small tokenizer trained on it.
        rows: Comma-separated names of rows, or all.
        steps: Optimizer steps to time per row and round; one more, not timed, runs before them.
        rounds: Number of times that each row runs.
        layers: Number of decoder layers, to try a large model on a smaller GPU; 0 keeps the model's own number.
        max_tokens_per_pass: Same as the flag of train.py.
        output: JSON file to write. By default one in benchmarks/results, named after model, data and device.
    """
    chosen, missing = _choose_rows(rows)
    job = {"model": model, "data_path": data_path, "steps": steps, "layers": layers, "max_tokens": max_tokens_per_pass}
    runs, failed = _run_rounds(job, chosen, rounds)
    gpu = _gpu()
    result = {
        **provenance(*PACKAGES, gpu=gpu),
        **job,
        "rounds": rounds,
        "skipped": missing,
        "failed": failed,
        "rows": _summarize(runs),
    }
    name = os.path.splitext(os.path.basename(model))[0] + ("_real_text" if data_path else "")
    path = output or os.path.join(RESULTS, f"train_throughput_{name}_{'gpu' if gpu else 'cpu'}.json")
    jdump(result, path)
    print(format_table(result), f"written to {os.path.relpath(path)}", sep="\n")


def _choose_rows(rows: str) -> tuple[list[str], list[str]]:
    """Returns the rows to run, and those that can't run because TRL isn't installed."""
    chosen = list(ROWS) if rows == "all" else [row.strip() for row in rows.split(",")]
    if unknown := [row for row in chosen if row not in ROWS]:
        raise UserError(f"--rows {unknown[0]}: no such row; there are {', '.join(ROWS)}")
    has_trl = importlib.util.find_spec("trl") is not None
    missing = sorted({row for row in chosen if row.startswith("TRL") and not has_trl})
    for row in missing:
        print(f"{row}: skipped, trl is not installed here", flush=True)
    return [row for row in chosen if row not in missing], missing


def _run_rounds(job: dict, chosen: list[str], rounds: int) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Runs every row once a round. A row that fails, for want of memory for instance, does not stop the others.

    Returns:
        The results of each row, and the error of each row that failed.
    """
    runs, failed = {row: [] for row in chosen}, {}
    for number in range(rounds):
        for row in (row for row in chosen if row not in failed):
            try:
                runs[row].append(_run_row({**job, "row": row}))
                print(f"round {number + 1}, {row}: {runs[row][-1]['seconds_per_step']:.2f} s a step", flush=True)
            except UserError as error:
                failed[row] = str(error)
                print(f"round {number + 1}, {error}", flush=True)
    if not any(runs.values()):
        raise UserError(f"no row ran; {next(iter(failed.values()))}")
    return runs, failed


def _summarize(runs: dict[str, list[dict]]) -> list[dict]:
    """Picks each row's fastest round; adds MFU and the ratio to the padded row."""
    table = [
        {"row": row, **min(found, key=lambda run: run["seconds_per_step"])} for row, found in runs.items() if found
    ]
    base = next((entry["useful_tokens_per_s"] for entry in table if entry["row"] == "padded"), None)
    # On a CPU the peak is timed in every run, and differs a little; the highest counts.
    peak = max(run["peak_tflops"] for found in runs.values() for run in found)
    for entry in table:
        entry["mfu"], entry["hardware_mfu"] = (round(entry[f"{k}_tflops"] / peak, 4) for k in ("useful", "executed"))
        entry["ratio"] = round(entry["useful_tokens_per_s"] / base, 2) if base else None
    return table


def format_table(result: dict) -> str:
    """Formats a result as a Markdown table."""
    heads = ["row", "useful tokens/s", "ratio", "work", "MFU", "hardware MFU", "memory", "s/step", "3 epochs of 52K"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in result["rows"]:
        cells = [row["row"], f"{row['useful_tokens_per_s']:,.0f}", f"{row['ratio'] or float('nan'):.2f}"]
        cells += [
            f"{row['work_per_useful_token']:.2f}" if row["work_per_useful_token"] else "–",  # TRL's is not counted
            f"{row['mfu']:.1%}",
            f"{row['hardware_mfu']:.1%}" if row["hardware_mfu"] else "–",
            f"{row['peak_memory_gib']:.2f} GiB",
        ]
        cells += [f"{row['seconds_per_step']:.2f}", f"{row['hours_for_3_epochs']:.2f} h"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _world_of_one() -> dict[str, str]:
    """Returns what torchrun would set for one process: FSDP2 then holds float32 weights and computes in bfloat16."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run_row(job: dict) -> dict:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        jdump({**job, "folder": folder}, os.path.join(folder, "job.json"))
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_throughput", "run_row", f"--folder={folder}"],
            env={**os.environ, **(_world_of_one() if torch.cuda.is_available() else {})},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise UserError(f"{job['row']} failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
        return jload(os.path.join(folder, "result.json"))


# ---------------------------------------------------------------------------------------------------------------------
# One row, in its own process


def run_row(folder: str) -> None:
    """Trains one row; `measure` runs this command in a process of its own.

    Args:
        folder: Folder that holds job.json; result.json is written there.
    """
    job = jload(os.path.join(folder, "job.json"))
    settings, count = _settings(job), STEP * (job["steps"] + 1)
    examples = _real(job, settings, count) if job["data_path"] else drawn_examples(count, settings["vocab_size"])
    make = _trl_trainer if job["row"].startswith("TRL") else _trainer
    trainer = make(job, settings, examples)
    counter = Counter(trainer.model)
    trainer.add_callback(counter)
    trainer.train()
    jdump(counter.result(examples, job), os.path.join(folder, "result.json"))


def _random_model(settings: dict, device: str | None = None):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)


def _settings(job: dict) -> dict:
    if job["model"] == "llama-7b":
        settings = dict(LLAMA_7B)
    else:
        path = os.path.join(ROOT, "configs", "tiny_llama.json") if job["model"] == "tiny" else job["model"]
        settings = jload(path)
    return {**settings, "num_hidden_layers": job["layers"] or settings["num_hidden_layers"]}


def drawn_examples(count: int, vocab_size: int) -> list[dict]:
    """Draws random tokens with the lengths that Alpaca's examples have in LLaMA's tokens.

    Two fifths have an input. The lengths between prefix and answer are log-normal, fitted to 999 records. Answers are
    log-normal too, with the spread at which padding in fours makes 1.54 tokens of one, as it does in the original's
    data (127 tokens on average).

    Returns:
        `input_ids` and `labels` of each example, int64 tensors of equal length, at most 512.
    """
    import numpy
    import torch

    draw = numpy.random.default_rng(0)
    prefixes = [draw.integers(3, vocab_size, length) for length in (29, 39)]
    examples = []
    for _ in range(count):
        kind = int(draw.random() < 0.4)
        body = round(draw.lognormal((2.96, 3.70)[kind], (0.24, 0.345)[kind]))
        answer = max(2, round(draw.lognormal(3.83, 0.85)))
        rest = draw.integers(3, vocab_size, body + answer)
        ids = torch.from_numpy(numpy.concatenate([prefixes[kind], rest]))[:512]
        labels = torch.where(torch.arange(len(ids)) < len(prefixes[kind]) + body, -100, ids)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def _real(job: dict, settings: dict, needed: int) -> list[dict]:
    from alpaca import tokenizers
    from alpaca.records import load_examples
    from demo import tiny_model
    from train import SupervisedDataset

    records = load_examples(job["data_path"])
    records = (records * -(-needed // len(records)))[:needed]
    where = os.path.join(job["folder"], "tokenizer")
    os.makedirs(where)
    texts = [text for record in records for text in (record["instruction"], record["output"])]
    tiny_model._train_sentencepiece(texts, settings["vocab_size"], where)
    tokenizer, _ = tokenizers.load_tokenizer(where, 512)
    dataset = SupervisedDataset(job["data_path"], tokenizer, dict(enumerate(records)))
    return [{"input_ids": dataset[i]["input_ids"], "labels": dataset[i]["labels"]} for i in range(len(dataset))]


def _common(job: dict, batch: int) -> dict:
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": job["folder"],
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": STEP // batch,
        "max_steps": job["steps"] + 1,
        "learning_rate": 2e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": gpu,
        "fsdp": "full_shard auto_wrap" if gpu else None,
        "use_cpu": not gpu,
    }


def _trainer(job: dict, settings: dict, examples: list[dict]):
    import torch

    from alpaca.training.plan import make_plan, write
    from train import DataArguments, DataCollatorForSupervisedDataset, ModelArguments, TrainingArguments, make_trainer

    flags = {"max_tokens_per_pass": job["max_tokens"], **ROWS[job["row"]]}
    args = TrainingArguments(**_common(job, 4), **flags)
    skeleton = _random_model(settings, "meta")  # like train.py, estimate memory before the weights exist
    plan = make_plan(ModelArguments(), DataArguments(job["data_path"] or "drawn"), args, skeleton)
    write(args, plan.settings)
    collator = DataCollatorForSupervisedDataset(_Padding())
    numbered = [{**example, "record": torch.tensor(i)} for i, example in enumerate(examples)]
    model = _random_model(settings)
    trainer = make_trainer(plan, model=model, args=args, train_dataset=numbered, data_collator=collator)
    job["notes"] = [trainer.describe()] if plan.padding_free else []
    job["notes"] += plan.notes
    return trainer


@dataclasses.dataclass
class _Padding:
    pad_token_id: int = 0


def _trl_trainer(job: dict, settings: dict, examples: list[dict]):
    """Makes TRL's trainer, padding-free (a micro-batch end to end) or packing (sequences filled up to 512 tokens).

    Gradient checkpointing, TRL's default, is off, because no other row uses it.
    """
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    columns = {name: [example[name].tolist() for example in examples] for name in ("input_ids", "labels")}
    packs = job["row"] == "TRL packing"
    common = _common(job, 4)
    if packs:  # four examples of 127 tokens fill one sequence
        common["gradient_accumulation_steps"] //= 4
    common |= {"packing": packs, "padding_free": not packs, "max_length": 512 if packs else None}
    args = SFTConfig(**common, gradient_checkpointing=False)
    model = _random_model(settings)
    return SFTTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
    )


class Counter:
    """A Trainer callback that times all steps after the first and counts the tokens and logits computed in them."""

    def __init__(self, model):
        """Hooks the first decoder layer and lm_head; call it before a trainer prepares the model."""
        import torch

        self.cuda = torch.cuda.is_available()
        self.seconds, self.tokens, self.logits, self.steps = 0.0, 0, 0, 0
        head = model.get_output_embeddings()
        lookup = model.get_input_embeddings().weight.numel()
        self.head = head.weight.numel()
        self.body = model.num_parameters() - self.head - lookup
        self.counting = False
        layer = next(m for m in model.modules() if type(m).__name__ in set(model._no_split_modules))
        layer.register_forward_pre_hook(self._count("tokens"), with_kwargs=True)
        head.register_forward_pre_hook(self._count("logits"), with_kwargs=True)
        self.device = next(model.parameters()).device

    def _count(self, name: str):
        def hook(_module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            if self.counting:
                setattr(self, name, getattr(self, name) + states.shape[:-1].numel())

        return hook

    def __getattr__(self, name: str):
        """Ignores all other events of the Trainer."""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.counting = state.global_step > 0
        self._synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stops the clock."""
        self._synchronize()
        if self.counting:
            self.seconds += time.perf_counter() - self.start
            self.steps += 1
        self.counting = False

    def _synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def result(self, examples: list[dict], job: dict) -> dict:
        """Sums up a run.

        MFU counts 6 FLOPs per parameter and useful token; hardware MFU counts what was executed. Both leave attention
        out. `work_per_useful_token` is executed over useful: 1.54 for padding alone. It is 0 if lm_head was never
        called: TRL computes the loss its own way, and its logits are not seen here.
        """
        from alpaca.training import throughput

        useful = sum(len(example["input_ids"]) for example in examples) / (job["steps"] + 1) * self.steps
        if job["row"] == "TRL packing":
            useful = self.tokens
        peak, source = throughput.peak_flops(self.device)
        ideal = 6 * (self.body + self.head) * useful
        executed = 6 * (self.body * self.tokens + self.head * self.logits) if self.logits else 0
        # A step of packed sequences does not hold 128 examples: report the time for the tokens of 128 examples.
        step_seconds = self.seconds / useful * STEP * sum(len(e["input_ids"]) for e in examples) / len(examples)
        return {
            "useful_tokens_per_s": round(useful / self.seconds, 1),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
            "useful_tflops": round(ideal / self.seconds / 1e12, 4),
            "executed_tflops": round(executed / self.seconds / 1e12, 4),
            "work_per_useful_token": round(executed / ideal, 3),
            "peak_tflops": round(peak / 1e12, 4),
            "peak_source": source,
            "peak_memory_gib": round(throughput.peak_memory(self.device) / 2**30, 3),
            "seconds_per_step": round(step_seconds, 4),
            "hours_for_3_epochs": round(step_seconds * FULL_RUN / 3600, 3),
            "parameters": self.body + 2 * self.head,
            "notes": [line for line in job.get("notes", []) if line],
        }


if __name__ == "__main__":
    run_cli({"measure": measure, "run_row": run_row})
