"""A blocking QMP client over one socket: connect, execute, wait for events.

Not here: the protocol (`qmp_protocol`), words on a command line (`arguments`).
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, TypeVar

from qmp_protocol.connection import BadMessage, ClientConnection, ClientEvent, Negotiated, PeerClosed, Reply
from qmp_protocol.errors import QmpError, QmpProtocolError
from qmp_protocol.messages import ABSENT, Absent, Error, Event, Greeting, Json
from qmp_protocol.methods import Methods
from qmp_protocol.schema import Command

R = TypeVar("R")

_READ_SIZE = 65536
_BACKLOG_PAUSE = 0.02  # seconds
_KEPT_EVENTS = 10_000  # of a program that executes but never looks at events; the oldest go


class QmpConnectionError(QmpProtocolError):
    """There is no connection: it could not be made, it broke, or the peer does not speak QMP."""


class QmpTimeout(QmpConnectionError):
    """The peer did not answer in time."""


def connect_socket(address: str, timeout: float | None) -> socket.socket:
    """Connect to `PATH`, `unix:PATH`, `HOST:PORT` or `tcp:HOST:PORT`, within `timeout` seconds if that is not None.

    Raises QmpConnectionError that names the address; QmpTimeout when the peer neither takes nor refuses the connection.
    """
    kind, _, rest = address.partition(":")
    try:
        if kind == "unix":
            return _connect_unix(rest, timeout)
        if kind == "tcp":
            return _connect_tcp(rest, timeout)
        if "/" not in address and address.rpartition(":")[2].isdecimal() and not Path(address).exists():
            return _connect_tcp(address, timeout)
        return _connect_unix(address, timeout)
    except (TimeoutError, BlockingIOError):
        raise QmpTimeout(f"{address}: no connection in time") from None
    except OSError as error:
        raise QmpConnectionError(f"{address}: {error.strerror or error}") from None


def _connect_unix(path: str, timeout: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # so many wait for the server that there is no room to wait with them
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                time.sleep(_BACKLOG_PAUSE)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def _connect_tcp(address: str, timeout: float | None) -> socket.socket:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise OSError(None, "not HOST:PORT", address)
    return socket.create_connection((host.strip("[]"), int(port)), timeout)


class QmpClient(Methods):
    """One connection, negotiated. Not for several threads at once. Usable as a context manager.

    Every command of StratoVirt is a method (`client.device_del(id="net-0")`); `execute` runs any command of any server.
    """

    def __init__(self, address: str, *, timeout: float | None = 10.0) -> None:
        """Connect and negotiate. `timeout` in seconds bounds each wait for the peer; None waits for ever.

        Raises QmpConnectionError; QmpTimeout when the peer does not greet, as StratoVirt while it has another client.
        """
        self._connection = ClientConnection()
        self._timeout = timeout
        self._arrived: deque[ClientEvent] = deque()
        self._ended = False
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        """Events that nobody has taken yet, oldest first."""
        self._socket = connect_socket(address, timeout)
        try:
            self._socket.setblocking(False)
            deadline = self._deadline(timeout)
            while self._connection.greeting is None:
                self._next(deadline, "greeting")
                self._expect_time(deadline, "greeting")
            self._send(self._connection.negotiate())
            while not isinstance(event := self._next(deadline, "reply to qmp_capabilities"), Negotiated):
                if isinstance(event, Reply) and isinstance(event.message, Error):
                    raise QmpConnectionError(f"{address}: refused negotiation: {event.message.desc}")
                self._expect_time(deadline, "reply to qmp_capabilities")
        except BaseException:
            self.close()
            raise

    @property
    def greeting(self) -> Greeting:
        """What the server said first."""
        assert self._connection.greeting is not None
        return self._connection.greeting

    def close(self) -> None:
        """Hang up. Harmless twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, command: str, arguments: Json | Absent = ABSENT, fds: Sequence[int] = ()) -> Json:
        """Run a command by name and return its result. `fds` are passed along; they stay the caller's.

        Raises QmpError for an error reply, QmpConnectionError, and TypeError for arguments that JSON cannot carry.
        """
        if self._ended:
            raise QmpConnectionError("the server hung up")
        number, line = self._connection.execute(command, arguments)
        self._send(line, fds)
        deadline = self._deadline(self._timeout)
        while True:
            event = self._next(deadline, f"reply to {command}")
            if isinstance(event, Reply) and event.request == number:
                if isinstance(event.message, Error):
                    raise QmpError(event.message.class_name, event.message.desc)
                return event.message.value
            self._expect_time(deadline, f"reply to {command}")

    def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. Raises as `execute`, and QmpError when the result does not fit."""
        return command.parse_result(self.execute(command.name, command.to_json() or ABSENT, fds))

    def wait_event(self, timeout: float | None = None, fits: Callable[[Event], bool] = lambda _event: True) -> Event:
        """Return the oldest event that nobody has taken, waiting for one if there is none. Those that do not fit are dropped.

        Raises QmpTimeout after `timeout` seconds, and QmpConnectionError when the server hangs up first.
        """
        deadline = self._deadline(timeout)
        polled = False
        while True:
            while self.events:
                event = self.events.popleft()
                if fits(event):
                    return event
            if polled and not self._arrived:
                self._expect_time(deadline, "event")
            self._next(deadline, "event")
            polled = True

    def _expect_time(self, deadline: float | None, what: str) -> None:
        """A server that sends a lot of something else must not make us wait for ever. Raises QmpTimeout."""
        if deadline is not None and time.monotonic() > deadline:
            raise QmpTimeout(f"no {what} in time")

    def _next(self, deadline: float | None, what: str) -> ClientEvent:
        while not self._arrived:
            if self._ended:
                raise QmpConnectionError(f"the server hung up before its {what}")
            self._receive(deadline, what)
        event = self._arrived.popleft()
        if isinstance(event, BadMessage):
            raise QmpConnectionError(f"the peer does not speak QMP: {event.desc}")
        if isinstance(event, PeerClosed):
            self._ended = True
            raise QmpConnectionError(f"the server hung up before its {what}")
        if isinstance(event, Event):
            self.events.append(event)
        return event

    def _receive(self, deadline: float | None, what: str) -> None:
        self._wait(select.POLLIN, deadline, what)
        try:
            data = self._socket.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            raise QmpConnectionError(f"the connection broke: {error.strerror}") from None
        self._arrived += self._connection.receive(data)

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if fds and self._socket.family != socket.AF_UNIX:
            raise QmpConnectionError("descriptors can be passed over a unix socket only")
        deadline = self._deadline(self._timeout)
        while data:
            try:
                # Linux takes the descriptors with the first byte, or nothing.
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else self._socket.send(data)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, "readiness")
            except OSError as error:
                raise QmpConnectionError(f"the connection broke: {error.strerror}") from None
            else:
                data, fds = data[sent:], ()

    def _wait(self, events: int, deadline: float | None, what: str) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(left):
            raise QmpTimeout(f"no {what} in time")

    def _deadline(self, timeout: float | None) -> float | None:
        return None if timeout is None else time.monotonic() + timeout
