"""A QMP client on asyncio, for the interactive shell: replies by command, events in a queue.

Not here: the blocking client (`client`), the protocol (`qmp_protocol`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Self, TypeVar

from pystratovirt.qmpshell.client import QmpConnectionError, QmpTimeout, connect_socket
from qmp_protocol.connection import BadMessage, ClientConnection, ClientEvent, Negotiated, PeerClosed, Reply
from qmp_protocol.errors import QmpError
from qmp_protocol.messages import ABSENT, Absent, Error, Event, Greeting, Json
from qmp_protocol.methods import AsyncMethods
from qmp_protocol.schema import Command

R = TypeVar("R")

_KEPT_EVENTS = 10_000  # shown late or never, when a server floods


class AsyncClient(AsyncMethods, asyncio.Protocol):
    """One negotiated connection. Belongs to one event loop. Every command of StratoVirt is a method to be awaited."""

    def __init__(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._socket = sock  # the transport's, for descriptors: asyncio passes none
        self._connection = ClientConnection()
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._ready: asyncio.Future[None] = loop.create_future()
        self.events: asyncio.Queue[Event] = asyncio.Queue(_KEPT_EVENTS)
        """Events that nobody has taken yet, oldest first."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when the connection is over."""

    @classmethod
    async def connect(cls, address: str, timeout: float) -> Self:
        """Connect and negotiate within `timeout` seconds. Raises QmpConnectionError, and QmpTimeout when the peer is silent."""
        loop = asyncio.get_running_loop()
        sock = connect_socket(address, timeout)
        sock.setblocking(False)
        _, client = await loop.create_connection(lambda: cls(sock), sock=sock)
        try:
            await asyncio.wait_for(asyncio.shield(client._ready), timeout)
        except TimeoutError:
            client.close()
            raise QmpTimeout(f"{address}: no greeting in time") from None
        except BaseException:
            client.close()
            raise
        return client

    @property
    def greeting(self) -> Greeting:
        """What the server said first."""
        assert self._connection.greeting is not None
        return self._connection.greeting

    def close(self) -> None:
        """Hang up."""
        if self._transport:
            self._transport.close()

    async def execute(self, command: str, arguments: Json | Absent = ABSENT, fds: Sequence[int] = ()) -> Json:
        """Run a command and return its result. `fds` are passed along; they stay the caller's.

        Raises QmpError for an error reply, QmpConnectionError when the server is gone, TypeError for arguments that JSON cannot
        carry.
        """
        if self.ended.done() or self._transport is None:
            raise QmpConnectionError("the server hung up")
        number, line = self._connection.execute(command, arguments)
        reply: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        try:
            self._transport.write(self._pass(line, fds) if fds else line)
            return await reply
        finally:
            del self._waiting[number]

    async def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. Raises as `execute`, and QmpError when the result does not fit."""
        return command.parse_result(await self.execute(command.name, command.to_json() or ABSENT, fds))

    def _pass(self, line: bytes, fds: Sequence[int]) -> bytes:
        """Send the beginning of `line` with descriptors and return the rest."""
        if self._socket.family != socket.AF_UNIX:
            raise QmpConnectionError("descriptors can be passed over a unix socket only")
        assert self._transport is not None
        if self._transport.get_write_buffer_size():
            raise QmpConnectionError("descriptors cannot be passed while earlier commands are on their way")
        try:
            return line[socket.send_fds(self._socket, [line], list(fds)) :]
        except OSError as error:
            raise QmpConnectionError(f"the descriptors were not passed: {error.strerror}") from None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for event in self._connection.receive(data):
            if self.ended.done():
                return
            self._handle(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(QmpConnectionError(f"the connection broke: {exc}" if exc else "the server hung up"))

    def _handle(self, event: ClientEvent) -> None:
        if isinstance(event, Event):
            if not self.events.full():
                self.events.put_nowait(event)
        elif isinstance(event, Greeting):
            assert self._transport is not None
            self._transport.write(self._connection.negotiate())
        elif isinstance(event, Negotiated):
            self._ready.set_result(None)
        elif isinstance(event, Reply):
            self._answer(event)
        elif isinstance(event, BadMessage):
            self._fail(QmpConnectionError(f"the peer does not speak QMP: {event.desc}"))
            self.close()
        elif isinstance(event, PeerClosed):
            self.close()

    def _answer(self, reply: Reply) -> None:
        message = reply.message
        waiting = self._waiting.get(reply.request)
        if waiting is not None and not waiting.done():
            if isinstance(message, Error):
                waiting.set_exception(QmpError(message.class_name, message.desc))
            else:
                waiting.set_result(message.value)
        elif not self._ready.done() and isinstance(message, Error):
            self._fail(QmpConnectionError(f"the server refused negotiation: {message.desc}"))

    def _fail(self, error: QmpConnectionError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # marked as seen: whoever waited may have given up
        if not self.ended.done():
            self.ended.set_result(None)
