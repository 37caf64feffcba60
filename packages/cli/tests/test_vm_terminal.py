"""`-serial stdio` on a terminal, the whole program in test mode: raw while there is a machine, and as before however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT = 60.0  # seconds, for what takes one


class Machine:
    """A process whose standard streams are a terminal, this side of it, and its test socket."""

    def __init__(self, folder: Path, *options: str, test: str = "test") -> None:
        self.monitor = folder / "qmp"
        self.master, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "test"))
        self.listener.listen()
        self.listener.settimeout(LIMIT)
        command = [sys.executable, "-m", "pystratovirt", "-m", "128", "-mod-test", str(folder / test), "-serial", "stdio"]
        command += ["-qmp", f"unix:{self.monitor},server,nowait", *options]
        # A session of its own, whose terminal this is: as the shell of a person would start it.
        self.process = subprocess.Popen(
            command, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE, start_new_session=True
        )
        self.test: socket.socket | None = None

    @property
    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def runs(self) -> None:
        """Wait for the machine, which has the terminal then."""
        self.test, _ = self.listener.accept()
        self.test.settimeout(LIMIT)
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
            client.settimeout(LIMIT)
            client.connect(str(self.monitor))
            assert lines.readline()
        assert self.raw

    def ask(self, request: str) -> None:
        assert self.test is not None
        self.test.sendall(request.encode())

    def execute(self, command: str) -> None:
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as lines:
            client.settimeout(LIMIT)
            client.connect(str(self.monitor))
            lines.readline()
            client.sendall(json.dumps({"execute": command}).encode())
            lines.readline()

    def close_test_socket(self) -> None:
        assert self.test is not None
        self.test.close()

    def ends(self) -> int:
        """Wait for its end; return the status."""
        return self.process.wait(LIMIT)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for fd in (self.master, self.slave):
            os.close(fd)
        if self.test is not None:
            self.test.close()
        self.listener.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(*options: str, **more: Any) -> Machine:
        made.append(Machine(tmp_path, *options, **more))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM]
END = {
    "quit": (lambda machine: machine.execute("quit"), 0),
    "the guest's power-off": (lambda machine: machine.ask("writeb 0xf0000010 0x34\n"), 0),
    "the end of the test": (Machine.close_test_socket, 1),
    **{
        number.name: (
            lambda machine, number=number: machine.process.send_signal(number),
            0 if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) else -number,
        )
        for number in (*SIGNALS, signal.SIGABRT)
    },
}


@pytest.mark.parametrize("how", END)
def test_a_terminal_is_as_before_when_the_machine_has_ended(make: Callable[..., Machine], how: str) -> None:
    machine = make()
    machine.runs()
    end, status = END[how]
    end(machine)  # type: ignore[no-untyped-call]
    assert machine.ends() == status
    assert termios.tcgetattr(machine.slave) == machine.before


def test_a_machine_that_is_paused_gives_the_terminal_back_too(make: Callable[..., Machine]) -> None:
    machine = make("-S")
    machine.runs()
    machine.execute("quit")
    assert machine.ends() == 0
    assert termios.tcgetattr(machine.slave) == machine.before


def test_a_start_that_fails_behind_the_serial_port_gives_the_terminal_back(make: Callable[..., Machine]) -> None:
    machine = make(test="nobody")  # found out when everything else is there
    assert machine.ends() == 1
    assert termios.tcgetattr(machine.slave) == machine.before


def test_a_start_that_is_interrupted_while_it_waits_gives_the_terminal_back(make: Callable[..., Machine], tmp_path: Path) -> None:
    machine = make("-chardev", f"socket,id=m,path={tmp_path}/m,server", "-mon", "chardev=m,mode=control")
    machine.test, _ = machine.listener.accept()  # the last thing before it waits
    deadline = time.monotonic() + LIMIT
    while not machine.raw:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    machine.process.send_signal(signal.SIGTERM)
    assert machine.ends() == 1
    assert termios.tcgetattr(machine.slave) == machine.before
