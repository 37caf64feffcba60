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
    """

    def __init__(self, clock: Clock, rate: int, burst: int = _SECOND) -> None:
        """Limit to `rate` units a second, at least 1."""
        if rate < 1:
            raise ValueError(f"a rate of {rate}")
        self._clock = clock
        self._rate = rate
        self._burst = rate * burst
        # When the bucket will be empty, in nanoseconds times rate: whole numbers, so nothing is lost by rounding.
        self._empty_at = 0
        self._lock = threading.Lock()

    def take(self, units: int) -> int:
        """Take `units` and return 0, or take nothing and return for how many nanoseconds to wait before asking again."""
        rate = self._rate
        with self._lock:
            now = self._clock.now() * rate
            over = self._empty_at - now - self._burst
            if over > 0:
                return -(-over // rate)
            self._empty_at = max(self._empty_at, now) + units * _SECOND
            return 0

    def charge(self, units: int) -> None:
        """Take `units` whatever the level: for what could be measured only after it had passed."""
        with self._lock:
            self._empty_at = max(self._empty_at, self._clock.now() * self._rate) + units * _SECOND
