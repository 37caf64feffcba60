"""The QMP server: listeners, clients, events to all of them, and the end.

Not here: what commands do. Handlers are registered by the program that embeds the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import anyio
import anyio.abc

from qmp_protocol.commands import GREETING, STRATOVIRT
from qmp_protocol.connection import ServerConnection
from qmp_protocol.errors import SchemaError
from qmp_protocol.messages import Event, Greeting, Timestamp, encode
from qmp_protocol.schema import Command, Notification, Schema, to_json
from qmp_server import builtin
from qmp_server.client import Client
from qmp_server.descriptors import DescriptorTable
from qmp_server.dispatch import AnyHandler, C, Call, Dispatcher, is_from_outside
from qmp_server.sockets import Listener

_log = logging.getLogger("qmp_server")

_ACCEPT_PAUSE: Final = 0.1  # seconds, when the process or the system is out of descriptors or memory
_EVENTS_FROM_THREADS: Final = 4096  # a loop that stands still keeps the newest of these

H = TypeVar("H", bound=AnyHandler)


class QmpServer:
    """Serves one schema to any number of clients. Belongs to the thread of its event loop; `emit` and `close` to all threads."""

    def __init__(
        self,
        schema: Schema = STRATOVIRT,
        greeting: Greeting = GREETING,
        *,
        rate: int = 100,
        max_clients: int = 32,
        outbox_limit: int = 4 * 1024 * 1024,
        drain_time: float = 1.0,
        strict: bool = False,
        traffic: Callable[[str, bytes], None] | None = None,
    ) -> None:
        """Make a server that does not listen yet.

        `rate` is commands a second for each client (0: no limit). `max_clients` is for each listener; more wait ungreeted, and
        1 is StratoVirt's own behaviour. A client that lets more than `outbox_limit` bytes wait is dropped. At the end clients
        have `drain_time` seconds to take what is on its way. `strict` demands `qmp_capabilities` first, as QEMU does.

        `traffic` hears of each command, with `-->`, and of each message to a client, with `<--`, as a line of JSON. Of what is no
        command it hears the answer alone, of commands that come too soon nothing. It is called on the event loop, and must
        neither block nor raise.
        """
        self.schema = schema
        self.greeting = greeting
        self.rate = rate
        self.outbox_limit = outbox_limit
        self.drain_time = drain_time
        self.traffic = traffic
        self.fds = DescriptorTable()
        self.dispatcher = Dispatcher(self, schema)
        self._max_clients = max_clients
        self._strict = strict
        self._fd_commands = frozenset(name for name, command in schema.commands.items() if command.takes_fds)
        self._clients: set[Client] = set()
        self._greeted = anyio.Event()
        self._closing = anyio.Event()
        self._thread = 0
        # What other threads want sent; the number of each wake-up is lost, the queue is what counts.
        self._from_threads: deque[bytes] = deque(maxlen=_EVENTS_FROM_THREADS)
        self._close_wanted = False
        self._bell = -1
        self._bell_lock = threading.RLock()  # a signal handler may ring while its own thread does
        builtin.register(self)

    # Handlers ---------------------------------------------------------------------------------------------------------

    def register(
        self,
        command: str | type[C],
        function: Callable[[C, Call], Any],
        *,
        in_thread: bool = False,
        concurrent: bool = False,
    ) -> None:
        """Set what answers a command. Replaces what did before.

        `function(arguments, call)` gets the typed command and returns its result, or raises QmpError. It may be async; a plain
        one runs on the event loop and must not block, or with `in_thread` in a worker thread. Commands run one at a time over all
        clients; with `concurrent` this one does not wait for others nor they for it. Raises SchemaError when the schema
        lacks the command.
        """
        name = command if isinstance(command, str) else command.name
        self.dispatcher.register(name, function, in_thread=in_thread, concurrent=concurrent)

    def handler(
        self, command: str | type[Command[Any]], *, in_thread: bool = False, concurrent: bool = False
    ) -> Callable[[H], H]:
        """The decorator form of `register`."""

        def decorate(function: H) -> H:
            self.register(command, function, in_thread=in_thread, concurrent=concurrent)
            return function

        return decorate

    # Events -----------------------------------------------------------------------------------------------------------

    def emit(self, event: str | Notification, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to every client, stamped now. From any thread; never blocks; nobody connected: nobody told.

        Raises SchemaError when the schema lacks the event.
        """
        if isinstance(event, Notification):
            name, body = event.name, event.to_json()
        else:
            name, body = event, dict(to_json(data or {}))
        if name not in self.schema.events:
            raise SchemaError(f"the schema has no event {name}")
        now = time.time_ns() // 1000
        line = encode(Event(name, body, Timestamp(now // 1_000_000, now % 1_000_000)))
        if threading.get_ident() == self._thread:
            self.publish()
            self._broadcast(line)
        else:
            self._from_threads.append(line)
            self._ring()

    def publish(self) -> None:
        """Send the events that other threads have emitted so far. On the event loop's thread."""
        while self._from_threads:
            self._broadcast(self._from_threads.popleft())
        if self._close_wanted:
            self._closing.set()

    def close(self) -> None:
        """Deliver what was emitted and answered so far, hang up, and let `serve` return. From any thread."""
        self._close_wanted = True
        self._ring()

    def _ring(self) -> None:
        with self._bell_lock:  # the bell must not be closed, and its number given to another file, under our hands
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def _broadcast(self, line: bytes) -> None:
        for client in list(self._clients):
            client.deliver(line)

    # Serving ----------------------------------------------------------------------------------------------------------

    async def wait_for_client(self) -> None:
        """Return when the first client has been greeted (`wait` instead of `nowait`)."""
        await self._greeted.wait()

    async def serve(
        self,
        listeners: Sequence[Listener | socket.socket],
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve clients of listening sockets until `close` is called or the scope around is cancelled; once in a server's life.

        Takes the listeners over and closes them at the end, with socket files, clients and descriptors.
        """
        doors = [door if isinstance(door, Listener) else Listener(door) for door in listeners]
        try:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.get_ident()
            async with anyio.create_task_group() as tasks:
                try:
                    async with anyio.create_task_group() as accepting:
                        accepting.start_soon(self._answer_bell)
                        for door in doors:
                            accepting.start_soon(self._accept, door.socket, tasks)
                        task_status.started()
                        await self._closing.wait()
                        accepting.cancel_scope.cancel()
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._say_goodbye()
                    tasks.cancel_scope.cancel()
        finally:
            self._thread = 0
            with self._bell_lock:
                bell, self._bell = self._bell, -1
            if bell >= 0:
                os.close(bell)
            for door in doors:
                door.close()
            self.fds.close()

    async def _say_goodbye(self) -> None:
        self.publish()
        for client in list(self._clients):
            client.finish()
        with anyio.move_on_after(self.drain_time):
            while self._clients:
                await next(iter(self._clients)).gone.wait()
        self.dispatcher.cancel()

    async def _answer_bell(self) -> None:
        self.publish()  # what came before the bell was there
        while True:
            await anyio.wait_readable(self._bell)
            os.eventfd_read(self._bell)
            self.publish()

    async def _accept(self, door: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
        room = anyio.Semaphore(self._max_clients)
        while True:
            await room.acquire()
            sock = await _accept_one(door)
            tasks.start_soon(self._serve_client, sock, room)

    async def _serve_client(self, sock: socket.socket, room: anyio.Semaphore) -> None:
        connection = ServerConnection(self.greeting, strict=self._strict, fd_commands=self._fd_commands)
        client = Client(self, sock, connection)
        self._clients.add(client)
        self._greeted.set()
        try:
            await client.run()
        except Exception:
            _log.exception("serving a client failed")
        finally:
            self._clients.discard(client)
            client.gone.set()
            room.release()

    def guard(self, function: Callable[[], object]) -> None:
        """Call what a handler left to be done behind its reply; its failure is logged and hurts nobody."""
        try:
            function()
        except BaseException as error:
            if is_from_outside(error):
                raise
            _log.exception("what was to follow a reply failed")


async def _accept_one(door: socket.socket) -> socket.socket:
    told = False
    while True:
        await anyio.wait_readable(door)
        try:
            sock, _ = door.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            continue
        except OSError as error:
            if not told:  # once, and not ten times a second for as long as it lasts
                told = True
                _log.warning("cannot accept a client: %s", error)
            await anyio.sleep(_ACCEPT_PAUSE)
            continue
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # it may have left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer that vanished must not hold its place
        return sock
