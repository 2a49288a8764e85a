"""LoRA through peft: a small adapter is trained, the model's weights stay frozen."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from alpaca.cli import UserError
from alpaca.files import jload, size_text


def add_adapter(model, r: int, alpha: float, dropout: float, target_modules: str | None):
    """Freezes a model and adds LoRA adapters to its linear layers.

    Args:
        model: A causal language model.
        r: Rank of the adapters.
        alpha: Their output is scaled by alpha / r.
        dropout: Dropout on their input.
        target_modules: Comma-separated names; every linear layer except the output layer if None.

    Returns:
        The peft model. Only its adapters get gradients.

    Raises:
        UserError: The model has no such modules, or no module that takes an adapter.
    """
    import peft

    targets = [name.strip() for name in target_modules.split(",")] if target_modules else []
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise UserError(f"--lora_target_modules {target_modules}: the model has no {target!r}")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_r {r}: no adapter fits this model ({str(error).splitlines()[0]})") from error
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            # Its input has the type that autocast or FSDP computes in; peft would save a float32 copy as well.
            module.cast_input_dtype_enabled = False
    adapted.enable_input_require_grads()  # gradient checkpointing needs an input with a gradient
    return adapted


def target_names(model) -> list[str]:
    """Lists the layers that have an adapter, such as ["k_proj", "q_proj"]."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")})


def adapter_shapes(model) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Lists the tensors of an adapter's checkpoint: name -> shape, and no aliases."""
    import peft

    return {name: tuple(t.shape) for name, t in peft.get_peft_model_state_dict(model).items()}, {}


def merge(adapter_dir: str, output_dir: str, base_model: str | None = None) -> None:
    """Merges an adapter into its model's weights and saves a model that needs no peft.

    Args:
        adapter_dir: The output folder of a LoRA run.
        output_dir: Folder for the merged model, new or empty.
        base_model: The model that the adapter was trained on; the one that the adapter names if not given.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("merging an adapter needs peft: pip install peft") from error
    import torch

    from alpaca.models import load_model

    base = base_model or _base_of(adapter_dir)
    with _merged_folder(output_dir) as staging:
        try:
            model = load_model(base, torch.float32)
        except UserError as error:
            raise UserError(f"{error}; name the adapter's model with --base_model") from error
        try:
            merged = peft.PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
        except Exception as error:  # of a truncated file, another model, or settings that peft doesn't know
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{adapter_dir} is not an adapter of {base}: {reason:.200}; name its model with --base_model"
            ) from error
        _save_merged(merged, adapter_dir, base, staging, output_dir)
    print(f"{output_dir}: {base} with {adapter_dir} merged into its weights, reloaded and checked")


def _base_of(adapter_dir: str) -> str:
    settings = os.path.join(adapter_dir, "adapter_config.json")
    if not os.path.isfile(settings):
        raise UserError(f"{adapter_dir} holds no adapter_config.json; expected the output folder of a LoRA run")
    found = jload(settings)
    if not isinstance(found, dict) or not isinstance(found.get("base_model_name_or_path"), str):
        raise UserError(f"{settings} names no base_model_name_or_path; name the adapter's model with --base_model")
    return found["base_model_name_or_path"]


@contextlib.contextmanager
def _merged_folder(output_dir: str) -> Iterator[str]:
    """Makes a folder for a merged model; if the block fails, nothing of it stays.

    What a killed merge left behind is cleared.

    Yields:
        The staging folder to write into.

    Raises:
        UserError: The folder holds something else, or can't be made.
    """
    from alpaca.training.saving import STAGING, claimed

    there = os.path.lexists(output_dir)
    if there and not (os.path.isdir(output_dir) and set(os.listdir(output_dir)) <= {STAGING}):
        raise UserError(f"{output_dir} is not empty, or not a folder; name a new one")
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {output_dir}: {error.strerror}; name another --output_dir") from error
    with claimed(output_dir):
        try:
            yield os.path.join(output_dir, STAGING)
        except BaseException:
            shutil.rmtree(os.path.join(output_dir, STAGING), ignore_errors=True)
            if not there:
                with contextlib.suppress(OSError):
                    os.rmdir(output_dir)
            raise


def _save_merged(merged, adapter_dir: str, base: str, staging: str, output_dir: str) -> None:
    from alpaca.models import check_saved, tensor_shapes
    from alpaca.tokenizers import load_tokenizer, save_sentencepiece
    from alpaca.training import card, resuming
    from alpaca.training.saving import STATE, disk_watched, publish

    need = sum(tensor.numel() * tensor.element_size() for tensor in merged.state_dict().values())
    free = shutil.disk_usage(output_dir).free
    if need > free:
        raise UserError(
            f"the disk of {output_dir} has {size_text(free)} free and the merged model needs {size_text(need)}; "
            "free space, or name another --output_dir"
        )
    with disk_watched(output_dir, advice=lambda _: "The adapter is unchanged; free space and merge again"):
        merged.save_pretrained(staging)
        tokenizer, _ = load_tokenizer(adapter_dir)
        tokenizer.save_pretrained(staging)
        for source in (base, adapter_dir):
            save_sentencepiece(tokenizer, staging, source)
        check_saved(staging, *tensor_shapes(merged))
        publish(staging, output_dir)
    record, state = (os.path.join(adapter_dir, name) for name in (resuming.RECORD, STATE))
    if os.path.isfile(record) and os.path.isfile(state):
        card.write_card(output_dir, jload(record), jload(state), merged=True)
