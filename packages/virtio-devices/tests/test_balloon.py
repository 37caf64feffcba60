"""The memory balloon: what is given back, what is refused, what is told, and what a hostile driver achieves."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_devices.balloon.device import (
    F_DEFLATE_ON_OOM,
    F_MESSAGE_VQ,
    F_REPORTING,
    F_STATS_VQ,
    AutoBalloon,
    BalloonDevice,
    BalloonState,
)
from virtio_devices.balloon.pages import in_ram, page_numbers, runs
from virtio_devices.balloon.statistics import NAMES, read_statistics
from virtio_devices.device import F_VERSION_1
from virtio_driver import BASE, Driver, descriptors, new_loop, watched
from vmm_core.directloop import DirectLoop
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory, Region

SECOND = 1_000_000_000
PAGE = 4096
HIGH = 1 << 32  # the memory fixture has 64 KiB there, and 1 MiB at 0
Make = Callable[..., Driver]
INFLATE, DEFLATE = 0, 1


class Taken:
    """Guest memory's discard(), noting what it is asked to give back."""

    def __init__(self, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory, self.ranges = memory, []
        self._real, self.error = memory.discard, None
        monkeypatch.setattr(memory, "discard", self)
        self._bases = [(memory.host_address(region), region) for region in memory.regions]

    ranges: list[tuple[int, int]]
    error: OSError | None

    def __call__(self, view: memoryview) -> int:
        import ctypes

        if self.error:
            raise self.error
        host = ctypes.addressof(ctypes.c_char.from_buffer(view))
        for base, region in self._bases:
            if base <= host < base + region.size:
                self.ranges.append((host - base + region.base, len(view)))
        return self._real(view)


@pytest.fixture
def loop() -> Iterator[DirectLoop]:
    loop = new_loop()
    yield loop
    loop.close()


@pytest.fixture
def taken(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(memory, monkeypatch)


@pytest.fixture
def make(memory: GuestMemory, loop: DirectLoop) -> Iterator[Make]:
    made: list[Driver] = []

    def make(*, features: int | None = None, start: bool = True, **options: Any) -> Driver:
        driver = Driver(BalloonDevice("balloon0", loop, memory, **options), memory, loop)
        made.append(driver)
        return driver.start(features) if start else driver

    yield make
    for driver in made:
        driver.close()
        driver.close()
    assert not watched(loop)
    assert loop.next_deadline() is None


def pfns(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def balloon(driver: Driver) -> BalloonDevice:
    assert isinstance(driver.device, BalloonDevice)
    return driver.device


# Pages


def test_inflated_pages_are_joined_to_ranges_and_given_back(make: Make, memory: GuestMemory, taken: Taken) -> None:
    driver = make()
    memory.view(0x80000, 0x10000)[:] = b"\xaa" * 0x10000
    assert driver.request(pfns(0x83, 0x81, 0x80, 0x86, 0x82, 0x81), queue=INFLATE) == (0, b"")
    assert taken.ranges == [(0x80000, 4 * PAGE), (0x86000, PAGE)]
    assert not any(memory.view(0x80000, 4 * PAGE))
    assert set(memory.read(0x84000, 2 * PAGE)) == {0xAA}


def test_pages_that_are_no_ram_are_passed_over(make: Make, taken: Taken) -> None:
    driver = make()
    driver.request(pfns(0xFE, 0xFF, 0x100, 0x101, 0xFFFFF, 0x100000, 0x10000F, 0x100010, 0xFFFFFFFF), queue=INFLATE)
    assert taken.ranges == [(0xFE000, 2 * PAGE), (HIGH, PAGE), (HIGH + 15 * PAGE, PAGE)]
    assert not driver.broken


def test_pages_and_what_the_host_took_back_are_counted(make: Make) -> None:
    driver = make(reporting=True)
    driver.request(pfns(0x80, 0x81, 0x81, 0x100), queue=INFLATE)
    driver.request(pfns(0x80), queue=DEFLATE)
    ring = driver.rings[2]
    ring.offer(ring.chain((0x90000, 2 * PAGE, True)))
    driver.kick(2)
    assert driver.device.counters() == {
        "inflated_pages": 4,
        "deflated_pages": 1,
        "reported_bytes": 2 * PAGE,
        "returned_bytes": 4 * PAGE,  # a page twice is one, and page 0x100 is no RAM
    }


def test_requests_of_one_batch_are_one_range(make: Make, taken: Taken) -> None:
    driver = make()
    for page in (0x82, 0x80, 0x81):
        driver.offer(pfns(page), queue=INFLATE)
    driver.kick(INFLATE)
    assert len(driver.rings[INFLATE].collect()) == 3
    assert taken.ranges == [(0x80000, 3 * PAGE)]
    assert driver.line.edges == 1


def test_deflating_touches_nothing(make: Make, memory: GuestMemory, taken: Taken) -> None:
    driver = make()
    memory.write(0x80000, b"in use")
    assert driver.request(pfns(0x80), queue=DEFLATE) == (0, b"")
    assert memory.read(0x80000, 6) == b"in use"
    assert taken.ranges == []


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_request_without_page_numbers_breaks_the_device(make: Make, queue: int) -> None:
    driver = make()
    driver.offer(64, queue=queue)
    driver.kick(queue)
    assert driver.broken
    assert driver.restart().request(pfns(0x80), queue=queue)[0] == 0


def test_a_request_that_would_keep_the_loop_for_long_breaks_the_device(make: Make, taken: Taken) -> None:
    driver = make()
    ring = driver.rings[INFLATE]
    ring.offer(ring.chain((0x80000, 0x8000, False), (0x80000, 0x8000, False)))  # 16,384 page numbers
    driver.kick(INFLATE)
    assert not driver.broken
    ring.offer(ring.chain((0x80000, 0x8000, False), (0x80000, 0x8000, False), (0x80000, 4, False)))
    driver.kick(INFLATE)
    assert driver.broken


def test_other_work_of_the_loop_has_its_turn_between_long_requests(make: Make, loop: DirectLoop) -> None:
    driver = make()
    ring = driver.rings[INFLATE]
    done: list[int] = []
    for _ in range(3):
        ring.offer(ring.chain((0x80000, 0x10000, False)))
    loop.call_soon(lambda: done.append(len(ring.collect())))
    driver.kick(INFLATE)
    assert done == [1]
    assert len(ring.collect()) == 2


def test_a_host_that_does_not_take_pages_is_reported_once_and_the_guest_goes_on(
    memory: GuestMemory, loop: DirectLoop, taken: Taken
) -> None:
    said: list[str] = []
    driver = Driver(BalloonDevice("balloon0", loop, memory, report=said.append), memory, loop).start()
    taken.error = OSError(95, "Operation not supported")
    for page in range(3):
        assert driver.request(pfns(page + 0x80), queue=INFLATE)[0] == 0
    assert said == ["balloon0: the host does not take pages back: Operation not supported"]
    driver.close()


@given(st.lists(st.integers(0, 60) | st.integers(0, 0xFFFFFFFF), max_size=40))
def test_ranges_hold_exactly_the_pages_that_are_ram(pages: list[int]) -> None:
    regions = [Region(0, 16 * PAGE, 0), Region(32 * PAGE, 16 * PAGE, 16 * PAGE)]
    numbers = page_numbers(pfns(*pages) + b"\1\2\3")
    ranges = list(in_ram(runs(numbers), regions))
    found = [page for address, length in ranges for page in range(address // PAGE, (address + length) // PAGE)]
    assert found == sorted({page for page in pages if page < 16 or 32 <= page < 48})
    assert all(address + length != other for (address, length), (other, _) in pairwise(ranges))


# Free page reporting


def test_reported_ranges_are_given_back(make: Make, memory: GuestMemory, taken: Taken) -> None:
    driver = make(reporting=True)
    assert driver.offered() == F_VERSION_1 | F_REPORTING
    memory.view(0x80000, 0x20000)[:] = b"\xaa" * 0x20000
    ring = driver.rings[2]
    ring.offer(ring.chain((0x80000, 0x8000, True), (0x90800, 0x2000, True), (HIGH, PAGE, True)))
    driver.kick(2)
    assert ring.collect() == [(0, 0x8000 + 0x2000 + PAGE)]
    assert taken.ranges == [(0x80000, 0x8000), (0x90800, 0x2000), (HIGH, PAGE)]
    assert not any(memory.view(0x80000, 0x8000))
    assert not any(memory.view(0x91000, 0x1000))
    assert set(memory.read(0x88000, 0x8800 + 0x800)) == {0xAA}, "half pages stay"


def test_a_report_of_readable_memory_or_of_none_breaks_the_device(make: Make) -> None:
    driver = make(reporting=True)
    driver.offer(b"readable", queue=2)
    driver.kick(2)
    assert driver.broken
    driver.restart()
    ring = driver.rings[2]
    ring.offer(ring.chain((HIGH, 0x20000, True)))
    driver.kick(2)
    assert driver.broken


# Configuration and the two sides' wishes


def test_a_target_reaches_the_driver_with_an_interrupt(make: Make) -> None:
    driver = make()
    assert balloon(driver).ready
    assert driver.config(0, 4) == 0
    generation = driver.read(0x0FC)
    balloon(driver).set_target(100)
    assert driver.config(0, 4) == 100
    assert driver.read(0x0FC) != generation
    assert (driver.line.edges, driver.read(0x060)) == (1, 2)
    balloon(driver).set_target(1 << 60)
    assert driver.config(0, 4) == balloon(driver).ram_pages == (1 << 20 | 1 << 16) // PAGE
    assert driver.config(8, 4) == 0


def test_a_target_that_was_set_before_is_there_when_the_driver_comes(make: Make) -> None:
    driver = make(start=False)
    balloon(driver).set_target(77)
    assert not balloon(driver).ready
    driver.start()
    assert driver.config(0, 4) == 77
    driver.restart()
    assert driver.config(0, 4) == 77


def test_a_driver_writes_what_it_holds_and_nothing_else(make: Make) -> None:
    driver = make(auto=AutoBalloon(50, 10))
    driver.write(0x104, 0x30)
    for offset, size in ((0, 4), (4, 2), (6, 2), (5, 1), (8, 4), (16, 4), (20, 4)):
        driver.write(0x100 + offset, 0xFFFFFFFF & ((1 << 8 * size) - 1), size)
    assert [driver.config(offset, 4) for offset in range(0, 28, 4)] == [0, 0x30, 0, 0, 50, 10, 0]
    assert balloon(driver).held == 0x30
    driver.write(0x104, 0xFFFFFFFF)
    assert balloon(driver).held == balloon(driver).ram_pages, "a guest has no less than nothing"


def test_many_changes_are_told_once_a_second_with_the_value_of_then(make: Make, loop: DirectLoop) -> None:
    told: list[int] = []
    driver = make(on_change=lambda: told.append(balloon(driver).held))
    for pages in (1, 2, 2, 3):
        driver.write(0x104, pages)
        loop.poll()
    loop.clock.advance(SECOND - 1)
    assert told == []
    driver.write(0x104, 9)
    loop.poll()
    loop.clock.advance(1)
    assert told == [9]
    loop.clock.advance(10 * SECOND)
    driver.write(0x104, 9)
    loop.poll()
    loop.clock.advance(10 * SECOND)
    assert told == [9], "what did not change is no change"


def test_a_driver_that_writes_faster_than_the_loop_runs_has_it_remember_one_change(make: Make, loop: DirectLoop) -> None:
    told: list[int] = []
    driver = make(on_change=lambda: told.append(balloon(driver).held))
    for pages in range(1, 1000):
        driver.write(0x104, pages)
    assert len(loop._soon) == 1
    loop.poll()
    loop.clock.advance(SECOND)
    driver.write(0x104, 1)
    loop.poll()
    loop.clock.advance(SECOND)
    assert told == [balloon(driver).ram_pages, 1]


def test_a_reset_empties_the_balloon_and_tells_of_it(make: Make, loop: DirectLoop) -> None:
    told: list[int] = []
    driver = make(on_change=lambda: told.append(balloon(driver).held))
    balloon(driver).set_target(5)
    driver.write(0x104, 5)
    loop.poll()
    loop.clock.advance(SECOND)
    driver.status = 0
    loop.poll()
    loop.clock.advance(SECOND)
    assert told == [5, 0]
    assert driver.config(0, 4) == 5, "the client's wish stays"


def test_features_are_offered_by_option(make: Make) -> None:
    assert make(start=False).offered() == F_VERSION_1
    everything = make(
        start=False, deflate_on_oom=True, reporting=True, statistics_interval=5, auto=AutoBalloon(20, 300)
    ).offered()
    assert everything == F_VERSION_1 | F_DEFLATE_ON_OOM | F_REPORTING | F_STATS_VQ | F_MESSAGE_VQ


def test_queues_are_numbered_by_what_the_driver_took(make: Make, taken: Taken) -> None:
    driver = make(features=F_VERSION_1 | F_REPORTING, statistics_interval=5, reporting=True, auto=AutoBalloon(50, 10))
    ring = driver.rings[2]
    ring.offer(ring.chain((0x80000, PAGE, True)))
    driver.kick(2)
    assert taken.ranges == [(0x80000, PAGE)]
    driver.offer(b"not this one", queue=3)
    driver.kick(3)
    assert driver.broken


# Statistics


def stat(**values: int) -> bytes:
    return b"".join(struct.pack("<HQ", NAMES.index("stat-" + name.replace("_", "-")), value) for name, value in values.items())


def test_statistics_are_asked_for_again_and_again(make: Make, loop: DirectLoop) -> None:
    driver = make(statistics_interval=10)
    ring = driver.rings[2]
    driver.offer(stat(free_memory=1000, total_memory=5000), queue=2)
    driver.kick(2)
    assert balloon(driver).statistics == {"stat-free-memory": 1000, "stat-total-memory": 5000}
    assert balloon(driver).statistics_time > 0
    assert ring.collect() == [], "the device keeps the buffer until it wants to know more"
    for round_ in range(3):
        loop.clock.advance(10 * SECOND)
        assert ring.collect() == [(round_, 0)]
        driver.offer(stat(free_memory=round_), queue=2)
        driver.kick(2)
        assert balloon(driver).statistics == {"stat-free-memory": round_}
    assert driver.line.edges == 3


def test_a_second_buffer_frees_the_first(make: Make) -> None:
    driver = make(statistics_interval=10)
    driver.offer(stat(free_memory=1), queue=2)
    driver.offer(stat(free_memory=2), queue=2)
    driver.kick(2)
    assert driver.rings[2].collect() == [(0, 0)]
    assert balloon(driver).statistics == {"stat-free-memory": 2}


def test_statistics_wait_in_the_ring_over_a_pause_and_go_on(make: Make, loop: DirectLoop) -> None:
    driver = make(statistics_interval=10)
    driver.offer(stat(free_memory=1), queue=2)
    driver.kick(2)
    driver.transport.pause()
    assert driver.transport.save().queues[2].next_avail == 0
    assert loop.next_deadline() is None
    driver.transport.resume()
    loop.poll()
    loop.clock.advance(10 * SECOND)
    assert driver.rings[2].collect() == [(0, 0)]


def test_statistics_go_on_when_another_queue_is_stopped(make: Make, loop: DirectLoop) -> None:
    driver = make(statistics_interval=10)
    driver.offer(stat(free_memory=1), queue=2)
    driver.kick(2)
    driver.write(0x030, INFLATE)
    driver.write(0x044, 0)
    loop.poll()
    loop.clock.advance(10 * SECOND)
    assert driver.rings[2].collect() == [(0, 0)]


def test_a_statistics_buffer_without_anything_breaks_the_device(make: Make) -> None:
    driver = make(statistics_interval=1)
    driver.offer(10, queue=2)
    driver.kick(2)
    assert driver.broken


@given(st.lists(st.binary(min_size=1, max_size=900), max_size=4))
def test_any_statistics_are_known_names_and_64_bit_values(pieces: list[bytes]) -> None:
    found = read_statistics([memoryview(piece) for piece in pieces])
    assert set(found) <= set(NAMES)
    assert all(0 <= value < 1 << 64 for value in found.values())
    assert len(b"".join(pieces)) >= 10 or not found


# Messages of the guest's own driver


def test_a_message_sets_the_target(make: Make) -> None:
    driver = make(auto=AutoBalloon(30, 60))
    driver.request(struct.pack("<HQ", 1, 40), queue=2)
    assert (driver.config(0, 4), driver.config(16, 4), driver.config(20, 4)) == (40, 30, 60)
    driver.request(struct.pack("<HQ", 1, 1 << 63), queue=2)
    assert driver.config(0, 4) == balloon(driver).ram_pages
    driver.status = 0
    assert driver.config(0, 4) == 0


@pytest.mark.parametrize("message", [b"123456789", 16])
def test_a_message_that_is_none_breaks_the_device(make: Make, message: bytes | int) -> None:
    driver = make(auto=AutoBalloon(30, 60))
    driver.offer(message, queue=2)
    driver.kick(2)
    assert driver.broken


# State


def test_saved_restored_and_saved_again_is_the_same(make: Make, loop: DirectLoop) -> None:
    first = make(reporting=True, on_change=lambda: None)
    balloon(first).set_target(50)
    first.write(0x104, 20)
    loop.poll()
    first.transport.pause()
    states = first.transport.save(), balloon(first).save()
    assert states[1] == BalloonState(50, 20, True)
    first.close()
    told: list[int] = []
    second = make(start=False, reporting=True, on_change=lambda: told.append(balloon(second).held))
    second.transport.pause()
    second.transport.restore(states[0])
    balloon(second).restore(states[1])
    assert (second.transport.save(), balloon(second).save()) == states
    second.transport.resume()
    loop.clock.advance(SECOND)
    assert told == [20]
    assert balloon(second).ready


@pytest.mark.parametrize("state", [BalloonState(1 << 20, 0, False), BalloonState(0, -1, False), BalloonState(0, 0, 2), None])  # type: ignore[arg-type]
def test_a_state_that_cannot_be_is_refused(make: Make, state: object) -> None:
    driver = make(start=False)
    with pytest.raises(StateError, match="balloon0"):
        balloon(driver).restore(state)


def test_a_closed_balloon_tells_nobody(memory: GuestMemory, loop: DirectLoop) -> None:
    before = descriptors(settle=True)
    told: list[bool] = []
    driver = Driver(BalloonDevice("balloon0", loop, memory, on_change=lambda: told.append(True)), memory, loop).start()
    driver.write(0x104, 20)
    driver.close()
    loop.poll()
    loop.clock.advance(2 * SECOND)
    assert told == []
    assert descriptors() == before


# Hostile drivers

_BUFFER = st.tuples(
    st.one_of(st.integers(0x3F000, 0x42000), st.integers(0, (1 << 20) + PAGE), st.integers(HIGH - PAGE, HIGH + 0x11000)),
    st.one_of(st.integers(0, 40), st.integers(0, 0x30000), st.just(0xFFFFFFFF)),
    st.booleans(),
)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("chain"), st.integers(0, 4), st.lists(_BUFFER, min_size=1, max_size=4)),
            st.tuples(st.just("config"), st.integers(0, 30), st.integers(0, 0xFFFFFFFF)),
            st.tuples(st.just("time"), st.integers(0, 3), st.just(None)),
            st.tuples(st.just("pause"), st.integers(0, 2), st.just(None)),
            st.tuples(st.just("stop"), st.integers(0, 4), st.just(None)),
            st.tuples(st.just("junk"), st.integers(0x40000, 0x41000), st.binary(min_size=1, max_size=64)),
        ),
        max_size=12,
    )
)
def test_whatever_a_driver_does_the_device_works_after_a_reset(steps: list[Any]) -> None:
    memory, loop = GuestMemory([(0, 1 << 20), (HIGH, 1 << 16)]), new_loop()
    options = {"reporting": True, "statistics_interval": 1, "auto": AutoBalloon(50, 10), "deflate_on_oom": True}
    driver = Driver(BalloonDevice("b", loop, memory, **options), memory, loop).start()  # type: ignore[arg-type]
    for kind, at, what in steps:
        if kind == "chain":
            ring = driver.rings[at]
            ring.offer(ring.chain(*what))
            driver.kick(at)
        elif kind == "config":
            driver.write(0x100 + at, what & 0xFF if at & 3 else what, 1 if at & 3 else 4)
        elif kind == "time":
            loop.clock.advance(at * SECOND)
        elif kind == "pause":
            driver.transport.pause()
            driver.transport.save()
            balloon(driver).save()
            driver.transport.resume()
        elif kind == "stop":
            driver.write(0x030, at)
            driver.write(0x044, 0)
        else:
            memory.write(at, what)
        loop.poll()
        assert balloon(driver).held <= balloon(driver).ram_pages
        assert balloon(driver).target <= balloon(driver).ram_pages
    assert driver.restart().request(pfns(0x80), queue=INFLATE)[0] == 0
    driver.close()
    assert not watched(loop)
    loop.close()
    memory.close()


def test_the_balloon_is_where_the_bus_has_it(make: Make) -> None:
    assert make().bus.read(BASE + 8, 4) == 5
