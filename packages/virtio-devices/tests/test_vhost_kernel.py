"""What the kernel's vhost devices are told, and what becomes of their refusals."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from vhost_peer import FakeVhost
from virtio_devices.device import DeviceError
from virtio_devices.queue import QueueError, SplitQueue
from virtio_devices.vhost_kernel import TRANSPORT_FEATURES, VhostKernel
from virtio_driver import descriptors
from virtio_rings import Ring
from vmm_core.guestmem import GuestMemory


@pytest.fixture
def peer() -> FakeVhost:
    return FakeVhost()


@pytest.fixture
def vhost(peer: FakeVhost) -> Iterator[VhostKernel]:
    vhost = VhostKernel("vsock0", peer.fd, ioctl=peer.ioctl)
    yield vhost
    vhost.close()
    vhost.close()


def test_the_owner_shows_all_memory_and_hands_a_queue_over_where_it_stands(
    vhost: VhostKernel, peer: FakeVhost, memory: GuestMemory
) -> None:
    ring = Ring(memory, 8, 0x2000)
    queue = SplitQueue(memory, 8, ring.desc, ring.avail, ring.used)
    queue.set_indices(7, 5)
    vhost.set_features(TRANSPORT_FEATURES)
    vhost.set_memory(memory)
    vhost.hand_over(1, queue, 40, 41)
    low, high = (memory.host_address(region) for region in memory.regions)
    assert peer.calls[0] == "set_owner"
    assert peer.regions == [(0, 1 << 20, low), (1 << 32, 1 << 16, high)]
    assert peer.features == TRANSPORT_FEATURES
    assert peer.queues == {
        1: {"num": 8, "base": 7, "addr": (low + ring.desc, low + ring.used, low + ring.avail), "call": 41, "kick": 40}
    }
    assert peer.calls[-1] == "kick", "the kernel may look at a queue as soon as it has its kick"


def test_indices_come_back_from_the_kernel_and_the_used_ring(vhost: VhostKernel, peer: FakeVhost, memory: GuestMemory) -> None:
    ring = Ring(memory, 8, 0x2000)
    queue = SplitQueue(memory, 8, ring.desc, ring.avail, ring.used)
    vhost.set_memory(memory)
    vhost.hand_over(0, queue, 40, 41)
    peer.queues[0]["base"] = 0x10003 & 0xFFFF
    memory.store(ring.used + 2, 2, 0xFFFE)
    vhost.take_indices(0, queue)
    assert queue.indices == (3, 0xFFFE)
    memory.store(ring.used + 2, 2, 100)
    with pytest.raises(QueueError, match="do not belong"):
        vhost.take_indices(0, queue)
    peer.queues[0]["base"] = 70_000
    with pytest.raises(QueueError, match="70000"):
        vhost.take_indices(0, queue)
    vhost.release(0)
    assert (peer.queues[0]["kick"], peer.queues[0]["call"]) == (-1, -1)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EBUSY, "in use by another process"),
        (errno.ENOTTY, "not a vhost device"),
        (errno.EPERM, "VHOST_SET_OWNER: Operation"),
    ],
)
def test_a_descriptor_that_cannot_be_owned_is_closed_and_the_reason_said(number: int, words: str) -> None:
    before = descriptors(settle=True)
    peer = FakeVhost()
    peer.fail["set_owner"] = number
    with pytest.raises(DeviceError, match=f"vsock0: .*{words}"):
        VhostKernel("vsock0", peer.fd, ioctl=peer.ioctl)
    assert descriptors() == before


def test_a_real_descriptor_of_something_else_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(DeviceError, match="vsock0: VHOST_SET_OWNER: not a vhost device"):
        VhostKernel.open("vsock0", "/dev/null")
    with pytest.raises(DeviceError, match="cannot open /nonexistent: No such file"):
        VhostKernel.open("vsock0", "/nonexistent")


def test_an_interrupted_call_is_repeated(peer: FakeVhost) -> None:
    interrupted: list[int] = []

    def ioctl(fd: int, number: int, data: bytearray) -> int:
        if len(interrupted) < 3:
            interrupted.append(number)
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return peer.ioctl(fd, number, data)

    vhost = VhostKernel("vsock0", peer.fd, ioctl=ioctl)
    assert vhost.features() == peer.offered
    vhost.close()
