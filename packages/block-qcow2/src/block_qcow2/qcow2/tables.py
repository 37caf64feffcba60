"""Tables of big-endian 64-bit entries, and the cache of L2 tables.

In memory a table is an array in the host's byte order; a table that changed is pinned until it is on disk.
Not here: what entries mean, or in which order tables may be written (`image`).
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict

from ..hostfile import HostFile, read_padded

_SWAP = sys.byteorder == "little"


def load(file: HostFile, offset: int, count: int) -> array[int]:
    """Read `count` entries at `offset`; what lies past the end of the file is zero."""
    data = bytearray(count * 8)
    with memoryview(data) as view:
        read_padded(file, offset, [view])
    return from_bytes(data)


def from_bytes(data: bytes | bytearray | memoryview, typecode: str = "Q") -> array[int]:
    """Big-endian bytes to an array."""
    table = array(typecode)
    table.frombytes(data)
    if _SWAP:
        table.byteswap()
    return table


def to_bytes(table: array[int], start: int = 0, end: int | None = None) -> bytes:
    """Entries [start, end) as big-endian bytes."""
    part = table[start:end]
    if _SWAP:
        part.byteswap()
    return part.tobytes()


class L2Table:
    """One L2 table: `entries` are the table's words (two a cluster with extended L2 entries)."""

    __slots__ = ("dirty_end", "dirty_start", "entries", "offset", "pinned")

    def __init__(self, offset: int, entries: array[int]) -> None:
        self.offset = offset
        self.entries = entries
        self.dirty_start = len(entries)
        self.dirty_end = 0
        self.pinned = 0  # commits that are writing it

    @property
    def dirty(self) -> bool:
        return self.dirty_start < self.dirty_end

    def touch(self, start: int, end: int) -> None:
        """Words [start, end) changed."""
        if start < self.dirty_start:
            self.dirty_start = start
        if end > self.dirty_end:
            self.dirty_end = end

    def dirty_part(self) -> tuple[int, int, bytes]:
        """(start word, end word, bytes) of what changed, on whole sectors."""
        start = self.dirty_start & ~63
        end = min(-(-self.dirty_end // 64) * 64, len(self.entries))
        return start, end, to_bytes(self.entries, start, end)

    def clean(self) -> None:
        """What changed is somebody else's to write."""
        self.dirty_start, self.dirty_end = len(self.entries), 0


class L2Cache:
    """L2 tables by host offset, least recently used first. Guarded by the image's lock."""

    def __init__(self, limit: int) -> None:
        self.limit = max(limit, 2)
        self._tables: OrderedDict[int, L2Table] = OrderedDict()
        self.dirty: dict[int, L2Table] = {}
        # What get() found last, if it is in the cache still: a request after the other asks for the same table.
        self.last_offset = -1
        self.last: L2Table | None = None

    def get(self, offset: int) -> L2Table | None:
        table = self._tables.get(offset)
        if table is not None:
            self._tables.move_to_end(offset)
            self.last_offset, self.last = offset, table
        return table

    def put(self, table: L2Table) -> None:
        """Add a table; the oldest clean ones make room."""
        self._forget_last()
        self._tables[table.offset] = table
        if len(self._tables) <= self.limit:
            return
        for _ in range(len(self._tables)):
            offset, old = next(iter(self._tables.items()))
            if old.dirty or old.pinned or old is table:
                self._tables.move_to_end(offset)  # looked at again when its turn comes: no scan past the same ones each time
                continue
            del self._tables[offset]
            if len(self._tables) <= self.limit:
                break

    @property
    def crowded(self) -> bool:
        """More tables are dirty than half of the cache holds: time to write them."""
        return len(self.dirty) * 2 > self.limit

    def touch(self, table: L2Table, start: int, end: int) -> None:
        table.touch(start, end)
        self.dirty[table.offset] = table

    def drop(self, offset: int) -> None:
        """The cluster at `offset` is no longer an L2 table."""
        self._forget_last()
        self._tables.pop(offset, None)
        self.dirty.pop(offset, None)

    def clear(self) -> None:
        self._forget_last()
        self._tables.clear()
        self.dirty.clear()

    def _forget_last(self) -> None:
        self.last_offset, self.last = -1, None
