"""One client of the NBD server, on a thread: sockets that block, and a poll only while the disk is at work.

A request that the channel finishes inline is answered at once; others when the channel's event descriptor says so. Replies go
out in batches of about a MiB. A connection holds at most 128 requests and its part of the export's memory (`budget`); it reads
no further before some replies are sent.

Not here: who accepts the client and cuts it off (`server`), and the wire format (`protocol`).
"""

from __future__ import annotations

import errno
import math
import select
import socket
import ssl
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import BlockError
from . import protocol as p

if TYPE_CHECKING:
    from .server import Export

_HANDSHAKE_SECONDS = 30
_TLS_SECONDS = 10  # of it, for encryption
_LOOK = 1  # seconds of waiting for the client after which a thread looks whether it should end
_TIMEVAL = struct.pack("ll", _LOOK, 0)
_MAX_REQUESTS = 128
_READ = 1 << 18
_BATCH = 1 << 20  # bytes of replies that are gathered before they are sent
_CARRY = (p.CMD_READ, p.CMD_WRITE)  # data, which are held until the reply is sent
_CHANGE = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)


class Connection:
    """Owns its socket. Everything is on the thread that calls run(), but for `stopped`, which anybody may set.

    Shutting a socket down does not wake who is writing to it (unix(7) sockets), so nobody waits for a client for long at a time.
    """

    def __init__(self, sock: socket.socket, export: Export) -> None:
        self._sock = sock
        self._export = export
        self._input = bytearray()
        self._output: list[bytes | bytearray] = []
        # Bytes: of the requests that came and whose replies are not sent, of those that are answered, of a write that comes in.
        self._held = self._answered = self._coming = 0
        self._part = export.budget.part
        self._turn: float | None = None  # when it is over; None: there is no request that is larger than our part
        self._full = False  # the next request has to wait for room
        self._running = 0
        self._structured = False
        self._room = 0  # in front of the data in a reply
        self._chosen: list[int] = []
        self._deadline = time.monotonic() + _HANDSHAKE_SECONDS
        self.began = self.stopped = False

    def run(self) -> None:
        """Serve the client until it leaves, breaks the protocol or is cut off."""
        self.began = True
        try:
            # TLS errors and timeouts are OSErrors. Who runs this machine out of memory or descriptors loses his connection.
            with suppress(p.ProtocolError, OSError, BlockError, MemoryError):
                self._sock.settimeout(_LOOK)
                self._handshake()
                self._deadline = math.inf
                if not isinstance(self._sock, ssl.SSLSocket):
                    # The kernel's own time limits: Python's would cost a poll each time.
                    self._sock.settimeout(None)
                    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL)
                channel = self._export.disk.channel()
                try:
                    self._requests(channel)
                finally:
                    channel.close()
        finally:
            if self._turn is not None:
                self._export.budget.give_turn_back()
            self._sock.close()

    def _receive(self) -> bytes:
        """Wait for bytes of the client; none at its end."""
        while True:
            try:
                data = self._sock.recv(_READ)
            except (BlockingIOError, TimeoutError):
                self._look()
                continue
            if self._turn is not None:
                self._look()  # who sends a byte now and then may not hold up others either
            return data

    def _send(self, data: bytes | bytearray) -> None:
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                try:
                    at += self._sock.send(view[at:])
                except (BlockingIOError, TimeoutError):
                    self._look()
                    continue
                if self._turn is not None:
                    self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if self.stopped or now > self._deadline:
            raise p.ProtocolError("cut off")
        if self._turn is not None and now > self._turn and self._export.budget.wanted():
            raise p.ProtocolError("a client that holds up others")

    def _handshake(self) -> None:
        handshake = self._export.handshake()

        def send() -> None:
            data = bytes(handshake.output)
            handshake.output.clear()
            self._send(data)

        send()
        while not handshake.done:
            data = self._receive()
            self._look()
            if not data:
                raise p.ProtocolError("the client left")
            try:
                handshake.feed(data)
            finally:
                send()
            if handshake.start_tls and self._export.tls is not None:
                self._sock.settimeout(_TLS_SECONDS)
                # Without a polite end: clients close the socket, and a reply that is cut off shows in its length.
                self._sock = self._export.tls.wrap_socket(self._sock, server_side=True, suppress_ragged_eofs=True)
                self._sock.settimeout(_LOOK)
                handshake.secured()
        self._structured = handshake.structured
        self._room = p.read_room(structured=self._structured)
        self._chosen = handshake.chosen
        self._input += handshake.rest()

    def _requests(self, channel: Any) -> None:
        sock = self._sock
        receive, disk = self._receive, channel.completion_fd
        either, only_disk = select.poll(), select.poll()
        either.register(sock, select.POLLIN)
        for poll in (either, only_disk):
            poll.register(disk, select.POLLIN)
        while True:
            more = True
            while more:
                more = self._take_requests(channel)
                channel.submit()
                if self._output:
                    pieces, self._output = self._output, []
                    # Few system calls for small replies, no second copy of large ones.
                    small = len(pieces) > 1 and sum(map(len, pieces)) <= 2 * _BATCH
                    for piece in [b"".join(pieces)] if small else pieces:
                        self._send(piece)
                    self._sent()
            if self._running:
                full = self._full or self._running >= _MAX_REQUESTS
                # What TLS has decrypted already is not the socket's any more.
                waits = not (isinstance(sock, ssl.SSLSocket) and sock.pending())
                ready = dict((only_disk if full else either).poll(None if waits or full else 0))
                if disk in ready:
                    for token, result in channel.completions():
                        self._running -= 1
                        self._finished(channel, token[0], token[1], result, flushed=len(token) == 3)
                if full or (waits and sock.fileno() not in ready):
                    continue
            data = receive()
            if not data:
                return
            self._input += data

    def _sent(self) -> None:
        """The replies so far are the client's now, and their memory is free."""
        self._held -= self._answered
        self._answered = 0
        if self._turn is not None and not self._held:
            self._turn = None
            self._export.budget.give_turn_back()

    def _has_room(self, length: int) -> bool:
        """Whether there is room for a request's data, perhaps after waiting for it; if not, replies have to be sent before."""
        if self._held + length > self._part:
            if self._held or self._running or self._output:
                return False
            self._turn = self._export.budget.take_turn(self._look)
        self._held += length
        return True

    def _take_requests(self, channel: Any) -> bool:
        """Begin the requests that have come. Returns whether to come again when the replies so far have been sent."""
        data, at, size = self._input, 0, p.REQUEST.size
        room, queued = self._room, 0
        self._full = False
        try:
            while len(data) - at >= size and self._running < _MAX_REQUESTS:
                if queued > _BATCH:
                    return True
                request = p.parse_request(data, at)
                flags, kind, _, offset, length = request
                known = not flags or p.flags_are_known(request)
                if kind in _CARRY and length <= p.MAX_PAYLOAD and not self._coming and not self._has_room(length):
                    self._full = True
                    return bool(self._output)
                reply = None
                if kind == p.CMD_READ and length <= p.MAX_PAYLOAD and known:
                    at += size
                    # In the place that it has in the reply: nothing is copied but by the socket.
                    reply = bytearray(room + length)
                    result = channel.readv(offset, [memoryview(reply)[room:]], (request, reply)) if length else 0
                    queued += length
                elif kind == p.CMD_BLOCK_STATUS and known and self._chosen and 0 < length <= self._export.disk.size - offset:
                    at += size
                    pieces = self._block_status(request)
                    self._output += pieces
                    queued += sum(map(len, pieces))
                    continue
                else:
                    payload = length if kind == p.CMD_WRITE else 0
                    if len(data) - at - size < payload:
                        self._coming = payload
                        return False
                    self._coming = 0
                    start, at = at + size, at + size + payload
                    result = self._start(channel, request, data[start:at] if payload else b"", known)
                if result is None:
                    self._running += 1
                else:
                    self._finished(channel, request, reply, result)
            return False
        finally:
            del data[:at]

    def _start(self, channel: Any, request: p.Request, payload: bytes | bytearray, known: bool) -> int | None:
        """Begin anything but a read and a block status, and return the channel's result. `known`: its flags are."""
        _, kind, _, offset, length = request
        token = (request, None)
        result: int | None = -errno.EINVAL
        if kind == p.CMD_DISC:
            raise p.ProtocolError("the client said goodbye")  # there is no reply to it, whatever its flags are
        if not known:
            return result
        if kind in (p.CMD_WRITE, p.CMD_WRITE_ZEROES) and offset + length > self._export.disk.size:
            result = -errno.ENOSPC  # what the protocol wants instead
        elif kind == p.CMD_WRITE:
            result = channel.writev(offset, [memoryview(payload)], token) if length else 0
        elif kind == p.CMD_FLUSH:
            result = channel.flush(token)
        elif kind == p.CMD_TRIM:
            result = channel.discard(offset, length, token)
        elif kind == p.CMD_WRITE_ZEROES:
            result = channel.write_zeroes(offset, length, token, not request.flags & p.CMD_FLAG_NO_HOLE)
        return result

    def _finished(self, channel: Any, request: p.Request, reply: bytearray | None, result: int, flushed: bool = False) -> None:
        """Answer a request that is done, or flush first what was to be on the disk by then."""
        held = request.length if request.kind in _CARRY and request.length <= p.MAX_PAYLOAD else 0
        if not result:
            if reply is not None:
                self._answered += held
                p.answer_read(request, reply, structured=self._structured)
                self._output.append(reply)
                return
            if request.flags & p.CMD_FLAG_FUA and request.kind in _CHANGE and not flushed:
                flushing = channel.flush((request, None, True))
                if flushing is None:
                    self._running += 1
                    return
                result = flushing
        self._answered += held
        self._output += p.answer(request, result, structured=self._structured)

    def _block_status(self, request: p.Request) -> list[bytes | bytearray]:
        limit = 1 if request.flags & p.CMD_FLAG_REQ_ONE else 1024
        try:
            answers = [(i, self._export.status[i](request.offset, request.length, limit)) for i in self._chosen]
            return p.answer_status(request, answers)
        except Exception:  # an image that is found wrong: the client hears of an I/O error
            return p.answer(request, -errno.EIO, structured=True)
