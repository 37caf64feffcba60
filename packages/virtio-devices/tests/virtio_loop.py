"""A loop that turns only when told to, on the test's own thread, and its clock."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class ManualClock:
    """Nanoseconds that pass when a test says so."""

    def __init__(self) -> None:
        self.time = 1_000_000_000_000

    def now(self) -> int:
        return self.time


class ManualTimer:
    def __init__(self, due: int, callback: Callable[[], None]) -> None:
        self.due, self.callback, self.cancelled = due, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class ManualLoop:
    """A `vmm_core.loop.Loop` without a thread."""

    def __init__(self, name: str = "manual", clock: ManualClock | None = None) -> None:
        self.name = name
        self.clock = clock or ManualClock()
        self.watches: dict[int, tuple[int, Callable[[int], None]]] = {}
        self.timers: list[ManualTimer] = []
        self._soon: list[Callable[[], None]] = []

    def add_fd(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        assert fd not in self.watches, "one watch per descriptor"
        self.watches[fd] = (events, callback)

    def modify_fd(self, fd: int, events: int) -> None:
        self.watches[fd] = (events, self.watches[fd][1])

    def remove_fd(self, fd: int) -> None:
        del self.watches[fd]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay_ns: int, callback: Callable[[], None]) -> ManualTimer:
        assert delay_ns >= 0
        timer = ManualTimer(self.clock.now() + delay_ns, callback)
        self.timers.append(timer)
        return timer

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def turn(self) -> bool:
        """Do what is due now, once. Return whether there was anything."""
        soon, self._soon = self._soon, []
        for callback in soon:
            callback()
        due = [timer for timer in self.timers if timer.due <= self.clock.now()]
        self.timers = [timer for timer in self.timers if timer not in due and not timer.cancelled]
        for timer in due:
            if not timer.cancelled:
                timer.callback()
        poll = select.poll()
        for fd, (events, _) in self.watches.items():
            poll.register(fd, events)
        ready = poll.poll(0)
        for fd, events in ready:
            if fd in self.watches:
                self.watches[fd][1](events)
        return bool(soon or due or ready)

    def settle(self, limit: int = 1000) -> None:
        """Turn until nothing is left to do. More than `limit` turns are a loop that never rests."""
        for _ in range(limit):
            if not self.turn():
                return
        raise AssertionError(f"the loop still has work after {limit} turns")

    def advance(self, nanoseconds: int) -> None:
        """Let time pass, stopping at every timer on the way."""
        end = self.clock.time + nanoseconds
        while True:
            due = min((timer.due for timer in self.timers if not timer.cancelled), default=end + 1)
            if due > end:
                break
            self.clock.time = max(self.clock.time, due)
            self.settle()
        self.clock.time = end
        self.settle()
