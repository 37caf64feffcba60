"""A driver of one device of a running machine in test mode, which does everything right, and networks that need no tap."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from struct import pack, unpack
from typing import Any

import pytest

from pystratovirt.devices import net
from running_vm import LIMIT, STATUS, RunningVm
from virtio_devices.net.backend import Backend
from virtio_devices.net.stream import StreamBackend

MiB = 1 << 20
SEL, NUM_MAX, NUM, READY, NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
ENTRIES = 16
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13  # virtio 1.2, section 5.2.6


class Driver:
    """A well-behaved driver of the device in a slot."""

    def __init__(self, vm: RunningVm, slot: int, queues: int) -> None:
        """Accept everything that is offered, and set up the queues."""
        self._vm = vm
        self._slot = slot
        self._made = [0] * queues
        for status in (0, 1, 3):
            self._set(STATUS, status)
        for half in (0, 1):
            self._set(0x014, half)
            self._set(0x024, half)
            self._set(0x020, vm.register(slot, 0x010))
        self._set(STATUS, 11)
        for queue in range(queues):
            vm.access.write(self._base(queue), bytes(0x1000))  # another driver may have had it
            self._set(SEL, queue)
            self._set(NUM, ENTRIES)
            for offset, part in ((0x080, 0), (0x090, 0x400), (0x0A0, 0x800)):
                self._set(offset, self._base(queue) + part)
            self._set(READY, 1)
        self._set(STATUS, 15)
        assert vm.register(slot, STATUS) == 15

    def request(self, queue: int, readable: bytes, *writable: int, waits: bool = True) -> bytes:
        """Offer one request, and wait until the device has used it; return what is where it may write."""
        base, memory = self._base(queue), self._vm.access
        parts = [(len(readable), 0)] * bool(readable) + [(length, 2) for length in writable]
        memory.write(base + 0x1000, readable)
        address = base + 0x1000
        for at, (length, kind) in enumerate(parts):
            last = at + 1 == len(parts)
            memory.write(base + 16 * at, pack("<QIHH", address, length, kind | (not last), 0 if last else at + 1))
            address += length
        made = self._made[queue]
        memory.write(base + 0x404 + 2 * (made % ENTRIES), pack("<H", 0))
        memory.write(base + 0x402, pack("<H", made + 1))
        self._made[queue] += 1
        self._set(NOTIFY, queue)
        if waits:
            until(lambda: self.used(queue) == self._made[queue])
        return memory.read(base + 0x1000 + len(readable), sum(writable))

    def used(self, queue: int) -> int:
        """How many requests the device has used."""
        count: int = unpack("<H", self._vm.access.read(self._base(queue) + 0x802, 2))[0]
        return count

    def disk(self, kind: int, data: bytes = b"", room: int = 0, *, waits: bool = True) -> bytes:
        """Make a request of a disk, at its beginning; return what was read, and the status."""
        return self.request(0, pack("<IIQ", kind, 0, 0) + data, *([room] if room else []), 1, waits=waits)

    def _base(self, queue: int) -> int:
        return MiB * (self._slot + 1) + 0x4000 * queue

    def _set(self, offset: int, value: int) -> None:
        self._vm.register(self._slot, offset, value)


@contextmanager
def streams(monkeypatch: pytest.MonkeyPatch, kind: type[StreamBackend] = StreamBackend) -> Iterator[None]:
    """Every netdev is a stream to nobody."""
    ends: list[socket.socket] = []

    def open_netdev(netdev: Any, take: Any = None) -> Backend:
        ours, theirs = socket.socketpair()
        ends.append(theirs)
        return kind(netdev.id, ours)

    monkeypatch.setattr(net, "open_netdev", open_netdev)
    yield
    for end in ends:
        end.close()


def until(condition: Callable[[], object], complaint: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.002)
