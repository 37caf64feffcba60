"""One connected client: reads commands, has them answered one after the other, and delivers replies and events.

Not here: what is shared by all clients (`server`), handlers (`dispatch`).
"""

from __future__ import annotations

import array
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

import anyio

from qmp_protocol.connection import (
    CommandReceived,
    DescriptorsUnused,
    Negotiated,
    PeerClosed,
    Rejected,
    ServerConnection,
    ServerEvent,
)
from qmp_protocol.errors import GENERIC_ERROR, OPERATION_THROTTLED
from qmp_protocol.messages import Error, Return, encode
from qmp_server.bucket import LeakyBucket
from qmp_server.descriptors import close_all
from qmp_server.outbox import Outbox, Overflow

if TYPE_CHECKING:
    from qmp_server.server import QmpServer

_log = logging.getLogger("qmp_server")

_READ_SIZE: Final = 65536
_FDS_AT_ONCE: Final = 253  # SCM_MAX_FD of Linux
_FD_SPACE: Final = socket.CMSG_SPACE(_FDS_AT_ONCE * array.array("i").itemsize)
_QUIET_START: Final = 0.25  # seconds
_HELD_EVENTS: Final = 256


class Client:
    """Owned by the server's event loop. `run` is its life; `deliver` may be called at any time of it."""

    def __init__(self, server: QmpServer, sock: socket.socket, connection: ServerConnection) -> None:
        self._server = server
        self._socket = sock
        self._connection = connection
        self._outbox = Outbox(sock, server.outbox_limit)
        self._bucket = LeakyBucket(server.rate) if server.rate else None
        self._unix = sock.family == socket.AF_UNIX
        self._scope = anyio.CancelScope()  # the whole client
        self._reading = anyio.CancelScope()  # only its wait for input
        self._idle = False
        self._finishing = False
        self._wake = anyio.Event()
        # Clients read the greeting, then the reply to qmp_capabilities, and some are confused by an event in between. One that
        # only listens waits this little longer for its first events.
        self._held: list[bytes] | None = []
        self._first_answer = anyio.Event()
        self.gone = anyio.Event()
        """Set by the server when the client has been served."""

    async def run(self) -> None:
        """Serve the client until it leaves, does not read, or the scope around is cancelled. Never raises for its sake."""
        try:
            with self._scope:
                self._put(self._connection.greet())
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write)
                    with self._reading:
                        await self._read()
                    self._finishing = True
                    self._release()
                    self._wake.set()
                    tasks.cancel_scope.deadline = anyio.current_time() + self._server.drain_time
        finally:
            self._hang_up()

    def finish(self) -> None:
        """Read nothing more; end when what is running is answered and everything is delivered."""
        self._finishing = True
        self._release()
        self._wake.set()
        if self._idle:
            self._reading.cancel()

    def deliver(self, line: bytes) -> None:
        """Send the bytes of an event."""
        if self._held is None:
            self._put(line)
        elif len(self._held) < _HELD_EVENTS:
            self._held.append(line)
        else:
            self._release()
            self._put(line)

    async def _read(self) -> None:
        connection = self._connection
        while not self._finishing:
            self._idle = True
            await anyio.wait_readable(self._socket)
            self._idle = False
            try:
                data, fds = self._receive()
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                return  # reset by the peer
            for event in connection.receive(data, fds):
                if isinstance(event, PeerClosed):
                    return
                await self._handle(event)

    def _receive(self) -> tuple[bytes, list[int]]:
        if not self._unix:
            return self._socket.recv(_READ_SIZE), []
        data, ancillary, _, _ = self._socket.recvmsg(_READ_SIZE, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        return data, list(fds)

    async def _handle(self, event: ServerEvent) -> None:
        if isinstance(event, DescriptorsUnused):
            close_all(event.fds)
            return
        if self._held is not None and not isinstance(event, Negotiated):
            self._release()
        if self._bucket is not None and not self._bucket.take(time.monotonic_ns()):
            self._refuse(event)
        elif isinstance(event, CommandReceived):
            reply, later = await self._server.dispatcher.answer(event)
            self._server.publish()  # events from threads that happened before the reply
            self._reply(reply)
            for function in later:
                self._server.guard(function)
        elif isinstance(event, Negotiated):
            self._reply(Return({}, event.id))
            self._release()
        elif isinstance(event, Rejected):
            self._reply(event.error)

    def _refuse(self, event: ServerEvent) -> None:
        """Answer a command that came too soon (StratoVirt's text)."""
        desc = f"More than {self._server.rate} requests received during 1 second"
        if isinstance(event, Rejected):
            self._reply(Error(OPERATION_THROTTLED, desc, event.error.id))
        elif isinstance(event, CommandReceived | Negotiated):
            self._reply(Error(OPERATION_THROTTLED, desc, event.id))
            if isinstance(event, CommandReceived):
                close_all(event.fds)

    def _reply(self, reply: Return | Error) -> None:
        try:
            line = encode(reply)
        except TypeError as error:
            _log.exception("a handler returned what JSON cannot carry")
            line = encode(Error(GENERIC_ERROR, f"the result cannot be sent: {error}", reply.id))
        self._put(line)

    def _release(self) -> None:
        """Send the events that waited for the client's first command."""
        held, self._held = self._held, None
        for line in held or ():
            self._put(line)
        self._first_answer.set()

    def _put(self, line: bytes) -> None:
        try:
            self._outbox.put(line)
        except Overflow as overflow:
            _log.warning("dropped a client: %s", overflow)
            self._scope.cancel()
        except OSError:  # it is gone
            self._scope.cancel()
        else:
            if self._outbox:
                self._wake.set()

    async def _write(self) -> None:
        """Send what the socket did not take at once."""
        with anyio.move_on_after(_QUIET_START):
            await self._first_answer.wait()
        self._release()
        while True:
            if self._outbox:
                await anyio.wait_writable(self._socket)
                try:
                    self._outbox.flush()
                except OSError:
                    self._scope.cancel()
                    return
            elif self._finishing:
                return
            else:
                self._wake = anyio.Event()
                await self._wake.wait()

    def _hang_up(self) -> None:
        """Close the socket so that a peer reads what it was sent before it reads the end."""
        with contextlib.suppress(OSError):
            self._release()
            self._outbox.flush()  # when the server is cancelled, this is the last chance
            self._socket.shutdown(socket.SHUT_WR)
            # TCP resets a connection that is closed over unread input, and the peer then loses what it has not read.
            while not self._unix and self._socket.recv(_READ_SIZE):
                pass
        self._socket.close()
