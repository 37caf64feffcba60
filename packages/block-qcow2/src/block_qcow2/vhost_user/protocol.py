"""The vhost-user wire format, back-end side: numbers, payloads, and messages with their descriptors on a socket.

Source: QEMU docs/interop/vhost-user.rst. Integers are in the machine's byte order, which is little-endian wherever this runs.
Not here: what a message means (`session`).
"""

from __future__ import annotations

import os
import socket
from struct import Struct
from typing import NamedTuple

from ..errors import BlockError

HEADER = Struct("<III")  # request, flags, size of the payload
_VERSION, _VERSION_MASK, _REPLY, NEED_REPLY = 1, 3, 1 << 2, 1 << 3

# Front-end message types (section of the same name)
GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG, GET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE = 24, 25, 31, 32, 34
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG = 36, 37, 38

# Protocol features (section of the same name), as masks
F_MQ, F_REPLY_ACK, F_CONFIG, F_INFLIGHT, F_RESET_DEVICE, F_MEM_SLOTS = 1 << 0, 1 << 3, 1 << 9, 1 << 12, 1 << 13, 1 << 15
PROTOCOL_FEATURES = F_MQ | F_REPLY_ACK | F_CONFIG | F_INFLIGHT | F_RESET_DEVICE | F_MEM_SLOTS
F_PROTOCOL_FEATURES = 1 << 30  # in the virtio features: there are protocol features at all

U64 = Struct("<Q")
VRING_STATE = Struct("<II")  # index, number
VRING_ADDR = Struct("<IIQQQQ")  # index, flags; user addresses of descriptors, used and available ring; log address
REGIONS = Struct("<I4x")  # number of regions, which follow
REGION = Struct("<QQQQ")  # guest address, size, user address, offset in the descriptor
CONFIG = Struct("<III")  # offset, size, flags; the content follows
INFLIGHT = Struct("<QQHH4x")  # size and offset of the mapping, number of queues, queue size
MAX_CONFIG = 256  # bytes: the specification's limit
NO_FD, INDEX_MASK = 1 << 8, 0xFF  # in the payload of the three messages that carry an event descriptor

MAX_TABLE = 8  # regions, and descriptors, of one message
_MAX_PAYLOAD = 1024  # bytes; the largest that is known takes 268


class ProtocolError(BlockError):
    """The front end broke the protocol: the message says how."""


class Message(NamedTuple):
    """One message; whoever handles it closes what it does not keep of `fds`."""

    request: int
    need_reply: bool
    payload: bytes
    fds: list[int]


class Connection:
    """A non-blocking socket to a front end. Never reads behind a message: descriptors belong to the one they came with."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._input = bytearray()
        self._fds: list[int] = []

    def receive(self) -> Message | None:
        """The next message, or None while there is no whole one. EOFError when the front end has gone; ProtocolError, OSError."""
        data = self._input
        while True:
            need = HEADER.size
            if len(data) >= need:
                request, flags, size = HEADER.unpack_from(data)
                if flags & _VERSION_MASK != _VERSION or flags & _REPLY or size > _MAX_PAYLOAD:
                    raise ProtocolError(f"message {request} with flags {flags:#x} and {size} bytes")
                need += size
                if len(data) == need:
                    message = Message(request, bool(flags & NEED_REPLY), bytes(data[HEADER.size :]), self._fds)
                    self._fds = []
                    data.clear()
                    return message
            try:
                part, fds, flags, _ = socket.recv_fds(self._socket, need - len(data), MAX_TABLE, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return None
            self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_TABLE:
                raise ProtocolError(f"a message with more than {MAX_TABLE} descriptors")
            if not part:
                raise EOFError
            data += part

    def reply(self, request: int, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        """Answer a message. ProtocolError if the front end does not read its answers."""
        message = HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload
        try:
            sent = socket.send_fds(self._socket, [message], fds) if fds else self._socket.send(message)
        except BlockingIOError:
            sent = 0
        if sent != len(message):
            raise ProtocolError("the front end does not read its answers")

    def close(self) -> None:
        """Close the socket, and descriptors of a message that never became whole."""
        close_all(self._fds)
        self._socket.close()


def close_all(fds: list[int]) -> None:
    """Close every descriptor, and forget it."""
    while fds:
        os.close(fds.pop())
