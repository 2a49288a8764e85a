"""Where a figure comes from: written beside every result in benchmarks/results."""

import importlib.metadata
import os
import platform
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def provenance(*packages: str) -> dict:
    """The device, the versions of Python and of some packages, and the commit."""
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "device": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": git.stdout.strip() or None,
    }
