"""Receive buffers that were taken from their ring and are not filled yet, as one stretch of memory.

A driver's buffers mostly lie one behind the other: those that do are one view here, so that a frame of 64 KiB, which takes
forty of them, is a system call with three views. A system call can always be offered all there is: what a frame does not need
stays.

Not here: what frames are, and where they come from.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from itertools import accumulate, compress, islice, pairwise, repeat
from operator import ne
from struct import Struct

from virtio_devices.net.features import ETHERNET, HEADER, NUM_BUFFERS
from virtio_devices.queue import QueueError, SplitQueue, used_elements

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

IOV_MAX = 1024  # buffers of one system call (limits.h)
_AHEAD = 128  # buffers that are taken at once when that is cheap
_WRITABLE = 2  # VIRTQ_DESC_F_WRITE
_STORE = Struct("<H").pack_into


class Buffers:
    """Receive buffers of one queue. All counts are of bytes unless said otherwise."""

    def __init__(self) -> None:
        """Have none."""
        self.begin(mergeable=False)

    def begin(self, *, mergeable: bool) -> None:
        """Have none, of a new driver. `mergeable`: a frame may lie in several buffers (VIRTIO_NET_F_MRG_RXBUF)."""
        self.mergeable = mergeable
        # 5.1.6.3.1: buffers that may be merged hold a header at least, others a whole frame.
        self._least = HEADER if mergeable else HEADER + ETHERNET
        self._detour = 0  # buffers to be taken one by one, as the next ones were none to be taken at once
        self.clear()

    def clear(self) -> None:
        """Have none."""
        self._elements = array("I")  # head and length of each, as they go into the used ring
        self._lengths: list[int] = []
        self._ends = [0]  # number n begins at [n] of some stretch, and ends at [n + 1]
        self._at = 0  # the first one that is not given back
        self._views: list[memoryview] = []  # from its beginning on
        self._apart = True  # each view is one buffer
        self.room = 0  # for the next frame with its header

    @property
    def count(self) -> int:
        """How many buffers there are."""
        return len(self._lengths) - self._at

    def fill(self, queue: SplitQueue, wanted: int) -> bool:
        """Have room for `wanted`, if the driver has made that much available; more if that is cheap. Tell whether any came.

        Where frames lie in one buffer each, have one buffer.

        Raises QueueError when the next buffer is none.
        """
        if not self.mergeable:
            if self.count:
                return False
            wanted = 1
        lengths, ends, views = self._lengths, self._ends, self._views
        if at := self._at:
            del self._elements[: 2 * at], lengths[:at], ends[:at]
            self._at = 0
        before = len(lengths)
        if not before:
            self._apart = True
        if self._detour <= 0:
            run = queue.take_singles(_AHEAD, _WRITABLE, self._least)
            if run is None:
                self._detour = _AHEAD
            elif run[0]:
                more, starts, sizes, stops = run
                self._elements += used_elements(more, sizes)
                lengths += sizes
                ends[-1:] = accumulate(sizes, initial=ends[-1])
                self.room = ends[-1] - ends[0] if self.mergeable else lengths[0]
                window = queue.window
                if self.mergeable and wanted > sizes[0]:
                    self._apart = False
                    count = len(more)
                    gaps = compress(range(1, count), map(ne, stops, islice(starts, 1, None)))
                    views += [window[starts[one] : stops[after - 1]] for one, after in pairwise((0, *gaps, count))]
                else:
                    views += map(window.__getitem__, map(slice, starts, stops))
        if self.room < wanted:
            self._fill_singly(queue, wanted)
        return len(lengths) > before

    def _fill_singly(self, queue: SplitQueue, wanted: int) -> None:
        for head, readable, writable in queue.chains():
            if readable or not writable:
                raise QueueError("a receive buffer has to be writable, and nothing else")
            length = len(writable[0]) if len(writable) == 1 else sum(map(len, writable))
            if length < self._least or len(writable) >= IOV_MAX:
                raise QueueError(f"a receive buffer of {length} bytes in {len(writable)} pieces")
            self._elements.extend((head, min(length, 0xFFFF_FFFF)))  # a chain may have one byte more, and no frame needs it
            self._lengths.append(length)
            self._ends.append(self._ends[-1] + length)
            self.room += length
            self._views += writable
            self._apart = self._apart and len(writable) == 1
            self._detour -= 1
            if self.room >= wanted:
                return

    def put_back(self, queue: SplitQueue) -> None:
        """Leave all of them in their ring."""
        queue.put_back(self.count)
        self.clear()

    def offer(self, wanted: int) -> tuple[list[memoryview], int]:
        """Return views of what the next frame goes to, and how much that is: `wanted` if there is room for it, or somewhat more.

        There are buffers. The list is the caller's.
        """
        views = self._views
        room = len(views[0])
        if not self.mergeable:
            wanted = self._lengths[self._at]
        if room >= wanted:
            return views[:1], room
        count = 1
        for view in islice(views, 1, IOV_MAX - 1):
            room += len(view)
            count += 1
            if room >= wanted:
                break
        return views[:count], room

    def each_holds(self, length: int) -> bool:
        """Tell whether frames of `length` with their header can be read one into each buffer, as each of views() is one.

        There are buffers.
        """
        return self._apart and length <= len(self._views[0])

    def views(self, most: int) -> list[memoryview]:
        """Return the next views, up to `most` of them."""
        return self._views[:most]

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Copy `data` to `offset` of the next frame. There is room for it."""
        poke(self._views, offset, data)

    def give(self, queue: SplitQueue, length: int) -> None:
        """Give back the buffers that a frame of `length` with its header lies in. There is room for it."""
        views, at, elements = self._views, self._at, self._elements
        taken = self._lengths[at]
        count = 1
        if length <= taken:
            queue.add_used(elements[2 * at], length)
        else:
            ends = self._ends
            end = ends[at] + length
            after = bisect_left(ends, end, at + 1)
            count = after - at
            elements[2 * after - 1] = end - ends[after - 1]  # the last one is not full
            queue.add_elements(elements[2 * at : 2 * after])
            taken = ends[after] - ends[at]
        first = views[0]
        if len(first) >= HEADER:
            first[NUM_BUFFERS], first[NUM_BUFFERS + 1] = count & 0xFF, count >> 8
        else:
            poke(views, NUM_BUFFERS, count.to_bytes(2, "little"))
        self._at = at = at + count
        if self.mergeable:
            self.room -= taken
        else:
            self.room = self._lengths[at] if at < len(self._lengths) else 0
        while taken >= len(first):
            taken -= len(first)
            del views[0]
            if not taken:
                return
            first = views[0]
        views[0] = first[taken:]

    def give_each(self, queue: SplitQueue, lengths: Sequence[int]) -> None:
        """Give back one buffer for each frame, of these lengths with its header; each_holds() them."""
        at, views = self._at, self._views
        count = len(lengths)
        self._at = after = at + count
        elements = self._elements[2 * at : 2 * after]
        elements[1::2] = array("I", lengths)
        queue.add_elements(elements)
        any(map(_STORE, islice(views, count), repeat(NUM_BUFFERS), repeat(1)))  # no loop of Python's
        del views[:count]
        if self.mergeable:
            self.room -= self._ends[after] - self._ends[at]
        else:
            self.room = self._lengths[after] if after < len(self._lengths) else 0


def poke(views: Sequence[memoryview], offset: int, data: bytes | memoryview) -> None:
    """Store `data` at `offset` of scattered bytes; what lies beyond their end is dropped."""
    for view in views:
        if offset < len(view):
            part = min(len(view) - offset, len(data))
            view[offset : offset + part] = data[:part]
            data, offset = data[part:], 0
            if not data:
                return
        else:
            offset -= len(view)


def peek(views: Sequence[memoryview], offset: int, count: int) -> bytes:
    """Return `count` bytes from `offset` on of scattered bytes, or as many as there are."""
    data = b""
    for view in views:
        if offset < len(view):
            data += bytes(view[offset : offset + count - len(data)])
            offset = 0
            if len(data) == count:
                break
        else:
            offset -= len(view)
    return data
