"""The network device with queues that the host's kernel serves: who has them when, and that their indices come back."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from net_cable import MAC, Net
from vhost_peer import FakeVhost
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.mmio import USED_BUFFER
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import CLASS_MQ, F_CTRL_VQ, F_MQ, F_MRG_RXBUF, OFFLOADS
from virtio_devices.net.vhost import VhostBackend
from virtio_devices.vhost_kernel import VhostKernel
from virtio_driver import descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory

OK = 0
KERNEL = 1 << 33 | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | 7 << 24 | F_MRG_RXBUF


class FakeNet(FakeVhost):
    """vhost-net: rings run while they have a back end."""

    def __init__(self, features: int = KERNEL) -> None:
        super().__init__(features)
        self.bound = {0: -1, 1: -1}

    def ioctl(self, fd: int, number: int, data: bytearray) -> int:
        if number & 0xFF != 0x30:
            return super().ioctl(fd, number, data)
        self.calls.append("set_backend")
        if "set_backend" in self.fail:
            raise OSError(self.fail["set_backend"], os.strerror(self.fail["set_backend"]))
        index, tap = struct.unpack("<Ii", data)
        self.bound[index] = tap
        self.running = any(tap >= 0 for tap in self.bound.values())
        return 0


class FakeTap:
    """The tap below."""

    name, features = "tap", OFFLOADS

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.pipes = [os.pipe() for _ in range(pairs)]
        self.fds = [read for read, _ in self.pipes]
        self.counts: list[int] = []

    def alive(self) -> bool:
        return bool(self.pipes) and self.pipes[0][1] >= 0

    def set_offloads(self, features: int) -> None:
        self.offloads = features

    def set_pairs(self, count: int) -> None:
        self.counts.append(count)

    def unplug(self) -> None:
        """Be deleted."""
        os.close(self.pipes[0][1])
        self.pipes[0] = (self.pipes[0][0], -1)

    def close(self) -> None:
        for pair in self.pipes:
            for fd in pair:
                if fd >= 0:
                    os.close(fd)
        self.pipes = []


class Kernel(Net):
    """A driver, and the kernel that serves its queues."""

    tap: FakeTap
    vhosts: list[FakeNet]
    said: list[str]

    def running(self) -> list[bool]:
        return [set(vhost.bound.values()) == {fd} for vhost, fd in zip(self.vhosts, self.tap.fds, strict=True)]

    def serve(self, pair: int, queue: int) -> None:
        """Be the kernel: use one buffer of a queue."""
        ring = self.rings[2 * pair + queue]
        at = ring.used_idx
        self.memory.store(ring.used + 4 + 8 * (at % ring.size), 8, 0)
        self.memory.store(ring.used + 2, 2, at + 1)
        state = self.vhosts[pair].queues[queue]
        state["base"] = state["base"] + 1  # type: ignore[operator]


Make = Callable[..., Kernel]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[tuple[Kernel, VhostBackend]] = []
    before = descriptors(settle=True)

    def make(pairs: int = 1, features: int = KERNEL) -> Kernel:
        tap, vhosts = FakeTap(pairs), [FakeNet(features) for _ in range(pairs)]
        kernels = [VhostKernel("net0", vhost.fd, ioctl=vhost.ioctl) for vhost in vhosts]
        backend = VhostBackend(tap, kernels)  # type: ignore[arg-type]
        said: list[str] = []
        device = NetDevice("net0", [loop], memory, mac=MAC, backend=backend, pairs=pairs, report=said.append)
        driver = Kernel(device, memory, loop)
        driver.tap, driver.vhosts, driver.said = tap, vhosts, said
        made.append((driver, backend))
        return driver

    yield make
    for driver, backend in made:
        driver.close()
        backend.close()
        backend.close()
        os.close(driver.line._fd) if driver.line._fd >= 0 else None
    assert not watched(loop)
    assert len(descriptors()) == len(before)


def test_what_the_kernel_cannot_do_is_not_offered(make: Make) -> None:
    assert make().offered() & (F_MRG_RXBUF | F_EVENT_IDX | F_INDIRECT_DESC) == F_MRG_RXBUF | F_EVENT_IDX | F_INDIRECT_DESC
    assert make(features=F_VERSION_1).offered() & (F_MRG_RXBUF | F_EVENT_IDX | F_INDIRECT_DESC | 1 << 33 | 1 << 24) == 0


def test_a_kernel_without_virtio_1_is_refused() -> None:
    tap, vhost = FakeTap(1), FakeNet(0)
    with VhostKernelOf(vhost) as kernel, pytest.raises(DeviceError, match="does not speak virtio 1"):
        VhostBackend(tap, [kernel])  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="0 vhost descriptors for 1"):
        VhostBackend(tap, [])  # type: ignore[arg-type]
    tap.close()


class VhostKernelOf:
    def __init__(self, vhost: FakeNet) -> None:
        self.kernel = VhostKernel("net0", vhost.fd, ioctl=vhost.ioctl)

    def __enter__(self) -> VhostKernel:
        return self.kernel

    def __exit__(self, *_: object) -> None:
        self.kernel.close()


def test_the_kernel_gets_what_the_driver_negotiated_and_its_rings(make: Make) -> None:
    driver = make().up(without=F_EVENT_IDX)
    vhost = driver.vhosts[0]
    assert vhost.features == F_VERSION_1 | F_INDIRECT_DESC | F_MRG_RXBUF
    assert driver.tap.offloads
    assert [base for base, _, _ in vhost.regions] == [0, 1 << 32]
    host = vhost.regions[0][2]
    for index in (0, 1):
        ring = driver.rings[index]
        assert vhost.queues[index] == {
            "num": 16,
            "base": 0,
            "addr": (host + ring.desc, host + ring.used, host + ring.avail),
            "kick": driver.transport.notify_fds[index],
            "call": driver.line.fileno(),
        }
    assert driver.running() == [True]
    assert vhost.calls.index("kick") < vhost.calls.index("set_backend")
    assert driver.read(0x060) & USED_BUFFER


def test_our_loops_leave_the_kernel_s_queues_alone(make: Make) -> None:
    driver = make().up()
    os.eventfd_read(driver.transport.notify_fds[1])
    driver.offer(bytes(12), bytes(60), queue=1)
    driver.kick(1)
    assert driver.rings[1].collect() == []
    assert os.eventfd_read(driver.transport.notify_fds[1]) == 1, "the kick is the kernel's"
    assert driver.command(0, 0, b"\1") == OK


def test_indices_come_back_in_a_pause_and_go_on_from_there(make: Make) -> None:
    driver = make().up()
    for _ in range(3):
        driver.serve(0, 0)
    driver.serve(0, 1)
    driver.transport.pause()
    assert driver.running() == [False]
    saved = driver.transport.save()
    assert [(queue.next_avail, queue.next_used) for queue in saved.queues] == [(3, 3), (1, 1), (0, 0)]
    assert driver.vhosts[0].queues[0]["kick"] == -1
    driver.transport.resume()
    assert driver.running() == [True]
    assert driver.vhosts[0].queues[0]["base"] == 3
    driver.status = 0
    assert driver.running() == [False]
    driver.up()
    assert driver.vhosts[0].queues[0]["base"] == 0
    assert driver.running() == [True]


def test_pairs_are_the_kernel_s_as_the_driver_uses_them(make: Make) -> None:
    driver = make(pairs=3).up(size=16)
    assert driver.running() == [True, False, False]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 3)) == OK
    assert driver.running() == [True, True, True]
    driver.offer(bytes(12), bytes(60), queue=5)
    driver.serve(2, 1)
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    assert driver.running() == [True, True, False]
    assert driver.tap.counts == [1, 3, 2]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 3)) == OK
    assert driver.vhosts[2].queues[1]["base"] == 1


def test_frames_that_wait_in_a_pair_that_is_given_up_come_back(make: Make) -> None:
    """The kernel has sent the first of three; nobody else would ever take the others."""
    driver = make(pairs=2).up()
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    for _ in range(3):
        driver.offer(bytes(12), bytes(60), queue=3)
    driver.serve(1, 1)
    assert len(driver.rings[3].collect()) == 1
    driver.command(CLASS_MQ, 0, struct.pack("<H", 1))
    assert driver.running() == [True, False]
    assert len(driver.rings[3].collect()) == 2
    assert driver.device.statistics().tx_dropped == 2
    assert driver.read(0x060) & USED_BUFFER
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 2)) == OK
    assert driver.vhosts[1].queues[1]["base"] == 3
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 1)) == OK
    assert driver.rings[3].collect() == []


def test_without_multi_queue_one_pair_and_the_third_queue_for_commands(make: Make) -> None:
    driver = make(pairs=2)
    assert driver.negotiate(F_VERSION_1 | F_CTRL_VQ)
    driver.rings = [driver.enable(index) for index in range(3)]
    driver.status |= 4
    driver.loop.poll()
    assert driver.running() == [True, False]
    assert driver.command(CLASS_MQ, 0, struct.pack("<H", 1)) == 1
    assert not driver.device.negotiated & F_MQ


def test_a_stopped_queue_takes_its_pair_from_the_kernel(make: Make) -> None:
    driver = make().up()
    driver.write(0x030, 0)
    driver.write(0x044, 0)
    assert driver.running() == [False]
    driver.loop.poll()


def test_a_back_end_in_the_kernel_comes_and_goes_under_a_driver(make: Make) -> None:
    driver = make().up()
    backend = driver.device.detach()
    assert driver.running() == [False]
    driver.loop.poll()
    driver.offer(bytes(12), bytes(60), queue=1)
    driver.kick(1)
    assert len(driver.rings[1].collect()) == 1, "lost, as without a network"
    driver.device.attach(backend)
    assert driver.running() == [True]
    assert driver.vhosts[0].queues[1]["base"] == 1


def test_a_tap_that_is_deleted_turns_the_link_down(make: Make) -> None:
    driver = make().up()
    assert driver.link == 1
    driver.tap.unplug()
    driver.loop.poll()
    assert driver.link == 0
    assert len(driver.said) == 1
    assert driver.loop.poll() == 0


@pytest.mark.parametrize("call", ["set_features", "set_mem_table", "num", "addr", "kick", "set_backend"])
def test_a_kernel_that_refuses_turns_the_link_down_and_a_later_driver_has_it(make: Make, call: str) -> None:
    driver = make()
    driver.vhosts[0].fail[call] = errno.EBADFD
    driver.up()
    assert driver.link == 0
    assert driver.running() == [False]
    assert not driver.broken
    assert len(driver.said) == 1
    driver.vhosts[0].fail.clear()
    driver.status = 0
    driver.up()
    assert driver.running() == [True]
    assert driver.link == 1


def test_a_used_index_that_the_driver_overwrote_breaks_the_device(make: Make, memory: GuestMemory) -> None:
    driver = make().up()
    memory.store(driver.rings[0].used + 2, 2, 0x7000)
    driver.transport.pause()
    assert driver.broken
    driver.transport.resume()
    driver.restart()
    assert not driver.broken


def test_a_broken_device_s_pairs_stay_with_us(make: Make, memory: GuestMemory) -> None:
    driver = make(pairs=2).up()
    memory.store(driver.rings[0].used + 2, 2, 0x7000)
    driver.transport.pause()
    assert driver.broken
    driver.transport.resume()
    assert driver.running() == [False, False], "nobody knows where the rings stand"
    driver.restart()
    assert driver.running() == [True, False]


def test_a_deleted_tap_is_noticed_without_the_control_queue(make: Make) -> None:
    driver = make().up()
    driver.write(0x030, 2)
    driver.write(0x044, 0)
    assert driver.running() == [True]
    driver.tap.unplug()
    driver.loop.poll()
    assert driver.link == 0
