"""The network device on real I/O threads: pauses, resets, pairs and networks that come and go under load."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator

import pytest

from net_cable import MAC, Cable, Net, frame
from virtio_devices.device import F_EVENT_IDX
from virtio_devices.mmio import DRIVER_OK
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import HEADER
from virtio_driver import DATA, Line
from vmm_core.clock import MonotonicClock
from vmm_core.guestmem import GuestMemory
from vmm_core.threads import IoThread

LIMIT = 60.0  # seconds; nothing here takes one


class Bell(Line):
    """An interrupt line that a test can wait on."""

    def __init__(self) -> None:
        super().__init__()
        self._rung = threading.Semaphore(0)

    def trigger(self) -> None:
        self._rung.release()

    def wait(self) -> None:
        assert self._rung.acquire(timeout=LIMIT), "no interrupt"


class ThreadedNet(Net):
    """The driver is on the test's thread; the device is on others."""

    def __init__(self, device: NetDevice, memory: GuestMemory) -> None:
        super().__init__(device, memory, None)  # type: ignore[arg-type]
        self.bell = Bell()
        self.transport._line = self.bell

    def go(self, size: int = 64) -> None:
        assert self.negotiate(self.offered() & ~F_EVENT_IDX)
        self.rings = [self.enable(index, size) for index in range(len(self.device.queue_sizes))]
        self.status |= DRIVER_OK
        self._next = DATA

    def kick(self, queue: int = 0) -> None:
        self.write(0x050, queue)

    def collect(self, index: int, count: int) -> list[tuple[int, int]]:
        """Wait until `count` buffers came back."""
        done = self.rings[index].collect()
        while len(done) < count:
            self.bell.wait()
            done += self.rings[index].collect()
        assert len(done) == count
        return done

    def told(self, kind: int, command: int, data: bytes) -> int:
        """Give a command and wait for the answer."""
        laid = self.offer(bytes([kind, command]), data, 1, queue=4)
        self.kick(4)
        self.collect(4, 1)
        return self.written(laid)[0]


@pytest.fixture
def threads() -> Iterator[list[IoThread]]:
    failures: list[str] = []
    clock = MonotonicClock()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads get in each other's way
    threads = [IoThread(f"io{n}", clock, lambda where, error: failures.append(f"{where}: {error!r}")) for n in range(2)]
    for thread in threads:
        thread.start()
    yield threads
    sys.setswitchinterval(interval)
    for thread in threads:
        thread.stop()
    assert not failures


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable(2)
    yield cable
    cable.close()


@pytest.fixture
def driver(memory: GuestMemory, threads: list[IoThread], cable: Cable) -> Iterator[ThreadedNet]:
    driver = ThreadedNet(NetDevice("net0", threads, memory, mac=MAC, backend=cable, pairs=2), memory)
    yield driver
    driver.close()


def test_frames_go_both_ways_through_pauses_and_none_is_lost(driver: ThreadedNet, cable: Cable) -> None:
    driver.go()
    for turn in range(60):
        driver._next = DATA
        for number in range(4):
            driver.offer(2048)
            driver.offer(bytes(HEADER), frame(100 + number, fill=turn), queue=1)
        driver.kick(1)
        for number in range(4):
            cable.send(frame(200 + number, fill=turn))
        driver.transport.pause()
        saved = driver.transport.save()
        assert all(queue.next_avail == queue.next_used for queue in saved.queues)
        driver.transport.resume()
        driver.kick(0)
        assert [length for _, length in driver.collect(0, 4)] == [212, 213, 214, 215]
        driver.collect(1, 4)
        assert [len(one) for one in cable.received()] == [112, 113, 114, 115]


def test_after_a_reset_under_load_guest_memory_is_not_written(driver: ThreadedNet, cable: Cable, memory: GuestMemory) -> None:
    for turn in range(60):
        driver.go()
        for _ in range(8):
            driver.offer(2048)
            cable.send(frame())
        driver.kick(0)
        driver.status = 0
        memory.write(DATA, b"\xa5" * 0x8000)
        cable.send(frame())
        assert memory.read(DATA, 0x8000) == b"\xa5" * 0x8000
        for end in cable.near:
            while True:
                try:
                    end.recv(1 << 17)
                except BlockingIOError:
                    break
        assert turn >= 0


def test_pairs_come_and_go_while_frames_move(driver: ThreadedNet, cable: Cable) -> None:
    driver.go()
    for turn in range(40):
        driver._next = DATA
        for pair in (0, 1):
            driver.offer(2048, queue=2 * pair)
            driver.kick(2 * pair)
            cable.send(frame(100 + turn), pair)
        assert driver.told(4, 0, struct.pack("<H", 2)) == 0
        for pair in (0, 1):
            driver.collect(2 * pair, 1)
        driver.offer(bytes(HEADER), frame(), queue=3)
        driver.kick(3)
        driver.collect(3, 1)
        assert driver.told(4, 0, struct.pack("<H", 1)) == 0
    assert len(cable.received(1)) == 40


def test_a_network_comes_and_goes_under_load(driver: ThreadedNet, cable: Cable) -> None:
    driver.go()
    for _ in range(40):
        driver._next = DATA
        for number in range(4):
            driver.offer(2048)
            driver.offer(bytes(HEADER), frame(100 + number), queue=1)
        driver.kick(0)
        driver.kick(1)
        assert driver.device.detach() is cable
        for _ in range(4):
            cable.send(frame(64))
        driver.device.attach(cable)
        driver.collect(1, 4)
        driver.collect(0, 4)
        cable.received()
    assert driver.device.statistics().rx_frames == 160
