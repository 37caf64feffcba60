"""A guest's side of the socket device: sends packets, offers receive buffers, reads what comes. Its credit is true."""

from __future__ import annotations

from typing import NamedTuple

from virtio_devices.vsock.packet import CREDIT_UPDATE, HEADER, HOST_CID, REQUEST, RESPONSE, RW, STREAM
from virtio_driver import Driver

CID = 7
RX, TX, EVENT = 0, 1, 2
RX_AREA, TX_AREA = 0x4_0000, 0x8_0000
BUFFER = 4096  # payload of a receive buffer, as in Linux


class Packet(NamedTuple):
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes


class Guest:
    """A driver with 32 receive buffers."""

    def __init__(self, driver: Driver, *, buffers: int = 32, together: bool = False, buf_alloc: int = 1 << 18) -> None:
        self.driver = driver
        self.buf_alloc = buf_alloc
        self.received: dict[tuple[int, int], int] = {}  # bytes by (our port, host's port)
        self.hold = False  # read nothing: give no buffers back and no credit
        self._together = together
        self._where: dict[int, int] = {}
        self._next_tx = TX_AREA
        for at in range(buffers):
            self._offer(RX_AREA + at * (BUFFER + 64))

    def _offer(self, where: int) -> None:
        ring = self.driver.rings[RX]
        size = HEADER.size
        pieces = [(where, size + BUFFER, True)] if self._together else [(where, size, True), (where + size, BUFFER, True)]
        head = ring.chain(*pieces)
        self._where[head] = where
        ring.offer(head)

    def send(
        self,
        op: int,
        src_port: int,
        dst_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        kick: bool = True,
        src_cid: int = CID,
        dst_cid: int = HOST_CID,
        kind: int = STREAM,
        buf_alloc: int | None = None,
        length: int | None = None,
    ) -> None:
        """Send one packet."""
        fwd_cnt = self.received.get((src_port, dst_port), 0) & 0xFFFFFFFF
        header = HEADER.pack(
            src_cid, dst_cid, src_port, dst_port, len(data) if length is None else length, kind, op, flags,
            self.buf_alloc if buf_alloc is None else buf_alloc, fwd_cnt,
        )  # fmt: skip
        if self._next_tx + len(header) + len(data) > 0xF_0000:
            self._next_tx = TX_AREA
        where = self._next_tx
        self._next_tx += (len(header) + len(data) + 15) & ~15
        self.driver.memory.write(where, header + data)
        ring = self.driver.rings[TX]
        pieces = [(where, len(header), False)] + ([(where + len(header), len(data), False)] if data else [])
        ring.offer(ring.chain(*pieces))
        if kick:
            self.kick()

    def kick(self, queue: int = TX) -> None:
        self.driver.kick(queue)
        self.driver.rings[queue].collect() if queue == TX else None

    def packets(self) -> list[Packet]:
        """Take what came, and give the buffers back unless we hold them."""
        found = []
        ring = self.driver.rings[RX]
        for head, written in ring.collect():
            where = self._where.pop(head)
            raw = self.driver.memory.read(where, written)
            fields = HEADER.unpack_from(raw)
            assert written == HEADER.size + fields[4]
            packet = Packet(*fields, raw[HEADER.size :])
            assert packet.dst_cid == CID
            found.append(packet)
            if packet.op == RW:
                key = packet.dst_port, packet.src_port
                self.received[key] = self.received.get(key, 0) + packet.length
            if not self.hold:
                self._offer(where)
        if found and not self.hold:
            self.driver.kick(RX)
        return found

    def ops(self) -> list[int]:
        return [packet.op for packet in self.packets()]

    def read(self, src_port: int, dst_port: int) -> bytes:
        """Take everything that comes for one connection, with credit given back, until there is no more."""
        data = b""
        while found := self.packets():
            data += b"".join(packet.data for packet in found)
            self.send(CREDIT_UPDATE, src_port, dst_port)
        return data

    def connect(self, src_port: int, dst_port: int) -> Packet:
        self.send(REQUEST, src_port, dst_port)
        (packet,) = self.packets()
        return packet

    def accept(self) -> tuple[int, int]:
        """Answer a request of the host; return (our port, the host's)."""
        (packet,) = self.packets()
        assert packet.op == REQUEST
        self.send(RESPONSE, packet.dst_port, packet.src_port)
        return packet.dst_port, packet.src_port
