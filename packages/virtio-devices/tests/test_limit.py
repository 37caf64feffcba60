"""Limits: never more than they say, and under load not less either, however late who waits comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_devices.limit import LeakyBucket

SECOND = 1_000_000_000


class HandClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        return self.time


def serve(bucket: LeakyBucket, clock: HandClock, end: int, stalls: list[int]) -> list[int]:
    """Ask for one unit after the other, coming back as late as `stalls` say; return when each one passed."""
    passed: list[int] = []
    turn = 0
    while clock.time < end:
        delay = bucket.take(1)
        if not delay:
            passed.append(clock.time)
            continue
        clock.time += delay + (stalls[turn % len(stalls)] if stalls else 0)
        turn += 1
    return passed


@given(
    rate=st.integers(1, 1000),
    stalls=st.lists(st.integers(0, SECOND - 1), max_size=8),
    burst=st.sampled_from([SECOND // 10, SECOND]),
)
def test_who_always_waits_gets_the_whole_rate_and_no_more(rate: int, stalls: list[int], burst: int) -> None:
    clock = HandClock()
    passed = serve(LeakyBucket(clock, rate, burst), clock, 20 * SECOND, stalls)
    at_once = rate * burst // SECOND + 1
    assert len(passed) <= rate * clock.time // SECOND + at_once
    # The last one to come back may not have come yet.
    assert len(passed) >= rate * (clock.time - SECOND) // SECOND - 1


@given(rests=st.lists(st.integers(0, 10 * SECOND), min_size=1, max_size=6))
def test_a_rest_is_worth_a_burst_and_no_more(rests: list[int]) -> None:
    clock = HandClock()
    bucket = LeakyBucket(clock, 100, SECOND // 10)
    for rest in rests:
        while not (delay := bucket.take(1)):
            pass
        clock.time += delay + SECOND // 2  # comes back late ...
        assert bucket.take(1) == 0
        clock.time += SECOND + 1 + rest  # ... and has had enough
        began, count = clock.time, 0
        while not bucket.take(1):
            count += 1
        assert count <= 11 + (clock.time - began) * 100 // SECOND


@given(work=st.sampled_from(range(25)), stall=st.sampled_from(range(1000)))  # milliseconds; integers() would prefer small ones
def test_who_comes_late_and_is_slow_gets_the_whole_rate_all_the_same(work: int, stall: int) -> None:
    clock = HandClock()
    bucket = LeakyBucket(clock, 40, SECOND // 10)
    passed = 0
    while clock.time < 30 * SECOND:
        if delay := bucket.take(1):
            clock.time += delay + stall * 1_000_000
        else:
            passed += 1
            clock.time += work * 1_000_000  # less than the 25 ms that a unit has
    assert 40 * (clock.time - 2 * SECOND) // SECOND <= passed <= 40 * clock.time // SECOND + 6


@given(gap=st.integers(26_000_000, SECOND - 1), rest=st.integers(0, SECOND - 1))
def test_what_is_left_of_being_late_never_becomes_more(gap: int, rest: int) -> None:
    clock = HandClock()
    bucket = LeakyBucket(clock, 40, SECOND // 10)
    while not (delay := bucket.take(1)):
        pass
    clock.time += delay + SECOND // 2
    for _ in range(100):  # slower than the limit
        assert bucket.take(1) == 0
        clock.time += gap
    clock.time += rest
    count = 0
    while not bucket.take(1):
        count += 1
    assert count <= 5 + 20  # a burst, and half a second


def test_what_is_charged_is_paid_before_the_next_one_passes() -> None:
    clock = HandClock()
    bucket = LeakyBucket(clock, 1000, SECOND // 10)
    assert bucket.take(0) == 0
    bucket.charge(1100)
    assert bucket.take(0) == SECOND
    clock.time += 3 * SECOND  # two seconds late, of which one is made up for
    assert bucket.take(0) == 0
    bucket.charge(1200)
    assert bucket.take(0) == SECOND // 10


def test_a_rate_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="a rate of 0"):
        LeakyBucket(HandClock(), 0)
