"""train.py's command line: flags are known and explained before torch and transformers are imported, and checked.

Importing the Trainer takes seconds. So the dataclasses that define the flags are read as source, not imported.
"""

import ast
import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

from alpaca.cli import UserError
from alpaca.files import nearest_existing


@dataclass
class Flag:
    """A command-line flag, as its dataclass field tells."""

    name: str
    default: str
    help: str


def declared_flags(path: str, classes: tuple[str, ...]) -> dict[str, Flag]:
    """Reads the fields of dataclasses from a source file, without importing it.

    Args:
        path: a Python file.
        classes: the names of the dataclasses.

    Returns:
        Flag name -> flag, in order.
    """
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    flags = {}
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in classes):
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_":
                default, text = _default_and_help(item.value)
                flags[item.target.id] = Flag(item.target.id, default, text)
    return flags


def _default_and_help(value: ast.expr | None) -> tuple[str, str]:
    if not isinstance(value, ast.Call):
        return ("" if value is None else ast.unparse(value)), ""
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    default = ast.unparse(keywords["default"]) if "default" in keywords else ""
    text = ""
    if isinstance(keywords.get("metadata"), ast.Dict):
        pairs = zip(keywords["metadata"].keys, keywords["metadata"].values, strict=True)
        texts = [node for key, node in pairs if isinstance(key, ast.Constant) and key.value == "help"]
        if texts and isinstance(texts[0], ast.Constant):
            text = " ".join(str(texts[0].value).split())
    return default, text


def known_flags(script: str) -> tuple[dict[str, Flag], dict[str, Flag]]:
    """Lists the script's own flags and those it inherits from the Hugging Face Trainer."""
    own = declared_flags(script, ("ModelArguments", "DataArguments", "TrainingArguments"))
    package = importlib.util.find_spec("transformers")
    if package is None:
        raise UserError("transformers is not installed; expected: pip install -r requirements.txt")
    inherited = declared_flags(
        os.path.join(package.submodule_search_locations[0], "training_args.py"), ("TrainingArguments",)
    )
    return own, {name: flag for name, flag in inherited.items() if name not in own}


def check_flags(argv: list[str], script: str) -> None:
    """Refuses a flag that does not exist, naming the nearest that does; answers --help.

    Args:
        argv: the arguments.
        script: path of the script whose dataclasses define the flags.

    Raises:
        UserError: the first unknown flag or stray value.
        SystemExit: after --help.
    """
    own, inherited = known_flags(script)
    if {"-h", "--help"} & set(argv):
        print(_help(script, own, inherited))
        raise SystemExit(0)
    names = {**own, **inherited}
    takes_value = False
    for argument in argv:
        if not argument.startswith("--"):
            if not takes_value:
                raise UserError(f"unexpected argument {argument!r}; every value follows its flag (--help lists them)")
            takes_value = False
            continue
        name = argument[2:].partition("=")[0].replace("-", "_")
        if name not in names and name.removeprefix("no_") not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            raise UserError(f"unknown flag --{name}; " + (f"did you mean --{close[0]}?" if close else "see --help"))
        takes_value = "=" not in argument


def _help(script: str, own: dict[str, Flag], inherited: dict[str, Flag]) -> str:
    import textwrap

    with open(script, encoding="utf-8") as file:
        lines = [ast.get_docstring(ast.parse(file.read())), "", "Flags:"]
    for flag in own.values():
        lines.append(f"  --{flag.name}" + (f" (default {flag.default})" if flag.default not in ("", "None") else ""))
        lines += textwrap.wrap(flag.help, 110, initial_indent="      ", subsequent_indent="      ")
    lines += ["", "From the Hugging Face Trainer (its documentation explains them):"]
    with_defaults = " ".join(f"--{flag.name}={flag.default or 'None'}" for flag in inherited.values())
    lines += textwrap.wrap(with_defaults, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def fail(message: str) -> None:
    """Raises what argparse has to complain of as a user's mistake."""
    raise UserError(message)


def check_values(model_args, data_args, args) -> None:
    """Refuses values that don't fit their flags or contradict each other.

    Args:
        model_args: train.py's ModelArguments, parsed.
        data_args: its DataArguments.
        args: its TrainingArguments.

    Raises:
        UserError: names the flag, what was found and what was expected.
    """
    if not data_args.data_path:
        raise UserError("--data_path is missing: a JSON or JSON Lines file, or a Hub data set id")
    if data_args.eval_data_path and data_args.eval_fraction:
        raise UserError("--eval_data_path and --eval_fraction both name data to evaluate on; give one")
    if not 0 <= data_args.eval_fraction < 1:
        raise UserError(f"--eval_fraction must be at least 0 and below 1, found {data_args.eval_fraction}")
    if args.loss_reduction not in ("micro_batch", "global"):
        raise UserError(f"--loss_reduction must be micro_batch or global, found {args.loss_reduction!r}")
    if args.compile_layers.lower() not in ("auto", "true", "false"):
        raise UserError(f"--compile_layers must be auto, true or false, found {args.compile_layers!r}")
    if args.pure_bf16 and (model_args.lora_r or args.deepspeed):
        raise UserError("--pure_bf16 is for full fine-tuning without --deepspeed; LoRA and ZeRO-3 hold float32 masters")
    positive = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    for name in (*positive, "num_train_epochs", "save_steps", "lora_alpha"):
        if not 0 < (value := getattr(model_args if name == "lora_alpha" else args, name)) < math.inf:
            raise UserError(f"--{name} must be above 0, found {value}")
    for name in ("learning_rate", "weight_decay", "seed", "max_tokens_per_pass"):
        if not 0 <= (value := getattr(args, name)) < math.inf:
            raise UserError(f"--{name} must be at least 0, found {value}")
    if args.seed >= 2**32:
        raise UserError(f"--seed must be below {2**32}, found {args.seed}")
    if not 0 <= (args.warmup_ratio or 0) < 1:
        raise UserError(f"--warmup_ratio must be at least 0 and below 1, found {args.warmup_ratio}")
    if not 0 <= model_args.lora_dropout < 1:
        raise UserError(f"--lora_dropout must be at least 0 and below 1, found {model_args.lora_dropout}")
    if args.remove_unused_columns:
        raise UserError("--remove_unused_columns True would drop the records' numbers, which errors are reported by")
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):  # its noise goes by a padded example's length
        if getattr(args, name) and args.padding_free.lower() != "false":
            raise UserError(f"--{name} needs --padding_free false")
    name = model_args.model_name_or_path
    if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"--model_name_or_path {name}: no such folder; expected a model's folder or a Hub id")
    folder = nearest_existing(args.output_dir)
    if not os.path.isdir(folder):
        raise UserError(f"--output_dir {args.output_dir}: {folder} is a file; name a folder, new or empty")
    if args.model_max_length < 2:
        raise UserError(f"--model_max_length must be at least 2, found {args.model_max_length}")
    if model_args.lora_r < 0:
        raise UserError(f"--lora_r must be 0 (train all weights) or more, found {model_args.lora_r}")
    if model_args.lora_target_modules and not model_args.lora_r:
        raise UserError("--lora_target_modules needs --lora_r, the adapter's rank; without it all weights are trained")
    needs_best = args.load_best_model_at_end or args.save_strategy == "best"
    if needs_best and not (data_args.eval_data_path or data_args.eval_fraction):
        flag = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy best"
        raise UserError(f"--{flag} needs --eval_data_path or --eval_fraction to tell the best by")
    if needs_best and not args.metric_for_best_model:
        raise UserError("--save_strategy best needs --metric_for_best_model, such as loss")
    _check_packages(model_args, args)


def _check_packages(model_args, args) -> None:
    """Refuses what needs a package that is not installed."""
    from transformers.integrations import integration_utils

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
