"""Devices on real I/O threads, with disks that finish on threads of their own: reset, pause and removal under load."""

from __future__ import annotations

import os
import queue
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from virtio_devices.blk.device import FLUSH, IN, S_IOERR, S_OK, BlkDevice
from virtio_devices.device import F_EVENT_IDX
from virtio_devices.mmio import DRIVER_OK
from virtio_disk import MemoryChannel, MemoryDisk
from virtio_driver import DATA, Driver, Line
from vmm_core.clock import MonotonicClock
from vmm_core.guestmem import GuestMemory
from vmm_core.threads import IoThread

LIMIT = 60.0  # seconds; nothing here takes one


class WorkerChannel(MemoryChannel):
    """Finishes requests on a thread."""

    def __init__(self, disk: MemoryDisk) -> None:
        super().__init__(disk)
        self._work: queue.SimpleQueue[tuple[Callable[[], int], Any] | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._busy = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def submit(self) -> None:
        with self._idle:
            self._busy += len(self.waiting)
        for one in self.waiting:
            self._work.put(one)
        if self.waiting:
            self.disk.begun.release()  # type: ignore[attr-defined]
        self.waiting.clear()

    def _run(self) -> None:
        while (one := self._work.get()) is not None:
            work, token = one
            for _ in range(100):
                os.sched_yield()  # others run while the request is under way
            result = work()
            with self._idle:
                self.done.append((token, result))
                self._busy -= 1
                os.eventfd_write(self.completion_fd, 1)
                self._idle.notify_all()

    def completions(self) -> list[tuple[Any, int]]:
        with self._idle:
            return super().completions()

    def drain(self) -> None:
        with self._idle:
            assert self._idle.wait_for(lambda: not self._busy, LIMIT)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        super().close()


class WorkerDisk(MemoryDisk):
    """A disk whose channels finish requests on threads."""

    def __init__(self) -> None:
        super().__init__(inline=False)
        self.begun = threading.Semaphore(0)  # a batch is under way

    def channel(self) -> MemoryChannel:
        self.channels.append(WorkerChannel(self))
        return self.channels[-1]


class Bell(Line):
    """An interrupt line that a test can wait on."""

    def __init__(self) -> None:
        super().__init__()
        self._rung = threading.Semaphore(0)

    def trigger(self) -> None:
        self._rung.release()

    def wait(self) -> None:
        assert self._rung.acquire(timeout=LIMIT), "no interrupt"


class ThreadedDriver(Driver):
    """A block device's driver on the test's thread; the device is on others."""

    def __init__(self, device: BlkDevice, memory: GuestMemory) -> None:
        super().__init__(device, memory, None)  # type: ignore[arg-type]
        self.bell = Bell()
        self.transport._line = self.bell

    def up(self) -> None:
        assert self.device is not None
        assert self.negotiate(self.offered() & ~F_EVENT_IDX)
        self.rings = [self.enable(index, 64) for index in range(len(self.device.queue_sizes))]
        self.status |= DRIVER_OK
        self._next = DATA

    def read_some(self, index: int, count: int) -> None:
        for _ in range(count):
            self.offer(struct.pack("<IIQ", IN, 0, 1), 512, 1, queue=index)
        self.write(0x050, index)

    def collect(self, index: int, count: int) -> None:
        """Wait until `count` requests came back."""
        done = len(self.rings[index].collect())
        while done < count:
            self.bell.wait()
            done += len(self.rings[index].collect())
        assert done == count


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
def disk() -> WorkerDisk:
    return WorkerDisk()


@pytest.fixture
def driver(memory: GuestMemory, threads: list[IoThread], disk: WorkerDisk) -> Iterator[ThreadedDriver]:
    device = BlkDevice("disk0", threads, threads[0].clock, disk=disk, num_queues=4, queue_size=64)
    driver = ThreadedDriver(device, memory)
    yield driver
    driver.close()
    assert not disk.channels


def test_requests_on_every_queue_come_back(driver: ThreadedDriver, disk: WorkerDisk) -> None:
    driver.up()
    for _ in range(20):
        for index in range(4):
            driver.read_some(index, 5)
        for index in range(4):
            driver.collect(index, 5)
        driver._next = DATA
    assert driver.read(0x060) == 1


def test_after_a_reset_under_load_guest_memory_is_not_written(
    driver: ThreadedDriver, disk: WorkerDisk, memory: GuestMemory
) -> None:
    for turn in range(100):
        driver.up()
        for index in range(4):
            driver.read_some(index, turn % 16 + 1)
        assert disk.begun.acquire(timeout=LIMIT)
        driver.status = 0
        assert driver.status == 0
        memory.write(DATA, b"\xa5" * 0x2_0000)
        for channel in disk.channels:
            channel.drain()
        assert memory.read(DATA, 0x2_0000) == b"\xa5" * 0x2_0000


def test_pausing_under_load_loses_no_request_and_leaves_everything_at_rest(driver: ThreadedDriver, memory: GuestMemory) -> None:
    driver.up()
    for turn in range(100):
        driver.read_some(turn % 4, 10)
        driver.transport.pause()
        at_rest = memory.read(0, 1 << 20)
        indices = driver.transport.save()
        assert all(queue.next_avail == queue.next_used for queue in indices.queues)
        driver.write(0x050, turn % 4)
        assert memory.read(0, 1 << 20) == at_rest
        driver.transport.resume()
        driver.collect(turn % 4, 10)
        driver._next = DATA


def test_a_disk_is_taken_out_and_put_in_under_load(driver: ThreadedDriver, disk: WorkerDisk, memory: GuestMemory) -> None:
    driver.up()
    for turn in range(50):
        driver.read_some(turn % 4, 10)
        driver.device.detach()
        assert not disk.channels
        driver.device.attach(disk)
        driver.collect(turn % 4, 10)
        statuses = {memory.read(DATA + n * 544 + 528, 1)[0] for n in range(10)}
        assert statuses <= {S_OK, S_IOERR}
        driver._next = DATA


def test_vcpus_that_reset_configure_and_kick_at_once_neither_hang_nor_escape(driver: ThreadedDriver) -> None:
    """Four vCPUs write the same registers without any order, while the machine's owner pauses and resumes."""
    problems: list[BaseException] = []

    def vcpu(seed: int) -> None:
        try:
            for turn in range(150):
                if (turn + seed) % 3 == 0:
                    driver.status = 0
                driver.negotiate(driver.offered())
                driver.enable(seed, 16)
                driver.status |= DRIVER_OK
                driver.write(0x050, seed)
                driver.write(0x064, 3)
                driver.read(0x0FC)
        except BaseException as error:
            problems.append(error)

    vcpus = [threading.Thread(target=vcpu, args=(seed,)) for seed in range(4)]
    for thread in vcpus:
        thread.start()
    while any(thread.is_alive() for thread in vcpus):
        driver.transport.pause()
        driver.transport.save()
        driver.transport.resume()
    for thread in vcpus:
        thread.join()
    assert not problems
    driver.status = 0
    driver.up()
    driver.offer(struct.pack("<IIQ", FLUSH, 0, 0), 1)
    driver.write(0x050, 0)
    driver.collect(0, 1)
