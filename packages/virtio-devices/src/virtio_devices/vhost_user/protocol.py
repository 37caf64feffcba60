"""Messages of the vhost-user protocol: their names, numbers and layouts, and an incremental decoder. Bytes and nothing else.

Source: "Vhost-user Protocol", docs/interop/vhost-user.rst of QEMU, here *the specification*. The peer is another process and may
be wrong or hostile: every length is bounded before it is waited for, and every number is checked where it is unpacked.

Not here: sockets, who owns the descriptors that come along (`connection`), and which message follows which (`frontend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from virtio_devices.device import DeviceError

MAX_PAYLOAD = 4096  # bytes; the largest message in use is a configuration space (256 bytes) or a table of 8 regions
MAX_FDS = 8  # "Memory regions description": at most 8 regions, a descriptor each
MAX_REGIONS = 8
MAX_CONFIG = 256  # bytes of configuration space in one message
INFLIGHT_MAX = 64 << 20  # bytes; 32 queues of 32,768 entries need 16 MiB

# Feature bits of the protocol itself, as masks
F_LOG_ALL = 1 << 26  # "Migration"
F_PROTOCOL_FEATURES = 1 << 30  # "Communication"

# "Protocol features", as masks
P_MQ = 1 << 0
P_REPLY_ACK = 1 << 3
P_BACKEND_REQ = 1 << 5
P_CONFIG = 1 << 9
P_INFLIGHT_SHMFD = 1 << 12
P_RESET_DEVICE = 1 << 13

# "Header": flags
VERSION = 0x1
VERSION_MASK = 0x3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

NO_FD = 1 << 8  # SET_VRING_KICK, _CALL, _ERR: there is no descriptor

# All numbers are in the machine's byte order.
_HEADER = Struct("=III")  # request, flags, size of the payload
_U64 = Struct("=Q")
_VRING_STATE = Struct("=II")  # index, num
_VRING_ADDR = Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
_MEMORY = Struct("=II")  # number of regions, padding
_REGION = Struct("=QQQQ")  # guest address, size, user address, offset in the descriptor's file
_CONFIG = Struct("=III")  # offset, size, flags; then the bytes
_INFLIGHT = Struct("=QQHH4x")  # size, offset, queues, queue size; QEMU's structure is padded to 24 bytes

HEADER_SIZE = _HEADER.size


class BackEndError(DeviceError):
    """The back end cannot be used: it is gone, too slow, refuses, or breaks the protocol. The message says what it did."""


class Refused(BackEndError):
    """The back end has acknowledged a message with a failure."""


class ProtocolError(BackEndError):
    """The peer sent what the specification does not allow."""


class Request:
    """One request: its number, and the name that messages for people carry."""

    __slots__ = ("name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name

    def __repr__(self) -> str:
        return self.name


# "Front-end message types", those in use here
GET_FEATURES = Request(1, "GET_FEATURES")
SET_FEATURES = Request(2, "SET_FEATURES")
SET_OWNER = Request(3, "SET_OWNER")
SET_MEM_TABLE = Request(5, "SET_MEM_TABLE")
SET_VRING_NUM = Request(8, "SET_VRING_NUM")
SET_VRING_ADDR = Request(9, "SET_VRING_ADDR")
SET_VRING_BASE = Request(10, "SET_VRING_BASE")
GET_VRING_BASE = Request(11, "GET_VRING_BASE")
SET_VRING_KICK = Request(12, "SET_VRING_KICK")
SET_VRING_CALL = Request(13, "SET_VRING_CALL")
SET_VRING_ERR = Request(14, "SET_VRING_ERR")
GET_PROTOCOL_FEATURES = Request(15, "GET_PROTOCOL_FEATURES")
SET_PROTOCOL_FEATURES = Request(16, "SET_PROTOCOL_FEATURES")
GET_QUEUE_NUM = Request(17, "GET_QUEUE_NUM")
SET_VRING_ENABLE = Request(18, "SET_VRING_ENABLE")
SET_BACKEND_REQ_FD = Request(21, "SET_BACKEND_REQ_FD")
GET_CONFIG = Request(24, "GET_CONFIG")
SET_CONFIG = Request(25, "SET_CONFIG")
GET_INFLIGHT_FD = Request(31, "GET_INFLIGHT_FD")
SET_INFLIGHT_FD = Request(32, "SET_INFLIGHT_FD")
RESET_DEVICE = Request(34, "RESET_DEVICE")

# "Back-end message types", the one that is answered
BACKEND_CONFIG_CHANGE = 2


class Message(NamedTuple):
    """A whole message as it came."""

    request: int
    flags: int
    payload: bytes


class Region(NamedTuple):
    """One entry of the memory table. User addresses are what SET_VRING_ADDR speaks of."""

    guest_address: int
    size: int
    user_address: int
    offset: int


class InflightArea(NamedTuple):
    """Where requests under way are recorded: bytes of a shared file, for so many queues of so many entries."""

    size: int
    offset: int
    queues: int
    queue_size: int


class Decoder:
    """Puts a stream back together. Reading never more than `needs` bytes keeps descriptors with the message they came with."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._wanted = HEADER_SIZE

    @property
    def needs(self) -> int:
        """How many bytes are missing before more can be said; never 0."""
        return self._wanted - len(self._data)

    @property
    def idle(self) -> bool:
        """Whether nothing of a message has come yet."""
        return not self._data

    def feed(self, data: bytes) -> Message | None:
        """Take at most `needs` bytes; return the message that they complete. Raises ProtocolError, and is of no use after it."""
        self._data += data
        if len(self._data) < self._wanted:
            return None
        request, flags, size = _HEADER.unpack_from(self._data)
        if self._wanted == HEADER_SIZE:
            if flags & VERSION_MASK != VERSION:
                raise ProtocolError(f"a message of version {flags & VERSION_MASK}")
            if size > MAX_PAYLOAD:
                # Waiting for it would let the peer choose how much memory this process uses.
                raise ProtocolError(f"a payload of {size} bytes; at most {MAX_PAYLOAD} are taken")
            self._wanted += size
            if size:
                return None
        message = Message(request, flags, bytes(self._data[HEADER_SIZE:]))
        self._data.clear()
        self._wanted = HEADER_SIZE
        return message


def encode(number: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """Return a message: request number, payload, and flags beside the version."""
    return _HEADER.pack(number, VERSION | flags, len(payload)) + payload


# Payloads


def u64(value: int) -> bytes:
    """Return the payload "a single 64-bit integer"."""
    return _U64.pack(value)


def read_u64(payload: bytes) -> int:
    """Read it back. Raises ProtocolError."""
    value: int = _unpack(_U64, payload, "a 64-bit integer")[0]
    return value


def vring_state(index: int, num: int) -> bytes:
    """Return the payload "a vring state description"."""
    return _VRING_STATE.pack(index, num)


def read_vring_state(payload: bytes) -> tuple[int, int]:
    """Return (index, num). Raises ProtocolError."""
    index, num = _unpack(_VRING_STATE, payload, "a vring state")
    return index, num


def vring_addr(index: int, descriptor: int, used: int, available: int) -> bytes:
    """Return the payload "a vring address description", in user addresses and without a log."""
    return _VRING_ADDR.pack(index, 0, descriptor, used, available, 0)


def memory_table(regions: Sequence[Region]) -> bytes:
    """Return the payload "memory regions description"; a descriptor for each region goes along."""
    return _MEMORY.pack(len(regions), 0) + b"".join(_REGION.pack(*region) for region in regions)


def config_space(offset: int, data: bytes) -> bytes:
    """Return the payload "virtio device config space", for writable fields."""
    return _CONFIG.pack(offset, len(data), 0) + data


def read_config_space(payload: bytes, offset: int, size: int) -> bytes:
    """Return the `size` bytes at `offset` that were asked for. Raises ProtocolError when the answer is another."""
    if not payload:
        raise BackEndError("does not give its configuration space")  # what an empty answer means
    if len(payload) != _CONFIG.size + size or _CONFIG.unpack_from(payload)[:2] != (offset, size):
        raise ProtocolError(f"another part of the configuration space than the {size} bytes at {offset}")
    return payload[_CONFIG.size :]


def inflight(area: InflightArea) -> bytes:
    """Return the payload "inflight description"."""
    return _INFLIGHT.pack(*area)


def read_inflight(payload: bytes) -> InflightArea:
    """Read it back. Raises ProtocolError, also for an area that no queues of ours need."""
    if len(payload) == _INFLIGHT.size - 4:  # without the padding, as the specification's picture has it
        payload += bytes(4)
    area = InflightArea(*_unpack(_INFLIGHT, payload, "an inflight description"))
    if not 0 < area.size <= INFLIGHT_MAX or area.offset >= 1 << 63:
        raise ProtocolError(f"an inflight area of {area.size} bytes at {area.offset}; at most {INFLIGHT_MAX}")
    return area


def _unpack(layout: Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"{len(payload)} bytes where {what} of {layout.size} was due")
    return layout.unpack(payload)
