"""Where the data of a request are, if that is known without waiting: for requests that go straight to the file.

Not here: everything that reads a table, allocates or unpacks, which waits (`reader`, `writer`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .format import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from .reader import Reader

if TYPE_CHECKING:
    from .tables import L2Table

_NOT_PLAIN = ZERO | COMPRESSED  # bits of an L2 entry
PARTS_MAX = 32  # host ranges of a request; one with more takes as long on another thread
_BYTES_MAX = 1 << 20  # of a request in parts: it is the caller's loop that copies, or fills with zeroes

Part = tuple[int | None, int]
"""Host offset, or None for zeroes, and length."""


class Lookup(Reader):
    """An image that finds what it has in memory."""

    def lookup_now(self, offset: int, length: int, *, write: bool) -> tuple[int, int | None] | None:
        """Without blocking: (running operation, host offset, or None for zeroes) if one host range has all of a guest range.

        None where that is not so or not known. The operation is running then: end() it when the I/O is done.
        """
        if self.encrypted or self._extended or (write and (self._broken or self._unready)):
            return None
        bits, shift = self.cluster_bits, self._l2_shift
        last = offset + length - 1
        l1_index = offset >> shift
        with self._lock:
            if self._exclusive or l1_index >= len(self.l1) or last >> shift != l1_index or not length:
                return None
            l1_entry = self.l1[l1_index]
            at, l2 = l1_entry & OFFSET_MASK, self.l2
            table = l2.last if at == l2.last_offset else l2.get(at)
            if table is None or (write and not l1_entry & COPIED):
                return None
            entries = table.entries
            index = offset >> bits & self._l2_mask
            first = entries[index]
            place = first & OFFSET_MASK
            host: int | None = None
            clusters = (last >> bits) - (offset >> bits)
            if first & _NOT_PLAIN or not place:
                if write or clusters or not first & ZERO or first & COMPRESSED:
                    return None
            else:
                mask = self.cluster_size - 1
                if place & mask or (write and not first & COPIED):
                    return None
                for i in range(1, clusters + 1):
                    if entries[index + i] != first + (i << bits):
                        return None
                host = place + (offset & mask)
                if write:
                    if not self.external:
                        start = place >> bits
                        stop = start + clusters + 1
                        if stop > self.refcounts.end or not self.reserved.isdisjoint(range(start, stop)):
                            return None  # the long way reports it
                    self.mark_dirty(offset, length)
            self._next_operation = number = self._next_operation + 1
            self._operations[number] = None
            return number, host

    def lookup_parts(self, offset: int, length: int, *, write: bool) -> tuple[int, list[Part]] | None:
        """Without blocking: (running operation, parts in order) if all of a guest range is in known host ranges or zero.

        What no image of the chain has is zero. None where that is not so or not known, where there are more than PARTS_MAX
        parts, or for more than a MiB. The operation is running then, as with lookup_now().
        """
        if self.encrypted or self._extended or (write and (self._broken or self._unready)):
            return None
        with self._lock:
            if self._exclusive or not 0 < length <= _BYTES_MAX:
                return None
            parts: list[Part] = []
            end, shift = offset + length, self._l2_shift
            while offset < end:
                l1_index = offset >> shift
                if l1_index >= len(self.l1):
                    return None
                l1_entry = self.l1[l1_index]
                span = min((l1_index + 1) << shift, end) - offset
                if not l1_entry & OFFSET_MASK:
                    if write or self.backing is not None:
                        return None
                    _join(parts, None, span)
                else:
                    table = self.l2.get(l1_entry & OFFSET_MASK)
                    if (
                        table is None
                        or (write and not l1_entry & COPIED)
                        or not self._parts_of(table, offset, span, write, parts)
                    ):
                        return None
                offset += span
            if write:
                if not self.external and not all(host is not None and self._holds_data(host, n) for host, n in parts):
                    return None
                self.mark_dirty(end - length, length)
            self._next_operation = number = self._next_operation + 1
            self._operations[number] = None
            return number, parts

    def _parts_of(self, table: L2Table, offset: int, length: int, write: bool, parts: list[Part]) -> bool:
        """Add what one table says of a range; False where that is not simple."""
        entries, bits, mask = table.entries, self.cluster_bits, self.cluster_size - 1
        unallocated_is_zero = self.backing is None and not self.external
        end = offset + length
        while offset < end:
            n = min(mask + 1 - (offset & mask), end - offset)
            entry = entries[offset >> bits & self._l2_mask]
            place = entry & OFFSET_MASK
            if entry & COMPRESSED:
                return False
            if entry & ZERO or not place:
                if write or not (entry & ZERO or unallocated_is_zero):
                    return False
                _join(parts, None, n)
            elif place & mask or (write and not entry & COPIED):
                return False
            else:
                _join(parts, place + (offset & mask), n)
            if len(parts) > PARTS_MAX:
                return False
            offset += n
        return True


def _join(parts: list[Part], host: int | None, length: int) -> None:
    """Add a part, to the one before where they are adjacent."""
    if parts:
        before, n = parts[-1]
        if (before is None and host is None) or (before is not None and host == before + n):
            parts[-1] = before, n + length
            return
    parts.append((host, length))
