"""One connected client: reads commands, has them answered one after the other, and delivers replies and events.

Not here: what is shared by all clients (`server`), handlers (`dispatch`).
"""

from __future__ import annotations

import array
import contextlib
import logging
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio

from qmp_protocol.connection import (
    CAPABILITIES,
    CommandReceived,
    DescriptorsUnused,
    Negotiated,
    PeerClosed,
    Rejected,
    ServerConnection,
    ServerEvent,
)
from qmp_protocol.errors import GENERIC_ERROR, OPERATION_THROTTLED
from qmp_protocol.messages import ABSENT, Error, Execute, Return, encode
from qmp_protocol.schema import to_json
from qmp_server.bucket import LeakyBucket
from qmp_server.descriptors import close_all
from qmp_server.outbox import Outbox, Overflow

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmp_server.server import QmpServer

_log = logging.getLogger("qmp_server")

_FROM_CLIENT: Final = "-->"  # as manuals of QMP show it
_TO_CLIENT: Final = "<--"
_READ_SIZE: Final = 4096  # what one client can make the server work on before others have their turn
_TURN: Final = 16  # messages of one read that are answered before others have their turn
_REFUSAL_PAUSE: Final = 0.0001  # seconds; whoever sends too much is heard as slowly as this for each message too many
_MOST_DRAINED: Final = 64  # reads of what a TCP client sent last
_FDS_AT_ONCE: Final = 253  # SCM_MAX_FD of Linux
_FDS_KEPT: Final = 8  # of those; unfinished messages of many clients must not use up the process's descriptors
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
        self._received: deque[ServerEvent] = deque()  # read, not handled yet
        self._refused = 0  # messages of the last read
        self._idle = False
        self._finishing = False
        self._deaf = False  # it takes nothing more: what is for it is dropped
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
                self._say(self._connection.greet())
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write)
                    with self._reading:
                        await self._read()
                    self._finishing = True
                    self._release()
                    self._wake.set()
                    # What remains is delivered as fast as the client reads: it may have closed only its sending side. The end of
                    # the server has its own limit.
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
            self._say(line)
        elif len(self._held) < _HELD_EVENTS:
            self._held.append(line)
        else:
            self._release()
            self._say(line)

    async def _read(self) -> None:
        while not self._finishing:
            self._idle = True
            if self._refused:
                await anyio.sleep(self._refused * _REFUSAL_PAUSE)
                self._refused = 0
            await anyio.wait_readable(self._socket)
            self._idle = False
            try:
                data, fds = self._receive()
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                return  # reset by the peer
            self._received += self._connection.receive(data, fds)
            if not await self._handle_received():
                return

    async def _handle_received(self) -> bool:
        """Handle what was read. False when it was the last."""
        received = self._received
        since_others = 0
        while received:
            event = received.popleft()
            if isinstance(event, PeerClosed):
                return False
            await self._handle(event)
            if self._scope.cancel_called:
                return False
            since_others += 1
            if received and since_others == _TURN:
                since_others = 0
                await anyio.sleep(0)
        return True

    def _receive(self) -> tuple[bytes, list[int]]:
        if not self._unix:
            return self._socket.recv(_READ_SIZE), []
        data, ancillary, _, _ = self._socket.recvmsg(_READ_SIZE, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        close_all(tuple(fds[:-_FDS_KEPT]))
        return data, list(fds[-_FDS_KEPT:])

    async def _handle(self, event: ServerEvent) -> None:
        if isinstance(event, DescriptorsUnused):
            close_all(event.fds)
            return
        if self._held is not None and not isinstance(event, Negotiated):
            self._release()
        if self._bucket is not None and not self._bucket.take(time.monotonic_ns()):
            self._refuse(event)
            return
        if self._server.traffic is not None:
            self._tell(self._server.traffic, event)
        if isinstance(event, CommandReceived):
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
        self._refused += 1
        desc = f"More than {self._server.rate} requests received during 1 second"
        if isinstance(event, Rejected):
            self._put(encode(Error(OPERATION_THROTTLED, desc, event.error.id)))
        elif isinstance(event, CommandReceived | Negotiated):
            self._put(encode(Error(OPERATION_THROTTLED, desc, event.id)))
            if isinstance(event, CommandReceived):
                close_all(event.fds)

    def _reply(self, reply: Return | Error) -> None:
        try:
            try:
                line = encode(reply)
            except TypeError:
                if isinstance(reply, Error):
                    raise
                line = encode(Return(to_json(reply.value), reply.id))  # JSON with typed values somewhere in it
        except (TypeError, RecursionError) as error:
            _log.exception("a handler returned what JSON cannot carry")
            line = encode(Error(GENERIC_ERROR, f"the result cannot be sent: {error}", reply.id))
        self._say(line)

    def _tell(self, traffic: Callable[[str, bytes], None], event: ServerEvent) -> None:
        """Let `traffic` hear of a command. What is none is known by its answer."""
        if isinstance(event, Negotiated):
            message = Execute(CAPABILITIES, {"enable": list(event.enabled)} if event.enabled else ABSENT, event.id)
        elif isinstance(event, CommandReceived):
            message = Execute(event.command, event.arguments, event.id)
        else:
            return
        try:
            line = encode(message)
        except TypeError:  # nested more deeply than can be written
            line = encode(Execute(message.command))
        traffic(_FROM_CLIENT, line)

    def _release(self) -> None:
        """Send the events that waited for the client's first command."""
        held, self._held = self._held, None
        for line in held or ():
            self._say(line)
        self._first_answer.set()

    def _say(self, line: bytes) -> None:
        if self._server.traffic is not None and not self._deaf:
            self._server.traffic(_TO_CLIENT, line)
        self._put(line)

    def _put(self, line: bytes) -> None:
        if self._deaf:
            return
        try:
            self._outbox.put(line)
        except Overflow as overflow:
            _log.warning("dropped a client: %s", overflow)
            self._turn_deaf()
            self._scope.cancel()
        except OSError:
            self._turn_deaf()
        else:
            if self._outbox:
                self._wake.set()

    def _turn_deaf(self) -> None:
        """The client takes nothing more. What it sent before it left is still read and done: reading ends by itself."""
        self._deaf = True
        self._outbox.clear()
        self._held = None
        self._first_answer.set()

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
                    self._turn_deaf()
            elif self._finishing:
                return
            else:
                self._wake = anyio.Event()
                await self._wake.wait()

    def _hang_up(self) -> None:
        """Close the socket so that a peer reads what it was sent before it reads the end. Close every descriptor it passed."""
        close_all(self._connection.close())
        for event in self._received:
            if isinstance(event, CommandReceived | DescriptorsUnused):
                close_all(event.fds)
        self._received.clear()
        with contextlib.suppress(OSError):
            self._release()
            self._outbox.flush()  # when the server is cancelled, this is the last chance
            self._socket.shutdown(socket.SHUT_WR)
            if not self._unix:
                self._drain()
        self._socket.close()

    def _drain(self) -> None:
        """Take what has arrived. TCP resets a connection that is closed over unread input, and the peer then loses what it has
        not read. Whoever sends faster than we read must not keep us here."""
        for _ in range(_MOST_DRAINED):
            if not self._socket.recv(65536):
                return
