"""Clocks: real time that can stand still, virtual time that runs timers on its way."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.clock import MonotonicClock, TimerQueue, VirtualClock
from vmm_core.directloop import DirectLoop


class Source:
    """A loop that only has timers and remembers when they ran."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.timers = TimerQueue(clock)
        self.ran: list[tuple[int, str]] = []
        clock.attach(self)

    def arm(self, delay: int, name: str, then: Callable[[], object] = lambda: None) -> Callable[[], None]:
        def ring() -> None:
            self.ran.append((self.clock.now(), name))
            then()

        return self.timers.add(delay, ring).cancel

    def next_deadline(self) -> int | None:
        return self.timers.next_deadline()

    def run_due(self) -> None:
        newest = self.timers.sequence
        while (callback := self.timers.take_due(newest)) is not None:
            callback()

    def clock_changed(self) -> None:
        pass


class Ticking:
    """time.monotonic_ns under control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 5_000
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.ns)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    return Ticking(monkeypatch)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_real_time_starts_at_nothing_and_passes(real: Ticking) -> None:
    clock = MonotonicClock()
    real.ns += 70
    assert clock.now() == 70


def test_a_pause_is_no_time(real: Ticking) -> None:
    clock = MonotonicClock()
    real.ns += 10
    clock.pause()
    real.ns += 1_000_000
    assert (clock.now(), clock.paused) == (10, True)
    clock.pause()  # twice is one pause
    clock.resume()
    clock.resume()
    real.ns += 5
    assert (clock.now(), clock.paused) == (15, False)


def test_a_paused_clock_has_nothing_to_wait_for(real: Ticking) -> None:
    clock = MonotonicClock()
    assert clock.wait(30) == 30
    clock.pause()
    assert clock.wait(30) is None
    assert clock.wait(0) is None  # even what is due stands still
    clock.resume()
    real.ns += 40
    assert clock.wait(30) == 0


def test_loops_are_told_when_a_clock_stops_and_goes(real: Ticking) -> None:
    told: list[bool] = []
    clock = MonotonicClock()

    class Listener(Source):
        def clock_changed(self) -> None:
            told.append(clock.paused)

    listener = Listener(VirtualClock())
    clock.attach(listener)
    clock.pause()
    clock.resume()
    clock.detach(listener)
    clock.pause()
    assert told == [True, False]


def test_virtual_time_does_not_pass_by_itself(clock: VirtualClock) -> None:
    assert clock.now() == 0
    assert clock.wait(1) is None
    assert clock.wait(0) == 0


def test_a_step_goes_to_the_nearest_deadline_of_any_loop(clock: VirtualClock) -> None:
    one, two = Source(clock), Source(clock)
    one.arm(300, "late")
    two.arm(200, "early")
    assert clock.step() == 200
    assert (two.ran, one.ran) == ([(200, "early")], [])
    assert clock.step() == 300
    assert one.ran == [(300, "late")]


def test_a_step_with_nothing_armed_stays(clock: VirtualClock) -> None:
    Source(clock)
    clock.set(17)
    assert clock.step() == 17


def test_a_step_runs_what_is_due_before_it_looks_for_the_next_deadline(clock: VirtualClock) -> None:
    source = Source(clock)
    clock.set(17)
    source.arm(0, "now")
    source.arm(5, "later")
    assert clock.step() == 22
    assert source.ran == [(17, "now"), (22, "later")]


def test_time_never_goes_back(clock: VirtualClock) -> None:
    clock.set(100)
    assert clock.set(50) == 100
    assert clock.advance(-5) == 100
    assert clock.advance(7) == 107


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50)), max_size=20), st.integers(0, 60))
def test_what_expires_runs_in_order_at_its_own_time_and_nothing_else_does(armed: list[tuple[int, int]], target: int) -> None:
    clock = VirtualClock()
    sources = [Source(clock), Source(clock)]
    order: list[int] = []
    for which, delay in armed:
        sources[which].arm(delay, "timer", lambda delay=delay: order.append(delay))
    assert clock.set(target) == target
    assert order == sorted(delay for _, delay in armed if delay <= target)
    assert all(
        when == delay
        for when, delay in zip(
            (w for s in sources for w, _ in s.ran),
            (delay for which in (0, 1) for delay in sorted(d for w, d in armed if w == which and d <= target)),
            strict=True,
        )
    )


def test_a_timer_armed_on_the_way_runs_when_the_way_passes_it(clock: VirtualClock) -> None:
    source = Source(clock)
    source.arm(10, "first", lambda: source.arm(10, "second", lambda: source.arm(10, "third")))
    assert clock.set(25) == 25
    assert source.ran == [(10, "first"), (20, "second")]


def test_a_periodic_timer_runs_once_a_period(clock: VirtualClock) -> None:
    source = Source(clock)

    def again() -> None:
        source.arm(100, "tick", again)

    again()
    clock.set(1050)
    assert [when for when, _ in source.ran] == list(range(100, 1100, 100))


def test_timers_that_arm_each_other_without_delay_all_run(clock: VirtualClock) -> None:
    source = Source(clock)
    source.arm(5, "a", lambda: source.arm(0, "b", lambda: source.arm(0, "c")))
    clock.set(5)
    assert source.ran == [(5, "a"), (5, "b"), (5, "c")]


def test_a_timer_that_arms_itself_without_delay_cannot_hold_time_up(clock: VirtualClock) -> None:
    source = Source(clock)

    def again() -> None:
        source.arm(0, "busy", again)

    again()
    assert clock.set(9) == 9
    assert len(source.ran) <= VirtualClock.ROUNDS + 2  # and what was due at the start


def test_a_cancelled_timer_does_not_run(clock: VirtualClock) -> None:
    source = Source(clock)
    cancel = source.arm(5, "never")
    source.arm(6, "ran")
    cancel()
    cancel()
    assert clock.step() == 6
    assert source.ran == [(6, "ran")]


def test_a_timer_cancelled_by_another_of_the_same_instant_does_not_run(clock: VirtualClock) -> None:
    source = Source(clock)
    victims: list[Callable[[], None]] = []
    source.arm(5, "canceller", lambda: [cancel() for cancel in victims])
    victims.append(source.arm(5, "victim"))
    clock.set(5)
    assert source.ran == [(5, "canceller")]


def test_armed_and_cancelled_a_million_times_fills_nothing() -> None:
    timers = TimerQueue(VirtualClock())
    keep = timers.add(7, lambda: None)
    for _ in range(10_000):
        timers.add(1 << 40, lambda: None).cancel()
    assert len(timers._heap) < 200
    assert timers.next_deadline() == 7
    keep.cancel()
    assert timers.next_deadline() is None


def test_a_loop_that_is_gone_is_not_asked(clock: VirtualClock) -> None:
    loop = DirectLoop("gone", clock)
    loop.call_later(5, lambda: pytest.fail("ran"))
    loop.close()
    assert clock.step() == 0
    clock.set(10)
