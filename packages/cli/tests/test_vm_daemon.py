"""The whole program in the background, in test mode: what whoever starts it sees, and what is left when it has ended."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

LIMIT = 60.0  # seconds, for what takes one


class Background:
    """Starts daemons in a folder, and ends those that are left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pidfile, self.monitor = folder / "pid", folder / "qmp"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "test"))
        self._listener.listen()
        self._listener.settimeout(LIMIT)
        self._tests: list[socket.socket] = []
        self._processes: list[int] = []  # descriptors of them

    def start(self, *options: str, monitor: str = "", test: str = "test") -> subprocess.CompletedProcess[str]:
        """Run the command until the process that was started ends."""
        command = [sys.executable, "-m", "pystratovirt", "-machine", "microvm", "-m", "128", "-daemonize"]
        command += ["-pidfile", str(self.pidfile), "-mod-test", str(self.folder / test)]
        command += ["-qmp", f"unix:{monitor or self.monitor},server,nowait", *options]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT, check=False)

    def started(self, *options: str) -> int:
        """Start a daemon that comes up; return its process id, as its pidfile has it."""
        done = self.start(*options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        self._tests.append(self._listener.accept()[0])
        pid = int(self.pidfile.read_text())
        self._processes.append(os.pidfd_open(pid))
        return pid

    def execute(self, command: str) -> tuple[int, dict[str, Any]]:
        """Ask over QMP, once; return the id of the process that listens, and the answer."""
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
            client.settimeout(LIMIT)
            client.connect(str(self.monitor))  # without trying again
            client.sendall(json.dumps({"execute": command}).encode())
            assert "QMP" in json.loads(lines.readline())
            (pid,) = struct.unpack_from("i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return pid, json.loads(lines.readline())

    def ended(self) -> bool:
        """Wait for the end of the latest."""
        return bool(select.select([self._processes[-1]], [], [], LIMIT)[0])

    def close(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)
        for end in (*self._tests, self._listener):
            end.close()


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Background]:
    background = Background(tmp_path)
    yield background
    background.close()


def test_the_start_ends_with_0_when_qmp_can_be_reached(background: Background) -> None:
    pid = background.started()
    assert background.execute("query-status") == (pid, {"return": {"running": True, "singlestep": False, "status": "running"}})
    assert background.pidfile.read_text() == str(pid)
    assert os.getsid(pid) != os.getsid(0)
    assert {str(Path(f"/proc/{pid}/fd/{fd}").readlink()) for fd in range(3)} == {"/dev/null"}


@pytest.mark.parametrize("how", ["quit", "SIGTERM", "SIGHUP"])
def test_pidfile_and_socket_go_with_the_process(background: Background, how: str) -> None:
    pid = background.started()
    if how == "quit":
        assert background.execute("quit")[1] == {"return": {}}
    else:
        os.kill(pid, signal.Signals[how])
    assert background.ended()
    assert sorted(path.name for path in background.folder.iterdir()) == ["test"]


@pytest.mark.parametrize(
    ("options", "places", "complaint"),
    [
        ((), {"monitor": "/nonexistent/qmp"}, "-qmp unix:/nonexistent/qmp: No such file or directory"),
        ((), {"test": "nobody"}, "-mod-test {}/nobody: No such file or directory"),
        (("-serial", "socket,path=/nonexistent/console,server,nowait"), {}, "-serial: .*/nonexistent/console: .*"),
        (("-serial", "stdio"), {}, "-daemonize stdio: a daemon has no standard input and output"),
    ],
)
def test_a_start_that_fails_is_1_with_one_line_and_leaves_nothing(
    background: Background, options: tuple[str, ...], places: dict[str, str], complaint: str
) -> None:
    done = background.start(*options, **places)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(f"stratovirt: {complaint.format(background.folder)}", line), line
    assert sorted(path.name for path in background.folder.iterdir()) == ["test"]


def test_a_second_start_with_the_pidfile_of_a_running_one_fails_and_disturbs_nobody(background: Background) -> None:
    pid = background.started()
    done = background.start(monitor=str(background.folder / "other"))
    assert done.returncode == 1
    assert done.stderr == f"stratovirt: -pidfile {background.pidfile}: belongs to process {pid}\n"
    assert background.pidfile.read_text() == str(pid)
    assert background.execute("query-status")[0] == pid
    assert not (background.folder / "other").exists()


def test_what_a_killed_one_left_does_not_stop_the_next(background: Background) -> None:
    first = background.started()
    os.kill(first, signal.SIGKILL)
    assert background.ended()
    assert background.pidfile.exists()
    assert background.monitor.exists()
    second = background.started()
    assert second != first
    assert background.execute("query-status")[0] == second


def test_what_goes_wrong_is_in_the_log_too(background: Background) -> None:
    log = background.folder / "log"
    done = background.start("-D", str(log), test="nobody")
    assert done.returncode == 1
    assert ":ERROR: -mod-test" in log.read_text()
