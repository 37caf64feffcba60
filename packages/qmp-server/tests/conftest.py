"""A server in the test's own event loop, and clients that speak its language."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import anyio
import orjson
import pytest

from qmp_protocol.framing import Framer
from qmp_server import Call, Listener, QmpServer, listen_tcp, listen_unix

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

PATIENCE = 60  # seconds: only a hang takes longer


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Peer:
    """A client that shows what it gets, message by message."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._framer = Framer(1 << 26)
        self._messages: list[Any] = []

    @classmethod
    async def connect(cls, address: Any) -> Self:
        """Connect and read the greeting."""
        peer = cls.connect_quietly(address)
        assert "QMP" in await peer.read()
        return peer

    @classmethod
    def connect_quietly(cls, address: Any) -> Self:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
        sock.connect(address)
        return cls(sock)

    async def send(self, text: bytes) -> None:
        while text:
            try:
                text = text[self.socket.send(text) :]
            except BlockingIOError:
                await anyio.wait_writable(self.socket)

    async def read(self) -> Any:
        """The next message, or None at the end of the stream."""
        with anyio.fail_after(PATIENCE):
            while not self._messages:
                await anyio.wait_readable(self.socket)
                try:
                    data = self.socket.recv(65536)
                except ConnectionResetError:
                    return None
                if not data:
                    return None
                self._messages += self._framer.feed(data)
        return self._messages.pop(0)

    async def read_all(self) -> list[Any]:
        """Everything up to the end of the stream."""
        messages = []
        while (message := await self.read()) is not None:
            messages.append(message)
        return messages

    async def run(self, command: str, arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """Send one command and return the next message."""
        request = {"execute": command, **({} if arguments is None else {"arguments": arguments}), **more}
        await self.send(orjson.dumps(request) + b"\n")
        return await self.read()

    async def is_quiet(self) -> bool:
        """Whether nothing comes for a little while: what a test of absence can do."""
        with anyio.move_on_after(0.1):
            await anyio.wait_readable(self.socket)
            return False
        return not self._messages

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def peers() -> type[Peer]:
    """The class, for clients that do not begin by reading the greeting."""
    return Peer


class Running:
    """A server that serves, and how to reach it."""

    def __init__(self, server: QmpServer, address: Any) -> None:
        self.server = server
        self.address = address
        self.ended = anyio.Event()

    async def connect(self) -> Peer:
        return await Peer.connect(self.address)

    async def end(self) -> None:
        """Close the server and wait until it is gone."""
        self.server.close()
        with anyio.fail_after(PATIENCE):
            await self.ended.wait()


Serve: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(params=["unix", "tcp"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Listener:
    return listen_unix(tmp_path / "qmp.sock") if request.param == "unix" else listen_tcp("127.0.0.1", 0)


@asynccontextmanager
async def _serving(listener: Listener, server: QmpServer) -> AsyncIterator[Running]:
    """Serve for as long as the block runs."""
    running = Running(server, listener.socket.getsockname())

    async def serve(*, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        await server.serve([listener], task_status=task_status)
        running.ended.set()

    async with anyio.create_task_group() as tasks:
        await tasks.start(serve)
        yield running
        await running.end()


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Start a server on a unix socket: `async with serve(server) as running`."""
    return lambda server: _serving(listen_unix(tmp_path / "qmp.sock"), server)


@pytest.fixture
def server() -> QmpServer:
    """A server without a rate limit, with a `query-status` that answers."""
    made = QmpServer(rate=0)

    @made.handler("query-status", concurrent=True)
    def query_status(_: object, call: Call) -> dict[str, Any]:
        return {"running": True, "singlestep": False, "status": "running"}

    return made


@pytest.fixture
def serving() -> Callable[[Listener, QmpServer], AbstractAsyncContextManager[Running]]:
    """Start a server on a given listener: `async with serving(listener, server) as running`."""
    return _serving
