"""One end of a vhost-user socket: whole messages with their descriptors, each wait with an end.

A connection belongs to one thread at a time. What comes with a message that has no use for descriptors is closed at once.

Not here: what messages mean (`frontend`) and when to connect (`session`).
"""

from __future__ import annotations

import os
import select
import socket
import time
from array import array
from collections.abc import Sequence

from virtio_devices.vhost_user.protocol import (
    MAX_FDS,
    NEED_REPLY,
    REPLY,
    BackEndError,
    Decoder,
    Message,
    ProtocolError,
    Refused,
    Request,
    encode,
    read_u64,
)

_GONE = "has closed the connection"


class Connection:
    """A connected socket of which this object is the owner."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        sock.setblocking(False)
        self._sock = sock
        self._decoder = Decoder()
        self._fds: list[int] = []  # came along with the message that is being read
        self._deadline = 0.0
        self.acknowledged = False  # REPLY_ACK was negotiated: what has no answer of its own is acknowledged

    @classmethod
    def open(cls, path: str) -> Connection:
        """Connect to the unix socket at `path`. Raises OSError: nobody is there, or does not take connections at present."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)  # at once or never: a full backlog is EAGAIN
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        """Return the descriptor, to be watched for an end of the connection."""
        return self._sock.fileno()

    def limit(self, seconds: float) -> None:
        """Let everything from here to the next limit take that long together."""
        self._deadline = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._deadline - time.monotonic()

    def close(self) -> None:
        """Hang up. Twice is fine."""
        self._sock.close()
        self._close_fds()

    # The front end's side: requests and their answers

    def call(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a request that has an answer, and return its payload."""
        return self.call_with_fds(request, payload, fds, 0)[0]

    def call_with_fds(self, request: Request, payload: bytes, fds: Sequence[int], expected: int) -> tuple[bytes, list[int]]:
        """The same for an answer that `expected` descriptors come with; they are the caller's from here on."""
        self.send(encode(request.number, payload), fds)
        message = self.receive()
        if message.request != request.number or not message.flags & REPLY:
            raise ProtocolError(f"message {message.request} where the answer to {request} was due")
        came = self._fds
        if len(came) != expected:
            raise ProtocolError(f"{len(came)} descriptors in the answer to {request}, not {expected}")
        self._fds = []
        return message.payload, came

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no answer of its own; wait until it is acknowledged where that was negotiated."""
        if not self.acknowledged:
            self.send(encode(request.number, payload), fds)
            return
        self.send(encode(request.number, payload, NEED_REPLY), fds)
        message = self.receive()
        if message.request != request.number or not message.flags & REPLY:
            raise ProtocolError(f"message {message.request} where the acknowledgement of {request} was due")
        self._close_fds()
        if failure := read_u64(message.payload):
            raise Refused(f"refuses {request} ({failure:#x})")

    # Whole messages

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises BackEndError when the peer is gone or does not read."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        view = memoryview(data)
        while view:
            try:
                sent = self._sock.sendmsg([view], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, "does not read")
                continue
            except OSError as error:
                raise BackEndError(_GONE if isinstance(error, ConnectionError) else f"sending fails: {error.strerror}") from None
            view, ancillary = view[sent:], []

    def receive(self) -> Message:
        """Return the next message. Raises BackEndError when none comes in time."""
        while True:
            message = self.poll()
            if message is not None:
                return message
            self._wait(select.POLLIN, "does not answer")

    def poll(self) -> Message | None:
        """Return the next message if it is there. Raises BackEndError when none will come any more."""
        if self._decoder.idle:
            self._close_fds()
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    self._decoder.needs, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            except OSError as error:
                raise BackEndError(_GONE if isinstance(error, ConnectionError) else f"receiving: {error.strerror}") from None
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array("i")
                    received.frombytes(content[: len(content) // 4 * 4])
                    self._fds.extend(received)
            if len(self._fds) > MAX_FDS or flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {MAX_FDS} descriptors with a message")
            if not data:
                raise BackEndError(_GONE)
            message = self._decoder.feed(data)
            if message is not None:
                return message

    def _wait(self, events: int, otherwise: str) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        left = self.left
        if left <= 0 or not poll.poll(left * 1000):
            raise BackEndError(otherwise)

    def _close_fds(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
