"""How other threads and signal handlers reach the main thread: a queue and an event descriptor.

Not here: what the events mean (`vmm_core.machine.core`), and the loop that waits for them (`pystratovirt.runtime`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from types import FrameType

from vmm_core.machine.core import MachineEvent

TERMINATING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class EventChannel:
    """Events for the main thread, in order of arrival."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events: deque[MachineEvent | signal.Signals] = deque()

    def fileno(self) -> int:
        """Descriptor that is readable while there are events."""
        return self._fd

    def post(self, event: MachineEvent | signal.Signals) -> None:
        """Add an event and wake the main thread. From any thread; never blocks. After close() the event is dropped."""
        self._events.append(event)
        with contextlib.suppress(OSError):  # a full counter wakes as well as one more; a closed channel has no reader
            os.eventfd_write(self._fd, 1)

    def drain(self) -> list[MachineEvent | signal.Signals]:
        """Take every event so far."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def catch_signals(self) -> None:
        """Turn SIGTERM, SIGINT and SIGHUP into events from here on, and ignore SIGPIPE. Only on the main thread."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.post(signal.Signals(number))

        for number in TERMINATING:
            signal.signal(number, handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def close(self) -> None:
        """Give the descriptor back. Twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
