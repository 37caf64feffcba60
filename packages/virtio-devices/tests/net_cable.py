"""A network for tests: a back end whose taps are datagram sockets, and a driver that speaks of frames."""

from __future__ import annotations

import os
import socket
import struct

from virtio_devices.device import F_EVENT_IDX
from virtio_devices.net.backend import Backend, Lane
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import F_MRG_RXBUF, HEADER, OFFLOADS
from virtio_devices.net.taplane import TapLane
from virtio_driver import Driver
from vmm_core.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("525400aabbcc")
BROADCAST = b"\xff" * 6


def frame(size: int = 60, *, to: bytes = MAC, tag: int | None = None, fill: int = 0x5A) -> bytes:
    """Return an Ethernet frame of `size` bytes, in a VLAN if it has a tag."""
    kind = b"\x08\x00" if tag is None else struct.pack(">HHH", 0x8100, tag, 0x0800)
    return (to + OTHER + kind).ljust(size, bytes([fill]))


class Cable(Backend):
    """A back end with one datagram socket a pair; `ends` are the network's. Frames have the virtio header there, as on a tap."""

    def __init__(self, pairs: int = 1, features: int = OFFLOADS) -> None:
        self.name, self.pairs, self.features = "cable", pairs, features
        sockets = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(pairs)]
        self.ends = [far for _, far in sockets]
        self.near = [near for near, _ in sockets]
        for one in (*self.ends, *self.near):
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.offloads: list[int] = []
        self.counts: list[int] = []
        self.gone = False

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        return TapLane(owner, pair, loop, self.near[pair].fileno())

    def alive(self) -> bool:
        return not self.gone

    def set_offloads(self, features: int) -> None:
        if self.gone:
            raise OSError(77, os.strerror(77))
        self.offloads.append(features)

    def set_pairs(self, count: int) -> None:
        self.counts.append(count)

    def send(self, data: bytes, pair: int = 0, header: bytes = bytes(HEADER)) -> None:
        """Put a frame onto the network's side."""
        self.ends[pair].send(header + data)

    def received(self, pair: int = 0) -> list[bytes]:
        """Return the frames that the driver sent, each behind its header."""
        frames = []
        while True:
            try:
                frames.append(self.ends[pair].recv(1 << 17))
            except BlockingIOError:
                return frames

    def close(self) -> None:
        for one in (*self.ends, *self.near):
            one.close()


class Net(Driver):
    """A network device's driver."""

    device: NetDevice

    def up(self, *, mergeable: bool = True, without: int = F_EVENT_IDX, size: int = 16) -> Net:
        self.start(without=without | (0 if mergeable else F_MRG_RXBUF), size=size)
        return self

    def room(self, *lengths: int, pair: int = 0) -> None:
        """Offer receive buffers."""
        for length in lengths:
            self.offer(length, queue=2 * pair)
        self.kick(2 * pair)

    def say(self, *frames: bytes, pair: int = 0) -> list[tuple[int, int]]:
        """Send frames; return what came back."""
        for data in frames:
            self.offer(bytes(HEADER), data, queue=2 * pair + 1)
        self.kick(2 * pair + 1)
        return self.rings[2 * pair + 1].collect()

    def heard(self, pair: int = 0) -> list[bytes]:
        """Return the frames that arrived, checking each header. Buffers are of one piece."""
        ring, memory = self.rings[2 * pair], self.memory
        done = ring.collect()
        frames = []
        while done:
            first = memory.read(memory.load(ring.desc + 16 * done[0][0], 8), done[0][1])
            (count,) = struct.unpack_from("<H", first, 10)
            assert 1 <= count <= len(done)
            parts = [first[HEADER:]]
            parts += [memory.read(memory.load(ring.desc + 16 * head, 8), length) for head, length in done[1:count]]
            frames.append(b"".join(parts))
            del done[:count]
        return frames

    def command(self, kind: int, command: int, *data: bytes) -> int:
        """Give a command; return the answer."""
        index = len(self.rings) - 1
        written, answer = self.request(bytes([kind, command]), *(part for part in data if part), 1, queue=index)
        assert written == 1
        return answer[0]

    @property
    def link(self) -> int:
        return self.config(6, 2)
