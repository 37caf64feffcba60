"""A leaky bucket: how much may pass per second on the machine's clock, with up to a burst's worth at once from rest.

Not here: what waits meanwhile. Who is told to wait arms a timer and asks again.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_core.clock import Clock

_SECOND = 1_000_000_000  # ns


class LeakyBucket:
    """One limit, which any number of threads may share.

    The level drains by `rate` units a second; while it is not above what drains in `burst` nanoseconds, whatever is asked for
    passes and raises it. With a burst of a second this is StratoVirt's rule (reference virtio, section 5.6).

    Who was told to wait and comes late, because the host was busy, finds what drained meanwhile, up to a second's worth: else a
    busy host would make every limit a lower one. He may take his time over it, and it never becomes more. Who comes after a
    second's rest finds no more than the burst.
    """

    def __init__(self, clock: Clock, rate: int, burst: int = _SECOND) -> None:
        """Limit to `rate` units a second, at least 1."""
        if rate < 1:
            raise ValueError(f"a rate of {rate}")
        self._clock = clock
        self._rate = rate
        self._burst = rate * burst
        # When the bucket will be empty, in nanoseconds times rate, as all times here: whole numbers, so rounding loses nothing.
        self._empty_at = 0
        self._told = -1  # for when somebody was told to come back; -1: nobody
        self._late = 0  # how much of what drained because he came late is still there
        self._late_until = 0  # unless nobody comes until then
        self._lock = threading.Lock()

    def take(self, units: int) -> int:
        """Take `units` and return 0, or take nothing and return for how many nanoseconds to wait before asking again."""
        rate = self._rate
        with self._lock:
            now = self._clock.now() * rate
            free_at = self._empty_at - self._burst
            if free_at > now:
                self._told = free_at
                return -(-(free_at - now) // rate)
            if self._told >= 0:
                self._late = min(now - self._told, rate * _SECOND)
                self._late_until = now + rate * _SECOND
                self._told = -1
            self._raise(now, units)
            return 0

    def charge(self, units: int) -> None:
        """Take `units` whatever the level: for what could be measured only after it had passed."""
        with self._lock:
            self._raise(self._clock.now() * self._rate, units)

    def _raise(self, now: int, units: int) -> None:
        if now > self._late_until:
            self._late = 0
        self._empty_at = max(self._empty_at, now - self._late)
        if self._late:
            self._late = min(self._late, max(now - self._empty_at, 0))
            self._late_until = now + self._rate * _SECOND
        self._empty_at += units * _SECOND
