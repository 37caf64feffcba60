"""Time as a machine sees it: a real clock that stands still while the machine does, and the virtual one of test mode.

A clock tells the time and knows whose timers hang on it. The timers themselves are a `TimerQueue`, one a loop.

Not here: running the timers (`vmm_core.threads`), and the date (`vmm_core.devices.rtc`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from threading import Lock
from typing import Protocol


class Clock(Protocol):
    """Nanoseconds since some start; never goes back. Rate limiters and devices of a machine read this and nothing else."""

    def now(self) -> int: ...


class TimerSource(Protocol):
    """The timers of one loop, as their clock sees them. Called from any thread."""

    def next_deadline(self) -> int | None:
        """When the nearest timer is due, in the clock's nanoseconds."""
        ...

    def run_due(self) -> None:
        """Run on the loop's thread what is due now; return when that is done. Not what the callbacks arm meanwhile."""
        ...

    def clock_changed(self) -> None:
        """The clock was stopped or started, or jumped: look at it again."""
        ...


class TimerClock(Clock, Protocol):
    """A clock that timers can hang on."""

    def wait(self, deadline: int) -> int | None:
        """Return for how many nanoseconds of real time to sleep until `deadline`; None when sleeping alone will not do."""
        ...

    def attach(self, source: TimerSource) -> None: ...

    def detach(self, source: TimerSource) -> None: ...


class MonotonicClock:
    """CLOCK_MONOTONIC from the moment of construction, less the time spent paused. Starts running, at 0."""

    def __init__(self) -> None:
        self._lost = time.monotonic_ns()
        self._frozen: int | None = None
        self._sources: tuple[TimerSource, ...] = ()

    def now(self) -> int:
        """Return the time in nanoseconds. Lock-free from any thread: a frozen time wins, and resume() moves it last."""
        frozen = self._frozen
        return time.monotonic_ns() - self._lost if frozen is None else frozen

    def wait(self, deadline: int) -> int | None:
        """Return the nanoseconds until `deadline`, 0 when it has passed, None while paused."""
        if self._frozen is not None:
            return None
        return max(0, deadline - self.now())

    @property
    def paused(self) -> bool:
        """Whether the clock stands still."""
        return self._frozen is not None

    def pause(self) -> None:
        """Stand still, and every timer with it. By the owner's thread; twice is fine."""
        if self._frozen is None:
            self._frozen = self.now()
            self._changed()

    def resume(self) -> None:
        """Go on from where pause() stopped. By the owner's thread; twice is fine."""
        if self._frozen is not None:
            self._lost = time.monotonic_ns() - self._frozen
            self._frozen = None
            self._changed()

    def attach(self, source: TimerSource) -> None:
        """Tell `source` about pauses from here on."""
        self._sources = (*self._sources, source)

    def detach(self, source: TimerSource) -> None:
        """Forget `source`; harmless when it is not attached."""
        self._sources = tuple(other for other in self._sources if other is not source)

    def _changed(self) -> None:
        for source in self._sources:
            source.clock_changed()


class VirtualClock:
    """Test mode's time: starts at 0 and moves only when told to, running every timer on its way in order of deadline.

    Source: reference migration-and-test-mode, section 12.
    """

    # How often timers may arm each other at one instant before time moves on without them. A device that re-arms itself with
    # no delay would otherwise hold the stepping thread for ever.
    ROUNDS = 1000

    def __init__(self) -> None:
        self._now = 0
        self._sources: tuple[TimerSource, ...] = ()
        self._moving = Lock()

    def now(self) -> int:
        """Return the time in nanoseconds."""
        return self._now

    def wait(self, deadline: int) -> int | None:
        """Return 0 for what is due: a timer without delay runs at once. Nothing else comes by waiting."""
        return 0 if deadline <= self._now else None

    def attach(self, source: TimerSource) -> None:
        """Run the timers of `source` when time moves."""
        self._sources = (*self._sources, source)

    def detach(self, source: TimerSource) -> None:
        """Forget `source`; harmless when it is not attached."""
        self._sources = tuple(other for other in self._sources if other is not source)

    def step(self) -> int:
        """Run what is due, then move to the nearest deadline and run what is due there. Does not move when nothing is armed.

        Returns the new time.
        """
        self._settle()
        nearest = self._nearest()
        return self._now if nearest is None or nearest <= self._now else self.set(nearest)

    def advance(self, delta: int) -> int:
        """Move on by `delta` nanoseconds, a negative one counting as 0. Returns the new time."""
        return self.set(self._now + max(0, delta))

    def set(self, target: int) -> int:
        """Move to `target`; an earlier time than now changes nothing. Returns the new time.

        Every timer that expires up to `target`, those armed on the way included, has run when this returns. Not from a
        timer's callback.
        """
        with self._moving:
            self._settle()
            rounds = 0
            while (nearest := self._nearest()) is not None and nearest <= target and rounds < self.ROUNDS:
                if nearest > self._now:
                    self._now = nearest
                    rounds = 0
                rounds += 1
                self._run_due()
            self._now = max(self._now, target)
            for source in self._sources:
                source.clock_changed()
            return self._now

    def _settle(self) -> None:
        """Let every loop handle what it has been woken for, such as a doorbell: it may arm a timer that is due on the way.

        Once is not enough: a loop that is awake already may serve us before the events that it got together with us.
        """
        for _ in range(2):
            for source in self._sources:
                source.run_due()

    def _run_due(self) -> None:
        for source in self._sources:
            deadline = source.next_deadline()
            if deadline is not None and deadline <= self._now:
                source.run_due()

    def _nearest(self) -> int | None:
        deadlines = [deadline for source in self._sources if (deadline := source.next_deadline()) is not None]
        return min(deadlines, default=None)


class DueTimer:
    """A callback in a `TimerQueue` (the `Timer` of `vmm_core.loop`)."""

    __slots__ = ("_queue", "callback")

    def __init__(self, callback: Callable[[], None], queue: TimerQueue) -> None:
        self.callback: Callable[[], None] | None = callback
        self._queue = queue

    def cancel(self) -> None:
        """Forget the callback. Harmless after it ran, and twice."""
        self._queue.cancel(self)


class TimerQueue:
    """One loop's timers on one clock, nearest first. Safe to use from any thread."""

    def __init__(self, clock: TimerClock) -> None:
        self.clock = clock
        self._heap: list[tuple[int, int, DueTimer]] = []
        self._lock = Lock()
        self._sequence = 0  # breaks ties in order of arming, and tells run_due() where to stop
        self._cancelled = 0  # entries in the heap whose callback is gone

    def __bool__(self) -> bool:
        """Whether a timer may be armed."""
        return bool(self._heap)

    def add(self, delay_ns: int, callback: Callable[[], None]) -> DueTimer:
        """Arm a timer `delay_ns` from now; a negative delay counts as 0."""
        timer = DueTimer(callback, self)
        with self._lock:
            self._sequence += 1
            heappush(self._heap, (self.clock.now() + max(0, delay_ns), self._sequence, timer))
        return timer

    def cancel(self, timer: DueTimer) -> None:
        """Take back a timer; harmless when it ran or was taken back already."""
        with self._lock:
            if timer.callback is None:
                return
            timer.callback = None
            self._cancelled += 1
            if self._cancelled > 64 and self._cancelled > len(self._heap) // 2:
                # A timer that is armed and taken back for every request must not fill the heap until its deadline.
                self._heap = [entry for entry in self._heap if entry[2].callback is not None]
                heapify(self._heap)
                self._cancelled = 0

    def next_deadline(self) -> int | None:
        """When the nearest timer is due; None when none is armed."""
        with self._lock:
            heap = self._heap
            while heap and heap[0][2].callback is None:
                heappop(heap)
                self._cancelled -= 1
            return heap[0][0] if heap else None

    @property
    def sequence(self) -> int:
        """The number of the newest timer, for take_due()."""
        return self._sequence

    def take_due(self, newest: int) -> Callable[[], None] | None:
        """Take the nearest timer that is due, unless it was armed after number `newest`; None when there is none."""
        with self._lock:
            heap = self._heap
            while heap:
                deadline, sequence, timer = heap[0]
                callback = timer.callback
                if callback is None:
                    heappop(heap)
                    self._cancelled -= 1
                    continue
                if sequence > newest or self.clock.wait(deadline) != 0:
                    return None
                heappop(heap)
                timer.callback = None
                return callback
            return None
