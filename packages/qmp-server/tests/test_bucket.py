"""Flow control: never more than rate * t + rate + 1 commands in any window of t seconds, and never less than the rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_server import LeakyBucket

SECOND = 1_000_000_000


def test_from_rest_one_more_than_the_rate_passes_as_in_stratovirt() -> None:
    bucket = LeakyBucket(100)
    assert [bucket.take(0) for _ in range(103)] == [True] * 101 + [False] * 2


def test_ten_milliseconds_after_a_refusal_one_more_passes() -> None:
    bucket = LeakyBucket(100)
    for _ in range(102):
        bucket.take(0)
    assert not bucket.take(9_999_999)
    assert bucket.take(10_000_000)
    assert not bucket.take(10_000_000)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="serves nobody"):
        LeakyBucket(0)


rates = st.integers(1, 1000)
steps = st.lists(st.integers(0, 3 * SECOND) | st.integers(0, SECOND // 100) | st.just(0), max_size=400)


@given(rates, steps)
def test_no_window_of_time_has_more_than_its_share(rate: int, pauses: list[int]) -> None:
    bucket = LeakyBucket(rate)
    now, served = 0, list[int]()
    for pause in pauses:
        now += pause
        if bucket.take(now):
            served.append(now)
    for first in range(len(served)):
        for last in range(first, len(served)):
            allowed = rate * (served[last] - served[first]) / SECOND + rate + 1
            assert last - first + 1 <= allowed


@given(rates, st.integers(1, 300), st.integers(0, 400))
def test_a_client_that_keeps_to_the_rate_is_never_refused(rate: int, count: int, greed: int) -> None:
    bucket = LeakyBucket(rate)
    now = 0
    for _ in range(greed):
        bucket.take(now)
    now += -(-SECOND // rate)
    for _ in range(count):
        assert bucket.take(now)
        now += -(-SECOND // rate)


@given(rates, steps)
def test_refused_commands_cost_nothing(rate: int, pauses: list[int]) -> None:
    asked, polite = LeakyBucket(rate), LeakyBucket(rate)
    now = 0
    for pause in pauses:
        now += pause
        if asked.take(now):
            assert polite.take(now)
