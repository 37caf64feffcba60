"""What the requests of all clients of an export may hold in memory together, however little the clients read.

Each connection has a part that is its own: nobody else can use it up, so nobody waits for it. A request that is larger than
that part waits for one of a few turns, first come, first served. Not here: who counts what is held (`connection`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from . import protocol as p

TOTAL = 256 << 20  # bytes
_TURNS = 2  # of the largest requests there are
_LEAST, _MOST = 1 << 20, 64 << 20  # bytes of one connection: what a client commonly sends at once, and what keeps a disk busy
_LOOK = 1  # seconds
_TURN_SECONDS = 60  # that a turn lasts where somebody waits for it: half a MiB a second


class Budget:
    """`part` is what each connection may hold, in bytes. Every method may be called from any thread."""

    def __init__(self, connections: int) -> None:
        self.part = min(max((TOTAL - _TURNS * p.MAX_PAYLOAD) // connections, _LEAST), _MOST)
        self._changed = threading.Condition()
        self._free = _TURNS
        self._waiting: deque[object] = deque()

    def take_turn(self, look: Callable[[], None]) -> float:
        """Wait for a turn; the time (of time.monotonic) at which it is over. `look` is called meanwhile, and may raise."""
        me = object()
        with self._changed:
            self._waiting.append(me)
            try:
                while not self._free or self._waiting[0] is not me:
                    self._changed.wait(_LOOK)
                    look()
                self._free -= 1
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()
        return time.monotonic() + _TURN_SECONDS

    def give_turn_back(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)
