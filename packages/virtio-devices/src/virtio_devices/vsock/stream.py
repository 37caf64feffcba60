"""One connection between a port of the guest and a unix socket of the host: credit, what waits, and which direction has ended.

Sizes and counts are the specification's (virtio 1.2, section 5.10.6.3): free-running 32-bit numbers of bytes. Not here:
packets and queues, and which connections there are (`user`).
"""

from __future__ import annotations

import os
import socket
from collections import deque
from contextlib import suppress

BUF_ALLOC = 128 << 10  # bytes that a guest may have under way to a host that does not read
_IOV_MAX = 64
_PIECE = 4096  # bytes: what is kept lies in pieces of this size, or a guest that sends byte by byte costs us megabytes

_MASK = 0xFFFF_FFFF


class Connection:
    """The state of one connection. Owned by one loop; knows nothing of it."""

    __slots__ = (
        "backlog",
        "backlog_size",
        "batch",
        "closed",
        "credit_requested",
        "ended",
        "established",
        "fwd_cnt",
        "guest_receives",
        "guest_sends",
        "hung_up",
        "key",
        "peer_buf_alloc",
        "peer_fwd_cnt",
        "queued",
        "readable",
        "refused",
        "socket",
        "told_fwd_cnt",
        "tx_cnt",
        "update_owed",
        "watched",
        "writable",
    )

    def __init__(self, key: tuple[int, int], peer: socket.socket, *, established: bool) -> None:
        """`key` is (port of the host, port of the guest); `peer` is non-blocking, and closed by close()."""
        self.key = key
        self.socket = peer
        self.established = established  # both sides have agreed
        self.closed = False
        # To the host
        self.backlog: deque[memoryview] = deque()  # what the host has not taken yet
        self.backlog_size = 0
        self.fwd_cnt = self.told_fwd_cnt = 0  # bytes that left our buffer, and what the guest knows of that
        self.update_owed = False  # the guest is to be told
        self.guest_sends = True
        self.writable = True  # the host's end still takes bytes
        self.refused = False  # it does not, and the guest knows
        # To the guest
        self.tx_cnt = self.peer_buf_alloc = self.peer_fwd_cnt = 0
        self.guest_receives = True
        self.ended = False  # the host's end says no more, and all it said is with the guest
        self.readable = False  # there may be something to read
        self.queued = False  # waits for its turn to be read
        self.credit_requested = False
        self.batch = 2  # receive buffers taken for one read
        self.hung_up = False  # the host's end is closed; what it sent may still be there
        self.watched: int | None = None  # events that the loop watches for; None: not on a loop

    # To the guest

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for. Not above 0 when there is none, whatever it says about itself."""
        return self.peer_buf_alloc - ((self.tx_cnt - self.peer_fwd_cnt) & _MASK)

    def take_credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Note what a packet of the guest says about its buffer."""
        self.peer_buf_alloc, self.peer_fwd_cnt = buf_alloc, fwd_cnt

    def read(self, views: list[memoryview]) -> int | None:
        """Read into `views`; return how many bytes, 0 at the end, None when there is nothing now."""
        try:
            return os.readv(self.socket.fileno(), views)
        except BlockingIOError:
            return None
        except OSError:
            return 0  # ECONNRESET comes behind the last byte (unix(7)): it is an end like others

    def sent(self, length: int) -> None:
        """Count bytes that went to the guest."""
        self.tx_cnt = (self.tx_cnt + length) & _MASK

    # To the host

    def has_room(self, length: int) -> bool:
        """Tell whether the guest may send `length` bytes: it was told BUF_ALLOC, and keeps count."""
        return self.backlog_size + length <= BUF_ALLOC

    def write(self, views: list[memoryview], length: int) -> None:
        """Pass bytes to the host, and keep what it does not take. The views may go afterwards."""
        written = 0
        if not self.backlog:
            written = self._send(views)
        if written < length and self.writable:
            rest = memoryview(b"".join(views))[written:]
            self.backlog_size += len(rest)
            if self.backlog and len(self.backlog[-1]) + len(rest) <= _PIECE:
                self.backlog[-1] = memoryview(b"".join((self.backlog[-1], rest)))
            else:
                self.backlog.append(rest)

    def flush(self) -> None:
        """Pass on what was kept, as far as the host takes it."""
        while self.backlog and self.writable:
            if not (written := self._send([self.backlog[at] for at in range(min(len(self.backlog), _IOV_MAX))])):
                return
            self.backlog_size -= written
            while written:
                first = self.backlog[0]
                if written < len(first):
                    self.backlog[0] = first[written:]
                    return
                written -= len(first)
                self.backlog.popleft()

    def _send(self, views: list[memoryview]) -> int:
        try:
            written = self.socket.sendmsg(views, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.give_up_writing()
            return 0
        self.fwd_cnt = (self.fwd_cnt + written) & _MASK
        return written

    def give_up_writing(self) -> None:
        """The host's end takes no more."""
        self.writable = False
        self.backlog.clear()
        self.backlog_size = 0

    def guest_has_room_for_news(self) -> bool:
        """Tell whether the guest, by what it was told, thinks that less than half of our buffer is free."""
        return (self.fwd_cnt - self.told_fwd_cnt) & _MASK >= BUF_ALLOC // 2

    def shut(self, how: int) -> None:
        """End one direction of the host's end."""
        with suppress(OSError):  # it may have hung up
            self.socket.shutdown(how)

    def close(self) -> None:
        """Hang up, after a last attempt to pass on what was kept. Twice is fine."""
        if not self.closed:
            self.flush()
            self.closed = True
            self.socket.close()
            self.give_up_writing()
