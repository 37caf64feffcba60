"""Keeping overlapping operations on byte ranges apart. Not a file lock: it orders the threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RangeGate:
    """Writes pass together unless they overlap an exclusive one; an exclusive one has its range alone.

    Used for read-modify-write: two plain writes may overlap (their order is their issuer's business), but a block that is
    being read, changed and written back must not change under the change.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shared: dict[int, tuple[int, int]] = {}
        self._exclusive: dict[int, tuple[int, int]] = {}
        self._next = 0

    def try_enter(self, start: int, end: int) -> int | None:
        """Enter as a plain write without waiting: a ticket for leave(), or None if an exclusive one is in the way."""
        with self._changed:
            if _overlaps(self._exclusive, start, end):
                return None
            return self._admit(self._shared, start, end)

    def leave(self, ticket: int) -> None:
        """End what try_enter() began."""
        with self._changed:
            self._shared.pop(ticket, None)
            self._exclusive.pop(ticket, None)
            self._changed.notify_all()

    @contextmanager
    def write(self, start: int, end: int, *, exclusive: bool = False) -> Iterator[None]:
        """Wait until nothing is in the way of [start, end), hold it, let go."""
        with self._changed:
            while _overlaps(self._exclusive, start, end) or (exclusive and _overlaps(self._shared, start, end)):
                self._changed.wait()
            ticket = self._admit(self._exclusive if exclusive else self._shared, start, end)
        try:
            yield
        finally:
            self.leave(ticket)

    def _admit(self, table: dict[int, tuple[int, int]], start: int, end: int) -> int:
        self._next += 1
        table[self._next] = (start, end)
        return self._next


def _overlaps(table: dict[int, tuple[int, int]], start: int, end: int) -> bool:
    return any(start < e and s < end for s, e in table.values())
