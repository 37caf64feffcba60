"""Lab commands that need no lab host: what is left when they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab.vmm import session_processes

LAB = Path(__file__).parents[1] / "lab" / "lab"
LIMIT = 60.0  # seconds, for what takes one


# Says so when whoever started it waits for it: before that, Python may not know its process yet.
APT = """#!/bin/sh
until grep -q '^State:.S' /proc/$PPID/status; do sleep 0.01; done
echo > {}
exec sleep 1000
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", ["setup", "assets"])
def test_a_signal_while_apt_works_ends_it_and_leaves_nothing(
    empty_cache: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """It is sent while apt stands still, which is not apt here."""
    programs, scratch, up = tmp_path / "programs", tmp_path / "scratch", tmp_path / "up"
    scratch.mkdir()
    programs.mkdir()
    os.mkfifo(up)
    for name in ("apt-get", "apt-cache", "sudo"):
        (programs / name).write_text(APT.format(up))
        (programs / name).chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, str(LAB), command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(scratch)},
        start_new_session=True,
    )
    up.read_text()
    process.send_signal(number)
    out, said = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (128 + number, "")
    assert "Traceback" not in said
    assert session_processes(process.pid) == []
    assert list(scratch.iterdir()) == []
    left = [path for path in empty_cache.rglob("*") if path.is_file() and "locks" not in path.parts]
    assert left == []
