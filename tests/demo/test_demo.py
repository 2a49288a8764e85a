"""What `make demo` does before its first step. The steps themselves are tested with their scripts."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from demo import __main__ as demo_main


def refusal(capsys, stage) -> str:
    with pytest.raises(SystemExit) as stop:
        demo_main.check(stage)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_old_python_is_refused_with_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    assert "Python 3.9.18 found, 3.10 or newer needed; name yours: make PYTHON=" in refusal(capsys, "install")


def test_full_disk_is_refused_with_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 2**29, 2**29))
    assert "0.5 GiB free on this disk, 6 GiB needed to install" in refusal(capsys, "install")


def test_occupied_port_is_refused_before_anything_is_removed(root, tmp_path):
    kept = tmp_path / demo_main.OUTPUT / "tuned"
    kept.mkdir(parents=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "demo"]
        done = subprocess.run(
            command, env={**os.environ, "PORT": port}, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: port {port} is in use; leave PORT out or choose another: make demo PORT=8765\n"
    assert kept.is_dir()


def test_ctrl_c_ends_the_demo_without_a_traceback(root, tmp_path):
    shutil.copytree(f"{root}/demo", tmp_path / "demo")
    (tmp_path / "demo" / "replay.py").write_text("import time\ntime.sleep(3)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "demo"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while "demo.replay" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["server starts", "server runs"])
def test_a_demo_that_is_ended_leaves_no_process_behind(root, tmp_path, number, moment):
    shutil.copytree(f"{root}/demo", tmp_path / "demo")
    sleeper = "import os, pathlib, time; pathlib.Path(f'{os.getpid()}.pid').touch(); time.sleep(60)"
    ready = "print('ready', flush=True); " if moment == "server runs" else ""
    (tmp_path / "demo" / "replay.py").write_text(ready + sleeper)
    (tmp_path / "generate_instruction.py").write_text(sleeper)
    processes = 1 if moment == "server starts" else 2
    with subprocess.Popen([sys.executable, "-m", "demo"], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        while len(pids := list(tmp_path.glob("*.pid"))) < processes:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.stem), 0)


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_missing_python_gives_one_line_and_no_environment(root, tmp_path, python):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(f"{root}/{name}", tmp_path)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), f"PYTHON={python}", "demo"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"{python} does not run; name a Python 3.10 or newer: make PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_demos_server_ends_where_a_script_runs_it_in_the_background(root):
    """There SIGINT is ignored, and a server that only obeys it would be waited for for ever."""
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "from demo.__main__ import free_port, replay_server\nwith replay_server(free_port()): print('up')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("up\n")
