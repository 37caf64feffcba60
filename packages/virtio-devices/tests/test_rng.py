"""The entropy device and its rate limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtio_devices.device import F_VERSION_1, DeviceError
from virtio_devices.limit import LeakyBucket
from virtio_devices.rng import RngDevice, open_source
from virtio_driver import Driver, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.guestmem import GuestMemory

SECOND = 1_000_000_000
Make = Callable[..., Driver]


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[Driver] = []

    def make(source: int | None = None, **options: int) -> Driver:
        device = RngDevice("rng0", loop, loop.clock, open_source("/dev/urandom") if source is None else source, **options)
        made.append(Driver(device, memory, loop))
        return made[-1].start()

    yield make
    for driver in made:
        driver.close()
        driver.close()
    assert not watched(loop)
    assert loop.next_deadline() is None


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A source that gives what is written into it: (source, where to write)."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield read, write
    os.close(write)


def test_a_request_is_filled_with_random_bytes(make: Make) -> None:
    driver = make()
    assert driver.offered() == F_VERSION_1
    written, first = driver.request(64, 100)
    assert written == 164
    assert first != driver.request(64, 100)[1]
    assert b"\xcc" * 16 not in first


def test_the_bytes_are_the_source_s_and_scattered_in_order(make: Make, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"0123456789")
    assert make(pipe[0]).request(4, 100) == (10, b"0123456789" + b"\xcc" * 94)


def test_requests_bytes_and_waits_are_counted(make: Make, pipe: tuple[int, int]) -> None:
    driver = make(pipe[0])
    os.write(pipe[1], b"0123456789")
    driver.request(4)
    driver.request(8)
    driver.offer(16)
    driver.kick()
    assert driver.device.counters() == {"requests": 2, "bytes": 10, "delays": 1}


def test_a_source_that_has_nothing_is_asked_again(make: Make, pipe: tuple[int, int]) -> None:
    driver = make(pipe[0])
    driver.offer(16)
    driver.kick()
    assert driver.rings[0].collect() == []
    os.write(pipe[1], b"late")
    driver.loop.poll()
    assert driver.rings[0].collect() == [(0, 4)]


@pytest.mark.parametrize("kind", ["end of file", "error"])
def test_a_source_that_fails_is_reported_once_and_asked_again(
    memory: GuestMemory, loop: DirectLoop, tmp_path: Path, kind: str
) -> None:
    said: list[str] = []
    source = os.open("/dev/null", os.O_RDONLY) if kind == "end of file" else os.open(tmp_path, os.O_RDONLY)
    driver = Driver(RngDevice("rng0", loop, loop.clock, source, report=said.append), memory, loop)
    driver.start()
    driver.offer(16)
    driver.kick()
    for _ in range(5):
        loop.poll()
    assert driver.rings[0].collect() == []
    assert len(said) == 1
    random = os.open("/dev/urandom", os.O_RDONLY)
    os.dup2(random, source)
    os.close(random)
    loop.poll()
    assert driver.rings[0].collect() == [(0, 16)]
    driver.close()


def test_a_request_without_room_breaks_the_device(make: Make) -> None:
    driver = make()
    driver.offer(b"readable only")
    driver.kick()
    assert driver.broken
    assert driver.restart().request(8)[0] == 8


def test_one_request_gets_at_most_a_mebibyte_and_the_loop_its_turn() -> None:
    memory, loop = GuestMemory([(0, 8 << 20)]), new_loop()
    driver = Driver(RngDevice("rng0", loop, loop.clock, open_source("/dev/urandom")), memory, loop).start()
    for _ in range(2):
        ring = driver.rings[0]
        ring.offer(ring.chain((1 << 20, 1 << 20, True), (2 << 20, 1 << 20, True)))
    done: list[list[tuple[int, int]]] = []
    loop.call_soon(lambda: done.append(driver.rings[0].collect()))
    driver.kick()
    assert done == [[(0, 1 << 20)]]
    assert driver.rings[0].collect() == [(2, 1 << 20)]
    assert not any(memory.view(2 << 20, 1 << 20)), "what is beyond is not touched"
    driver.close()
    loop.close()


# The limit


def test_the_rate_holds_over_time(make: Make, loop: DirectLoop) -> None:
    driver = make(rate=100)
    given = 0
    driver.offer(1000)
    driver.kick()
    for _ in range(100):
        loop.clock.advance(SECOND // 10)
        loop.poll()
        for _, written in driver.rings[0].collect():
            given += written
            driver._next = 0x4_0000
            driver.offer(1000)
            driver.kick()
    assert 10 * 100 <= given <= 12 * 100, "100 bytes a second for 10 seconds, and what a full bucket starts with"


def test_what_a_source_did_not_give_is_not_paid_for(make: Make, loop: DirectLoop, pipe: tuple[int, int]) -> None:
    driver = make(pipe[0], rate=100)
    driver.offer(100)
    driver.kick()
    for _ in range(5):  # it has nothing, and is asked again and again
        loop.poll()
    os.write(pipe[1], bytes(10))
    loop.poll()
    assert driver.rings[0].collect() == [(0, 10)]
    os.write(pipe[1], bytes(90))
    assert driver.request(100)[0] == 90, "which makes 100 in the first second"


def test_a_request_waits_in_the_ring_over_pause_and_reset(make: Make, loop: DirectLoop) -> None:
    driver = make(rate=64)
    assert [driver.request(64)[0] for _ in range(2)] == [64, 64]
    driver.offer(64)
    driver.kick()
    driver.kick()
    driver.transport.pause()
    assert driver.transport.save().queues[0].next_avail == 2
    loop.clock.advance(10 * SECOND)
    assert driver.rings[0].collect() == []
    driver.transport.resume()
    loop.poll()
    assert driver.rings[0].collect() == [(2, 64)]
    driver.offer(64)
    driver.offer(64)
    driver.kick()
    driver.status = 0
    assert loop.next_deadline() is None


@pytest.mark.parametrize("rate", [1, 63, 1_000_000_001])
def test_a_rate_out_of_range_is_refused(loop: DirectLoop, rate: int) -> None:
    with pytest.raises(ValueError, match="bytes per second of rng"):
        RngDevice("rng0", loop, loop.clock, -1, rate=rate)


def test_a_bucket_is_exact_over_any_number_of_small_steps(loop: DirectLoop) -> None:
    with pytest.raises(ValueError, match="rate of 0"):
        LeakyBucket(loop.clock, 0)
    bucket = LeakyBucket(loop.clock, 3)
    taken = 0
    for _ in range(1000):
        while not (delay := bucket.take(1)):
            taken += 1
        loop.clock.advance(delay)
    assert taken == 3 + 1 + 999
    assert loop.clock.now() == pytest.approx(1000 / 3 * SECOND, abs=1000)


# The source


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("/nonexistent", "is not existed"), ("/etc/passwd", "not a character special"), ("/etc", "not a character special")],
)
def test_a_source_must_be_a_character_device(path: str, complaint: str) -> None:
    before = descriptors(settle=True)
    with pytest.raises(DeviceError, match=complaint):
        open_source(path)
    assert descriptors() == before


def test_a_source_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    loop_of_links = tmp_path / "link"
    loop_of_links.symlink_to(loop_of_links)
    with pytest.raises(DeviceError, match="symbolic links"):
        open_source(str(loop_of_links))
