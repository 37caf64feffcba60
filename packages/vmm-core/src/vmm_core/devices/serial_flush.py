"""When a hypervisor that collects writes to a serial port is asked for them: soon while the guest uses the port, else seldom.

Collected writes are delivered with the next exit; this is for a guest that writes and then waits. A driver that has not spoken
for a while makes an exit before it writes (it looks at the line, or opens the interrupt), which is when soon begins again. A
guest that writes without ever looking waits for the seldom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmm_core.loop import Loop, Timer

    class Port(Protocol):
        """What is flushed to."""

        used: bool

        def on_use(self, hook: Callable[[], None]) -> None:
            """Have `hook` called, on any thread, when the guest uses the port and `used` was False."""
            ...


SOON, SELDOM = 100_000_000, 1_000_000_000  # nanoseconds of the host's time


class SerialFlush:
    """Calls `flush` again and again on `loop`, until the loop ends. An idle machine is woken up once a second by it."""

    def __init__(self, loop: Loop, flush: Callable[[], None], port: Port) -> None:
        """Begin."""
        self._loop, self._flush, self._port = loop, flush, port
        self._timer: Timer | None = None
        self._asleep = False
        port.on_use(self._used)
        self._tick()

    def _used(self) -> None:
        # The other side of what _tick() does last: one of the two sees what the other has done.
        if self._asleep:
            self._asleep = False
            self._loop.call_soon(self._awake)

    def _awake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(SOON, self._tick, host=True)

    def _tick(self) -> None:
        self._flush()
        # Set to False only when it is True: a use of just then is either seen here, or finds `used` False and wakes us up.
        if self._in_use():
            self._port.used = self._asleep = False
            self._awake()
            return
        self._asleep = True
        self._timer = self._loop.call_later(SELDOM, self._tick, host=True)
        if self._in_use():
            self._asleep = False
            self._awake()

    def _in_use(self) -> bool:
        """A look at what the guest's threads change, between one line and the next."""
        return self._port.used
