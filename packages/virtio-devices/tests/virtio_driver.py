"""A virtio-mmio driver for tests: speaks to a real transport through a real bus and real guest memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from pathlib import Path

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice
from virtio_devices.mmio import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, MmioTransport
from virtio_devices.mmio_registers import SIZE
from virtio_rings import Ring
from vmm_core.bus import Bus
from vmm_core.clock import VirtualClock
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory

BASE = 0xD000_0000
RINGS = 0x1000  # where the driver puts its rings, sharing the space up to DATA
DATA = 0x4_0000  # where it puts its buffers


def new_loop() -> DirectLoop:
    """Return a loop that runs only in poll(), with a clock of its own that moves only when told to."""
    return DirectLoop("test", VirtualClock())


def watched(loop: DirectLoop) -> list[int]:
    """Return the descriptors that a loop watches."""
    return list(loop._handlers)


def descriptors(*, settle: bool = False) -> list[str]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


class Line:
    """An interrupt line that counts its edges."""

    def __init__(self) -> None:
        self.edges = 0
        self._fd = -1

    @property
    def gsi(self) -> int:
        return 5

    def trigger(self) -> None:
        self.edges += 1

    def fileno(self) -> int:
        if self._fd < 0:
            self._fd = os.eventfd(0)
        return self._fd


class Driver:
    """One device behind its transport, with the loop that serves it."""

    def __init__(self, device: VirtioDevice | None, memory: GuestMemory, loop: DirectLoop) -> None:
        self.device, self.memory, self.loop = device, memory, loop
        self.line = Line()
        self.reports: list[str] = []
        self.transport = MmioTransport(device, memory, self.line, report=self.reports.append)
        self.bus = Bus("test bus", 1 << 40)
        self.bus.add(BASE, SIZE, self.transport, "virtio-mmio")
        self.rings: list[Ring] = []
        self._next = DATA

    def close(self) -> None:
        self.transport.close()

    # Registers

    def read(self, offset: int, size: int = 4) -> int:
        return self.bus.read(BASE + offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.bus.write(BASE + offset, size, value)

    def config(self, offset: int, size: int) -> int:
        return self.read(0x100 + offset, size)

    @property
    def status(self) -> int:
        return self.read(0x070)

    @status.setter
    def status(self, value: int) -> None:
        self.write(0x070, value)

    @property
    def broken(self) -> bool:
        return bool(self.status & NEEDS_RESET)

    def offered(self) -> int:
        features = 0
        for sel in (0, 1):
            self.write(0x014, sel)
            features |= self.read(0x010) << (32 * sel)
        return features

    # Negotiation

    def acknowledge(self) -> None:
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER

    def choose(self, features: int) -> None:
        for sel in (0, 1):
            self.write(0x024, sel)
            self.write(0x020, features >> (32 * sel) & 0xFFFF_FFFF)

    def negotiate(self, features: int | None = None) -> bool:
        """Take what is offered, or exactly `features`; return whether the device agreed."""
        self.acknowledge()
        self.choose(self.offered() if features is None else features)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    def enable(self, index: int, size: int = 8) -> Ring:
        """Set up one queue."""
        assert self.device is not None
        room = (DATA - RINGS) // len(self.device.queue_sizes) & ~15
        ring = Ring(self.memory, size, RINGS + room * index)
        assert ring.end <= RINGS + room * (index + 1)
        self.write(0x030, index)
        self.write(0x038, size)
        for register, address in ((0x080, ring.desc), (0x090, ring.avail), (0x0A0, ring.used)):
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(0x044, 1)
        return ring

    def start(self, features: int | None = None, *, size: int = 8, without: int = F_EVENT_IDX) -> Driver:
        """Negotiate (all offered features but `without`, unless `features` are given), enable every queue, and go live."""
        assert self.device is not None
        assert self.negotiate(self.offered() & ~without if features is None else features)
        self.rings = [self.enable(index, size) for index in range(len(self.device.queue_sizes))]
        self.status |= DRIVER_OK
        self.loop.poll()
        return self

    def restart(self) -> Driver:
        """Reset the device and bring it up again, as a driver does that saw DEVICE_NEEDS_RESET."""
        self.status = 0
        self._next = DATA
        return self.start()

    # Requests

    def buffer(self, content: bytes | int) -> tuple[int, int, bool]:
        """Place bytes for the device to read, or room for that many bytes to be written."""
        length = content if isinstance(content, int) else len(content)
        addr = self._next
        self._next += (length + 15) & ~15
        if isinstance(content, int):
            self.memory.write(addr, b"\xcc" * length)
            return (addr, length, True)
        self.memory.write(addr, content)
        return (addr, length, False)

    def offer(self, *buffers: bytes | int, queue: int = 0, table: int | None = None) -> list[tuple[int, int, bool]]:
        """Make one request of buffers available, without a kick."""
        laid = [self.buffer(content) for content in buffers]
        ring = self.rings[queue]
        ring.offer(ring.chain(*laid, table=table))
        return laid

    def kick(self, queue: int = 0) -> None:
        self.write(0x050, queue)
        self.loop.poll()

    def request(self, *buffers: bytes | int, queue: int = 0) -> tuple[int, bytes]:
        """Make one request and wait for it: (bytes written as reported, what is in the writable buffers now)."""
        laid = self.offer(*buffers, queue=queue)
        self.kick(queue)
        done = self.rings[queue].collect()
        assert len(done) == 1, f"{len(done)} requests came back"
        return done[0][1], self.written(laid)

    def written(self, laid: Iterable[tuple[int, int, bool]]) -> bytes:
        return b"".join(self.memory.read(addr, length) for addr, length, writable in laid if writable)


MODERN = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
