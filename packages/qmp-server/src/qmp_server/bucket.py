"""StratoVirt's flow control: a leaky bucket of requests.

Not here: reading a clock. The caller passes the time, so that tests can choose it.
"""

from __future__ import annotations

_SECOND = 1_000_000_000


class LeakyBucket:
    """Serves at most `rate` requests a second, and `rate + 1` at once after a rest.

    Each request served adds one to the level; the level leaks `rate` a second. A request is refused while the level is above
    `rate`, and refused ones add nothing. So in any window of t seconds at most `rate * t + rate + 1` requests are served.
    (Reference section 1.10; there the level counts thousandths of a request.)
    """

    __slots__ = ("_last", "_level", "rate")

    def __init__(self, rate: int) -> None:
        """`rate` in requests a second, at least 1."""
        if rate < 1:
            raise ValueError(f"a rate of {rate} requests a second serves nobody")
        self.rate = rate
        self._level = 0  # in billionths of a request, so that time in nanoseconds stays a whole number
        self._last = 0

    def take(self, now: int) -> bool:
        """Ask to serve one request at time `now`, in nanoseconds of a clock that never goes back."""
        self._level = max(0, self._level - (now - self._last) * self.rate)
        self._last = now
        if self._level > self.rate * _SECOND:
            return False
        self._level += _SECOND
        return True
