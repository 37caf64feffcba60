"""Split virtqueue, device side (virtio 1.2, section 2.7). The driver is hostile: every number read here is checked.

Indirect descriptors, event index, suppression of notifications both ways, and the two indices that are its whole state.

Not here: who is notified and how, and what a request means. Packed virtqueues (2.8) are not offered.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import add, itemgetter, sub
from struct import Struct

from vmm_core.errors import GuestMemoryError, VmmError
from vmm_core.guestmem import GuestMemory

Chain = tuple[int, list[memoryview], list[memoryview]]
"""One request: the head's index, what the device may read, what it may write. The views are guest memory itself, in ring
order and never empty. A plain tuple, because a named one costs a tenth of the time a request may take."""

Singles = tuple[list[int], Sequence[int], Sequence[int], list[int]]
"""Requests of one descriptor each, by columns: heads; where each buffer begins in the queue's `window`, how long it is, where
it ends there."""

_DESC = Struct("<QIHH").unpack_from  # 2.7.5 virtq_desc: addr, len, flags, next
_F_NEXT, _F_WRITE, _F_INDIRECT = 1, 2, 4  # 2.7.5
_AVAIL_F_NO_INTERRUPT = 1  # 2.7.6
_USED_F_NO_NOTIFY = 1  # 2.7.8

# 2.7.5.3.1 limits a chain to the queue size. Linux does not keep to it with indirect tables, so they may be longer: as long as
# what one preadv takes (IOV_MAX). Without a limit one table of 65,535 entries times the ring is gigabytes of our memory.
MAX_INDIRECT = 1024
_MAX_TABLE = 16 * 65535  # an index has 16 bits, and 65,535 entries are what the reference takes
_MAX_BYTES = 1 << 32  # 2.7.5.3.1: a chain is never longer than 2**32 bytes in total

# A table that is used from its first entry on, one after the other, has this for flags and next, as long as it goes on.
_LONG = 16 * 20  # bytes; a shorter table is read sooner entry by entry
_READ_ON = array("I", range(0x1_0000 + _F_NEXT, MAX_INDIRECT << 16, 0x1_0000)).tobytes()
_WRITE_ON = array("I", range(0x1_0000 + _F_NEXT + _F_WRITE, MAX_INDIRECT << 16, 0x1_0000)).tobytes()

# Stores are seen in program order on x86; elsewhere the index must be kept behind what it publishes.
_WEAKLY_ORDERED = os.uname().machine not in ("x86_64", "i686", "i386")


def used_elements(heads: Sequence[int], written: Sequence[int]) -> array[int]:
    """Return elements of a used ring (2.7.8 virtq_used_elem): head and length of each in turn."""
    elements = array("I", bytes(8 * len(heads)))
    elements[::2], elements[1::2] = array("I", heads), array("I", written)
    return elements


class QueueError(VmmError):
    """The driver broke a rule of its ring. The device answers with DEVICE_NEEDS_RESET (2.1.2)."""


class SplitQueue:
    """One enabled queue. Owned by exactly one loop; nothing here locks.

    The driver sees what add_used() gave back when publish() runs, once a batch.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        max_size: int = 32768,
        event_idx: bool = False,
        indirect: bool = False,
    ) -> None:
        """Enable a queue of `size` descriptors with its three rings at the guest addresses `desc`, `avail` and `used`.

        `event_idx` and `indirect` say that VIRTIO_F_EVENT_IDX and VIRTIO_F_INDIRECT_DESC were negotiated.

        Raises QueueError when the size is not a power of two up to `max_size`, or a ring is misaligned, not wholly RAM, or
        overlaps another (2.7: alignment 16, 2, 4).
        """
        if not 0 < size <= min(max_size, 32768) or size & (size - 1):
            raise QueueError(f"queue size {size} is not a power of two up to {max_size}")
        rings = (
            ("descriptor table", desc, 16 * size, 16),
            ("available ring", avail, 6 + 2 * size, 2),
            ("used ring", used, 6 + 8 * size, 4),
        )
        for at, (name, address, length, alignment) in enumerate(rings):
            if address % alignment:
                raise QueueError(f"{name} at {address:#x} is not aligned to {alignment}")
            for other, start, extent, _ in rings[:at]:
                if address < start + extent and start < address + length:
                    raise QueueError(f"{name} at {address:#x} overlaps the {other} at {start:#x}")
        try:
            # Mapped once: a ring that is not wholly RAM is refused here, not found out per request.
            self._desc = memory.view(desc, 16 * size)
            self._avail = memory.view(avail, 6 + 2 * size).cast("H")  # [flags, idx, ring..., used_event]
            self._used_words = memory.view(used, 6 + 8 * size).cast("H")  # [flags, idx, ring..., avail_event]
            self._used = memory.view(used + 4, 8 * size).cast("Q")  # 2.7.8 virtq_used_elem: id in the low half, len in the high
            self._used_halves = memory.view(used + 4, 8 * size).cast("I")
            # The region in which a guest's buffers mostly are, looked at first: Linux allocates from the top of its memory.
            base, extent, _ = memory.regions[-1 if 4 * memory.regions[-1].size >= memory.size else 0]
            self.window = memory.view(base, extent)
        except GuestMemoryError as error:
            raise QueueError(f"rings of queue: {error}") from None
        self._window_base, self._window_size = base, extent
        self._longs, self._words = self.window.cast("Q"), self.window.cast("I")
        # The table by columns: addr, len, flags.
        self._addrs, self._lengths = self._desc.cast("Q")[::2], self._desc.cast("I")[2::4]
        self._flags = self._desc.cast("H")[6::8]
        self._memory = memory
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.event_idx = event_idx
        self.indirect = indirect
        self._seen = 0
        self._used_idx = 0
        self._published = 0
        # 2.7.7.2 compares with the last index that the driver was told; a new or restored queue has told it nothing yet.
        self._signalled: int | None = None
        # Held for ever: fence() gives it back and takes it again.
        self._barrier = threading.Lock()
        self._barrier.acquire()

    @property
    def indices(self) -> tuple[int, int]:
        """Where the device reads next in the available ring, and where it writes next in the used ring. The whole state."""
        return self._seen, self._used_idx

    def set_indices(self, next_avail: int, next_used: int) -> None:
        """Go on where a saved queue stopped. Raises QueueError when the two cannot belong together."""
        if not (0 <= next_avail <= 0xFFFF and 0 <= next_used <= 0xFFFF) or (next_avail - next_used) & 0xFFFF > self.size:
            raise QueueError(f"indices {next_avail} and {next_used} do not belong to a queue of {self.size}")
        self._seen, self._used_idx, self._published, self._signalled = next_avail, next_used, next_used, None

    @property
    def in_flight(self) -> int:
        """Requests taken by chains() and not given back by add_used() yet."""
        return (self._seen - self._used_idx) & 0xFFFF

    @property
    def pending(self) -> bool:
        """Whether the driver has made something available that chains() has not yielded."""
        return self._avail[1] != self._seen

    @property
    def available(self) -> int:
        """How many requests there are to be taken, as the driver says: not to be relied on."""
        return (self._avail[1] - self._seen) & 0xFFFF

    def chains(self) -> Iterator[Chain]:
        """Yield every request that is available now, oldest first. Requests not taken from the iterator stay in the ring.

        Raises QueueError on anything that a correct driver cannot have written.
        """
        desc, avail, size, view, unpack = self._desc, self._avail, self.size, self._memory.view, _DESC
        window, base, extent = self.window, self._window_base, self._window_size
        mask, indirect = size - 1, self.indirect
        seen = self._seen
        idx = avail[1]
        # A driver has at most `size` requests in the device's hands. Believing a wilder index would serve stale entries.
        if (idx - seen) & 0xFFFF > size - ((seen - self._used_idx) & 0xFFFF):
            raise QueueError(
                f"available index {idx} is too far ahead of {seen} for a queue of {size}, {self.in_flight} in flight"
            )
        if _WEAKLY_ORDERED:
            self._fence()
        try:
            while seen != idx:
                head = at = avail[2 + (seen & mask)]
                table, origin, nested = desc, 0, False
                entries = left = size
                readable: list[memoryview] = []
                writable: list[memoryview] = []
                total = 0
                while True:
                    if at >= entries:
                        raise QueueError(f"descriptor {at} of a table of {entries}")
                    addr, length, flags, following = unpack(table, origin + (at << 4))
                    if flags & _F_INDIRECT:  # 2.7.5.3; F_WRITE on it means nothing (2.7.5.3.2)
                        if not indirect or nested or flags & _F_NEXT or not length or length & 15 or length > _MAX_TABLE:
                            raise self._bad_indirect(nested, flags, length)
                        start = addr - base
                        if start >= 0 and start + length <= extent:
                            table, origin = window, start
                        else:
                            table, origin = view(addr, length), 0
                        at, nested = 0, True
                        entries = left = length >> 4
                        if length >= _LONG:
                            if entries > MAX_INDIRECT:
                                left = MAX_INDIRECT
                            elif table is window and not total and (whole := self._whole_table(start, entries)):
                                readable, writable, total = whole
                                break
                        continue
                    if not length:
                        raise QueueError(f"descriptor {at} has length 0")
                    total += length
                    start = addr - base
                    end = start + length
                    if start >= 0 and end <= extent:
                        piece = window[start:end]
                    else:
                        piece = view(addr, length)
                    if flags & _F_WRITE:
                        writable.append(piece)
                    elif writable:
                        raise QueueError(f"descriptor {at} is readable after a writable one (2.7.4.2)")
                    else:
                        readable.append(piece)
                    if not flags & _F_NEXT:
                        break
                    left -= 1
                    if not left:
                        raise QueueError(f"chain from {head} does not end within {min(entries, MAX_INDIRECT)} descriptors")
                    at = following
                if total > _MAX_BYTES:
                    raise QueueError(f"chain from {head} has {total} bytes, more than 2**32")
                self._seen = seen = (seen + 1) & 0xFFFF
                yield head, readable, writable
        except GuestMemoryError as error:
            raise QueueError(str(error)) from None

    def _whole_table(self, start: int, entries: int) -> tuple[list[memoryview], list[memoryview], int] | None:
        """Read an indirect table in the window by columns: what is readable, what is writable, and how many bytes that is.

        None unless it is as Linux makes it (each entry goes on to the next one, all buffers lie in the window): what it says
        then, and what is wrong with it, is found entry by entry. Each number is read once; it is never looked at again.
        """
        window, base, extent, words = self.window, self._window_base, self._window_size, self._words
        if start & 7:
            return None
        end = (start >> 2) + 4 * entries
        links = words[(start >> 2) + 3 : end : 4].tobytes()  # flags and next of each
        flags = links[-4]
        first = 0 if links[0] & _F_WRITE else 1 if links[4] & _F_WRITE else entries - (flags >> 1)  # that is writable
        body = 4 * entries - 4
        split = min(4 * first, body)
        if (
            links[:split] != _READ_ON[:split]
            or links[split:body] != _WRITE_ON[split:body]
            or flags != (_F_WRITE if first < entries else 0)
        ):
            return None
        lengths = words[(start >> 2) + 2 : end : 4].tolist()
        addrs = self._longs[start >> 3 : end >> 1 : 2].tolist()
        if base:
            addrs = list(map(sub, addrs, repeat(base)))
            if min(addrs) < 0:
                return None
        if max(addrs) + max(lengths) > extent or not all(lengths):
            return None
        pieces = [window[at : at + length] for at, length in zip(addrs, lengths)]  # noqa: B905 (asking takes as long as two pieces)
        return pieces[:first], pieces[first:], sum(lengths)

    def take_singles(self, most: int, flags: int, least: int = 1) -> Singles | None:
        """Take up to `most` requests at once when each is a single descriptor: with `flags` and nothing else, of `least` bytes or
        more, in the window. Fewer than two are left to chains(), as none.

        None when the next ones are not all like that, or something is wrong with them: chains() has them then.
        """
        avail, seen, size = self._avail, self._seen, self.size
        count = (avail[1] - seen) & 0xFFFF
        if count > size - ((seen - self._used_idx) & 0xFFFF):
            return None
        if count > most:
            count = most
        if count < 2:
            return [], (), (), []
        if _WEAKLY_ORDERED:
            self._fence()
        first = seen & (size - 1)
        end = first + count
        heads: list[int] = avail[2 + first : 2 + min(end, size)].tolist()
        if end > size:
            heads += avail[2 : 2 + end - size].tolist()
        pick: itemgetter[tuple[int, ...]] = itemgetter(*heads)
        try:
            if self._flags[heads[0]] != flags or pick(self._flags).count(flags) != count:
                return None
            starts, lengths = pick(self._addrs), pick(self._lengths)
        except IndexError:
            return None
        if base := self._window_base:
            starts = tuple(map(sub, starts, repeat(base)))
        ends = list(map(add, starts, lengths))
        if min(starts) < 0 or max(ends) > self._window_size or min(lengths) < least:
            return None
        self._seen = (seen + count) & 0xFFFF
        return heads, starts, lengths, ends

    def _bad_indirect(self, nested: bool, flags: int, length: int) -> QueueError:
        if not self.indirect:
            return QueueError("an indirect descriptor, which was not negotiated")
        if nested:
            return QueueError("an indirect descriptor inside an indirect table")
        if flags & _F_NEXT:
            return QueueError("an indirect descriptor with a next one")
        return QueueError(f"an indirect table of {length} bytes")

    def put_back(self, count: int = 1) -> None:
        """Leave the requests that were taken last in the ring, to be yielded again. Ends an iteration of chains()."""
        self._seen = (self._seen - count) & 0xFFFF

    def add_used(self, head: int, written: int) -> None:
        """Give a request back after writing `written` bytes. The driver sees it after publish()."""
        used_idx = self._used_idx
        if written > 0xFFFF_FFFF:  # a chain may have 2**32 bytes, but its used length has 32 bits
            written = 0xFFFF_FFFF
        self._used[used_idx & (self.size - 1)] = head | written << 32
        self._used_idx = (used_idx + 1) & 0xFFFF

    def add_all_used(self, heads: Sequence[int], written: Sequence[int]) -> None:
        """Give requests back as with add_used() for each of `heads` in turn. What was `written` into each is below 2**32."""
        self.add_elements(used_elements(heads, written))

    def add_elements(self, elements: array[int]) -> None:
        """Give requests back of which `used_elements` has made these."""
        used = self._used_halves
        count = len(elements)
        at = 2 * (self._used_idx & (self.size - 1))
        end = at + count
        self._used_idx = (self._used_idx + (count >> 1)) & 0xFFFF
        if end > len(used):
            room = len(used) - at
            used[: count - room] = elements[room:]
            elements = elements[:room]
            end = len(used)
        used[at:end] = elements

    def publish(self) -> bool:
        """Make everything given back visible at once, and return whether the driver wants a notification for it."""
        if self._published == self._used_idx:
            return False
        if _WEAKLY_ORDERED:
            self._fence()
        self._used_words[1] = self._published = self._used_idx
        return self.needs_interrupt()

    def needs_interrupt(self) -> bool:
        """Decide whether what was published since the last time is worth a notification (2.7.7.2). publish() asks by itself."""
        self._fence()  # the index must be out before the driver's wish is read, or both sides wait
        new, old = self._used_idx, self._signalled
        self._signalled = new
        if not self.event_idx:
            return not self._avail[0] & _AVAIL_F_NO_INTERRUPT
        used_event = self._avail[2 + self.size]
        return old is None or (new - used_event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def disable_kicks(self) -> None:
        """Tell the driver that it need not notify. A hint: with event index, the stale avail_event says it already."""
        if not self.event_idx:
            self._used_words[0] = _USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask for a notification of the next request, and return whether one came in meanwhile: then go on, no kick will come."""
        if self.event_idx:
            self._used_words[2 + 4 * self.size] = self._seen
        else:
            self._used_words[0] = 0
        self._fence()  # the wish must be out before the index is read, or both sides wait
        return self._avail[1] != self._seen

    def _fence(self) -> None:
        """Order every store before every later load. Unlocking and locking is the one full barrier that plain Python has."""
        self._barrier.release()
        self._barrier.acquire()
