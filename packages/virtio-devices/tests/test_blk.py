"""The block device: requests, mistakes, limits, and disks that come and go."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_devices.blk.device import (
    DISCARD,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_WRITE_ZEROES,
    FLUSH,
    GET_ID,
    IN,
    OUT,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    WRITE_ZEROES,
    BlkDevice,
)
from virtio_devices.device import F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.mmio import CONFIG_CHANGE, DRIVER_OK, USED_BUFFER
from virtio_disk import MemoryDisk
from virtio_driver import Driver, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory

SECOND = 1_000_000_000


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, count, flags)


class Disk(Driver):
    """A block device's driver, in words of disks."""

    def read_disk(self, sector: int, length: int, **options: int) -> tuple[int, bytes]:
        """Return (status, data)."""
        written, data = self.request(header(IN, sector), length, 1, **options)
        assert written == length + 1
        return data[-1], data[:-1]

    def write_disk(self, sector: int, data: bytes, **options: int) -> int:
        written, status = self.request(header(OUT, sector), data, 1, **options)
        assert written == 1
        return status[0]

    def command(self, kind: int, *data: bytes, sector: int = 0) -> int:
        return self.request(header(kind, sector), *data, 1)[1][0]

    @property
    def capacity(self) -> int:
        return self.config(0, 8)


Make = Callable[..., Disk]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[tuple[Disk, MemoryDisk | None]] = []

    def make(disk: MemoryDisk | None = None, *, loops: list[DirectLoop] | None = None, **options: object) -> Disk:
        device = BlkDevice("disk0", loops or [loop], loop.clock, disk=disk, **options)  # type: ignore[arg-type]
        made.append((Disk(device, memory, loop), disk))
        return made[-1][0]

    yield make
    for driver, _ in made:
        driver.close()
        driver.close()
    assert not any(disk and disk.channels for _, disk in made), "a closed device has closed its channels"
    assert not watched(loop)


# What is offered


def test_the_features_and_the_configuration_are_the_references(make: Make) -> None:
    driver = make(MemoryDisk(1 << 16))
    assert driver.offered() == 0x1_3000_0204
    assert (driver.capacity, driver.config(12, 4), driver.config(34, 2)) == (128, 254, 0)
    assert [driver.config(offset, 4) for offset in (8, 16, 20, 24, 28, 36, 40, 44, 48, 52, 56)] == [0] * 11


def test_options_show_in_features_and_configuration(make: Make) -> None:
    driver = make(MemoryDisk(read_only=True), num_queues=4, queue_size=1024, discard=True, write_zeroes=True)
    assert driver.offered() & 0xFFFF == 0x7224
    assert driver.offered() & (F_RO | F_MQ | F_DISCARD | F_WRITE_ZEROES) == F_RO | F_MQ | F_DISCARD | F_WRITE_ZEROES
    assert (driver.config(12, 4), driver.config(34, 2)) == (1022, 4)
    assert [driver.config(offset, 4) for offset in (36, 40, 44, 48, 52)] == [0x7FFFFF, 1, 1, 0x7FFFFF, 1]
    assert driver.config(56, 1) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_queues": 0}, "1 to 32"),
        ({"num_queues": 33}, "1 to 32"),
        ({"queue_size": 2}, "from 4 to 1024"),
        ({"queue_size": 100}, "power of two"),
        ({"queue_size": 2048}, "from 4 to 1024"),
    ],
)
def test_options_that_cannot_be_are_refused(make: Make, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(**options)


def test_32_queues_on_4_loops_are_served_by_their_owners(make: Make, loop: DirectLoop) -> None:
    loops = [loop, *(new_loop() for _ in range(3))]
    disk = MemoryDisk()
    driver = make(disk, loops=loops, num_queues=32)
    driver.start(size=4)
    assert len(disk.channels) == 4
    laid = [driver.offer(header(IN), 512, 1, queue=index) for index in range(32)]
    for index in range(32):
        driver.write(0x050, index)
    for turned, lane in enumerate(loops):
        lane.poll()
        assert [len(driver.rings[index].collect()) for index in range(32)] == [int(index % 4 == turned) for index in range(32)]
    assert {driver.written(buffers)[:512] for buffers in laid} == {bytes(disk.data[:512])}
    driver.close()
    for lane in loops[1:]:
        assert not watched(lane)
        lane.close()


# Requests


def test_what_is_written_is_read_back(make: Make) -> None:
    driver = make(MemoryDisk()).start()
    assert driver.write_disk(2, b"x" * 1024) == S_OK
    assert driver.read_disk(2, 1024) == (S_OK, b"x" * 1024)
    assert driver.read(0x060) == USED_BUFFER


def test_the_last_sector_can_be_reached_and_the_one_behind_cannot(make: Make) -> None:
    disk = MemoryDisk(1 << 16)
    driver = make(disk).start()
    assert driver.read_disk(127, 512) == (S_OK, bytes(disk.data[-512:]))
    for sector, length in ((128, 512), (127, 1024), ((1 << 64) - 1, 512), (1 << 55, 512)):
        assert driver.read_disk(sector, length)[0] == S_IOERR
        assert driver.write_disk(sector, bytes(length)) == S_IOERR


def test_the_rest_of_an_image_that_ends_inside_a_sector_is_not_part_of_the_disk(make: Make) -> None:
    driver = make(MemoryDisk(1000)).start()
    assert driver.capacity == 1
    assert driver.read_disk(1, 512)[0] == S_IOERR


@pytest.mark.parametrize("length", [1, 511, 513])
def test_data_that_is_not_whole_sectors_is_an_error(make: Make, length: int) -> None:
    driver = make(MemoryDisk()).start()
    assert driver.read_disk(0, length)[0] == S_IOERR
    assert driver.write_disk(0, bytes(length)) == S_IOERR


def test_data_may_be_scattered(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    _, data = driver.request(header(IN, 1), 100, 400, 12, 1)
    assert data == bytes(disk.data[512:1024]) + bytes([S_OK])
    assert driver.request(header(OUT, 1), b"a" * 100, b"b" * 412, 1)[1] == bytes([S_OK])
    assert disk.data[512:1024] == b"a" * 100 + b"b" * 412


def test_the_header_may_be_split_and_the_status_may_share_a_buffer(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    request = header(OUT, 3) + b"z" * 512
    assert driver.request(request[:5], request[5:10], request[10:300], request[300:], 1)[1] == bytes([S_OK])
    assert disk.data[3 * 512 : 4 * 512] == b"z" * 512
    assert driver.request(request[:16], request[16:], 1)[1] == bytes([S_OK])
    assert driver.request(request, 7)[1] == b"\xcc" * 6 + bytes([S_OK])
    assert driver.request(header(IN, 3), 513)[1] == b"z" * 512 + bytes([S_OK])


def test_an_indirect_request_is_served(make: Make, memory: GuestMemory) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    laid = driver.offer(header(IN), 512, 1, table=0x2_0000)
    driver.kick()
    assert driver.written(laid) == bytes(disk.data[:512]) + bytes([S_OK])


def test_flush_reaches_the_disk(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    assert driver.command(FLUSH) == S_OK
    assert disk.log == ["flush"]


@pytest.mark.parametrize(
    ("room", "expected"),
    [((20,), b"abc" + bytes(17)), ((2,), b"ab"), ((2, 2), b"abc\0"), ((22,), b"abc" + bytes(17) + b"\xcc\xcc")],
)
def test_the_serial_number_is_padded_or_cut_to_the_buffer(make: Make, room: tuple[int, ...], expected: bytes) -> None:
    driver = make(MemoryDisk(), serial="abc").start()
    assert driver.request(header(GET_ID), *room, 1) == (sum(room) + 1, expected + bytes([S_OK]))


def test_a_disk_without_serial_number_has_zeros_for_one(make: Make) -> None:
    assert make(MemoryDisk()).start().request(header(GET_ID), 20, 1)[1] == bytes(20) + bytes([S_OK])


@pytest.mark.parametrize("kind", [2, 3, 5, 9, 10, 12, 14, 0x8000_0000])
def test_other_requests_are_unsupported(make: Make, kind: int) -> None:
    assert make(MemoryDisk()).start().command(kind) == S_UNSUPP


def test_discard_and_write_zeroes_reach_the_disk(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk, discard=True, write_zeroes=True).start()
    assert driver.command(DISCARD, segment(8, 16)) == S_OK
    assert driver.command(WRITE_ZEROES, segment(2, 1)) == S_OK
    assert driver.command(WRITE_ZEROES, segment(2, 1, 1)) == S_OK
    assert driver.command(DISCARD, segment(0, 0)) == S_OK
    assert disk.log == ["discard 4096+8192", "zero 1024+512", "zero 1024+512 unmap"]


@pytest.mark.parametrize(
    ("kind", "data", "status"),
    [
        (DISCARD, segment(0, 8, 1), S_UNSUPP),
        (DISCARD, segment(0, 8, 2), S_UNSUPP),
        (WRITE_ZEROES, segment(0, 8, 2), S_UNSUPP),
        (DISCARD, segment(0, 129), S_IOERR),
        (DISCARD, segment(128, 1), S_IOERR),
        (DISCARD, segment((1 << 64) - 1, 1), S_IOERR),
        (WRITE_ZEROES, segment(0, 0x80_0000), S_IOERR),
        (WRITE_ZEROES, segment(0, 0xFFFF_FFFF), S_IOERR),
        (DISCARD, segment(0, 1) * 2, S_UNSUPP),
        (DISCARD, segment(0, 1) + b"x", S_UNSUPP),
    ],
)
def test_segments_that_are_not_allowed_do_not_reach_the_disk(make: Make, kind: int, data: bytes, status: int) -> None:
    disk = MemoryDisk()
    driver = make(disk, discard=True, write_zeroes=True).start()
    assert driver.command(kind, data) == status
    assert disk.log == []


def test_a_segment_longer_than_the_limit_is_refused_on_a_disk_that_is_large_enough(make: Make) -> None:
    disk = MemoryDisk()
    disk.size = 1 << 40
    driver = make(disk, discard=True).start()
    assert driver.command(DISCARD, segment(0, 0x80_0000)) == S_IOERR
    assert driver.command(DISCARD, segment(0, 0x7F_FFFF)) == S_OK


@pytest.mark.parametrize("inline", [True, False])
def test_requests_are_counted(make: Make, inline: bool) -> None:
    disk = MemoryDisk(inline=inline)
    driver = make(disk, num_queues=2, discard=True, write_zeroes=True).start(size=64)
    device = driver.device
    assert isinstance(device, BlkDevice)
    laid = [driver.offer(header(IN), 512 * (1 + queue), 1, queue=queue) for queue in (0, 1)]
    laid += [driver.offer(header(OUT), bytes(1536), 1), driver.offer(header(FLUSH), 1)]
    laid += [driver.offer(header(kind), segment(0, 1), 1) for kind in (DISCARD, WRITE_ZEROES)]
    laid += [driver.offer(header(IN, 1 << 40), 512, 1), driver.offer(header(GET_ID), 20, 1)]
    for queue in (0, 1):
        driver.kick(queue)
    disk.finish()
    driver.loop.poll()
    assert device.statistics == (2, 1536, 1, 1536, 1, 1, 1, 1)
    disk.failure["read"] = -errno.EIO
    driver.offer(header(IN), 512, 1)
    driver.kick()
    disk.finish()
    driver.loop.poll()
    assert device.statistics == (3, 2048, 1, 1536, 1, 1, 1, 2)


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_requests_that_were_not_negotiated_are_unsupported(make: Make, kind: int) -> None:
    assert make(MemoryDisk()).start().command(kind, segment(0, 1)) == S_UNSUPP


def test_a_read_only_disk_is_not_changed(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk, read_only=True, discard=True, write_zeroes=True).start()
    assert driver.write_disk(0, bytes(512)) == S_IOERR
    assert driver.command(DISCARD, segment(0, 1)) == S_IOERR
    assert driver.command(WRITE_ZEROES, segment(0, 1)) == S_IOERR
    assert disk.log == []
    assert driver.read_disk(0, 512)[0] == S_OK


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("name", ["read", "write", "flush"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP])
def test_what_fails_on_the_host_is_an_io_error(make: Make, inline: bool, name: str, error: int) -> None:
    disk = MemoryDisk(inline=inline)
    driver = make(disk).start()
    disk.failure[name] = -error
    laid = driver.offer(
        header({"read": IN, "write": OUT, "flush": FLUSH}[name]), *({"read": [512], "write": [bytes(512)]}.get(name, [])), 1
    )
    driver.kick()
    disk.finish()
    driver.loop.poll()
    assert driver.written(laid)[-1] == S_IOERR
    assert not driver.broken


# Write-through


@pytest.mark.parametrize("inline", [True, False])
def test_every_change_is_flushed_when_the_driver_cannot_flush(make: Make, inline: bool) -> None:
    disk = MemoryDisk(inline=inline)
    driver = make(disk, write_zeroes=True)
    driver.start(driver.offered() & ~F_FLUSH)
    for number, (kind, data) in enumerate(((OUT, bytes(512)), (WRITE_ZEROES, segment(0, 1)))):
        driver.offer(header(kind), data, 1)
        driver.kick()
        if not inline:
            disk.finish()
            driver.loop.poll()
            assert driver.rings[0].collect() == [], "not done before it is flushed"
            disk.finish()
            driver.loop.poll()
        assert len(driver.rings[0].collect()) == 1
        assert disk.log[2 * number + 1] == "flush"


@pytest.mark.parametrize("inline", [True, False])
def test_a_write_through_that_cannot_be_flushed_is_an_io_error(make: Make, inline: bool) -> None:
    disk = MemoryDisk(inline=inline)
    disk.failure["flush"] = -errno.EIO
    driver = make(disk, write_zeroes=True)
    driver.start(driver.offered() & ~F_FLUSH)
    laid = driver.offer(header(OUT), bytes(512), 1)
    driver.kick()
    disk.finish()
    disk.inline = True
    driver.loop.poll()
    assert driver.written(laid) == bytes([S_IOERR])


def test_a_failed_write_is_not_flushed(make: Make) -> None:
    disk = MemoryDisk()
    disk.failure["write"] = -errno.EIO
    driver = make(disk)
    driver.start(driver.offered() & ~F_FLUSH)
    assert driver.write_disk(0, bytes(512)) == S_IOERR
    assert disk.log == ["write"]


# Requests under way


def test_requests_finish_in_the_order_of_the_disk(make: Make) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk).start(size=16)
    for sector in range(3):
        driver.offer(header(IN, sector), 512, 1)
    driver.kick()
    channel = disk.channels[0]
    assert channel.submits >= 1
    channel.waiting.reverse()
    disk.finish()
    driver.loop.poll()
    assert [head for head, _ in driver.rings[0].collect()] == [6, 3, 0]
    assert driver.line.edges == 1, "one interrupt for what finished together"


def test_a_reset_waits_for_requests_under_way_and_nothing_is_written_after_it(make: Make, memory: GuestMemory) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk).start()
    laid = driver.offer(header(IN), 512, 1)
    driver.kick()
    driver.status = 0
    assert not disk.channels[0].in_flight
    assert driver.written(laid)[-1] == S_OK
    memory.write(laid[1][0], b"new owner")
    before = memory.read(0, 1 << 20)
    disk.finish()
    driver.loop.poll()
    assert memory.read(0, 1 << 20) == before
    disk.inline = True
    assert driver.restart().read_disk(0, 512)[0] == S_OK


def test_a_pause_finishes_what_is_under_way_even_where_a_flush_follows(make: Make) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk)
    driver.start(driver.offered() & ~F_FLUSH)
    driver.offer(header(OUT), bytes(512), 1)
    driver.kick()
    driver.transport.pause()
    assert driver.rings[0].collect() == [(0, 1)]
    assert disk.log == ["write", "flush"]
    driver.offer(header(IN), 512, 1)
    driver.kick()
    assert disk.log == ["write", "flush"]
    driver.transport.resume()
    driver.loop.poll()
    assert disk.log[2:] == ["read"]


def test_a_disk_that_cannot_come_to_rest_works_on(make: Make, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    other = new_loop()
    disk = MemoryDisk(inline=False)
    driver = make(disk, loops=[loop, other], num_queues=2).start()
    driver.offer(header(IN), 512, 1)
    driver.kick()

    def refuse() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(disk.channels[0], "drain", refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        driver.transport.pause()
    monkeypatch.undo()
    disk.finish()
    disk.inline = True
    for queue in (0, 1):
        driver.offer(header(IN), 512, 1, queue=queue)
        driver.kick(queue)
    loop.poll()
    other.poll()
    assert [len(ring.collect()) for ring in driver.rings[:2]] == [2, 1]
    driver.transport.pause()
    driver.close()
    other.close()


def refuse_to_rest(disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(disk.channels[0], "drain", refuse)


def test_a_reset_after_one_that_failed_waits_for_requests_under_way(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk).start()
    driver.offer(header(IN), 512, 1)
    driver.kick()
    refuse_to_rest(disk, monkeypatch)
    with pytest.raises(OSError, match="the disk is gone"):
        driver.transport.reset()
    monkeypatch.undo()
    driver.transport.reset()
    assert not disk.channels[0].waiting, "it would write into the memory of the next guest"


def test_a_disk_that_cannot_come_to_rest_leaves_nothing_open(
    make: Make, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk).start()
    driver.offer(header(IN), 512, 1)
    driver.kick()
    refuse_to_rest(disk, monkeypatch)
    with pytest.raises(OSError, match="the disk is gone"):
        driver.transport.close()
    assert not driver.transport.doorbells
    monkeypatch.undo()
    driver.device.close()


def test_a_disk_that_cannot_go_on_stays_at_rest_until_it_can(
    make: Make, loop: DirectLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = MemoryDisk()
    driver = make(disk, num_queues=2).start()
    driver.transport.pause()
    for queue in (0, 1):
        driver.offer(header(IN), 512, 1, queue=queue)
    watch, left = loop.add_fd, [1]

    def add_fd(fd: int, events: int, callback: Callable[[int], None]) -> None:
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # epoll_ctl(2): max_user_watches
        left.pop()
        watch(fd, events, callback)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "add_fd", add_fd)
        with pytest.raises(OSError, match="No space left"):
            driver.transport.resume()
    loop.poll()
    assert disk.log == []
    driver.transport.resume()
    loop.poll()
    assert [len(ring.collect()) for ring in driver.rings] == [1, 1]


def test_a_disk_that_comes_while_a_driver_sets_up_is_told_of_when_it_is_ready(make: Make) -> None:
    driver = make()
    assert driver.negotiate()
    assert driver.capacity == 0  # as Linux does: read before it is ready, and not again
    driver.rings = [driver.enable(0)]
    assert isinstance(driver.device, BlkDevice)
    driver.device.attach(MemoryDisk(1 << 20))
    assert (driver.transport.interrupt_status, driver.line.edges) == (0, 0)
    driver.status |= DRIVER_OK
    assert driver.transport.interrupt_status == CONFIG_CHANGE
    assert driver.line.edges == 1
    assert driver.capacity == 2048


def test_a_stopped_queue_is_given_back_its_requests_first(make: Make) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk, num_queues=2).start()
    driver.offer(header(IN), 512, 1, queue=1)
    driver.kick(1)
    driver.write(0x030, 1)
    driver.write(0x044, 0)
    assert len(driver.rings[1].collect()) == 1


def test_completions_of_a_broken_device_are_dropped(make: Make) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk).start()
    driver.offer(header(IN), 512, 1)
    driver.rings[0].offer(7777)
    driver.kick()
    assert driver.broken
    disk.finish()
    driver.loop.poll()
    assert driver.rings[0].collect() == []
    disk.inline = True
    assert driver.restart().read_disk(0, 512)[0] == S_OK


def test_long_batches_are_published_in_parts(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start(size=256)
    for _ in range(80):
        driver.offer(header(IN), 512, 1)
    driver.kick()
    assert len(driver.rings[0].collect()) == 80
    assert driver.line.edges == 2


def test_a_queue_that_never_runs_empty_does_not_starve_its_loop(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    served_after: list[int] = []

    class Refill(dict[str, int]):
        """Offers a new request whenever one is served, for the first three turns of the loop."""

        def get(self, name: str, default: int = 0) -> int:
            if len(served_after) < 3:
                driver.offer(header(FLUSH), 1)
            return default

    def turned() -> None:
        served_after.append(len(disk.log))
        if len(served_after) < 3:
            driver.loop.call_soon(turned)

    disk.failure = Refill()
    driver.offer(header(FLUSH), 1)
    driver.loop.call_soon(turned)
    driver.kick()
    assert served_after == [10, 20, 30]


# Mistakes that break the device


@pytest.mark.parametrize(
    "buffers",
    [
        (header(IN),),
        (512, 1),
        (header(IN)[:15], 512, 1),
        (header(IN)[:8], header(IN)[8:15], 1),
        (header(IN), 1),
        (header(OUT), 1),
        (header(DISCARD), 1),
        (header(DISCARD), segment(0, 1)[:15], 1),
        (header(WRITE_ZEROES), segment(0, 1)[:8], segment(0, 1)[8:15], 1),
    ],
)
def test_a_malformed_request_breaks_the_device_until_reset(make: Make, buffers: tuple[bytes | int, ...]) -> None:
    driver = make(MemoryDisk(), discard=True, write_zeroes=True).start()
    driver.offer(*buffers)
    driver.kick()
    assert driver.broken
    assert driver.read(0x060) == CONFIG_CHANGE
    assert driver.restart().read_disk(0, 512)[0] == S_OK


# Limits


def passed(loop: DirectLoop, driver: Driver, seconds: float) -> int:
    """Let time pass, in steps as short as a host's timers; return how many requests were served."""
    count = 0
    for _ in range(round(seconds * 100)):
        loop.clock.advance(SECOND // 100)
        loop.poll()
        count += sum(len(ring.collect()) for ring in driver.rings)
    return count


def test_an_iops_limit_lets_a_tenth_of_a_second_s_worth_through_at_once_and_then_its_rate(make: Make, loop: DirectLoop) -> None:
    driver = make(MemoryDisk(), iops=50, num_queues=2).start(size=128)
    for _ in range(64):
        driver.offer(header(FLUSH), 1, queue=0)
        driver.offer(header(FLUSH), 1, queue=1)
    driver.kick(0)
    driver.kick(1)
    assert len(driver.rings[0].collect()) + len(driver.rings[1].collect()) == 6, "both queues share one limit"
    assert passed(loop, driver, 1) == 50
    assert passed(loop, driver, 0.1) == 5
    assert passed(loop, driver, 5) == 67
    assert loop.next_deadline() is None


def test_a_bandwidth_limit_counts_bytes_of_data(make: Make, loop: DirectLoop) -> None:
    driver = make(MemoryDisk(), bps=50 * 4096).start(size=256)
    for _ in range(60):
        driver.offer(header(IN), 4096, 1)
    driver.kick()
    assert len(driver.rings[0].collect()) == 6
    assert passed(loop, driver, 1) == 50


def test_the_narrower_of_two_limits_counts(make: Make, loop: DirectLoop) -> None:
    driver = make(MemoryDisk(), bps=50 * 4096, iops=25).start(size=256)
    for _ in range(60):
        driver.offer(header(IN), 4096, 1)
    driver.kick()
    assert len(driver.rings[0].collect()) == 3
    assert passed(loop, driver, 2) == 50


def test_a_limited_device_can_be_paused_reset_and_closed_with_requests_waiting(make: Make, loop: DirectLoop) -> None:
    driver = make(MemoryDisk(), iops=10).start()

    def offer_4() -> None:
        for _ in range(4):
            driver.offer(header(FLUSH), 1)
        driver.kick()

    offer_4()
    assert len(driver.rings[0].collect()) == 2
    driver.transport.pause()
    loop.clock.advance(5 * SECOND)
    assert driver.rings[0].collect() == []
    driver.transport.resume()
    loop.poll()
    assert len(driver.rings[0].collect()) == 2
    offer_4()
    driver.kick()
    driver.status = 0
    assert loop.next_deadline() is None, "no timer outlives the driver that it was for"
    driver.restart()
    loop.clock.advance(5 * SECOND)
    offer_4()
    assert len(driver.rings[0].collect()) == 2


# Disks that come and go


def test_a_device_without_disk_has_no_capacity_and_fails_every_request(make: Make) -> None:
    driver = make(discard=True).start()
    assert driver.capacity == 0
    assert driver.read_disk(0, 512)[0] == S_IOERR
    assert driver.write_disk(0, bytes(512)) == S_IOERR
    assert [driver.command(kind, *data) for kind, data in ((FLUSH, ()), (GET_ID, ()), (DISCARD, (segment(0, 1),)), (99, ()))] == [
        S_IOERR
    ] * 4
    with pytest.raises(DeviceError, match="has no disk"):
        driver.device.detach()
    driver.device.disk_resized()


def test_a_disk_can_be_put_in_and_taken_out_under_an_active_driver(make: Make) -> None:
    driver = make().start()
    disk = MemoryDisk(inline=False)
    driver.device.attach(disk)
    assert driver.device.has_disk
    assert driver.capacity == 128
    assert driver.read(0x060) == CONFIG_CHANGE
    with pytest.raises(DeviceError, match="has a disk"):
        driver.device.attach(MemoryDisk())
    laid = driver.offer(header(IN), 512, 1)
    driver.kick()
    generation = driver.read(0x0FC)
    driver.device.detach()
    assert driver.written(laid)[-1] == S_OK, "what is under way is finished first"
    assert not disk.channels
    assert driver.capacity == 0
    assert driver.read(0x0FC) != generation
    driver.rings[0].collect()
    assert driver.read_disk(0, 512)[0] == S_IOERR
    assert not driver.device.has_disk


def test_a_disk_brings_its_serial_number_and_its_limit(make: Make, loop: DirectLoop) -> None:
    driver = make(serial="slot", iops=1).start(size=16)
    driver.device.attach(MemoryDisk(), serial="first", iops=20)
    for _ in range(5):
        driver.offer(header(GET_ID), 20, 1)
    driver.kick()
    assert len(driver.rings[0].collect()) == 3
    loop.clock.advance(SECOND)
    driver.rings[0].collect()
    driver.device.detach()
    driver.device.attach(MemoryDisk())
    assert driver.request(header(GET_ID), 20, 1)[1] == bytes(21)
    driver.device.detach()
    with pytest.raises(DeviceError, match="at most 20"):
        driver.device.attach(MemoryDisk(), serial="ä" * 11)
    assert not driver.device.has_disk


def test_the_limit_of_a_disk_that_was_taken_out_holds_nothing_up(make: Make, loop: DirectLoop) -> None:
    driver = make().start(size=16)
    driver.device.attach(MemoryDisk(), bps=512)
    for _ in range(3):
        driver.offer(header(IN), 64 * 512, 1)  # a minute's worth each
    driver.kick()
    assert [written for _, written in driver.rings[0].collect()] == [64 * 512 + 1]
    driver.device.detach()
    loop.poll()
    assert len(driver.rings[0].collect()) == 2, "what waited fails with the disk"
    assert loop.next_deadline() is None
    driver.device.attach(MemoryDisk())
    assert driver.read_disk(0, 512)[0] == S_OK


def test_a_serial_number_has_at_most_20_bytes(make: Make) -> None:
    for serial in ("x" * 21, "ä" * 11):
        with pytest.raises(DeviceError, match="at most 20"):
            make(serial=serial)
    make(MemoryDisk(), serial="x" * 20)


def test_a_serial_number_is_bytes_as_they_are_in_an_argument(make: Make) -> None:
    driver = make(MemoryDisk(), serial="\udcff\udc80").start()
    assert driver.request(header(GET_ID), 20, 1)[1] == b"\xff\x80".ljust(21, b"\0")


def test_a_disk_can_be_put_in_before_there_is_a_driver(make: Make) -> None:
    driver = make()
    disk = MemoryDisk()
    driver.device.attach(disk)
    assert not disk.channels
    assert driver.start().read_disk(0, 512)[0] == S_OK
    driver.device.detach()


def test_the_next_driver_is_offered_what_suits_the_disk(make: Make) -> None:
    driver = make().start()
    driver.device.attach(MemoryDisk(read_only=True))
    assert not driver.device.features & F_RO, "this driver has its features"
    assert driver.write_disk(0, bytes(512)) == S_IOERR
    driver.write(0x070, 0)
    assert driver.device.features & F_RO
    driver.device.detach()
    driver.device.attach(MemoryDisk())
    assert not driver.device.features & F_RO
    assert driver.start().write_disk(0, bytes(512)) == S_OK
    driver.device.detach()


def test_a_disk_that_grows_is_larger_for_the_driver_too(make: Make) -> None:
    disk = MemoryDisk()
    driver = make(disk).start()
    disk.data += bytes(512)
    disk.size += 512
    assert driver.read_disk(128, 512)[0] == S_IOERR
    driver.device.disk_resized()
    assert driver.capacity == 129
    assert driver.read_disk(128, 512) == (S_OK, bytes(512))


def test_a_disk_whose_channels_cannot_be_opened_is_not_attached(make: Make, loop: DirectLoop) -> None:
    second = new_loop()
    driver = make(loops=[loop, second], num_queues=2).start()
    disk = MemoryDisk()
    disk.channel_limit = 1
    with pytest.raises(DeviceError, match="no more channels"):
        driver.device.attach(disk)
    assert not disk.channels
    assert driver.capacity == 0
    assert driver.read_disk(0, 512)[0] == S_IOERR
    driver.close()
    second.close()


def test_a_disk_whose_channels_cannot_be_opened_at_driver_ok_breaks_the_device(make: Make) -> None:
    disk = MemoryDisk()
    disk.channel_limit = 0
    driver = make(disk).start()
    assert driver.broken
    disk.channel_limit = 1
    assert driver.restart().read_disk(0, 512)[0] == S_OK


def test_a_restored_device_serves_what_was_waiting(make: Make, loop: DirectLoop) -> None:
    disk = MemoryDisk()
    old = make(disk).start()
    old.transport.pause()
    laid = old.offer(header(IN), 512, 1)
    state = old.transport.save(), old.device.save()
    new = make(disk)
    new.device.restore(state[1])
    new.transport.restore(state[0])
    new.transport.resume()
    loop.poll()
    assert new.written(laid) == bytes(disk.data[:512]) + bytes([S_OK])
    with pytest.raises(StateError):
        new.device.restore(state[0])


# Anything at all


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 7]),
        st.integers(0, 130),
        st.lists(st.one_of(st.binary(min_size=1, max_size=40), st.sampled_from([bytes(512), segment(1, 2)])), max_size=3),
        st.lists(st.sampled_from([1, 2, 20, 511, 512, 513, 1024]), max_size=3),
    ),
    max_size=8,
)


def check_requests(requests: list[tuple[int, int, list[bytes], list[int]]], inline: bool) -> None:
    """Make requests of whatever form: each comes back, or the device is broken, and works after a reset."""
    memory, loop, disk = GuestMemory([(0, 1 << 20)]), new_loop(), MemoryDisk(inline=inline)
    driver = Disk(BlkDevice("fuzz", [loop], loop.clock, disk=disk, discard=True, write_zeroes=True), memory, loop)
    try:
        driver.start(size=64)
        for kind, sector, readable, writable in requests:
            driver.offer(header(kind, sector), *readable, *writable)
            driver.kick()
        disk.finish()
        loop.poll()
        disk.inline = True
        assert len(disk.data) == disk.size
        assert driver.broken or len(driver.rings[0].collect()) == len(requests)
        assert driver.restart().read_disk(0, 512) == (S_OK, bytes(disk.data[:512]))
    finally:
        driver.close()
        assert not watched(loop)
        assert not disk.channels
        loop.close()


@given(REQUESTS, st.booleans())
@settings(max_examples=600)
def test_no_request_escapes_hangs_or_leaves_its_disk(
    requests: list[tuple[int, int, list[bytes], list[int]]], inline: bool
) -> None:
    check_requests(requests, inline)


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize("mine", [0, F_FLUSH], ids=["a flush behind each write", "flushes when asked"])
def test_requests_of_many_pieces_wait_in_the_ring_when_there_are_too_many_at_the_disk(make: Make, kind: int, mine: int) -> None:
    """Each piece costs memory of ours as long as its request waits; the largest ring of the longest chains would be gigabytes."""
    disk = MemoryDisk(inline=False)
    driver = make(disk, num_queues=2).start(F_VERSION_1 | F_INDIRECT_DESC | F_MQ | mine, size=128)
    table, data, count = 0x8_0000, 0x9_0000, 1000
    driver.memory.write(data, header(kind) + bytes(2048))
    pieces = [(data, 16, False), *[(data + 16, 1, kind == IN)] * (count - 1), (data + 16, 1024 - count + 1, kind == IN)]
    for ring in driver.rings:
        head = ring.chain(*pieces, (data + 2064, 1, True), table=table)
        ring.offer(*[head] * 128)
    for index in range(2):
        driver.kick(index)
    assert len(disk.channels[0].waiting) == 66
    done = [0, 0]
    while disk.channels[0].waiting:
        disk.finish(min(50, len(disk.channels[0].waiting)))
        driver.loop.poll()
        assert len(disk.channels[0].waiting) <= 66
        for index, ring in enumerate(driver.rings):
            done[index] += len(ring.collect())
    assert done == [128, 128]
    assert not driver.broken


def test_a_queue_that_is_never_empty_leaves_others_their_share_of_what_the_disk_may_have(make: Make) -> None:
    disk = MemoryDisk(inline=False)
    driver = make(disk, num_queues=2).start(F_VERSION_1 | F_INDIRECT_DESC | F_MQ | F_FLUSH, size=128)
    table, data, count = 0x8_0000, 0x9_0000, 1000
    driver.memory.write(data, header(IN) + bytes(2048))
    pieces = [(data, 16, False), *[(data + 16, 1, True)] * (count - 1), (data + 16, 1024 - count + 1, True)]
    busy, other = driver.rings
    heads = [ring.chain(*pieces, (data + 2064, 1, True), table=table) for ring in driver.rings]
    busy.offer(*[heads[0]] * 128)
    driver.kick(0)
    other.offer(*[heads[1]] * 10)
    driver.kick(1)
    done = 0
    for _ in range(100):
        disk.finish(1)
        driver.loop.poll()
        busy.offer(*[heads[0]] * len(busy.collect()))
        driver.kick(0)
        done += len(other.collect())
    assert done == 10
