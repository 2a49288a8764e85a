"""The flags of train.py: parsed by HfArgumentParser, checked beside their definition."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import transformers
from transformers.integrations import integration_utils

from alpaca.cli import UserError
from alpaca.files import nearest_existing
from alpaca.training import lora
from alpaca.training.plan import flag_settings, write

Switch = Literal["auto", "true", "false", "True", "False"]


@dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = field(default="facebook/opt-125m", metadata={"help": "The model: a folder or a Hub id."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains all weights."})
    lora_alpha: float = field(
        default=16.0, metadata={"help": "LoRA's alpha: the adapter's output is scaled by alpha / rank."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: str | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter, separated by commas; all linear layers if not given."},
    )

    def __post_init__(self):
        """Refuses values that don't fit."""
        name = self.model_name_or_path
        if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
            raise UserError(f"--model_name_or_path {name}: no such folder; expected a model's folder or a Hub id")
        if self.lora_r < 0:
            raise UserError(f"--lora_r must be 0 (train all weights) or more, found {self.lora_r}")
        _require_above_0(self, "lora_alpha")
        _require_share(self, "lora_dropout")
        if self.lora_target_modules and not self.lora_r:
            raise UserError("--lora_target_modules needs --lora_r, the adapter's rank; without it all weights train")

    def adapt(self, model):
        """Adds the LoRA adapter that these flags describe to a model."""
        return lora.add_adapter(model, self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


@dataclass
class DataArguments:
    """What to train on."""

    data_path: str = field(
        default=None, metadata={"help": "Instruction data to train on: JSON, JSON Lines or a Hub data set id."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Instruction data to evaluate on."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of --data_path to set aside for evaluation, from 0 to below 1."}
    )
    prompt_boundary: Literal["joint", "separate"] = field(
        default="joint",
        metadata={
            "help": "How prompt and answer become tokens. joint: as one text, as the original does; a token that spans "
            "both is not learned. separate: each by itself, so that all of the answer is learned."
        },
    )

    def __post_init__(self):
        """Refuses values that don't fit."""
        if not self.data_path:
            raise UserError("--data_path is missing: a JSON or JSON Lines file, or a Hub data set id")
        _require_share(self, "eval_fraction")
        if self.eval_data_path and self.eval_fraction:
            raise UserError("--eval_data_path and --eval_fraction both name data to evaluate on; give one")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How to train: the Trainer's arguments, the original's own, and the legacy flags of 2023."""

    cache_dir: str | None = field(default=None, metadata={"help": "Folder for the model's downloads."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer."})
    model_max_length: int = field(
        default=512,
        metadata={"help": "Longest sequence in tokens; examples are right-padded, and longer ones are cut."},
    )
    loss_reduction: Literal["micro_batch", "global"] = field(
        default="micro_batch",
        metadata={
            "help": "How a step's loss is averaged. micro_batch: over each micro-batch's tokens, then over the "
            "micro-batches, as the original does. global: over all tokens of the step, across accumulation and ranks."
        },
    )
    padding_free: Switch = field(
        default="auto",
        metadata={"help": "Train without padding. auto: if losses stay those of padded batches."},
    )
    shared_prefix: Switch = field(
        default="auto", metadata={"help": "Compute the template's opening words once per padding-free pass."}
    )
    max_tokens_per_pass: int = field(
        default=0, metadata={"help": "Tokens of a padding-free pass at most; 0 takes what the device's memory allows."}
    )
    compile_layers: Switch = field(
        default="auto",
        metadata={"help": "Compile the layers with torch.compile. auto: if training is padding-free and on a GPU."},
    )
    pure_bf16: bool = field(
        default=False, metadata={"help": "Keep weights and Adam's states in bfloat16, where small updates vanish."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run that --output_dir already holds."}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Legacy name of --eval_strategy."})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Warmup as a share of all steps; --warmup_steps now takes shares too."}
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "Layer class that FSDP wraps; the model's own if not given."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays off: batches carry record numbers."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Stays off: a NaN loss stops the run."})

    def __post_init__(self):
        """Refuses values that don't fit, then decides types and sharding before the Trainer's own checks."""
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        _require_above_0(self, *batches, "num_train_epochs", "save_steps")
        _require_not_negative(
            self, "learning_rate", "weight_decay", "seed", "max_tokens_per_pass", "neftune_noise_alpha"
        )
        _require_share(self, "warmup_ratio")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps must be above 0, found {self.max_steps}; -1 trains --num_train_epochs")
        if self.seed >= 2**32:
            raise UserError(f"--seed must be below {2**32}, found {self.seed}")
        if self.model_max_length < 2:
            raise UserError(f"--model_max_length must be at least 2, found {self.model_max_length}")
        if self.remove_unused_columns:
            raise UserError(
                "--remove_unused_columns True would drop the records' numbers, which errors are reported by"
            )
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):  # NEFTune scales its noise by padded lengths
            if getattr(self, name) and str(self.padding_free).lower() != "false":
                raise UserError(f"--{name} needs --padding_free false")
        folder = nearest_existing(self.output_dir or ".")
        if not os.path.isdir(folder):
            raise UserError(f"--output_dir {self.output_dir}: {folder} is a file; name a folder, new or empty")
        write(self, flag_settings(self))
        super().__post_init__()


def _require_above_0(flags: Any, *names: str) -> None:
    for name in names:
        if not 0 < (value := getattr(flags, name)) < math.inf:
            raise UserError(f"--{name} must be above 0, found {value}")


def _require_not_negative(flags: Any, *names: str) -> None:
    for name in names:
        if not 0 <= ((value := getattr(flags, name)) or 0) < math.inf:
            raise UserError(f"--{name} must be at least 0, found {value}")


def _require_share(flags: Any, name: str) -> None:
    if not 0 <= ((value := getattr(flags, name)) or 0) < 1:
        raise UserError(f"--{name} must be at least 0 and below 1, found {value}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it stands."""


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None):
    """Reads the command line.

    Args:
        argv: The arguments; `sys.argv[1:]` if None.
        description: What `--help` prints at the top.

    Returns:
        A ModelArguments, a DataArguments and a TrainingArguments.

    Raises:
        UserError: A flag is unknown, a value doesn't fit its flag, or flags contradict each other.
        SystemExit: After `--help`.
    """
    classes = (ModelArguments, DataArguments, TrainingArguments)
    parser = transformers.HfArgumentParser(
        classes,
        usage="%(prog)s --flag VALUE ...",
        description=description,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.error = _refuse
    argv = [_expand_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    _, unknown = parser.parse_known_args(argv)  # before any class looks at the machine
    if unknown:
        _refuse_unknown(unknown, [one.name for flags in classes for one in dataclasses.fields(flags)])
    with misfits_in_one_line():
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    _check_together(model_args, data_args, args)
    _check_packages(model_args, args)
    return model_args, data_args, args


@contextlib.contextmanager
def misfits_in_one_line() -> Iterator[None]:
    """Turns whatever the Trainer's classes raise for their flags into one line: one net for all flags.

    Raises:
        UserError: Says what transformers, accelerate or torch found wrong.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise UserError(f"the Trainer can't be built from these flags ({reason}); change or drop the flag") from error


def _expand_home(argument: str) -> str:
    """Expands the ~ that a shell leaves alone: `--output_dir=~/tuned`, '~/tuned'."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _refuse(message: str) -> NoReturn:
    """Turns argparse's complaint into a user's mistake."""
    raise UserError(message)


def _refuse_unknown(unknown: Sequence[str], known: Sequence[str]) -> NoReturn:
    flags = [argument for argument in unknown if argument.startswith("--")]
    if not flags:
        raise UserError(f"unexpected argument {unknown[0]!r}; every value follows its flag (--help lists them)")
    name = flags[0][2:].partition("=")[0].replace("-", "_")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise UserError(f"unknown flag --{name}; " + (f"did you mean --{close[0]}?" if close else "see --help"))


def _check_together(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Refuses flags of different classes that contradict each other."""
    if args.pure_bf16 and (model_args.lora_r or args.deepspeed):
        raise UserError("--pure_bf16 is for full fine-tuning without --deepspeed; LoRA and ZeRO-3 train in float32")
    if not args.load_best_model_at_end and args.save_strategy != "best":
        return
    if not (data_args.eval_data_path or data_args.eval_fraction):
        flag = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy best"
        raise UserError(f"--{flag} needs --eval_data_path or --eval_fraction to find the best model")
    if args.metric_for_best_model and args.metric_for_best_model.removeprefix("eval_") != "loss":
        raise UserError(
            f"--metric_for_best_model {args.metric_for_best_model}: an evaluation gives one metric here, eval_loss"
        )
    if not args.metric_for_best_model:
        raise UserError("--save_strategy best needs --metric_for_best_model, for example loss")


def _check_packages(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Refuses flags that need a package which is not installed."""
    try:
        integration_utils.get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise UserError(f"--report_to {error}") from error
    needed = {name: f"--report_to {name}" for name in ("tensorboard", "wandb") if name in args.report_to}
    if model_args.lora_r:
        needed["peft"] = f"--lora_r {model_args.lora_r}"
    if re.search(r"\dbit", args.optim):
        needed["torchao" if "torch" in args.optim else "bitsandbytes"] = f"--optim {args.optim.value}"
    for name, flag in needed.items():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{flag}: {name} is not installed here; pip install {name}")
