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
        clock.time += SECOND // 10 + 1 + rest  # ... and has had enough
        began, count = clock.time, 0
        while not bucket.take(1):
            count += 1
        assert count <= 11 + (clock.time - began) * 100 // SECOND


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
