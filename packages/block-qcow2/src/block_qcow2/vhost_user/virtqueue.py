"""Split virtqueue, device side (virtio 1.2, section 2.7), in memory of a front end. The driver is hostile: every number that is
read here is checked.

With a `Record`, what is taken and given back is written down in memory that outlives this process, so that another back end
goes on where this one was stopped (vhost-user, "Inflight I/O tracking").

Not here: who is notified and how, and what a request means. Packed virtqueues are not offered.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from struct import Struct

from ..errors import BlockError
from .memory import SharedMemory

Chain = tuple[int, list[memoryview], list[memoryview]]
"""One request: the head's index, what the device may read, what it may write, in ring order."""

_DESC = Struct("<QIHH").unpack_from  # 2.7.5 virtq_desc: addr, len, flags, next
_F_NEXT, _F_WRITE, _F_INDIRECT = 1, 2, 4
_AVAIL_F_NO_INTERRUPT = 1  # 2.7.6
_USED_F_NO_NOTIFY = 1  # 2.7.8
# Linux makes indirect tables that are longer than the queue; what one preadv takes is enough for everybody.
_MAX_CHAIN = 1024
_MAX_BYTES = 1 << 32  # 2.7.5.3.1
# Stores are seen in program order on x86; elsewhere the index must be kept behind what it publishes.
_WEAKLY_ORDERED = os.uname().machine not in ("x86_64", "i686", "i386")


class QueueError(BlockError):
    """The driver broke a rule of its ring, which is not served any further."""


class Record:
    """One queue's part of the inflight buffer: which requests are being worked on, in which order they came.

    struct QueueRegionSplit: features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16, then for each descriptor
    struct DescStateSplit: inflight u8, padding, next u16 at 6, counter u64 at 8.
    """

    HEADER, ENTRY, ALIGNMENT, VERSION = 16, 16, 64, 1

    @classmethod
    def bytes_needed(cls, size: int) -> int:
        """Bytes of one queue of `size` descriptors, which is also the distance from one queue to the next."""
        return -(-(cls.HEADER + cls.ENTRY * size) // cls.ALIGNMENT) * cls.ALIGNMENT

    def __init__(self, view: memoryview, size: int) -> None:
        self.size = size
        self._bytes = view
        self._words = view[: self.HEADER + self.ENTRY * size].cast("H")
        self._counters = view[: self.HEADER + self.ENTRY * size].cast("Q")
        self._counter = 0
        self._batch: list[int] = []

    def recover(self, used_idx: int) -> list[int] | None:
        """The heads that were being worked on when the last back end stopped, oldest first; None in a new record."""
        words = self._words
        if words[4] != self.VERSION:
            words[4], words[5], words[7] = self.VERSION, self.size, used_idx
            return None
        # The driver was told of a batch, the record was not: its heads are done. They are linked from the last one on.
        head = words[6]
        for _ in range(min((used_idx - words[7]) & 0xFFFF, self.size)):
            if head >= self.size:
                break
            self._bytes[self.HEADER + self.ENTRY * head] = 0
            head = words[8 + 8 * head + 3]
        words[7] = used_idx
        found = [i for i in range(self.size) if self._bytes[self.HEADER + self.ENTRY * i] == 1]
        found.sort(key=lambda i: self._counters[2 + 2 * i + 1])
        self._counter = max((self._counters[2 + 2 * i + 1] for i in found), default=0)
        return found

    def taken(self, head: int) -> None:
        self._counter = (self._counter + 1) & ((1 << 64) - 1)
        self._counters[2 + 2 * head + 1] = self._counter
        self._bytes[self.HEADER + self.ENTRY * head] = 1

    def given_back(self, head: int) -> None:
        words = self._words
        words[8 + 8 * head + 3] = words[6]
        words[6] = head
        self._batch.append(head)

    def published(self, used_idx: int) -> None:
        for head in self._batch:
            self._bytes[self.HEADER + self.ENTRY * head] = 0
        self._batch.clear()
        self._words[7] = used_idx


class SplitQueue:
    """One running queue. Belongs to one thread. The driver sees what add_used() gave back when publish() runs."""

    def __init__(
        self,
        memory: SharedMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        next_avail: int,
        event_idx: bool = False,
        indirect: bool = False,
        record: Record | None = None,
    ) -> None:
        """Start at `next_avail` of the available ring. `desc`, `avail`, `used` are user addresses of the front end.

        QueueError for a size that is no power of two, a misaligned ring or one outside shared memory, or an impossible index.
        """
        if not 0 < size <= 32768 or size & (size - 1):
            raise QueueError(f"queue size {size} is not a power of two up to 32768")
        if desc % 16 or avail % 2 or used % 4:
            raise QueueError(f"rings at {desc:#x}, {avail:#x}, {used:#x} are not aligned to 16, 2, 4")
        if record is not None and record.size < size:
            raise QueueError(f"queue size {size} is more than the inflight buffer's {record.size}")
        self._desc = memory.at_user(desc, 16 * size)
        # A region need not be aligned in its file as it is for the guest: cast() does not mind.
        self._avail = memory.at_user(avail, 6 + 2 * size).cast("H")  # flags, idx, ring…, used_event
        self._used_words = memory.at_user(used, 6 + 8 * size).cast("H")  # flags, idx, ring…, avail_event
        self._used = memory.at_user(used + 4, 8 * size).cast("Q")  # 2.7.8 virtq_used_elem: id low, len high
        self._memory = memory
        self.size = size
        self.event_idx = event_idx
        self._indirect = indirect
        self._record = record
        self._used_idx = self._published = self._used_words[1]
        self._signalled: int | None = None  # what the driver was told last: nothing yet
        again = record.recover(self._used_idx) if record is not None else None
        if again is not None:
            again = [head for head in again if head < size]
            next_avail = (self._used_idx + len(again)) & 0xFFFF
        self._again = again or []
        self._next_avail = next_avail
        if (next_avail - self._used_idx) & 0xFFFF > size:
            raise QueueError(f"indices {next_avail} and {self._used_idx} do not belong to a queue of {size}")
        # Held for ever: _fence() gives it back and takes it again.
        self._barrier = threading.Lock()
        self._barrier.acquire()

    @property
    def next_avail(self) -> int:
        """Where the device reads next in the available ring."""
        return self._next_avail

    @property
    def unpublished(self) -> int:
        """Requests given back that the driver does not know of yet."""
        return (self._used_idx - self._published) & 0xFFFF

    def chains(self) -> Iterator[Chain]:
        """Yield every request that is available now, oldest first; before them those that an earlier back end left unfinished.

        QueueError on anything that a correct driver cannot have written.
        """
        while self._again:
            head = self._again.pop(0)
            yield self._chain(head)
        avail, mask, record = self._avail, self.size - 1, self._record
        idx = avail[1]
        busy = (self._next_avail - self._used_idx) & 0xFFFF
        if (idx - self._next_avail) & 0xFFFF > self.size - busy:
            raise QueueError(
                f"available index {idx} is too far ahead of {self._next_avail}, with {busy} of {self.size} in flight"
            )
        if _WEAKLY_ORDERED:
            self._fence()
        while self._next_avail != idx:
            head = avail[2 + (self._next_avail & mask)]
            chain = self._chain(head)
            if record is not None:
                record.taken(head)
            self._next_avail = (self._next_avail + 1) & 0xFFFF
            yield chain

    def _chain(self, head: int) -> Chain:
        memory, table, entries, at, nested = self._memory, self._desc, self.size, head, False
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        total, left = 0, max(self.size, _MAX_CHAIN)
        while True:
            if at >= entries:
                raise QueueError(f"descriptor {at} of a table of {entries}")
            addr, length, flags, following = _DESC(table, at << 4)
            if flags & _F_INDIRECT:  # 2.7.5.3
                if not self._indirect or nested or flags & _F_NEXT or not length or length & 15 or length > _MAX_CHAIN << 4:
                    raise QueueError(f"descriptor {at}: an indirect table of {length} bytes, flags {flags:#x}")
                # A table may lie across two regions: it is small, so it is copied, which also keeps it from changing.
                table = memoryview(b"".join(memory.views(addr, length)))
                at, entries, nested = 0, length >> 4, True
                continue
            if not length:
                raise QueueError(f"descriptor {at} has length 0")
            total += length
            if total > _MAX_BYTES:
                raise QueueError(f"the chain from {head} has more than 2**32 bytes")
            if flags & _F_WRITE:
                writable += memory.views(addr, length)
            elif writable:
                raise QueueError(f"descriptor {at} is readable after a writable one (2.7.4.2)")
            else:
                readable += memory.views(addr, length)
            if not flags & _F_NEXT:
                return head, readable, writable
            left -= 1
            if not left:
                raise QueueError(f"the chain from {head} does not end")
            at = following

    def add_used(self, head: int, written: int) -> None:
        """Give a request back after writing `written` bytes."""
        self._used[self._used_idx & (self.size - 1)] = head | min(written, 0xFFFF_FFFF) << 32
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        if self._record is not None:
            self._record.given_back(head)

    def publish(self) -> bool:
        """Make everything given back visible at once; whether the driver wants a notification for it (2.7.7.2)."""
        if self._published == self._used_idx:
            return False
        if _WEAKLY_ORDERED:
            self._fence()
        self._used_words[1] = self._published = self._used_idx
        if self._record is not None:
            self._record.published(self._used_idx)
        self._fence()  # the index must be out before the driver's wish is read, or both sides wait
        new, old = self._used_idx, self._signalled
        self._signalled = new
        if not self.event_idx:
            return not self._avail[0] & _AVAIL_F_NO_INTERRUPT
        return old is None or (new - self._avail[2 + self.size] - 1) & 0xFFFF < (new - old) & 0xFFFF

    def disable_kicks(self) -> None:
        """Tell the driver that it need not notify. A hint."""
        if not self.event_idx:
            self._used_words[0] = _USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask for a notification of the next request; whether one came in meanwhile: then go on, no kick will come."""
        if self.event_idx:
            self._used_words[2 + 4 * self.size] = self._next_avail
        else:
            self._used_words[0] = 0
        self._fence()  # the wish must be out before the index is read, or both sides wait
        return self._avail[1] != self._next_avail

    def _fence(self) -> None:
        """Order every store before every later load. Unlocking and locking is the one full barrier that plain Python has."""
        self._barrier.release()
        self._barrier.acquire()
