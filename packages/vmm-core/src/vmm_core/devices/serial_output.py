"""What a serial port's guest has written and the host has not taken yet.

A guest's driver writes a byte at a time, and for each a thread of the host would have to wake up. So bytes are gathered, and
handed over on the guest's own thread at the end of a line, when there are many, or when the driver is through with what it
had; a timer sees to the rest.

Not here: registers (`serial`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmm_core.devices.chardev import CharBackend, Report
    from vmm_core.loop import Loop

# Above FULL the transmitter says that it is busy, and a guest that looks waits. A guest may write on regardless (Linux's console
# does, after 10 ms a byte), and a hypervisor may deliver writes late: nothing is lost up to LIMIT, which bounds what a guest can
# make the host keep.
FULL = 16 << 10
LIMIT = 1 << 20

CHUNK = 4096  # bytes that are handed over at once, whatever the driver is at
# Nanoseconds of the host's time. Nobody sees either delay, and what a person types is not echoed by the timer.
GATHER = 30_000_000  # the beginning of a line that a kernel's console prints
SHORTLY = 5_000_000  # a driver may wait for the interrupt that follows
NEWLINE = 0x0A

TELL = 60_000_000_000  # nanoseconds of the host's time from one report of lost bytes to the next: a guest may lose some for days


class SerialOutput:
    """Bytes on their way out. Guarded by the port's lock, which is held while the back end is called: it never calls back."""

    def __init__(self, loop: Loop, flush: Callable[[], None], report: Report) -> None:
        """`flush` is what the timer calls, without the lock; it ends in flushed()."""
        self.waiting = bytearray()
        self.backend: CharBackend | None = None
        self._loop = loop
        self._flush = flush
        self._report = report
        self._blocked = False  # the back end will say when it takes more
        self._timer = False  # a flush is on its way
        self._lost = 0  # and not reported
        self._silent_until = 0  # time.monotonic_ns()

    @property
    def full(self) -> bool:
        """Whether the guest should wait."""
        return len(self.waiting) >= FULL

    def add(self, byte: int) -> None:
        """Take a byte from the guest; what nobody is there for is dropped."""
        waiting = self.waiting
        if self.backend is None:
            return
        if len(waiting) >= LIMIT:
            self._lost += 1
            return
        waiting.append(byte)
        if byte == NEWLINE or len(waiting) % CHUNK == 0:
            self.hand_over()

    def flush_later(self, delay: int) -> None:
        """Have `flush` called in `delay` nanoseconds, or when it was to be called already."""
        if not self._timer:
            self._timer = True
            self._loop.call_later(delay, self._flush, host=True)

    def hand_over(self) -> None:
        """Give the back end what it takes now."""
        backend, waiting = self.backend, self.waiting
        if waiting and not self._blocked and backend is not None:
            taken = backend.write(bytes(waiting))
            self._blocked = taken < len(waiting)
            del waiting[:taken]

    def unblock(self) -> None:
        """The back end takes bytes again."""
        self._blocked = False

    def flushed(self) -> int:
        """Say that the timer has run; returns how many lost bytes are to be reported, if any are by now."""
        self._timer = False
        if not self._lost or (now := time.monotonic_ns()) < self._silent_until:
            return 0
        self._silent_until = now + TELL
        return self.take_lost()

    def take_lost(self) -> int:
        """Return how many bytes were lost that nobody was told of, and take them as told."""
        lost, self._lost = self._lost, 0
        return lost
