"""Unix sockets through the lab's wall: many connections over one virtio-serial port, the same code at both ends.

Frames on the port: connection (4 bytes), kind (1), length (2), all little-endian, then the bytes. Outside, a socket appears when
the one in the lab does, so that a client outside sees what it would see inside.
In the lab this runs as `python forward.py PORT SOCKET`, alone and without the rest of the package.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from struct import Struct

_HEADER = Struct("<IBH")
_READY, _OPEN, _DATA, _CLOSE = range(1, 5)
_CHUNK = 4096
_FULL = 256 * 1024  # bytes waiting for a slow reader; nothing more is read for it meanwhile
_PAUSE = 0.1  # seconds between two looks for the socket of a program that is still starting


class _Pipe:
    """A descriptor with what waits to be written to it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.waiting = bytearray()
        self.ending = False  # close it when everything is written


class Multiplexer:
    """One end of the port. `opened` makes the connection that the other end asks for, or returns None."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        port: int,
        opened: Callable[[], socket.socket | None] = lambda: None,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._selector = selector
        self._opened = opened
        self._ready = ready
        self._port = _Pipe(port)
        self._received = bytearray()
        self._sockets: dict[int, socket.socket] = {}
        self._pipes: dict[int, _Pipe] = {}
        self._next = 0
        os.set_blocking(port, False)
        self._watch(self._port, self._port_event, reading=True)

    def close(self) -> None:
        """Close every connection. The port is the caller's."""
        for number in list(self._sockets):
            self._drop(number)

    def announce(self) -> None:
        """Tell the other end that connections can be made."""
        self._send(0, _READY)

    def add(self, connection: socket.socket) -> None:
        """A client has come: the other end is asked to connect."""
        self._next += 1
        self._send(self._next, _OPEN)
        self._adopt(self._next, connection)

    def _adopt(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._sockets[number] = connection
        self._pipes[number] = _Pipe(connection.fileno())
        self._refresh(number)

    def _drop(self, number: int) -> None:
        self._unwatch(self._pipes.pop(number).descriptor)
        self._sockets.pop(number).close()

    def _send(self, number: int, kind: int, data: bytes = b"") -> None:
        self._port.waiting += _HEADER.pack(number, kind, len(data)) + data
        self._flush(self._port)
        self._watch(self._port, self._port_event, reading=True)

    def _port_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(self._port)
            self._watch(self._port, self._port_event, reading=True)
            for number in self._pipes:
                self._refresh(number)
        if mask & selectors.EVENT_READ:
            data = _read(self._port.descriptor)
            if data == b"":  # the other end is gone for good
                self._unwatch(self._port.descriptor)
                self.close()
            elif data:
                self._received += data
                self._frames()

    def _frames(self) -> None:
        while len(self._received) >= _HEADER.size:
            number, kind, length = _HEADER.unpack_from(self._received)
            if len(self._received) < _HEADER.size + length:
                return
            data = bytes(self._received[_HEADER.size : _HEADER.size + length])
            del self._received[: _HEADER.size + length]
            self._frame(number, kind, data)

    def _frame(self, number: int, kind: int, data: bytes) -> None:
        pipe = self._pipes.get(number)
        if kind == _READY:
            self._ready()
        elif kind == _OPEN:
            connection = self._opened()
            if connection is None:
                self._send(number, _CLOSE)
            else:
                self._adopt(number, connection)
        elif pipe is None:
            return  # it crossed our own close
        elif kind == _DATA:
            pipe.waiting += data
            if len(pipe.waiting) > _FULL:
                self._send(number, _CLOSE)  # a client that does not read has no right to our memory
                self._drop(number)
            else:
                self._connection_flush(number)
        elif kind == _CLOSE:
            pipe.ending = True
            self._connection_flush(number)

    def _connection_event(self, number: int, mask: int) -> None:
        if number not in self._pipes:
            return
        if mask & selectors.EVENT_WRITE:
            self._connection_flush(number)
        if mask & selectors.EVENT_READ and number in self._pipes and not self._pipes[number].ending:
            data = _read(self._pipes[number].descriptor)
            if data:
                self._send(number, _DATA, data)
                self._refresh(number)
            elif data == b"":
                self._send(number, _CLOSE)
                self._drop(number)

    def _connection_flush(self, number: int) -> None:
        pipe = self._pipes[number]
        if not self._flush(pipe) or (pipe.ending and not pipe.waiting):
            if not pipe.ending:
                self._send(number, _CLOSE)
            self._drop(number)
        else:
            self._refresh(number)

    def _refresh(self, number: int) -> None:
        pipe = self._pipes[number]
        reading = not pipe.ending and len(self._port.waiting) < _FULL
        self._watch(pipe, lambda mask: self._connection_event(number, mask), reading)

    def _watch(self, pipe: _Pipe, handler: Callable[[int], None], reading: bool) -> None:
        events = (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if pipe.waiting else 0)
        self._unwatch(pipe.descriptor)
        if events:
            self._selector.register(pipe.descriptor, events, handler)

    def _unwatch(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    @staticmethod
    def _flush(pipe: _Pipe) -> bool:
        """Write what can be written now; False when nobody is there to read it."""
        while pipe.waiting:
            try:
                del pipe.waiting[: os.write(pipe.descriptor, pipe.waiting[:_CHUNK])]
            except BlockingIOError:
                return True
            except OSError:
                pipe.waiting.clear()
                return False
        return True


def _read(descriptor: int) -> bytes | None:
    """What is there; b"" at the end, None when there is nothing now."""
    try:
        return os.read(descriptor, _CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _connect(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def main(port: str, path: str) -> None:
    """The lab's end: wait for the program's socket, then serve until killed."""
    while not os.path.exists(path):  # noqa: PTH110 - pathlib costs half a second to import in the lab
        time.sleep(_PAUSE)
    with selectors.PollSelector() as selector:
        multiplexer = Multiplexer(selector, os.open(port, os.O_RDWR), opened=lambda: _connect(path))
        multiplexer.announce()
        while selector.get_map():
            for key, mask in selector.select():
                key.data(mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
