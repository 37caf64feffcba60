"""The NBD wire format, server side, and the handshake as a state machine without I/O.

Source: NetworkBlockDevice/nbd doc/proto.md, sections "Fixed newstyle negotiation", "Transmission", "Structured replies",
"Metadata querying". Not here: sockets, images.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

NBDMAGIC, IHAVEOPT = 0x4E42444D41474943, 0x49484156454F5054
_OPTION_REPLY_MAGIC, _REQUEST_MAGIC = 0x3E889045565A9, 0x25609513
_SIMPLE_MAGIC, _STRUCTURED_MAGIC = 0x67446698, 0x668E33EF

_OPTION = Struct(">QII")  # magic, option, length
_OPTION_REPLY = Struct(">QIII")  # magic, option, type, length
REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_SIMPLE = Struct(">IIQ")  # magic, error, cookie
_STRUCTURED = Struct(">IHHQI")  # magic, flags, type, cookie, length
_READ_HEAD = Struct(">IHHQIQ")  # the same, and the offset of the data that follow

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
_ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN = _ERROR + 1, _ERROR + 3, _ERROR + 5, _ERROR + 6
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN = 1 << 5, 1 << 6, 1 << 7, 1 << 8

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, _, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_DF, CMD_FLAG_REQ_ONE = 1, 2, 4, 8
# Besides FUA, which any command may have ("Command flags").
_COMMAND_FLAGS = {CMD_READ: CMD_FLAG_DF, CMD_WRITE_ZEROES: CMD_FLAG_NO_HOLE, CMD_BLOCK_STATUS: CMD_FLAG_REQ_ONE}

CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_BLOCK_STATUS, CHUNK_ERROR = 0, 1, 5, (1 << 15) + 1
CHUNK_DONE = 1
STATE_HOLE, STATE_ZERO = 1, 2

BASE_ALLOCATION = b"base:allocation"
DIRTY_BITMAP = b"qemu:dirty-bitmap:"  # and the bitmap's name; QEMU docs/interop/nbd.txt
STATE_DIRTY = 1
MAX_NAME = 4096  # bytes of any string
MAX_PAYLOAD = 32 << 20  # bytes: what the protocol wants a server to take at least
_MAX_OPTION = 64 << 10
_MAX_OPTIONS = 64  # of one handshake

_ERRORS = {errno.EPERM: 1, errno.EROFS: 1, errno.EIO: 5, errno.ENOMEM: 12, errno.EINVAL: 22, errno.ENOSPC: 28, errno.EDQUOT: 28}
_ERRORS |= {errno.EFBIG: 28, errno.EOVERFLOW: 75, errno.EOPNOTSUPP: 95, errno.ESHUTDOWN: 108}


class ProtocolError(Exception):
    """The client broke the protocol, or is done: the connection ends."""


_new = tuple.__new__  # half the time of a NamedTuple's own constructor


class Request(NamedTuple):
    """One command of the transmission phase. For writes, `length` bytes of payload follow on the wire."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int


class Handshake:
    """Fixed newstyle negotiation. Feed it bytes; send what `output` holds; `done` says that transmission begins."""

    def __init__(
        self,
        name: str,
        size: int,
        flags: int,
        block: tuple[int, int, int],
        *,
        contexts: Sequence[bytes] = (BASE_ALLOCATION,),
        tls: bool = False,
    ) -> None:
        """`contexts`: what block status can tell. `tls`: nothing is told or exported before the connection is encrypted."""
        self._contexts = contexts
        self._tls = tls  # and it is not encrypted yet
        self._name = name.encode(errors="surrogateescape")
        self._size = size
        self._flags = flags
        self._block = block  # minimum, preferred, maximum, in bytes
        self._input = bytearray()
        self._client_flags: int | None = None
        self._options = 0
        self.output = bytearray(
            NBDMAGIC.to_bytes(8, "big") + IHAVEOPT.to_bytes(8, "big") + (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_bytes(2, "big")
        )
        self.structured = False
        self.chosen: list[int] = []  # indices into `contexts`, in that order
        self.start_tls = False  # whoever owns the connection is to encrypt it now, and then to call secured()
        self.done = False

    def feed(self, data: bytes) -> None:
        """Take bytes from the client. ProtocolError ends the connection, after `output` was sent."""
        self._input += data
        if self._client_flags is None:
            if len(self._input) < 4:
                return
            self._client_flags = int.from_bytes(self._take(4), "big")
            if self._client_flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
                raise ProtocolError(f"unknown client flags {self._client_flags:#x}")
        while not (self.done or self.start_tls) and len(self._input) >= _OPTION.size:
            magic, option, length = _OPTION.unpack_from(self._input)
            if magic != IHAVEOPT or length > _MAX_OPTION:
                raise ProtocolError(f"option with magic {magic:#x} and {length} bytes")
            if len(self._input) < _OPTION.size + length:
                return
            self._options += 1
            if self._options > _MAX_OPTIONS:
                raise ProtocolError("too many options")
            self._take(_OPTION.size)
            self._option(option, self._take(length))

    def secured(self) -> None:
        """The connection is encrypted: what was agreed on before does not count."""
        self.start_tls = self._tls = self.structured = False
        self.chosen = []

    def rest(self) -> bytes:
        """What the client sent behind the handshake."""
        return self._take(len(self._input))

    def _take(self, n: int) -> bytes:
        data = bytes(self._input[:n])
        del self._input[:n]
        return data

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.output += _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _option(self, option: int, data: bytes) -> None:
        if option == OPT_STARTTLS and self._tls:
            if data:
                self._reply(option, REP_ERR_INVALID)
                return
            if self._input:  # would be taken for something that came encrypted
                raise ProtocolError("data behind the wish for encryption")
            self._reply(option, REP_ACK)
            self.start_tls = True
        elif self._tls and option == OPT_EXPORT_NAME:
            raise ProtocolError("a client without encryption")  # this option has no way to say so
        elif self._tls and option != OPT_ABORT:
            self._reply(option, REP_ERR_TLS_REQD)
        elif option == OPT_EXPORT_NAME:
            if data != self._name:
                raise ProtocolError("no such export")  # this option has no way to say so
            self.output += self._size.to_bytes(8, "big") + self._flags.to_bytes(2, "big")
            if not (self._client_flags or 0) & FLAG_NO_ZEROES:
                self.output += bytes(124)
            self.done = True
        elif option == OPT_ABORT:
            self._reply(option, REP_ACK)
            raise ProtocolError("the client gave up")
        elif option == OPT_LIST:
            if data:
                self._reply(option, REP_ERR_INVALID)
                return
            self._reply(option, REP_SERVER, len(self._name).to_bytes(4, "big") + self._name)
            self._reply(option, REP_ACK)
        elif option in (OPT_INFO, OPT_GO):
            self._info(option, data)
        elif option == OPT_STRUCTURED_REPLY:
            if data:
                self._reply(option, REP_ERR_INVALID)
                return
            self.structured = True
            self._reply(option, REP_ACK)
        elif option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
            self._meta_contexts(option, data)
        else:
            self._reply(option, REP_ERR_UNSUP)

    def _info(self, option: int, data: bytes) -> None:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 6 or 6 + length > len(data):
            self._reply(option, REP_ERR_INVALID)
            return
        if data[4 : 4 + length] != self._name:
            self._reply(option, REP_ERR_UNKNOWN)
            return
        self._reply(
            option, REP_INFO, INFO_EXPORT.to_bytes(2, "big") + self._size.to_bytes(8, "big") + self._flags.to_bytes(2, "big")
        )
        sizes = b"".join(n.to_bytes(4, "big") for n in self._block)
        self._reply(option, REP_INFO, INFO_BLOCK_SIZE.to_bytes(2, "big") + sizes)
        self._reply(option, REP_ACK)
        self.done = option == OPT_GO

    def _meta_contexts(self, option: int, data: bytes) -> None:
        length = int.from_bytes(data[:4], "big")
        if not self.structured or len(data) < 8 + length:
            self._reply(option, REP_ERR_INVALID)
            return
        if data[4 : 4 + length] != self._name:
            self._reply(option, REP_ERR_UNKNOWN)
            return
        at = 4 + length
        count = int.from_bytes(data[at : at + 4], "big")
        at += 4
        listing = option == OPT_LIST_META_CONTEXT
        wanted = set(range(len(self._contexts))) if listing and count == 0 else set()
        for _ in range(count):
            size = int.from_bytes(data[at : at + 4], "big")
            if at + 4 + size > len(data):
                self._reply(option, REP_ERR_INVALID)
                return
            query = data[at + 4 : at + 4 + size]
            # A namespace, or one below it, lists what is in it.
            prefix = listing and query.endswith(b":") and query.count(b":") < 3
            wanted |= {i for i, c in enumerate(self._contexts) if c == query or (prefix and c.startswith(query))}
            at += 4 + size
        for i in sorted(wanted):
            number = 0 if listing else i + 1
            self._reply(option, REP_META_CONTEXT, number.to_bytes(4, "big") + self._contexts[i])
        if not listing:
            self.chosen = sorted(wanted)
        self._reply(option, REP_ACK)


def parse_request(data: bytes | bytearray | memoryview, at: int = 0) -> Request:
    """The header of a request: REQUEST.size bytes from `at`. ProtocolError if it is none, or its payload is too large."""
    magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(data, at)
    if magic != _REQUEST_MAGIC:
        raise ProtocolError(f"request with magic {magic:#x}")
    if kind == CMD_WRITE and length > MAX_PAYLOAD:
        raise ProtocolError(f"a write of {length} bytes, at most {MAX_PAYLOAD}")
    return _new(Request, (flags, kind, cookie, offset, length))


def flags_are_known(request: Request) -> bool:
    """Whether every flag of the request is one that its command has; if not, the answer is EINVAL ("Error values")."""
    return not request.flags & ~(CMD_FLAG_FUA | _COMMAND_FLAGS.get(request.kind, 0))


def wire_error(result: int) -> int:
    """A negative errno as an NBD error."""
    return _ERRORS.get(-result, 5) if result else 0


def read_room(*, structured: bool) -> int:
    """Bytes in front of the data in the reply to a read."""
    return _READ_HEAD.size if structured else _SIMPLE.size


def answer_read(request: Request, reply: bytearray, *, structured: bool) -> None:
    """Complete the reply to a read that went well: `reply` has the data already, behind read_room() bytes."""
    if structured:
        length = len(reply) - _STRUCTURED.size
        _READ_HEAD.pack_into(reply, 0, _STRUCTURED_MAGIC, CHUNK_DONE, CHUNK_OFFSET_DATA, request.cookie, length, request.offset)
    else:
        _SIMPLE.pack_into(reply, 0, _SIMPLE_MAGIC, 0, request.cookie)


def answer(request: Request, result: int, *, structured: bool) -> list[bytes | bytearray]:
    """The reply to anything but block status and a read that went well."""
    error = wire_error(result)
    if not structured:
        return [_SIMPLE.pack(_SIMPLE_MAGIC, error, request.cookie)]
    if error:
        payload = error.to_bytes(4, "big") + bytes(2)
        return [_STRUCTURED.pack(_STRUCTURED_MAGIC, CHUNK_DONE, CHUNK_ERROR, request.cookie, len(payload)) + payload]
    return [_STRUCTURED.pack(_STRUCTURED_MAGIC, CHUNK_DONE, CHUNK_NONE, request.cookie, 0)]


def answer_status(request: Request, answers: Sequence[tuple[int, list[tuple[int, int]]]]) -> list[bytes | bytearray]:
    """The reply to block status: for each context its index and (length, state) of adjacent extents."""
    pieces: list[bytes | bytearray] = []
    for n, (context, extents) in enumerate(answers):
        payload = (context + 1).to_bytes(4, "big")
        payload += b"".join(length.to_bytes(4, "big") + state.to_bytes(4, "big") for length, state in extents)
        last = CHUNK_DONE if n + 1 == len(answers) else 0
        pieces.append(_STRUCTURED.pack(_STRUCTURED_MAGIC, last, CHUNK_BLOCK_STATUS, request.cookie, len(payload)) + payload)
    return pieces
