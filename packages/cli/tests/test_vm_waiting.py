"""`-qmp` and `-mon` without `nowait`: nothing of the machine runs before somebody is there to control it."""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from free_port import reserved_port

LIMIT = 60.0  # seconds, for what takes a tenth of one


class Start:
    """A start in test mode that waits for clients."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "test"))
        self._listener.listen()
        self._listener.settimeout(LIMIT)
        command = [sys.executable, "-m", "pystratovirt", "-machine", "microvm", "-m", "128", "-mod-test", str(folder / "test")]
        self.process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._test: socket.socket | None = None

    @property
    def test(self) -> socket.socket:
        """The test socket's other end."""
        if self._test is None:
            self._test, _ = self._listener.accept()
        return self._test

    def said(self) -> str:
        """The next line on standard error."""
        assert self.process.stderr
        assert select.select([self.process.stderr], [], [], LIMIT)[0]
        return self.process.stderr.readline().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._listener.close()
        if self._test is not None:
            self._test.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Start] = []

    def start(*options: str) -> Start:
        started.append(Start(tmp_path, *options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def connect(address: Any) -> socket.socket:
    """Connect, as soon as somebody listens there."""
    deadline = time.monotonic() + LIMIT
    while True:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        sock.settimeout(LIMIT)
        try:
            sock.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            assert time.monotonic() < deadline
            select.select([], [], [], 0.01)
        else:
            return sock


def status(sock: socket.socket) -> Any:
    """Read the greeting, and ask how the machine is."""
    with sock.makefile("rb") as lines:
        assert "QMP" in json.loads(lines.readline())
        sock.sendall(b'{"execute":"query-status"}')
        return json.loads(lines.readline())["return"]


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.mark.parametrize("kind", ["unix", "tcp", "mon"])
def test_the_machine_runs_once_a_client_has_connected(start: Any, tmp_path: Path, port: int, kind: str) -> None:
    address: Any = ("127.0.0.1", port) if kind == "tcp" else str(tmp_path / "q")
    name = f"tcp:127.0.0.1:{port}" if kind == "tcp" else f"unix:{tmp_path}/q"
    options = [
        *(["-chardev", f"socket,id=m,path={tmp_path}/q,server", "-mon", "chardev=m,mode=control"] if kind == "mon" else []),
        *(["-qmp", f"{name},server"] if kind != "mon" else []),
    ]
    waiting = start(*options)
    assert waiting.said() == f"stratovirt: waiting for a client on {name}\n"
    # The machine is built and stands still: requests of the test are read by a loop that does not run yet.
    waiting.test.sendall(b"readl 0xf0100000")
    assert not select.select([waiting.test], [], [], 0)[0]
    with connect(address) as client:
        assert status(client) == {"running": True, "singlestep": False, "status": "running"}
        waiting.test.settimeout(LIMIT)
        assert waiting.test.recv(100).startswith(b"OK")


def test_each_socket_that_is_to_be_waited_for_is(start: Any, tmp_path: Path) -> None:
    chardev = ["-chardev", f"socket,id=m,path={tmp_path}/m,server", "-mon", "chardev=m,mode=control"]
    waiting = start("-qmp", f"unix:{tmp_path}/q,server=on,wait=on", *chardev, "-S")
    assert waiting.said() == f"stratovirt: waiting for a client on unix:{tmp_path}/q\n"
    with connect(str(tmp_path / "q")) as first:
        assert waiting.said() == f"stratovirt: waiting for a client on unix:{tmp_path}/m\n"
        with connect(str(tmp_path / "m")) as second:
            assert status(second)["status"] == status(first)["status"] == "paused"


def test_a_client_that_came_early_is_not_waited_for_again(start: Any, tmp_path: Path) -> None:
    start("-qmp", f"unix:{tmp_path}/q,server", "-chardev", f"socket,id=c,path={tmp_path}/c,server", "-serial", "chardev:c")
    # The sockets are there before the machine is built, which waits for its serial port here.
    with connect(str(tmp_path / "q")) as early, connect(str(tmp_path / "c")):
        assert status(early)["running"] is True


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_start_says_that_it_waits_for_who_is_at_the_serial_port(start: Any, tmp_path: Path, port: int, kind: str) -> None:
    where = f"path={tmp_path}/c" if kind == "unix" else f"host=127.0.0.1,port={port}"
    waiting = start("-serial", f"socket,{where},server")
    name = f"unix:{tmp_path}/c" if kind == "unix" else f"tcp:127.0.0.1:{port}"
    assert waiting.said() == f"stratovirt: waiting for a client on {name}\n"
    with connect(f"{tmp_path}/c" if kind == "unix" else ("127.0.0.1", port)):
        waiting.test.settimeout(LIMIT)
        waiting.test.sendall(b"readl 0xf0100000\n")
        assert waiting.test.recv(100).startswith(b"OK")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait(start: Any, tmp_path: Path, number: signal.Signals) -> None:
    waiting = start("-qmp", f"unix:{tmp_path}/q,server")
    waiting.said()
    waiting.process.send_signal(number)
    assert waiting.said() == f"stratovirt: -qmp unix:{tmp_path}/q: interrupted while waiting for a client\n"
    assert waiting.process.wait(LIMIT) == 1
    assert not (tmp_path / "q").exists()


def test_who_starts_a_daemon_waits_with_it(start: Any, tmp_path: Path) -> None:
    waiting = start("-qmp", f"unix:{tmp_path}/q,server", "-daemonize", "-pidfile", str(tmp_path / "pid"))
    assert waiting.said() == f"stratovirt: waiting for a client on unix:{tmp_path}/q\n"
    assert waiting.process.poll() is None
    with connect(str(tmp_path / "q")) as client:
        assert waiting.process.wait(LIMIT) == 0
        assert status(client)["running"] is True
        client.sendall(b'{"execute":"quit"}')
        while client.recv(4096):
            pass
