"""alpaca/generation/progress.py: plain lines, or a bar on a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

from generation_runs import flags, generate


def test_plain_lines_stand_for_the_bar_where_there_is_no_terminal(folder, server, capsys):
    generate(server)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("0 of 50 tasks kept, 1 requests in flight")
    assert lines[-1].startswith("50 of 50 tasks kept")
    assert "\r" not in "".join(lines)


def test_a_terminal_gets_one_bar_with_yield_tokens_cost_and_time_left(folder, server):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "-m", "generate_instruction", *flags(server, price_input=1, price_output=1)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal) as process:
        process.wait(timeout=30)
    os.close(terminal)
    drawn = os.read(controller, 100_000).decode().rstrip().split("\r")[-1]
    for words in ("50/50", "requests in flight", "tasks kept of each", "tokens", "a task", "tasks/s"):
        assert words in drawn
