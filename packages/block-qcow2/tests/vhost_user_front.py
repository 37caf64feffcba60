"""A vhost-user front end with the driver behind it: enough of both to do right, and everything wrong, by hand."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

from block_qcow2.vhost_user import protocol as p
from block_qcow2.vhost_user.blk import F_EVENT_IDX, F_FLUSH, F_INDIRECT_DESC, F_VERSION_1

MiB = 1 << 20
USER = 0x7000_0000_0000  # where the front end has its memory
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000  # of a queue, which has 0x4000 bytes
DATA = 0x4_0000  # guest address from which requests take their buffers
SIZE = 64  # descriptors
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
USUAL = p.F_PROTOCOL_FEATURES | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_FLUSH
EVENT = b"\1\0\0\0\0\0\0\0"


class Memory:
    """Guest memory as two adjacent regions of 1 MiB, each a file of its own."""

    def __init__(self) -> None:
        self.fds = [os.memfd_create("guest"), os.memfd_create("guest")]
        for fd in self.fds:
            os.ftruncate(fd, MiB)
        self.maps = [mmap.mmap(fd, MiB) for fd in self.fds]

    def write(self, at: int, data: bytes) -> None:
        for byte_at, part in self._parts(at, len(data)):
            self.maps[byte_at // MiB][byte_at % MiB : byte_at % MiB + part] = data[byte_at - at : byte_at - at + part]

    def read(self, at: int, n: int) -> bytes:
        return b"".join(self.maps[a // MiB][a % MiB : a % MiB + part] for a, part in self._parts(at, n))

    def _parts(self, at: int, n: int) -> list[tuple[int, int]]:
        border = max(min(MiB - at, n), 0)
        return [(a, m) for a, m in ((at, border), (at + border, n - border)) if m]

    def regions(self) -> list[tuple[int, int, int, int]]:
        return [(i * MiB, MiB, USER + i * 16 * MiB, 0) for i in range(2)]

    def close(self) -> None:
        for m, fd in zip(self.maps, self.fds, strict=True):
            m.close()
            os.close(fd)


class Front:
    """One connection."""

    def __init__(self, path: str, memory: Memory) -> None:
        self.memory = memory
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self.events: list[int] = []
        self.next: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.kicks: dict[int, int] = {}
        self.buffers = DATA

    def close(self) -> None:
        self.socket.close()
        for fd in self.events:
            os.close(fd)

    # --- messages ---

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, ack: bool = False) -> None:
        socket.send_fds(self.socket, [p.HEADER.pack(request, 9 if ack else 1, len(payload)) + payload], fds)

    def receive(self) -> tuple[int, bytes, list[int]]:
        head, fds, _, _ = socket.recv_fds(self.socket, p.HEADER.size, 4)
        if not head:
            raise EOFError
        request, flags, size = p.HEADER.unpack(head)
        assert flags == 5
        payload = b""
        while len(payload) < size:
            payload += self.socket.recv(size - len(payload))
        return request, payload, list(fds)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A message that has an answer of its own."""
        self.send(request, payload, fds)
        answered, data, none = self.receive()
        assert (answered, none) == (request, [])
        return data

    def number(self, request: int) -> int:
        return int.from_bytes(self.ask(request), "little")

    def acked(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """A message whose success is asked for."""
        self.send(request, payload, fds, ack=True)
        answered, data, _ = self.receive()
        assert answered == request
        return data == bytes(8)

    # --- set up ---

    def start(self, queues: int = 1, features: int = USUAL, protocol: int = p.PROTOCOL_FEATURES, *, base: int = 0) -> None:
        """What QEMU does when the driver is ready."""
        self.negotiate(features, protocol)
        self.share_memory()
        for i in range(queues):
            for ring in (AVAIL, USED):
                self.memory.write(i * 0x4000 + ring + 2, struct.pack("<H", base))
            self.start_queue(i, base)

    def negotiate(self, features: int = USUAL, protocol: int = p.PROTOCOL_FEATURES) -> None:
        self.features = features
        self.send(p.SET_OWNER)
        assert self.number(p.GET_FEATURES) & features == features
        assert self.number(p.GET_PROTOCOL_FEATURES) & protocol == protocol
        self.send(p.SET_PROTOCOL_FEATURES, p.U64.pack(protocol))
        assert self.acked(p.SET_FEATURES, p.U64.pack(features))

    def share_memory(self) -> None:
        regions = self.memory.regions()
        table = p.REGIONS.pack(len(regions)) + b"".join(p.REGION.pack(*r) for r in regions)
        assert self.acked(p.SET_MEM_TABLE, table, self.memory.fds)

    def start_queue(self, i: int, base: int = 0, size: int = SIZE) -> None:
        at = i * 0x4000
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.events += [kick, call]
        self.kicks[i], self.calls[i] = kick, call
        self.next[i] = self.seen[i] = base
        assert self.acked(p.SET_VRING_NUM, p.VRING_STATE.pack(i, size))
        assert self.acked(p.SET_VRING_BASE, p.VRING_STATE.pack(i, base))
        addresses = p.VRING_ADDR.pack(i, 0, USER + at + DESC, USER + at + USED, USER + at + AVAIL, 0)
        assert self.acked(p.SET_VRING_ADDR, addresses)
        assert self.acked(p.SET_VRING_CALL, p.U64.pack(i), [call])
        assert self.acked(p.SET_VRING_KICK, p.U64.pack(i), [kick])
        if self.features & p.F_PROTOCOL_FEATURES:
            assert self.acked(p.SET_VRING_ENABLE, p.VRING_STATE.pack(i, 1))

    # --- the driver ---

    def describe(self, queue: int, i: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(queue * 0x4000 + DESC + 16 * i, struct.pack("<QIHH", addr, length, flags, following))

    def offer(self, queue: int, head: int, *, kick: bool = True) -> None:
        at = queue * 0x4000 + AVAIL
        index = self.next[queue]
        self.memory.write(at + 4 + 2 * (index % SIZE), struct.pack("<H", head))
        self.next[queue] = (index + 1) & 0xFFFF
        self.memory.write(at + 2, struct.pack("<H", self.next[queue]))
        if kick:
            os.write(self.kicks[queue], EVENT)

    def chain(self, queue: int, head: int, parts: Sequence[tuple[int, int, bool]], *, indirect: int = 0) -> None:
        """Descriptors from `head` on for (address, length, writable) parts; in a table at `indirect` if that is given."""
        for n, (addr, length, writable) in enumerate(parts):
            flags = (F_WRITE if writable else 0) | (F_NEXT if n + 1 < len(parts) else 0)
            if indirect:
                self.memory.write(indirect + 16 * n, struct.pack("<QIHH", addr, length, flags, n + 1))
            else:
                self.describe(queue, head + n, addr, length, flags, head + n + 1)
        if indirect:
            self.describe(queue, head, indirect, 16 * len(parts), F_INDIRECT)

    def used(self, queue: int) -> tuple[int, int]:
        """Wait for the next used element: (head, length)."""
        at = queue * 0x4000 + USED
        poll = select.poll()
        poll.register(self.calls[queue], select.POLLIN)
        while struct.unpack("<H", self.memory.read(at + 2, 2))[0] == self.seen[queue]:
            self.memory.write(queue * 0x4000 + AVAIL + 4 + 2 * SIZE, struct.pack("<H", self.seen[queue]))
            if struct.unpack("<H", self.memory.read(at + 2, 2))[0] != self.seen[queue]:
                break
            assert poll.poll(30_000), "no interrupt within half a minute"
            os.read(self.calls[queue], 8)
        head, length = struct.unpack("<II", self.memory.read(at + 4 + 8 * (self.seen[queue] % SIZE), 8))
        self.seen[queue] = (self.seen[queue] + 1) & 0xFFFF
        return head, length

    def request(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, queue: int = 0, at: int = DATA, **more: Any
    ) -> tuple[int, bytes]:
        """One request and its answer: (status, what was read)."""
        self.memory.write(at, struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(at + 16, data)
        self.memory.write(at + 16 + len(data) + room, b"\xee")
        parts = [(at, 16, False)]
        if data:
            parts.append((at + 16, len(data), False))
        if room:
            parts.append((at + 16 + len(data), room, True))
        parts.append((at + 16 + len(data) + room, 1, True))
        self.chain(queue, 0, parts, **more)
        self.offer(queue, 0)
        head, _ = self.used(queue)
        assert head == 0
        return self.memory.read(at + 16 + len(data) + room, 1)[0], self.memory.read(at + 16 + len(data), room)
