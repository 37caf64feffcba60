"""A QMP client on asyncio, for the interactive shell: replies by command, events in a queue.

Not here: the blocking client (`client`), the protocol (`qmp_protocol`).
"""

from __future__ import annotations

import asyncio
from typing import Self

from pystratovirt.qmpshell.client import QmpConnectionError, QmpTimeout, connect_socket
from qmp_protocol.connection import BadMessage, ClientConnection, ClientEvent, Negotiated, PeerClosed, Reply
from qmp_protocol.errors import QmpError
from qmp_protocol.messages import ABSENT, Absent, Error, Event, Greeting, Json

_KEPT_EVENTS = 10_000  # shown late or never, when a server floods


class AsyncClient(asyncio.Protocol):
    """One negotiated connection. Belongs to one event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
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
        _, client = await loop.create_connection(cls, sock=sock)
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

    async def execute(self, command: str, arguments: Json | Absent = ABSENT) -> Json:
        """Run a command and return its result. Raises QmpError for an error reply, QmpConnectionError when the server is gone."""
        if self.ended.done() or self._transport is None:
            raise QmpConnectionError("the server hung up")
        number, line = self._connection.execute(command, arguments)
        reply: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        self._transport.write(line)
        try:
            return await reply
        finally:
            del self._waiting[number]

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for event in self._connection.receive(data):
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
