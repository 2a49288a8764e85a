"""Writes checkpoints that are complete or absent, and a final model that is reloaded and checked.

A run replaces and deletes only what a run wrote: folders `checkpoint-<digits>` with a trainer state, its own staging
folder, and a model that lies beside a trainer state.
"""

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

from alpaca.cli import UserError
from alpaca.files import lock, nearest_existing, size_text
from alpaca.ranks import is_main

# A checkpoint is written here, and renamed once every rank has finished writing. The name is the proof that what an
# interrupted save left behind is ours to delete.
STAGING = ".alpaca_saving"

STATE = "trainer_state.json"  # lies in every checkpoint, and beside every finished model

_WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PUBLISHED = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer.model")
_PUBLISHED += ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "training_args.bin")


# ---------------------------------------------------------------------------------------------------------------------
# What belongs to whom


def own_checkpoints(output_dir: str) -> dict[int, str]:
    """Finds the checkpoints that runs wrote into a folder, step -> path, in the order of steps.

    `checkpoint-20` with a trainer state is one. `checkpoint-best`, a file `checkpoint-notes.txt` and a link to another
    folder are not.
    """
    found = {}
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else ():
        path = os.path.join(output_dir, name)
        has_state = os.path.isfile(os.path.join(path, STATE)) and not os.path.islink(path)
        if re.fullmatch(r"checkpoint-\d+", name) and has_state:
            found[int(name.removeprefix("checkpoint-"))] = path
    return dict(sorted(found.items()))


def last_checkpoint(output_dir: str) -> str | None:
    """Finds the last checkpoint of a run: `checkpoint-<step>` with the highest step."""
    return next(reversed(own_checkpoints(output_dir).values()), None)


def check_output(output_dir: str, resume: str | None, overwrite: bool, model: str, data: Sequence[str | None]) -> None:
    """Refuses a folder in which a run would replace or delete what no run wrote, or what it reads.

    Args:
        output_dir: The run's folder.
        resume: The checkpoint to continue from, if there is one. It wins over `overwrite`.
        overwrite: Whether an earlier run in `output_dir` may be replaced.
        model: The model's folder or Hub id.
        data: The files to read.

    Raises:
        UserError: Names what is in the way.
    """
    names = sorted(os.listdir(output_dir)) if os.path.isdir(output_dir) else []
    own = list(own_checkpoints(output_dir).values())
    if _lies_in(output_dir, model) and _lies_in(model, output_dir):
        raise UserError(f"--output_dir {output_dir} is the model's own folder; name another one")
    for name in names:
        path = os.path.join(output_dir, name)
        if re.fullmatch(r"checkpoint-\d+", name) and path not in own:
            raise UserError(f"{path} is no run's checkpoint, it lacks {STATE}; move it, or name another --output_dir")
    continues = resume is not None and _lies_in(resume, output_dir)
    published = [name for name in names if _WEIGHTS.fullmatch(name) or name in _PUBLISHED]
    others = [name for name in names if name.endswith((".safetensors", ".bin")) and name != "training_args.bin"]
    model_files = published if continues else sorted({*published, *others})
    if model_files and STATE not in names:
        raise UserError(
            f"{output_dir} already holds {model_files[0]} of a model that no run of train.py wrote there, and it is "
            "left alone; name another --output_dir"
        )
    if continues:
        return
    if (own or model_files) and not overwrite:
        raise UserError(
            f"{output_dir} already holds {os.path.basename(own[-1]) if own else model_files[0]}; continue that run "
            "with --resume_from_checkpoint True, replace it with --overwrite_output_dir, or name another --output_dir"
        )
    for folder in own:
        for path in (model, *data):
            if path and _lies_in(path, folder):
                raise UserError(
                    f"--overwrite_output_dir would delete {folder}, which this run reads; name another --output_dir"
                )


def _lies_in(path: str, folder: str) -> bool:
    """Tells whether a path is a folder or lies below it, whatever links lead there."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.exists(path) and os.path.commonpath([path, folder]) == folder


@contextlib.contextmanager
def claimed(output_dir: str, clear: bool = False) -> Iterator[None]:
    """Locks a folder against other runs for the duration of the block, and clears it.

    It removes what an interrupted save left behind and, with `clear`, an earlier run's checkpoints.

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
        for path in own_checkpoints(output_dir).values() if clear else ():
            shutil.rmtree(path)
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Disk space


def check_disk(args, trainable: int, steps: int, done: int = 0) -> str:
    """Checks that all files of a run fit on the disk, and that they can be written.

    LLaMA 7B with `--save_total_limit 1` takes 25 GiB for the float32 model and 2 x 75 GiB for checkpoints, or
    2 x 100 GiB if sharded: the new one is written before the old one is deleted. What the run will clear counts as
    free, and checkpoints that are there already take no more room.

    Args:
        args: The Trainer's arguments.
        trainable: Parameters that are trained, and so saved.
        steps: Steps of the run.
        done: Steps of the checkpoint to continue from; 0 starts the run.

    Returns:
        A line with the space needed and the space free.

    Raises:
        UserError: It doesn't fit, or the folder can't be written to.
    """
    output_dir = args.output_dir
    weights = 4 * trainable
    moments = 0 if args.save_only_model else 8 * trainable + (4 * trainable if args.fsdp or args.deepspeed else 0)
    own = own_checkpoints(output_dir)
    cleared = [os.path.join(output_dir, STAGING), *(own.values() if args.overwrite_output_dir and not done else ())]
    checkpoints = new_checkpoints_at_once(args, steps, done, 0 if len(cleared) > 1 else len(own))
    free = shutil.disk_usage(nearest_existing(output_dir)).free + sum(map(_folder_size, cleared))
    need = weights + checkpoints * (weights + moments)
    parts = f"the final model {size_text(weights)}, {checkpoints} checkpoint(s) of {size_text(weights + moments)}"
    if need > free:
        raise UserError(
            f"the disk of {output_dir} has {size_text(free)} free and this run needs {size_text(need)} ({parts}); "
            "free space, lower --save_total_limit, or pass --save_strategy no or --save_only_model True"
        )
    try:
        tempfile.TemporaryFile(dir=nearest_existing(output_dir)).close()  # a refused run leaves no folder behind
    except OSError as error:
        raise UserError(f"cannot write into {output_dir}: {error.strerror}; name another --output_dir") from error
    return f"disk: {size_text(need)} needed at most ({parts}), {size_text(free)} free"


def _folder_size(folder: str) -> int:
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)


def new_checkpoints_at_once(args, steps: int, done: int = 0, there: int = 0) -> int:
    """Counts the checkpoints that a run adds to those on the disk, the one being written included.

    With a limit of 2 and 2 checkpoints there, the run adds one and then deletes one, so the answer is 1.

    Args:
        args: The Trainer's arguments.
        steps: Steps of the run.
        done: Steps of the checkpoint to continue from.
        there: Checkpoints on the disk that stay until they are rotated.
    """
    if args.save_strategy == "no" or done >= steps:
        return 0
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(steps * args.save_steps))
    if args.save_strategy == "epoch":
        every = steps / args.num_train_epochs
    made = math.ceil(steps / every) - math.floor(done / every)
    limit = args.save_total_limit
    return min(made, max(1, limit + 1 - there)) if limit and limit > 0 else made  # the Trainer keeps all at 0 and below


# ---------------------------------------------------------------------------------------------------------------------
# During training


@contextlib.contextmanager
def disk_watched(output_dir: str, advice: Callable[[str], str] | None = None) -> Iterator[None]:
    """Reports a save that failed because of the disk in one line; other errors pass.

    Args:
        output_dir: The folder that is written.
        advice: Says what to do next; names the last good checkpoint if not given.

    Raises:
        UserError: The disk is full, read-only or broken.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        of_disk = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
        # torch.save reports a full disk as a broken zip file
        if not (of_disk or isinstance(error, SafetensorError) or "inline_container" in str(error)):
            raise
        free = size_text(shutil.disk_usage(nearest_existing(output_dir)).free)  # other machines may lack the folder
        reason = " ".join(str(error).split())
        advice = (advice or last_good)(output_dir)
        raise UserError(f"cannot save into {output_dir}, {free} free ({reason}). {advice}") from error


def last_good(output_dir: str) -> str:
    """Names the checkpoint that an aborted run can be continued from."""
    last = last_checkpoint(output_dir)
    return f"The last good checkpoint is {last}" if last else "No checkpoint had been saved yet"


@contextlib.contextmanager
def staged(target: str, writers: tuple[bool, bool], barrier: Callable[[], None]) -> Iterator[str]:
    """Lets all ranks write a folder, which then appears complete under the name `target`.

    For OUT/checkpoint-400 the ranks write OUT/.alpaca_saving/checkpoint-400. When all have finished, its files are
    fsynced and it is renamed.

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
            for folder, _, names in os.walk(os.path.join(staging, name)):
                for path in (*(os.path.join(folder, file) for file in names), folder):
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


def rotate(output_dir: str, limit: int | None, newest: str, best: str | None) -> None:
    """Deletes a run's oldest checkpoints until `limit` are left; never the newest, never the best.

    Args:
        output_dir: The run's folder.
        limit: `--save_total_limit`; None, 0 and below keep all.
        newest: The checkpoint that has just been written.
        best: The best one so far, if an evaluation has found it.
    """
    if not limit or limit <= 0:
        return
    own = list(own_checkpoints(output_dir).values())
    kept = {os.path.realpath(path) for path in (newest, best) if path}
    old = sorted((path for path in own if os.path.realpath(path) not in kept), key=os.path.getmtime)
    for path in old[: max(0, len(own) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# After training


def publish(staging: str, output_dir: str) -> None:
    """Moves a verified model from its staging folder into the run's folder, the weights' index and the config last.

    An earlier model's weights are deleted by the names that the Trainer gives them; other files stay. So does a
    README.md that is there.
    """
    late = ("model.safetensors.index.json", "adapter_config.json", "config.json")
    names = sorted(os.listdir(staging), key=lambda name: (name in late, name))
    for stale in os.listdir(output_dir):
        if _WEIGHTS.fullmatch(stale) and stale not in names:
            os.unlink(os.path.join(output_dir, stale))
    for name in names:
        if name == "README.md":  # peft's, without a word about this run
            continue
        if name.endswith(".safetensors"):  # created readable by their owner only; other files follow the umask
            shutil.copymode(os.path.join(staging, names[-1]), os.path.join(staging, name))
        os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
    shutil.rmtree(staging)
