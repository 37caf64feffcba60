"""A loop without a thread: everything runs when poll() says so, on the caller's thread. For device tests and embedding.

The same watches, timers and order of work as an I/O thread, so a device cannot tell the difference; a test can, because
nothing happens between two of its lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vmm_core.clock import DueTimer, TimerClock
from vmm_core.epoll import BATCH, EpollLoop

T = TypeVar("T")

ROUNDS = 10_000  # of one poll(): far more than any device needs, and soon over


def _raise(_where: str, error: Exception) -> None:
    raise error


class DirectLoop(EpollLoop):
    """A loop that runs in poll() (`vmm_core.loop.Loop`). Belongs to one thread."""

    thread_id = 0

    def __init__(self, name: str, clock: TimerClock, failed: Callable[[str, Exception], None] = _raise) -> None:
        """Without `failed`, an exception in a callback leaves poll()."""
        super().__init__(name, clock, failed)
        clock.attach(self)

    def poll(self) -> int:
        """Run everything that is ready, and what becomes ready by that, until there is nothing more; return after how many turns.

        Timers of the host's time that are armed now count as due, however long their delay. Raises RuntimeError when there is
        no end to it.
        """
        armed = self._host_timers.sequence
        for turn in range(ROUNDS):
            if not self._turn(armed):
                return turn
        raise RuntimeError(f"loop {self.name}: still busy after {ROUNDS} turns")

    def _turn(self, armed: int) -> bool:
        self._fresh.clear()
        events = self._epoll.poll(0, BATCH)
        self._dispatch(events)
        ran = self._run_timers(self._timers, self._timers.sequence)
        ran |= self._run_timers(self._host_timers, armed)
        return self._run_soon() or ran or bool(events)

    def remove_fd(self, fd: int) -> None:
        """Stop watching; harmless when `fd` is not watched."""
        self._forget_fd(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` in the next poll()."""
        self._soon.append(callback)

    def call_later(self, delay_ns: int, callback: Callable[[], None], *, host: bool = False) -> DueTimer:
        """Run `callback` in a poll() once `delay_ns` of the machine's clock have passed; in the next one when `host`."""
        return self._add_timer(0 if host else delay_ns, callback, host)

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` now."""
        return function()

    def run_due(self) -> None:
        """Run due timers of the machine's clock (`clock.TimerSource`)."""
        self._run_timers(self._timers, self._timers.sequence)

    def clock_changed(self) -> None:
        """Nothing to do: poll() looks at the clock."""

    def pause(self) -> None:
        """Nothing to do: nothing runs outside poll()."""

    def resume(self) -> None:
        """Nothing to do, as for pause()."""

    def close(self) -> None:
        """Give the descriptors back. Twice is fine."""
        self.clock.detach(self)
        self._epoll.close()
        self._handlers.clear()
        self._soon.clear()
