"""How other threads and signal handlers reach the main thread: a queue and a pipe.

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
_READ = 4096  # bytes


class EventChannel:
    """Events for the main thread, in order of arrival."""

    def __init__(self) -> None:
        # No event descriptor: Python writes a single byte when a signal comes.
        self._fd, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._catching = False
        self._events: deque[MachineEvent | signal.Signals] = deque()

    def fileno(self) -> int:
        """Descriptor that is readable while there are events."""
        return self._fd

    def post(self, event: MachineEvent | signal.Signals) -> None:
        """Add an event and wake the main thread. From any thread; never blocks. After close() the event is dropped."""
        self._events.append(event)
        with contextlib.suppress(OSError):  # a full pipe wakes as well as one more byte; a closed channel has no reader
            os.write(self._bell, b"\0")

    def drain(self) -> list[MachineEvent | signal.Signals]:
        """Take every event so far."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fd, _READ)) == _READ:
                pass
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def catch_signals(self) -> None:
        """Turn SIGTERM, SIGINT and SIGHUP into events from here on, and ignore SIGPIPE. Only on the main thread."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.post(signal.Signals(number))

        # A signal that comes just before the main thread waits does not interrupt it, and its handler would run only after the
        # wait. So Python rings as well.
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._catching = True
        for number in TERMINATING:
            signal.signal(number, handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def close(self) -> None:
        """Give the descriptors back. Twice is fine. Where signals were caught, only on the main thread."""
        if self._catching:
            self._catching = False
            signal.set_wakeup_fd(-1)
        if self._fd >= 0:
            fds = self._fd, self._bell
            self._fd = self._bell = -1
            for fd in fds:
                os.close(fd)
