"""A guest whose device another process serves, and the fixtures that put both together. Fixtures by way of conftest.py."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vhost_backend as peer
from vhost_backend import ACK, CHANNEL, CONFIG, INFLIGHT, LIMIT, MQ, BackEnd, echo
from virtio_devices.device import VirtioDevice
from virtio_devices.vhost_user.blk import CONFIG_SIZE, VhostUserBlk
from virtio_devices.vhost_user.fs import VhostUserFs
from virtio_driver import Driver, Line, descriptors, new_loop
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory

BLK = {"protocol": MQ | ACK | CONFIG | CHANNEL}
RECORDS = {"protocol": MQ | ACK | CONFIG | CHANNEL | INFLIGHT}


class Bell(Line):
    """An interrupt line that can be waited on, however it is rung."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def trigger(self) -> None:
        os.eventfd_write(self._fd, 1)

    def wait(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(LIMIT * 1000), "no interrupt"
        os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Guest(Driver):
    """A driver whose device is served elsewhere."""

    def __init__(self, device: VirtioDevice, memory: GuestMemory, loop: DirectLoop) -> None:
        super().__init__(device, memory, loop)
        self.line = Bell()
        self.transport._line = self.line
        self.done: list[tuple[int, int]] = []

    def close(self) -> None:
        if self.device is not None:
            self.transport.close()
            self.device.close()
            self.device = None
            self.line.close()

    def collect(self, count: int, queue: int = 0) -> list[int]:
        """Wait until `count` requests came back; return their heads."""
        found = self.rings[queue].collect()
        while len(found) < count:
            self.line.wait()
            found += self.rings[queue].collect()
        assert len(found) == count
        return [head for head, _ in found]

    def ask(self, *buffers: bytes | int, queue: int = 0) -> bytes:
        """Make one request, and return the answer."""
        laid = self.offer(*buffers, queue=queue)
        self.kick(queue)
        self.collect(1, queue)
        return self.written(laid)


Make = Callable[..., BackEnd]
MakeGuest = Callable[..., Guest]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    before, threads = descriptors(settle=True), threading.active_count()
    yield
    assert descriptors() == before
    assert threading.active_count() == threads


@pytest.fixture
def back_end(tmp_path: Path, nothing_is_left: None) -> Iterator[Callable[..., BackEnd]]:
    made: list[BackEnd] = []

    def make(serve: peer.Serve = echo, **options: Any) -> BackEnd:
        options.setdefault("config", bytes(CONFIG_SIZE))
        made.append(BackEnd(str(tmp_path / "vu"), serve, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def guest(memory: GuestMemory, loop: DirectLoop, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(kind: str = "blk", **options: Any) -> Guest:
        reports: list[str] = []
        path = str(tmp_path / "vu")
        device: VirtioDevice
        if kind == "blk":
            device = VhostUserBlk("disk0", loop, memory, path, report=reports.append, **options)
        else:
            device = VhostUserFs("fs0", loop, memory, path, tag="share", report=reports.append, **options)
        made.append(Guest(device, memory, loop))
        made[-1].reports = reports
        return made[-1]

    yield make
    for one in made:
        one.close()
