"""Where a figure comes from: the stamp that every file in benchmarks/results carries."""

import importlib.metadata
import os
import platform
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "benchmarks", "results")


def provenance(*packages: str, gpu: str | None = None) -> dict:
    """Says what a figure was measured on.

    Args:
        packages: Distributions whose versions matter; those that are not installed are left out.
        gpu: Name of the GPU that was measured, if one was. Otherwise the device is the CPU.

    Returns:
        `device`, for instance "AMD EPYC, 2 cores"; `versions` of Python and the packages; `commit`, with a trailing
        "+" if tracked files have uncommitted changes, or None outside a git checkout.
    """
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"device": gpu or f"{_cpu()}, {os.cpu_count()} cores", "versions": versions, "commit": _commit()}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "") if head else None


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return ""
