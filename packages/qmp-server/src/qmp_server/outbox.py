"""What is on its way to one client: sent at once if the socket takes it, else kept up to a bound.

Not here: waiting until the socket is writable (`client`).
"""

from __future__ import annotations

import socket


class Overflow(Exception):
    """The client does not read: more waits for it than may."""


class Outbox:
    """Bytes for one non-blocking socket, in order. Holds at most `limit` bytes."""

    __slots__ = ("_limit", "_pending", "_socket")

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self._socket = sock
        self._limit = limit
        self._pending = bytearray()

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, data: bytes) -> None:
        """Send `data` after everything before it. Raises Overflow, and OSError when the client is gone."""
        if self._pending:
            self._keep(data)
            return
        try:
            sent = self._socket.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(data):
            self._keep(data[sent:])

    def flush(self) -> bool:
        """Send what the socket takes now. True when nothing is left. Raises OSError when the client is gone."""
        while self._pending:
            try:
                sent = self._socket.send(self._pending, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            del self._pending[:sent]
        return True

    def clear(self) -> None:
        """Forget what waits: nobody will read it."""
        self._pending.clear()

    def _keep(self, data: bytes) -> None:
        if len(self._pending) + len(data) > self._limit:
            raise Overflow(f"more than {self._limit} bytes wait for a client that does not read")
        self._pending += data
