"""The socket device on vhost: what the kernel is told over a driver's life, and that both agree on where the rings stand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from vhost_peer import FakeVhost
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.vhost_kernel import VhostKernel
from virtio_devices.vsock.vhost import F_SEQPACKET, VhostVsockDevice
from virtio_driver import Driver, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory

CID = 33
Make = Callable[[], tuple[Driver, FakeVhost]]
START = ["set_features", "set_mem_table", *["num", "set_base", "addr", "call", "kick"] * 2]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    before = descriptors(settle=True)
    made: list[Driver] = []

    def make() -> tuple[Driver, FakeVhost]:
        peer = FakeVhost()
        device = VhostVsockDevice("vsock0", loop, memory, CID, VhostKernel("vsock0", peer.fd, ioctl=peer.ioctl))
        made.append(Driver(device, memory, loop))
        return made[-1], peer

    yield make
    for driver in made:
        driver.close()
        driver.close()
        driver.line._fd >= 0 and os.close(driver.line._fd)
    assert not watched(loop)
    assert descriptors() == before


def test_the_guest_sees_its_context_id_and_what_the_kernel_can_do_for_it(make: Make) -> None:
    driver, peer = make()
    assert driver.read(0x008) == 19
    assert driver.config(0, 8) == driver.config(0, 4) == CID
    assert driver.offered() == F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_SEQPACKET
    assert peer.cid == CID, "taken before a driver comes"
    assert not peer.running


def test_the_kernel_has_its_queues_from_driver_ok_to_reset(make: Make) -> None:
    driver, peer = make()
    peer.calls.clear()
    driver.start(without=0)
    assert peer.calls == [*START, "set_running"]
    assert peer.features == driver.offered()
    assert peer.running
    for index in (0, 1):
        assert peer.queues[index]["kick"] == driver.transport.notify_fds[index]
        assert peer.queues[index]["call"] == driver.line.fileno()
    assert watched(driver.loop) == [driver.transport.notify_fds[2]], "only events are ours"
    assert driver.read(0x060) == 1, "the kernel interrupts without telling"
    driver.status = 0
    assert not peer.running
    assert [peer.queues[index]["kick"] for index in (0, 1)] == [-1, -1]
    assert driver.read(0x060) == 0
    driver.restart()
    assert peer.running


def test_the_kernel_s_work_is_in_the_saved_state_and_goes_on_after_a_pause(make: Make) -> None:
    driver, peer = make()
    driver.start()
    peer.queues[0]["base"], peer.queues[1]["base"] = 5, 7
    driver.memory.store(driver.rings[0].used + 2, 2, 3)
    driver.memory.store(driver.rings[1].used + 2, 2, 7)
    os.eventfd_read(driver.transport.notify_fds[0])
    driver.transport.pause()
    assert not peer.running
    saved = driver.transport.save()
    assert [(queue.next_avail, queue.next_used) for queue in saved.queues] == [(5, 3), (7, 7), (0, 0)]
    driver.transport.resume()
    assert peer.running
    assert os.eventfd_read(driver.transport.notify_fds[0]) == 1, "the kernel looks at what came meanwhile"


def test_a_restored_driver_is_told_that_its_connections_are_gone(make: Make) -> None:
    driver, peer = make()
    driver.start()
    for _ in range(2):
        driver.offer(8, queue=2)
    peer.queues[0]["base"] = 2
    driver.memory.store(driver.rings[0].used + 2, 2, 2)
    driver.transport.pause()
    assert driver.device is not None
    states = driver.transport.save(), driver.device.save()
    driver.close()
    other, kernel = make()
    other.transport.pause()
    other.transport.restore(states[0])
    assert other.device is not None
    other.device.restore(states[1])
    assert (other.transport.save(), other.device.save()) == states
    assert not kernel.running
    other.transport.resume()
    other.loop.poll()
    assert kernel.running
    assert kernel.queues[0]["base"] == 2
    assert driver.rings[2].collect() == [(0, 4)]
    assert other.memory.read(driver._next - 32, 4) == bytes(4)
    other.transport.pause()
    other.transport.resume()
    other.loop.poll()
    assert driver.rings[2].collect() == [], "once"
    with pytest.raises(StateError, match="vsock0"):
        other.device.restore(None)


def test_a_driver_that_sets_up_one_queue_only_or_none_for_events(make: Make) -> None:
    driver, peer = make()
    assert driver.negotiate()
    driver.enable(0)
    driver.status |= 4
    assert driver.broken
    assert "has not set up queue 1" in driver.reports[0]
    assert not peer.running
    driver.status = 0
    assert driver.negotiate()
    for index in (0, 1):
        driver.enable(index)
    driver.status |= 4
    assert peer.running


def test_a_queue_that_is_stopped_stops_the_kernel(make: Make) -> None:
    driver, peer = make()
    driver.start()
    driver.write(0x030, 0)
    driver.write(0x044, 0)
    assert not peer.running
    driver.transport.pause()
    driver.transport.resume()
    assert not peer.running


def test_a_used_ring_that_the_driver_overwrote_breaks_the_device(make: Make) -> None:
    driver, peer = make()
    driver.start()
    driver.memory.store(driver.rings[0].used + 2, 2, 1000)
    driver.transport.pause()
    assert driver.broken
    driver.transport.save()
    driver.transport.resume()
    assert not peer.running, "nobody knows where its rings stand"
    driver.restart()
    assert peer.running


@pytest.mark.parametrize("request_", ["set_running", "addr", "set_mem_table", "set_features"])
def test_a_kernel_that_refuses_breaks_the_device_and_not_the_machine(make: Make, request_: str) -> None:
    driver, peer = make()
    peer.fail[request_] = errno.EFAULT
    driver.start()
    assert driver.broken
    assert "Bad address" in driver.reports[0]
    peer.fail.clear()
    driver.restart()
    assert peer.running
    assert not driver.broken
    driver.transport.pause()
    peer.fail["set_running"] = errno.EFAULT
    driver.transport.resume()
    assert driver.broken
    peer.fail.clear()
    driver.restart()
    assert peer.running


@pytest.mark.parametrize("room", [3, b"read only"])
def test_an_event_buffer_without_room_breaks_the_device(make: Make, room: int | bytes) -> None:
    driver, _ = make()
    driver.start()
    driver.offer(room, queue=2)
    driver.kick(2)
    assert not driver.broken, "it is not looked at before there is an event"
    driver.transport.pause()
    assert driver.device is not None
    driver.device.restore(driver.device.save())
    driver.transport.resume()
    driver.loop.poll()
    assert driver.broken


def test_a_context_id_that_is_taken_or_is_no_guest_s_is_refused_at_the_start(memory: GuestMemory, loop: DirectLoop) -> None:
    before = descriptors(settle=True)
    peer = FakeVhost()
    peer.fail["cid"] = errno.EADDRINUSE
    with pytest.raises(DeviceError, match=r"vsock0: VHOST_VSOCK_SET_GUEST_CID: .*in use"):
        VhostVsockDevice("vsock0", loop, memory, CID, VhostKernel("vsock0", peer.fd, ioctl=peer.ioctl))
    for cid in (0, 2, 0xFFFFFFFF, 1 << 40):
        peer = FakeVhost()
        with pytest.raises(ValueError, match="guest-cid"):
            VhostVsockDevice("vsock0", loop, memory, cid, VhostKernel("vsock0", peer.fd, ioctl=peer.ioctl))
    assert descriptors() == before
