"""Frames that are read in a row, a buffer of the driver's for each: what is no such frame is found, nothing is lost or cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EIO

import pytest

from net_cable import MAC, OTHER, Cable, Net, frame
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import F_MRG_RXBUF
from virtio_driver import new_loop
from vmm_core.guestmem import GuestMemory

RX, PROMISCUOUS, VLANS, ADD, MQ = 0, 0, 2, 0, 4  # of the control queue
ROW = 8  # frames, which a datagram socket of the tests holds


@pytest.fixture(params=[True, False], ids=["mergeable", "whole"])
def driver(memory: GuestMemory, request: pytest.FixtureRequest) -> Iterator[Net]:
    """A driver whose last frames were small and many."""
    loop, cable = new_loop(), Cable()
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=cable), memory, loop)
    driver.up(mergeable=request.param, size=64)
    driver.room(*[1536] * 40)
    driver.cable = cable  # type: ignore[attr-defined]
    assert bring(driver, *map(frame, range(60, 60 + ROW))) == [frame(60 + n) for n in range(ROW)]
    yield driver
    driver.close()
    cable.close()
    loop.close()


def bring(driver: Net, *frames: bytes) -> list[bytes]:
    """Have all of these on the network before the device looks, and return what the driver has then."""
    for data in frames:
        driver.cable.send(data)  # type: ignore[attr-defined]
    driver.loop.poll()
    return driver.heard()


class Reads:
    """Counts calls of os.readv(), and lets one fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int = -1) -> None:
        self.pieces: list[int] = []
        self.readv = os.readv
        self.failing = failing
        monkeypatch.setattr("os.readv", self)

    def __call__(self, fd: int, views: list[memoryview]) -> int:
        self.pieces.append(len(views))
        if len(self.pieces) == self.failing:
            raise OSError(EIO, os.strerror(EIO))
        return self.readv(fd, views)


def test_small_frames_are_a_system_call_each_and_one_that_finds_nothing(driver: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    assert len(bring(driver, *[frame(100)] * ROW)) == ROW
    assert reads.pieces == [2] * (ROW + 1), "a buffer, and room for what is too much for it"


def test_a_frame_that_is_larger_than_its_buffer_is_whole_and_in_its_place_if_buffers_merge(driver: Net) -> None:
    frames = [frame(60), frame(61), frame(9000, fill=1), frame(62), frame(4000, fill=2), frame(63)]
    small = [data for data in frames if len(data) < 1536]
    merges = bool(driver.device.negotiated & F_MRG_RXBUF)
    assert bring(driver, *frames) == (frames if merges else small)
    assert driver.device.statistics()[:3] == (
        ROW + len(frames if merges else small),
        sum(range(60, 60 + ROW)) + sum(map(len, frames if merges else small)),
        0 if merges else 2,
    )
    assert bring(driver, *[frame(64)] * 3) == [frame(64)] * 3


def test_what_is_no_frame_is_not_brought_and_the_others_are(driver: Net) -> None:
    assert bring(driver, frame(60), b"short", frame(61), frame(62)) == [frame(60), frame(61), frame(62)]
    assert driver.device.statistics().rx_dropped == 1


def test_frames_for_others_are_not_brought_and_the_driver_s_own_are(driver: Net) -> None:
    assert driver.command(RX, PROMISCUOUS, b"\0") == 0
    frames = [frame(60), frame(61, to=OTHER), frame(62), frame(63, to=OTHER), frame(64, to=b"\xff" * 6)]
    assert bring(driver, *frames) == [frames[0], frames[2], frames[4]]
    assert driver.device.statistics().rx_filtered == 2
    assert bring(driver, *[frame(60)] * 4) == [frame(60)] * 4


def test_what_lies_behind_the_end_of_a_tiny_frame_is_not_taken_for_its_tag(driver: Net) -> None:
    """What lies there is what the driver left in its buffer, or an earlier frame."""
    assert driver.command(RX, PROMISCUOUS, b"\0") == 0
    assert driver.command(VLANS, ADD, b"\xcc\x0c") == 0  # which the buffers are full of
    frames = [frame(14, tag=0xCCC)[:14], frame(16, tag=0xCCC)[:16]]
    assert bring(driver, *frames) == [frames[1]]
    assert bring(driver, frame(1500)) == [frame(1500)]  # and one by one
    assert bring(driver, *frames) == [frames[1]]
    assert driver.device.statistics().rx_filtered == 2


def test_frames_that_were_read_before_the_network_failed_arrive(driver: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    Reads(monkeypatch, failing=4)
    assert bring(driver, *[frame(60 + n) for n in range(6)]) == [frame(60), frame(61), frame(62)]
    assert not driver.link & 1


@pytest.mark.parametrize("driver", [True], ids=["mergeable"], indirect=True)
def test_frames_that_wait_for_buffers_wait_over_a_pause(driver: Net) -> None:
    frames = [frame(60), frame(60_000), frame(61)]  # there are 32 buffers, and 40 are needed
    assert bring(driver, *frames) == frames[:1]
    driver.transport.pause()
    driver.transport.resume()
    driver.loop.poll()
    driver.room(*[1536] * 10)
    assert driver.heard() == frames[1:]


@pytest.mark.parametrize("driver", [True], ids=["mergeable"], indirect=True)
def test_frames_that_wait_are_no_later_driver_s(driver: Net) -> None:
    assert bring(driver, frame(60), frame(60_000), frame(61)) == [frame(60)]
    driver.status = 0
    driver.up(size=64)
    driver.room(*[1536] * 60)
    driver.loop.poll()
    assert driver.heard() == []
    assert driver.device.statistics().rx_dropped == 2
    assert bring(driver, frame(62)) == [frame(62)]


def test_frames_that_end_a_turn_and_do_not_lie_where_they_were_read_arrive_in_it(
    driver: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tap has nothing more then, and would not call again for them."""
    assert driver.command(RX, PROMISCUOUS, b"\0") == 0
    monkeypatch.setattr("virtio_devices.net.taplane.FRAMES", 4)
    assert bring(driver, frame(60), frame(61, to=OTHER), frame(62), frame(63)) == [frame(60), frame(62), frame(63)]
    monkeypatch.setattr("virtio_devices.net.taplane.BYTES", 60)
    monkeypatch.setattr("virtio_devices.net.taplane.FRAMES", 1)
    assert bring(driver, frame(1500)) == [frame(1500)]
    assert bring(driver, frame(1501, to=OTHER)) == []
    merges = bool(driver.device.negotiated & F_MRG_RXBUF)
    assert bring(driver, frame(3000)) == ([frame(3000)] if merges else [])


def test_frames_that_wait_in_a_pair_that_is_given_up_do_not_come_when_it_is_used_again(memory: GuestMemory) -> None:
    """The kernel drops those that wait in the queue of a tap that is detached, too."""
    loop, cable = new_loop(), Cable(2)
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=cable, pairs=2), memory, loop).up(size=64)
    assert driver.command(MQ, 0, b"\2\0") == 0
    driver.room(1536, pair=1)
    cable.send(frame(3000), 1)
    loop.poll()
    assert driver.command(MQ, 0, b"\1\0") == 0
    assert driver.command(MQ, 0, b"\2\0") == 0
    driver.room(1536, 1536, pair=1)
    assert driver.heard(1) == []
    assert driver.device.statistics().rx_dropped == 1
    cable.send(frame(60), 1)
    loop.poll()
    assert driver.heard(1) == [frame(60)]
    driver.close()
    cable.close()
    loop.close()


@pytest.mark.parametrize("driver", [True], ids=["mergeable"], indirect=True)
def test_frames_that_wait_for_buffers_are_dropped_once_the_network_has_gone(driver: Net) -> None:
    frames = [frame(60), frame(60_000), frame(61)]
    assert bring(driver, *frames) == frames[:1]
    driver.device._lanes[0]._die("gone")
    driver.room(*[1536] * 10)
    assert driver.heard() == []
    assert driver.device.statistics().rx_dropped == 2
