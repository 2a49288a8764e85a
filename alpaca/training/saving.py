"""Checkpoints that are whole or not there, and a final model that is read back before the run says it is done."""

import contextlib
import errno
import glob
import math
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator

from alpaca.cli import UserError
from alpaca.files import jload, lock, nearest_existing, size_text
from alpaca.ranks import announce, is_main

STAGING = ".saving"  # a checkpoint is written here and renamed once all ranks have written all of it


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def find_resume_point(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Finds the checkpoint to continue from, and refuses to write over another run.

    Args:
        output_dir: the run's folder.
        resume: `--resume_from_checkpoint`: None or a false word, a true word (the last checkpoint in `output_dir`),
            or a checkpoint's folder.
        overwrite: whether a run that is there may be replaced.

    Returns:
        The checkpoint's folder, or None to start from the beginning.

    Raises:
        UserError: nothing to continue from, or something that would be written over.
    """
    if resume and resume.lower() not in ("true", "yes", "1", "false", "no", "0"):
        if not os.path.isfile(os.path.join(resume, "trainer_state.json")):
            last = last_checkpoint(output_dir)
            hint = f"the last whole one is {last}" if last else f"{output_dir} holds none"
            raise UserError(f"--resume_from_checkpoint {resume}: no checkpoint of a run there; {hint}")
        check_whole(resume)
        return resume
    last = last_checkpoint(output_dir)
    if resume and resume.lower() in ("true", "yes", "1"):
        if last is None:
            raise UserError(
                f"--resume_from_checkpoint: {output_dir} holds no whole checkpoint; leave the flag away to start afresh"
            )
        check_whole(last)
        return last
    found = last or next(iter(glob.glob(os.path.join(output_dir, "*.safetensors"))), None)
    if found and not overwrite:
        raise UserError(
            f"{output_dir} already holds {os.path.basename(found)}; continue that run with --resume_from_checkpoint "
            "True, replace it with --overwrite_output_dir, or name another --output_dir"
        )
    return None


def check_whole(folder: str) -> None:
    """Checks that a checkpoint's files are all of their length, and that there is an optimizer's state among them.

    Raises:
        UserError: a run cannot go on from there exactly; names the file.
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
            raise UserError(f"{path} is broken or cut off; {hint}")
    if not any("optim" in os.path.basename(path) for path in paths):
        raise UserError(
            f"{folder} holds no optimizer state (--save_only_model saves none) to continue with exactly; {hint}, or "
            f"start anew with --model_name_or_path {folder}"
        )


def check_same_run(folder: str, config, lora_r: int, args, steps: int) -> None:
    """Checks that a checkpoint is of the model that is to be trained, and says when its run was cut otherwise.

    Args:
        folder: the checkpoint.
        config: the model's.
        lora_r: rank of the adapter; 0 where all weights are trained.
        args: train.py's.
        steps: of this run.

    Raises:
        UserError: names what differs.
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
                "continue with the flags that the run was started with"
            )
    state = jload(os.path.join(folder, "trainer_state.json"))
    same_length = args.max_steps <= 0 and math.ceil(args.num_train_epochs) == state["num_train_epochs"]
    if same_length and state["max_steps"] != steps:
        announce(
            f"{folder} is of a run of {state['max_steps']} steps, this one has {steps}: data, batch or number of "
            "processes differ, and some examples will be learned twice or not at all"
        )


def last_checkpoint(output_dir: str) -> str | None:
    """Finds the latest checkpoint of a run: `checkpoint-<step>` with the highest step."""
    steps = {}
    for path in glob.glob(os.path.join(output_dir, "checkpoint-*")):
        number = os.path.basename(path).removeprefix("checkpoint-")
        if number.isdigit() and os.path.isfile(os.path.join(path, "trainer_state.json")):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


@contextlib.contextmanager
def claimed(output_dir: str, overwrite: bool) -> Iterator[None]:
    """Keeps other runs out of a folder while the block lasts, and clears it.

    Removed is what an interrupted save left, and with `overwrite` the checkpoints of an earlier run.

    Raises:
        UserError: another run is at work there.
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


def check_disk(output_dir: str, final_bytes: int, checkpoint_bytes: int, checkpoints: int) -> str:
    """Checks that everything a run will keep fits on the disk, and that it can be written there.

    Args:
        output_dir: where it goes.
        final_bytes: of the final model.
        checkpoint_bytes: of one checkpoint.
        checkpoints: how many there are at once, the one being written included.

    Returns:
        A line that says what is needed and what there is.

    Raises:
        UserError: it doesn't fit, or the folder can't be written to.
    """
    free = shutil.disk_usage(nearest_existing(output_dir)).free
    need = final_bytes + checkpoints * checkpoint_bytes
    parts = f"the final model {size_text(final_bytes)}, {checkpoints} checkpoint(s) of {size_text(checkpoint_bytes)}"
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


# ---------------------------------------------------------------------------------------------------------------------
# During training


@contextlib.contextmanager
def disk_watched(output_dir: str) -> Iterator[None]:
    """Says in one line that a save failed because of the disk, and what is left; other errors pass.

    Raises:
        UserError: the disk is full, read-only or broken.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_disk = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        # torch.save tells a full disk by what its zip file lacks
        if not (of_disk or isinstance(error, SafetensorError) or "inline_container" in str(error)):
            raise
        free = size_text(shutil.disk_usage(output_dir).free)
        reason = " ".join(str(error).split())
        raise UserError(f"cannot save into {output_dir}, {free} free ({reason}). {last_good(output_dir)}") from error


def last_good(output_dir: str) -> str:
    """Says what a run that broke off may be continued from."""
    last = last_checkpoint(output_dir)
    return f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet"


class StopSignal:
    """Remembers, inside a `with` block, that SIGTERM has come, so that what is under way is finished and saved.

    Attributes:
        received: whether it has.
    """

    received = False

    def __enter__(self):
        """Starts listening."""
        self._previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number, frame) -> None:
        self.received = True

    def __exit__(self, *error):
        """Stops listening."""
        signal.signal(signal.SIGTERM, self._previous)


@contextlib.contextmanager
def staged(target: str, writers: tuple[bool, bool], barrier: Callable[[], None]) -> Iterator[str]:
    """Lets all ranks write a folder that then appears under `target` whole.

    Args:
        target: the folder, such as OUT/checkpoint-400; one that is there is replaced.
        writers: whether this rank is the run's first, and whether it is its machine's first (where machines don't
            share a disk, each renames its own part).
        barrier: waits for all ranks.

    Yields:
        A folder beside the target to write into; it has the target's name.
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
    """Moves a verified model from its staging folder into the run's folder, weights' index and config last."""
    late = ("model.safetensors.index.json", "adapter_config.json", "config.json")
    names = sorted(os.listdir(staging), key=lambda name: (name in late, name))
    for stale in glob.glob(os.path.join(output_dir, "*.safetensors*")):
        if os.path.basename(stale) not in names:
            os.unlink(stale)
    for name in names:
        if name.endswith(".safetensors"):  # made for their owner alone, where other files go by the umask
            shutil.copymode(os.path.join(staging, names[-1]), os.path.join(staging, name))
        os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
    shutil.rmtree(staging)


def saves_kept(total_steps: int, strategy: str, save_steps: float, epochs: float, limit: int | None) -> int:
    """Counts the checkpoints that stand on the disk at once, the one being written included."""
    if strategy == "no":
        return 0
    every = save_steps if save_steps >= 1 else max(1, math.ceil(total_steps * save_steps))
    made = math.ceil(epochs) if strategy == "epoch" else math.ceil(total_steps / every)
    return min(made, limit + 1) if limit and limit > 0 else made  # the Trainer keeps all at 0 and below
