"""The size of an image: making it larger, moving its L1 table for that, making it smaller.

A resize that fails changes nothing, or the image is not written any more. Not here: who may resize, what a device tells a guest.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ..errors import ImageFormatError
from ..hostfile import Cursor
from . import tables
from .format import AUTOCLEAR_DATA_FILE_RAW, MAX_L1_BYTES, MAX_VIRTUAL_SIZE
from .reader import COMPRESSED_DATA, NORMAL, UNALLOCATED
from .writer import Writer

if TYPE_CHECKING:
    from .bitmaps import Bitmaps


class Resizer(Writer):
    """An image whose size can be changed."""

    bitmaps: Bitmaps | None = None  # followed, while the image is ours to write

    def resize(self, size: int, *, shrink: bool = False) -> None:
        """Set the virtual size, in bytes. Making it smaller loses data and wants `shrink`."""
        self.must_be_writable()
        if not 0 <= size <= MAX_VIRTUAL_SIZE:
            raise ValueError(f"size {size}: expected 0 to 2^63-1")
        if size < self.size and not shrink:
            raise ValueError("making an image smaller loses data: it has to be asked for")
        if size == self.size:
            return
        needed = -(-size >> self._l2_shift) if size else 0
        if needed * 8 > MAX_L1_BYTES:
            raise ImageFormatError(f"an L1 table for {size} bytes would take {needed * 8} bytes, at most {MAX_L1_BYTES} work")
        if self.bitmaps is not None:
            self.bitmaps.must_fit(size)
        with self.exclusive():
            self.must_be_writable()  # and nobody has found it wrong meanwhile, or made a snapshot
            if self.header.version < 3 and self.header.nb_snapshots:
                raise ImageFormatError("Can't resize a version 2 image with snapshots")
            old = self.size
            if size < old:
                if not shrink:
                    raise ValueError("the image was made larger meanwhile")
                self._cut(size)
            hidden = min(size, self.backing.size) if self.backing is not None else 0
            if size > old:
                self._zero_tail(old)
            if needed > len(self.l1):
                self._grow_l1(needed, old if hidden > old else size)
            if hidden > old:
                self._hide_backing(hidden)
            if self.header.size != size:
                self._write_size(size)
            self.size = size
            if self.bitmaps is not None:
                self.bitmaps.resized()
                with self._lock:  # whoever copies what is marked may have the backing image's bytes there
                    self.mark_dirty(old, hidden - old)
            if self.external and self.header.autoclear & AUTOCLEAR_DATA_FILE_RAW:
                self.data_file.truncate(size)

    def _cut(self, size: int) -> None:
        """Drop what is behind `size`: whole clusters are freed, the rest of the last one is zeroed. Nothing else runs."""
        mask = self.cluster_size - 1
        with self._lock:
            self.mark_dirty(size, self.size - size)
        self._zero_tail(size)
        at, end = (size + mask) & ~mask, (self.size + mask) & ~mask
        while at < end:
            stop = min((at >> self._l2_shift) + 1 << self._l2_shift, end)
            self._forget_clusters(at, stop - at, True)
            self.commit_if_crowded()
            at = stop
        self.commit()

    def _forget_clusters(self, offset: int, length: int, unmap: bool) -> None:
        self._set_clusters(offset, length, keep=False, zero=False)

    def _zero_tail(self, start: int) -> None:
        """What is added behind an end reads as zeroes: so must the last cluster's bytes behind it, whatever stands there.

        They are written like guest data: a snapshot that is longer than the disk is now may share the cluster. Nothing else runs.
        """
        mask = self.cluster_size - 1
        end = (start + mask) & ~mask
        if start == end:
            return
        with self._lock:
            kinds = {run.kind for run in self._map(start, end - start)}
        shown = {NORMAL, COMPRESSED_DATA}
        if self.backing is not None and self.backing.size > start:
            shown.add(UNALLOCATED)
        if kinds & shown:
            self._write_gated(start, Cursor([memoryview(bytes(end - start))]), end - start)
            self.commit()

    def _hide_backing(self, end: int) -> None:
        """A backing image that is longer than this one must not show through up to `end`. Nothing else runs.

        On the disk when this returns, before any header says that the disk is that long: a power loss between the two would
        show what is in the backing image.
        """
        mask = self.cluster_size - 1
        at, end = (self.size + mask) & ~mask, (end + mask) & ~mask
        while at < end:
            stop = min((at >> self._l2_shift) + 1 << self._l2_shift, end)
            if self.header.version < 3:
                self._write_zero_data(at, stop - at)
            else:
                self._set_clusters(at, stop - at, keep=True, zero=True)
            self.commit_if_crowded()
            at = stop
        self.commit()

    def _grow_l1(self, needed: int, size: int) -> None:
        """Move the L1 table to a larger place, for a disk of `size` bytes; a failure changes nothing. Nothing else runs."""
        header, bits = self.header, self.cluster_bits
        self.commit()
        clusters = -(-needed * 8 >> bits)
        larger = self.l1 + array("Q", bytes(8 * (needed - len(self.l1))))
        with self._lock:
            first = self._allocate_adjacent(clusters)
            self.reserved.update(range(first, first + clusters))
        old = header.l1_table_offset, header.l1_size
        try:
            self.file.pwrite(first << bits, tables.to_bytes(larger) + bytes((clusters << bits) - 8 * needed))
            self.write_counts()
            header.l1_table_offset, header.l1_size = first << bits, needed
            self._write_size(size)
        except OSError:
            if header.l1_size != old[1]:
                header.l1_table_offset, header.l1_size = old
                self._write_back("the L1 table could not be moved")
            with self._lock:
                self.refcounts.add(first, clusters, -1)
                self.reserved.difference_update(range(first, first + clusters))
            raise
        self.l1 = larger
        if old[0] and old[1]:
            with self._lock:
                self._free_later(old[0] >> bits, -(-old[1] * 8 >> bits))

    def _write_size(self, size: int) -> None:
        """Let the header say how large the disk is."""
        old, self.header.size = self.header.size, size
        try:
            self.write_header()
        except OSError:
            self.header.size = old
            raise

    def _write_back(self, what: str) -> None:
        """A change of the header failed: have the one on the disk be the old one for certain, or refuse writes from now on."""
        try:
            self.write_header()
        except OSError:
            self._broken = what
