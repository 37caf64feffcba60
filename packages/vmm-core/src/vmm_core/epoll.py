"""What a thread's loop and a threadless one share: watched descriptors, timers and callbacks to run soon.

Not here: who calls this and when (`vmm_core.threads.IoThread`, `vmm_core.directloop.DirectLoop`).
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from vmm_core.clock import DueTimer, MonotonicClock, TimerClock, TimerQueue

# Events taken from the kernel at a time. More would make one busy turn longer for the timers behind it.
BATCH = 64

# A callback that fails does not consume what it was called for, so it is called again at once. After this many failures in a
# row its descriptor is no longer watched: one dead device instead of a thread that spins and a log that fills the disk.
FAILURES = 16


class EpollLoop:
    """Watches, timers and soon-callbacks of one loop. Adding is safe from any thread; running belongs to one."""

    def __init__(self, name: str, clock: TimerClock, failed: Callable[[str, Exception], None]) -> None:
        """`failed` is told of an exception that left a callback: which callback, and the exception."""
        self.name = name
        self.clock = clock
        self._failed = failed
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._failures: dict[int, int] = {}
        # Watched since the last look at the kernel: an event in hand for such a number was meant for an older descriptor.
        self._fresh: set[int] = set()
        self._soon: deque[Callable[[], None]] = deque()
        self._timers = TimerQueue(clock)
        self._host_timers = TimerQueue(MonotonicClock())
        self._interrupted = False  # stop between two callbacks

    def add_fd(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Watch `fd` (level-triggered). Raises PermissionError for a regular file, ValueError for a second watch."""
        if self._handlers.setdefault(fd, callback) is not callback:
            raise ValueError(f"loop {self.name}: descriptor {fd} is watched already")
        self._fresh.add(fd)
        try:
            self._epoll.register(fd, events)
        except BaseException:
            del self._handlers[fd]
            raise

    def modify_fd(self, fd: int, events: int) -> None:
        """Change what is watched. Raises ValueError when `fd` is not."""
        if fd not in self._handlers:
            raise ValueError(f"loop {self.name}: descriptor {fd} is not watched")
        self._epoll.modify(fd, events)

    def _forget_fd(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._failures.pop(fd, None)
            with suppress(OSError, ValueError):  # closed before it was removed, or the loop is: the kernel has forgotten it
                self._epoll.unregister(fd)

    def _add_timer(self, delay_ns: int, callback: Callable[[], None], host: bool) -> DueTimer:
        return (self._host_timers if host else self._timers).add(delay_ns, callback)

    def next_deadline(self) -> int | None:
        """When the nearest timer on the machine's clock is due (`clock.TimerSource`)."""
        return self._timers.next_deadline()

    def _wait_ns(self) -> int | None:
        """How long to sleep at most, in nanoseconds; None for ever."""
        if self._soon:
            return 0
        wait: int | None = None
        if self._timers and (deadline := self._timers.next_deadline()) is not None:
            wait = self.clock.wait(deadline)
        if self._host_timers and (deadline := self._host_timers.next_deadline()) is not None:
            host = max(0, deadline - self._host_timers.clock.now())
            wait = host if wait is None else min(wait, host)
        return wait

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        handlers, fresh, failures = self._handlers, self._fresh, self._failures
        for fd, mask in events:
            callback = handlers.get(fd)
            if callback is None or fd in fresh:
                continue
            try:
                callback(mask)
                if failures:
                    failures.pop(fd, None)
            except Exception as error:
                self._count_failure(fd, callback, error)
            if self._interrupted:
                return  # the rest is level-triggered: the kernel reports it again

    def _count_failure(self, fd: int, callback: Callable[[int], None], error: Exception) -> None:
        where = f"loop {self.name}: callback of descriptor {fd}"
        if self._handlers.get(fd) is callback:
            count = self._failures[fd] = self._failures.get(fd, 0) + 1
            if count >= FAILURES:
                self._forget_fd(fd)
                where += f" (failed {count} times in a row, no longer watched)"
        self._failed(where, error)

    def _run_timers(self, queue: TimerQueue, newest: int) -> bool:
        """Run what is due, except what was armed after timer number `newest`. Returns whether anything ran."""
        ran = False
        while not self._interrupted and (callback := queue.take_due(newest)) is not None:
            ran = True
            self._guarded(callback, "timer")
        return ran

    def _run_soon(self) -> bool:
        """Run what was called soon, except what is added meanwhile. Returns whether anything ran."""
        soon = self._soon
        count = len(soon)
        for _ in range(count):
            if self._interrupted:
                break
            self._guarded(soon.popleft(), "soon-callback")
        return count > 0

    def _guarded(self, callback: Callable[[], None], kind: str) -> None:
        try:
            callback()
        except Exception as error:
            self._failed(f"loop {self.name}: {kind}", error)
