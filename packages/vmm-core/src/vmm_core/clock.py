"""The two clocks of a machine: real (monotonic) time, and the virtual time of test mode that moves only when told to."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Nanoseconds since some start. Timers and rate limiters of a machine read this and nothing else."""

    def now(self) -> int: ...


class MonotonicClock:
    """CLOCK_MONOTONIC."""

    def now(self) -> int:
        """Return the time in nanoseconds."""
        return time.monotonic_ns()
