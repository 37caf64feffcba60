"""Many commands, many clients, much coming and going: no reply is lost, and memory does not grow.

The server is a process of its own, so that its memory and descriptors can be seen. A short form runs with the other tests.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0  # seconds: only a hang takes longer

SERVER = """
import sys, threading, anyio
from qmp_server import QmpServer, listen_unix
server = QmpServer(rate=0, outbox_limit=1 << 20)
count = 0
@server.handler("query-status", concurrent=True)
def query_status(_, call):
    global count
    count += 1
    if count % 50 == 0:
        call.emit("STOP")
    return {"running": True, "singlestep": False, "status": "running"}
@server.handler("stop")
async def stop(_, call):
    await anyio.sleep(0)
    call.emit_after("STOP")
@server.handler("cont", in_thread=True)
def cont(_, call):
    server.emit("RESUME")
anyio.run(server.serve, [listen_unix(sys.argv[1])], backend=sys.argv[2])
"""


class Server:
    """The process, and what the kernel says of it."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.path = str(folder / "s")
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, self.path, backend])

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)  # blocking: with a timeout, a full backlog is an error
        sock.settimeout(PATIENCE)
        return sock

    def memory(self) -> int:
        """Resident KiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("the server is gone")

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


@contextmanager
def serving(folder: Path, backend: str) -> Iterator[Server]:
    server = Server(folder, backend)
    try:
        for _ in range(12000):
            try:
                server.connect().close()
            except OSError:
                assert server.process.poll() is None
                threading.Event().wait(0.01)
            else:
                break
        yield server
        assert server.process.poll() is None, "the server died"
    finally:
        server.process.kill()
        server.process.wait()


class Talker(threading.Thread):
    """A client that sends commands in bursts, reads every reply, and reconnects at random."""

    def __init__(self, server: Server, seed: int, commands: int) -> None:
        super().__init__()
        self._server = server
        self._random = random.Random(seed)
        self._left = commands
        self.answered = 0
        self.events = 0
        self.wrong: list[Any] = []

    def run(self) -> None:
        try:
            while self._left:
                self._visit()
        except Exception as error:
            self.wrong.append(error)

    def _visit(self) -> None:
        rng = self._random
        with self._server.connect() as sock:
            lines = sock.makefile("rb")
            assert b"QMP" in lines.readline()
            for _ in range(rng.randrange(1, 40)):
                burst = min(rng.randrange(1, 30), self._left)
                if not burst:
                    break
                self._left -= burst
                expected = [f"{self.name}-{self._left}-{each}" for each in range(burst)]
                names = ["query-status"] * 40 + ["stop", "cont", "no-such"]
                data = b"".join(b'{"execute":"%s","id":"%s"}\n' % (rng.choice(names).encode(), id_.encode()) for id_ in expected)
                for at in range(0, len(data), size := rng.randrange(1, 2000)):
                    sock.sendall(data[at : at + size])
                while expected:
                    message = json.loads(lines.readline())
                    if "event" in message:
                        self.events += 1
                    elif message.get("id") != expected.pop(0):
                        self.wrong.append(message)
                    else:
                        self.answered += 1


class Nuisance(threading.Thread):
    """Clients that leave in the middle, send garbage, or never read."""

    def __init__(self, server: Server, seed: int) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._random = random.Random(seed)
        self.enough = threading.Event()
        self.visits = 0

    def run(self) -> None:
        rng = self._random
        while not self.enough.is_set():
            sock = self._server.connect()
            try:
                for _ in range(rng.randrange(4)):
                    sock.sendall(rng.choice([b"junk\n", b'{"exec', b'{"execute":"query-qmp-schema"}' * 20, rng.randbytes(500)]))
                if rng.random() < 0.3:
                    sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass
            sock.close()
            self.visits += 1


def soak(folder: Path, backend: str, clients: int, commands: int) -> None:
    with serving(folder, backend) as server:

        def round_(number: int, each: int) -> None:
            talkers = [Talker(server, 100 * number + seed, each) for seed in range(clients)]
            for talker in talkers:
                talker.start()
            for talker in talkers:
                talker.join()
            assert [talker.wrong for talker in talkers] == [[]] * clients
            assert sum(talker.answered for talker in talkers) == clients * each
            assert all(talker.events for talker in talkers) or each < 100

        nuisance = Nuisance(server, 1)
        nuisance.start()
        round_(0, commands // 5)  # what is allocated once is allocated now
        before = server.memory()
        round_(1, commands)
        nuisance.enough.set()
        nuisance.join()
        assert nuisance.visits
        assert server.memory() - before < 4096


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_no_reply_is_lost_and_memory_stays_flat(tmp_path: Path, backend: str) -> None:
    soak(tmp_path, backend, clients=4, commands=500)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_hundred_thousand_commands_of_eight_clients_are_all_answered(tmp_path: Path, backend: str) -> None:
    soak(tmp_path, backend, clients=8, commands=12_500)


def come_and_go(folder: Path, backend: str, visits: int) -> None:
    with serving(folder, backend) as server:

        def visit(count: int) -> None:
            for number in range(count):
                with server.connect() as sock:
                    if number % 4:
                        sock.recv(1000)
                    if number % 3:
                        sock.sendall(b'{"execute":"query-status"}\n')

        visit(visits // 10)
        memory, descriptors = server.memory(), server.descriptors()
        visit(visits)
        for _ in range(1000):
            if server.descriptors() <= descriptors:
                break
            threading.Event().wait(0.01)
        assert server.descriptors() <= descriptors
        assert server.memory() - memory < 4096


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_clients_that_come_and_go_leave_nothing_behind(tmp_path: Path, backend: str) -> None:
    come_and_go(tmp_path, backend, 1000)


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ten_thousand_clients_leave_nothing_behind(tmp_path: Path, backend: str) -> None:
    come_and_go(tmp_path, backend, 10_000)
