"""The program in test mode as a process of its own, with a monitor on a unix and one on a TCP socket, and a client for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from free_port import reserved_port
from qmp_protocol.framing import Framer

LIMIT = 60.0  # seconds, for what takes a tenth of one
WINDOWS = 0xF010_0000  # of virtio-mmio, 0x200 bytes each


class Client:
    """A connection that shows messages in the order in which they come."""

    def __init__(self, address: Any, *, early: bool = False) -> None:
        """Connect and read the greeting. `early`: the program may not listen yet."""
        deadline = time.monotonic() + (LIMIT if early else 0.0)
        while True:
            self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
            self.socket.settimeout(LIMIT)
            try:
                self.socket.connect(address)
            except (FileNotFoundError, ConnectionRefusedError):
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                break
        self._framer = Framer(1 << 24)
        self._messages: list[Any] = []
        self.greeting = self.read()

    def read(self) -> Any:
        """The next message, or None at the end of the stream."""
        while not self._messages:
            data = self.socket.recv(65536)
            if not data:
                return None
            self._messages += self._framer.feed(data)
        return self._messages.pop(0)

    def send(self, text: str, fds: Sequence[int] = ()) -> None:
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        data = text.encode()
        # Who answers and goes at once is gone by now, and even a send of nothing to a closed socket is a broken pipe.
        if rest := data[self.socket.sendmsg([data], passed) :]:
            self.socket.sendall(rest)

    def run(self, command: str, arguments: Any = None) -> Any:
        """Run a command and return its reply; events before it are dropped."""
        self.send(json.dumps({"execute": command} if arguments is None else {"execute": command, "arguments": arguments}) + "\n")
        while "event" in (message := self.read()):
            pass
        return message

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Vm:
    """A microvm in test mode. `unix` and `tcp` are addresses of its monitors."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        machine: str = "microvm",
        memory: str = "128",
        swapped: bool = False,
        level: str = "trace",
        program: Sequence[str] = ("-m", "pystratovirt"),
    ) -> None:
        """`-qmp` is the unix socket and `-mon` the TCP one unless `swapped`; `level` is the log's; `program` what Python runs."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "test"))
        listener.listen()
        listener.settimeout(LIMIT)
        self._held = ExitStack()  # for as long as the process may want it
        self.tcp = ("127.0.0.1", self._held.enter_context(reserved_port()))
        self.unix = str(folder / "qmp")
        host, port = self.tcp
        command = [sys.executable, *program, "-machine", machine, "-m", memory, "-mod-test", str(folder / "test")]
        command += ["-qmp", f"tcp:{host}:{port},server,nowait" if swapped else f"unix:{self.unix},server,nowait"]
        where = f"path={self.unix}" if swapped else f"host={host},port={port}"
        command += ["-chardev", f"socket,{where},id=m,server,nowait", "-mon", "chardev=m,id=mon,mode=control", *options]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "STRATOVIRT_LOG_LEVEL": level}
            )
        try:
            self.test, _ = listener.accept()
        except TimeoutError:
            self.process.kill()
            self.process.wait()
            self._held.close()
            raise AssertionError(self.log.read_text()) from None
        finally:
            listener.close()
        self.test.settimeout(LIMIT)

    def ask(self, request: str) -> str:
        """A request of test mode."""
        self.test.sendall(request.encode())
        reply = b""
        while not reply.endswith(b"\n"):
            reply += self.test.recv(65536)
        return reply.decode().strip()

    def register(self, slot: int, offset: int, value: int | None = None) -> int:
        """Read a register of a slot, or write it."""
        address = WINDOWS + 0x200 * slot + offset
        if value is not None:
            assert self.ask(f"writel {address:#x} {value:#x}") == "OK"
            return value
        return int(self.ask(f"readl {address:#x}").removeprefix("OK "), 16)

    def drive_slot(self, slot: int) -> None:
        """Be a driver of what is in a slot, which has negotiated VERSION_1 only and uses no queue."""
        for offset, value in ((0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x70, 15)):
            self.register(slot, offset, value)
        assert self.register(slot, 0x70) == 15

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.test.close()
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
