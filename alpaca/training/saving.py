"""Writes checkpoints that are complete or absent, and a final model that is reloaded and checked."""

import contextlib
import errno
import glob
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator

from alpaca.cli import UserError
from alpaca.files import jload, lock, nearest_existing, size_text
from alpaca.ranks import announce, is_main

STAGING = ".saving"  # a checkpoint is written here, and renamed once every rank has finished writing


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def find_resume_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Finds the checkpoint to continue from, and refuses to overwrite another run.

    Args:
        output_dir: The run's folder.
        resume: The value of `--resume_from_checkpoint`: None or a false word, a true word (the last checkpoint in
            `output_dir`), or a checkpoint's folder.
        overwrite: Whether an earlier run in `output_dir` may be replaced.

    Returns:
        The checkpoint's folder, or None to start from the beginning.

    Raises:
        UserError: There is nothing to continue from, or an earlier run would be overwritten.
    """
    if resume and resume.lower() not in ("true", "yes", "1", "false", "no", "0"):
        if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
            last = last_checkpoint(output_dir)
            hint = f"the last complete one is {last}" if last else f"{output_dir} holds none"
            raise UserError(f"--resume_from_checkpoint {resume}: no checkpoint of a run there; {hint}")
        check_complete(resume)
        return resume
    last = last_checkpoint(output_dir)
    if resume and resume.lower() in ("true", "yes", "1"):
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint: {output_dir} holds no complete checkpoint; drop the flag to start over"
            )
        check_complete(last)
        return last
    found = last or next(iter(glob.glob(os.path.join(output_dir, "*.safetensors"))), None)
    if found and not overwrite:
        raise UserError(
            f"{output_dir} already holds {os.path.basename(found)}; continue that run with --resume_from_checkpoint "
            "True, replace it with --overwrite_output_dir, or name another --output_dir"
        )
    return None


def check_complete(folder: str) -> None:
    """Checks that no file of a checkpoint is cut off, and that it holds an optimizer state.

    Raises:
        UserError: A run cannot continue exactly from there; names the file.
    """
    from safetensors import SafetensorError, safe_open

    jload(os.path.join(folder, "trainer_state.json"))
    paths = [path for path in glob.glob(os.path.join(folder, "**"), recursive=True) if os.path.isfile(path)]
    hint = "continue from an earlier one: --resume_from_checkpoint FOLDER"
    for path in paths:
        whole = not path.endswith((".pt", ".pth", ".bin")) or zipfile.is_zipfile(path)  # torch.save writes zips
        if path.endswith(".safetensors"):
            try:
                safe_open(path, "pt").__exit__(None, None, None)
            except SafetensorError:
                whole = False
        if not whole:
            raise UserError(f"{path} is damaged or cut off; {hint}")
    if not any("optim" in os.path.basename(path) for path in paths):
        raise UserError(
            f"{folder} holds no optimizer state (--save_only_model saves none), so no run continues exactly from it; "
            f"{hint}, or start a new run with --model_name_or_path {folder}"
        )


def check_same_run(folder: str, config, lora_r: int, args, steps: int) -> None:
    """Checks that a checkpoint belongs to the model to be trained, and warns if its run had other steps.

    Args:
        folder: The checkpoint.
        config: The model's configuration.
        lora_r: Rank of the adapter; 0 if all weights are trained.
        args: The Trainer's arguments.
        steps: Steps of this run.

    Raises:
        UserError: Names what differs.
    """
    found, ours = {"lora_r": 0}, {**config.to_dict(), "lora_r": lora_r}
    if os.path.isfile(path := os.path.join(folder, "adapter_config.json")):
        found["lora_r"] = jload(path)["r"]
    elif os.path.isfile(path := os.path.join(folder, "config.json")):
        found |= jload(path)
    for name in ("lora_r", "model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        if name in found and found[name] != ours.get(name):
            raise UserError(
                f"--resume_from_checkpoint {folder}: its {name} is {found[name]}, this run's {ours.get(name)}; "
                "continue with the flags that started the run"
            )
    state = jload(os.path.join(folder, "trainer_state.json"))
    same_length = args.max_steps <= 0 and math.ceil(args.num_train_epochs) == state["num_train_epochs"]
    if same_length and state["max_steps"] != steps:
        announce(
            f"{folder} comes from a run of {state['max_steps']} steps, this one has {steps}: data, batch or number of "
            "processes differ, and some examples will be seen twice or not at all"
        )


def last_checkpoint(output_dir: str) -> str | None:
    """Finds the last checkpoint of a run: `checkpoint-<step>` with the highest step."""
    steps = {}
    for path in glob.glob(os.path.join(output_dir, "checkpoint-*")):
        number = os.path.basename(path).removeprefix("checkpoint-")
        if number.isdigit() and os.path.isfile(os.path.join(path, "trainer_state.json")):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


@contextlib.contextmanager
def claimed(output_dir: str, overwrite: bool) -> Iterator[None]:
    """Locks a folder against other runs for the duration of the block, and clears it.

    It removes what an interrupted save left behind and, with `overwrite`, an earlier run's checkpoints.

    Raises:
        UserError: Another run is writing there.
    """
    if not is_main():
        yield
        return
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        lock(descriptor, output_dir, "--output_dir")
        shutil.rmtree(os.path.join(output_dir, STAGING), ignore_errors=True)
        for path in glob.glob(os.path.join(output_dir, "checkpoint-*")) if overwrite else ():
            shutil.rmtree(path)
        yield
    finally:
        os.close(descriptor)


def check_disk(args, trainable: int, steps: int) -> str:
    """Checks that all files of a run fit on the disk, and that they can be written.

    LLaMA 7B with `--save_total_limit 1` takes 25 GiB for the float32 model and 2 x 75 GiB for checkpoints, or
    2 x 100 GiB if sharded: the new one is written before the old one is deleted.

    Args:
        args: The Trainer's arguments.
        trainable: Parameters that are trained, and so saved.
        steps: Steps of the run.

    Returns:
        A line with the space needed and the space free.

    Raises:
        UserError: It doesn't fit, or the folder can't be written to.
    """
    output_dir = args.output_dir
    weights = 4 * trainable
    moments = 0 if args.save_only_model else 8 * trainable + (4 * trainable if args.fsdp or args.deepspeed else 0)
    checkpoints = checkpoints_at_once(args, steps)
    free = shutil.disk_usage(nearest_existing(output_dir)).free
    need = weights + checkpoints * (weights + moments)
    parts = f"the final model {size_text(weights)}, {checkpoints} checkpoint(s) of {size_text(weights + moments)}"
    if need > free:
        raise UserError(
            f"the disk of {output_dir} has {size_text(free)} free and this run needs {size_text(need)} ({parts}); "
            "free space, lower --save_total_limit, or pass --save_strategy no or --save_only_model True"
        )
    try:
        os.makedirs(output_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"cannot write into {output_dir}: {error.strerror}; name another --output_dir") from error
    return f"disk: {size_text(need)} needed at most ({parts}), {size_text(free)} free"


def checkpoints_at_once(args, steps: int) -> int:
    """Counts the checkpoints that are on the disk at the same time, the one being written included."""
    if args.save_strategy == "no":
        return 0
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(steps * args.save_steps))
    made = math.ceil(args.num_train_epochs) if args.save_strategy == "epoch" else math.ceil(steps / every)
    limit = args.save_total_limit
    return min(made, limit + 1) if limit and limit > 0 else made  # the Trainer keeps all at 0 and below


# ---------------------------------------------------------------------------------------------------------------------
# During training


@contextlib.contextmanager
def disk_watched(output_dir: str) -> Iterator[None]:
    """Reports a save that failed because of the disk in one line; other errors pass.

    Raises:
        UserError: The disk is full, read-only or broken; names the last good checkpoint.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_disk = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        # torch.save reports a full disk as a broken zip file
        if not (of_disk or isinstance(error, SafetensorError) or "inline_container" in str(error)):
            raise
        free = size_text(shutil.disk_usage(output_dir).free)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot save into {output_dir}, {free} free ({reason}). {last_good(output_dir)}") from error


def last_good(output_dir: str) -> str:
    """Names the checkpoint that an aborted run can be continued from."""
    last = last_checkpoint(output_dir)
    return f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet"


@contextlib.contextmanager
def staged(target: str, writers: tuple[bool, bool], barrier: Callable[[], None]) -> Iterator[str]:
    """Lets all ranks write a folder, which then appears complete under the name `target`.

    For OUT/checkpoint-400 the ranks write OUT/.saving/checkpoint-400. When all have finished, its files are fsynced
    and it is renamed.

    Args:
        target: The folder; an existing one is replaced.
        writers: Whether this rank is the run's first, and whether it is its machine's first. Where machines don't
            share a disk, each renames its own part.
        barrier: Waits for all ranks.

    Yields:
        The folder to write into.
    """
    parent, name = os.path.split(os.path.abspath(target))
    staging = os.path.join(parent, STAGING)
    yield os.path.join(staging, name)
    barrier()
    for writer in writers:
        if writer and os.path.isdir(os.path.join(staging, name)):
            for path in glob.glob(os.path.join(staging, name, "**"), recursive=True):
                _fsync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(os.path.join(staging, name), target)
            os.rmdir(staging)
            _fsync(parent)
        barrier()


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# After training


def publish(staging: str, output_dir: str) -> None:
    """Moves a verified model from its staging folder into the run's folder, the weights' index and the config last."""
    late = ("model.safetensors.index.json", "adapter_config.json", "config.json")
    names = sorted(os.listdir(staging), key=lambda name: (name in late, name))
    for stale in glob.glob(os.path.join(output_dir, "*.safetensors*")):
        if os.path.basename(stale) not in names:
            os.unlink(stale)
    for name in names:
        if name.endswith(".safetensors"):  # created readable by their owner only; other files follow the umask
            shutil.copymode(os.path.join(staging, names[-1]), os.path.join(staging, name))
        os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
    shutil.rmtree(staging)
