"""Writing guest data: in place where a cluster is ours alone, else into new clusters that are linked when the data are there.

A request that allocates has its guest clusters alone (`gate`); others go on. Data are written before the L2 entry changes in
memory, and `Metadata.commit` puts a barrier between the two on the disk.

Not here: the order on the disk, snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import ImageFormatError
from ..hostfile import Cursor
from ..zeroes import all_zero
from .format import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    compressed_entry,
    compressed_span,
)
from .lookup import Lookup
from .reader import UNALLOCATED, ZERO_PLAIN
from .tables import L2Table

_MAX_RUN = 4 << 20  # bytes of one allocating write: what it holds of other requests' clusters stays small
_ZEROES = memoryview(bytes(1 << 15))  # longer padding goes to the host as a range


class Piece(NamedTuple):
    """Adjacent guest clusters that get their data by one write to adjacent host clusters."""

    offset: int  # guest
    length: int
    host: int  # of the cluster that `offset` is in
    new: bool  # allocated for this write: not linked yet
    fresh: bool  # the host clusters were never written, so read as zeroes
    whole: bool  # every byte of the clusters must be written: what was there before moves
    start: int  # guest range that is written, padding included
    end: int


class Writer(Lookup):
    """An image that can be written."""

    _deflate: Callable[[bytes | bytearray | memoryview], bytes] | None = None
    _compressed_at = 0  # where the next compressed cluster may start, 0 for a new host cluster

    # --- data ---

    def write_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write `buffers` at `offset`. ValueError outside the image; ImageReadOnlyError, OSError, ImageFormatError."""
        length = sum(map(len, buffers))
        number = self.begin()
        try:
            self._must_be_inside(offset, length)
            self.must_be_writable()
            runs = self._in_place(offset, length)
            source = Cursor(buffers)
            if runs is not None:
                for host, n in runs:
                    self.data_file.writev(host, source.views(n))
            else:
                self._write_gated(offset, source, length)
        finally:
            self.end(number)
        self.commit_if_crowded()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`."""
        with memoryview(data) as view:
            self.write_from(offset, [view])

    def _in_place(self, offset: int, length: int) -> list[tuple[int, int]] | None:
        """(host offset, length) of each part if all of the range can be overwritten where it is, else None."""
        found: list[tuple[int, int]] = []
        end = offset + length
        mask, bits = self.cluster_size - 1, self.cluster_bits
        index_mask = (1 << self.header.l2_bits) - 1
        extended = self.header.extended_l2
        with self._lock:
            self.mark_dirty(offset, length)
            while offset < end:
                table = self._table(offset >> self._l2_shift)
                if table is None or not self.l1[offset >> self._l2_shift] & COPIED:
                    return None
                span_end = min((offset >> self._l2_shift) + 1 << self._l2_shift, end)
                while offset < span_end:
                    n = min(mask + 1 - (offset & mask), span_end - offset)
                    index = offset >> bits & index_mask
                    if extended:
                        entry = table.entries[2 * index]
                        needed = self._subcluster_mask(offset & mask, n)
                        if table.entries[2 * index + 1] & needed != needed:
                            return None
                    else:
                        entry = table.entries[index]
                        if entry & ZERO:
                            return None
                    if not entry & COPIED or entry & COMPRESSED or not (entry & OFFSET_MASK or self.external):
                        return None
                    host = (entry & OFFSET_MASK) + (offset & mask)
                    if entry & OFFSET_MASK & mask:
                        raise self._corrupt(f"L2 table at {table.offset:#x}, entry {index}: cluster at {entry & OFFSET_MASK:#x}")
                    if found and found[-1][0] + found[-1][1] == host:
                        found[-1] = (found[-1][0], found[-1][1] + n)
                    else:
                        found.append((host, n))
                    offset += n
            for host, n in found:
                self._check_in_place(host, n)
        return found

    def _write_gated(self, offset: int, source: Cursor, length: int) -> None:
        mask = self.cluster_size - 1
        while length:
            n = min(length, max(_MAX_RUN, self.cluster_size) - (offset & mask))
            with self.gate.write(offset & ~mask, (offset + n + mask) & ~mask, exclusive=True):
                end = offset + n
                while offset < end:
                    done = self._write_piece(offset, source, end - offset)
                    offset += done
                    length -= done

    def _write_piece(self, offset: int, source: Cursor, length: int) -> int:
        """Write the first part of the range that goes to adjacent host clusters; return its length."""
        with self._lock:
            piece = self._plan(offset, length)
        if piece is None:
            runs = self._in_place(offset, min(length, self.cluster_size - (offset & (self.cluster_size - 1))))
            if runs is None:  # the gate keeps it as it was planned, so it never was a place to write to
                raise self._corrupt(f"guest data at {offset:#x} is said to be in place, and lies nowhere")
            for host, n in runs:
                self.data_file.writev(host, source.views(n))
            return sum(n for _, n in runs)
        try:
            self._write_padded(piece, source)
            with self._lock:
                self._link(piece)
        except BaseException:
            if piece.new and not self.external:
                with self._lock:
                    clusters = (piece.offset % self.cluster_size + piece.length + self.cluster_size - 1) >> self.cluster_bits
                    self.refcounts.add(piece.host >> self.cluster_bits, clusters, -1)
            raise
        return piece.length

    def _plan(self, offset: int, length: int) -> Piece | None:
        """What the next write is; None if the first cluster can be overwritten in place. The lock is held."""
        bits, mask = self.cluster_bits, self.cluster_size - 1
        l1_index = offset >> self._l2_shift
        table = self._writable_table(l1_index)
        length = min(length, (l1_index + 1 << self._l2_shift) - offset)
        index = offset >> bits & (1 << self.header.l2_bits) - 1
        clusters = ((offset & mask) + length + mask) >> bits
        kinds = [self._how(table, index, offset & mask, min(mask + 1 - (offset & mask), length))]
        while len(kinds) < clusters:
            at = len(kinds)
            start = (offset & ~mask) + (at << bits)
            kind = self._how(table, index + at, 0, min(mask + 1, offset + length - start))
            if kind[0] != kinds[0][0] or (kind[0] == "reuse" and kind[1] != kinds[0][1] + (at << bits)):
                break
            kinds.append(kind)
        how, host, _ = kinds[0]
        if how == "in place":
            return None
        whole = any(k[2] for k in kinds)
        count, fresh = len(kinds), False
        if how == "new":
            if self.external:
                host = offset & ~mask
            else:
                first, count, fresh = self._allocate(count)
                host = first << bits
                fresh = fresh and not self.encrypted  # what was never written does not decrypt to zeroes
                # The lock may have been away, but nobody else changes these entries: the gate is held.
        else:
            self._check_in_place(host, count << bits)
        n = min(length, (count << bits) - (offset & mask))
        start, end = self._granule(offset, offset + n, whole)
        if how == "reuse" and self.header.extended_l2:
            # A subcluster that has data takes the write as it is: others may be writing to the rest of it.
            if table.entries[2 * index + 1] >> (offset & mask) * SUBCLUSTERS // (mask + 1) & 1:
                start = offset
            last = offset + n - 1
            if table.entries[2 * (index + count - 1) + 1] >> (last & mask) * SUBCLUSTERS // (mask + 1) & 1:
                end = offset + n
        return Piece(offset, n, host, how == "new", fresh, whole, start, end)

    def _how(self, table: L2Table, index: int, inside: int, n: int) -> tuple[str, int, bool]:
        """("in place" | "reuse" | "new", host offset, whether all of the cluster's old content has to move)."""
        bitmap = 0
        if self.header.extended_l2:
            entry, bitmap = table.entries[2 * index], table.entries[2 * index + 1]
        else:
            entry = table.entries[index]
        if entry & COMPRESSED:
            return "new", 0, True
        host = entry & OFFSET_MASK
        if host & (self.cluster_size - 1):
            raise self._corrupt(f"L2 table at {table.offset:#x}, entry {index}: cluster at {host:#x}")
        there = bool(host) or (self.external and bool(entry & COPIED))
        if there and (entry & COPIED or self.external):
            if self.header.extended_l2:
                needed = self._subcluster_mask(inside, n)
                return ("in place", host, False) if bitmap & needed == needed else ("reuse", host, False)
            return ("reuse" if entry & ZERO else "in place"), host, False
        # A cluster that snapshots share: its data move to the new one. Without data, only what is written is.
        return "new", 0, there and (bool(bitmap & 0xFFFFFFFF) if self.header.extended_l2 else not entry & ZERO)

    def _subcluster_mask(self, inside: int, n: int) -> int:
        size = self.cluster_size // SUBCLUSTERS
        first, end = inside // size, -(-(inside + n) // size)
        return (1 << end) - (1 << first)

    def _granule(self, offset: int, end: int, whole: bool) -> tuple[int, int]:
        """The range with its padding: to cluster borders, or to subcluster borders where that will do."""
        size = self.cluster_size
        if self.header.extended_l2 and not whole:
            size //= SUBCLUSTERS
        return offset // size * size, -(-end // size) * size

    def _write_padded(self, piece: Piece, source: Cursor) -> None:
        stop = piece.offset + piece.length
        base = piece.host - (piece.offset & ~(self.cluster_size - 1))  # host = guest + base
        at, views = piece.offset, source.views(piece.length)
        end = min(piece.end, max(self.size, stop)) if self.external else piece.end
        for lo, hi in ((piece.start, piece.offset), (stop, end)):
            if lo >= hi:
                continue
            pad = self._old_content(lo, hi - lo)
            if pad is None:
                if piece.fresh:
                    continue
                if hi - lo > len(_ZEROES):
                    self.data_file.write_zeroes(lo + base, hi - lo)
                    continue
                pad = _ZEROES[: hi - lo]
            if hi == piece.offset:
                at, views = lo, [pad, *views]
            else:
                views = [*views, pad]
        self.data_file.writev(at + base, views)

    def _old_content(self, offset: int, length: int) -> memoryview | None:
        """Guest data as they are, for copying; None if they are zeroes."""
        there = max(min(length, self.size - offset), 0)  # the last cluster may reach behind the end of the disk
        if not there:
            return None
        with self._lock:
            if all(r.kind == ZERO_PLAIN or (r.kind == UNALLOCATED and self.backing is None) for r in self._map(offset, there)):
                return None
        data = bytearray(length)
        view = memoryview(data)
        self._read(offset, Cursor([view[:there]]), there)
        return None if all_zero([view]) else view

    def _link(self, piece: Piece) -> None:
        """The data are written: let the L2 entries say so. The lock is held."""
        bits, mask = self.cluster_bits, self.cluster_size - 1
        table = self._writable_table(piece.offset >> self._l2_shift)  # fails, if anything does, before anything has changed
        index = piece.offset >> bits & (1 << self.header.l2_bits) - 1
        clusters = ((piece.offset & mask) + piece.length + mask) >> bits
        entries = table.entries
        if self.header.extended_l2:
            for i in range(clusters):
                at = (piece.offset & ~mask) + (i << bits)
                lo, hi = max(piece.start - at, 0), min(piece.end - at, mask + 1)
                written = self._subcluster_mask(lo, hi - lo)
                old, bitmap = entries[2 * (index + i)], entries[2 * (index + i) + 1]
                if piece.new:
                    self._dereference(old)
                    if piece.whole or old & COMPRESSED:
                        bitmap, written = 0, 0xFFFFFFFF
                entries[2 * (index + i)] = piece.host + (i << bits) | COPIED
                entries[2 * (index + i) + 1] = (bitmap | written) & ~(written << 32)
            self.l2.touch(table, 2 * index, 2 * (index + clusters))
            return
        for i in range(clusters):
            if piece.new:
                self._dereference(entries[index + i])
            entries[index + i] = piece.host + (i << bits) | COPIED
        self.l2.touch(table, index, index + clusters)

    def _dereference(self, entry: int) -> None:
        """An L2 entry is being replaced: what it referenced is free when that is on the disk."""
        if self.external:
            return
        if entry & COMPRESSED:
            offset, length = compressed_span(entry, self.cluster_bits)
            first = offset >> self.cluster_bits
            self._free_later(first, (offset + length - 1 >> self.cluster_bits) - first + 1)
            self._compressed_at = 0
        elif entry & OFFSET_MASK:
            self._free_later((entry & OFFSET_MASK) >> self.cluster_bits, 1)

    # --- compressed ---

    def write_compressed(self, offset: int, data: bytes | bytearray | memoryview, packed: bytes | None = None) -> None:
        """Write one whole cluster compressed, or plainly if it does not get smaller. `offset` is a multiple of the cluster size.

        `packed` is the data compressed already (`compressor`). Only the last cluster of the disk may be short.
        """
        self.must_be_writable()
        if self.external or self.encrypted:
            what = "an external data file" if self.external else "encryption"
            raise ImageFormatError(f"an image with {what} has no compressed clusters")
        length = len(data)
        if offset % self.cluster_size or (length != self.cluster_size and offset + length != self.size):
            raise ValueError("compressed writes are of whole clusters")
        if packed is None:
            packed = self.compressor()(bytes(data) + bytes(self.cluster_size - length))
        if len(packed) >= self.cluster_size:
            self.write(offset, data)
            return
        with self.operation(), self.gate.write(offset, offset + self.cluster_size, exclusive=True):
            self._must_be_inside(offset, length)
            self.must_be_writable()
            with self._lock:
                self.mark_dirty(offset, length)
                at = self._allocate_bytes(len(packed))
            try:
                # Up to the sector's end: readers take whole sectors, and the file must not end inside one.
                self.file.pwrite(at, packed)
                with self._lock:
                    self._link_compressed(offset, at, len(packed))
            except BaseException:
                with self._lock:
                    self.refcounts.add(at >> self.cluster_bits, 1, -1)
                    self._compressed_at = 0
                raise
        self.commit_if_crowded()

    def _link_compressed(self, offset: int, at: int, length: int) -> None:
        """Let the L2 entry name `length` compressed bytes at `at`. The lock and the gate are held."""
        table = self._writable_table(offset >> self._l2_shift)  # fails, if anything does, before anything has changed
        index = offset >> self.cluster_bits & (1 << self.header.l2_bits) - 1
        words = 2 if self.header.extended_l2 else 1
        old = table.entries[words * index]
        next_at = self._compressed_at
        self._dereference(old)
        self._compressed_at = next_at if not old & COMPRESSED else 0
        table.entries[words * index] = compressed_entry(at, length, self.cluster_bits)
        if words == 2:
            table.entries[2 * index + 1] = 0
        self.l2.touch(table, words * index, words * (index + 1))

    def compressor(self) -> Callable[[bytes | bytearray | memoryview], bytes]:
        """The function that compresses a cluster of this image; for threads that compress ahead of write_compressed."""
        if self._deflate is None:
            from . import compress

            self._deflate = compress.compressor(self.header.compression_type)
        return self._deflate

    def _allocate_bytes(self, length: int) -> int:
        """Room for compressed data: they follow each other, each counting its host clusters. The lock is held."""
        bits, mask = self.cluster_bits, self.cluster_size - 1
        at = self._compressed_at
        if at and (at & mask) + length <= mask + 1 and self.refcounts.get(at >> bits) < self.refcounts.maximum and at & mask:
            self.refcounts.add(at >> bits, 1, 1)
        else:
            first, _, _ = self._allocate(1)
            at = first << bits
        self._compressed_at = at + length
        return at

    # --- zeroes and discard ---

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeroes without writing them where the format can say so. `unmap`: give clusters back."""
        self._clusterwise(offset, length, self._zero_clusters, unmap, self._zero_part)

    def discard(self, offset: int, length: int) -> None:
        """The content of a range is no longer needed: whole clusters in it are given back, the rest stays as it is."""
        if self.header.version < 3 and self.backing is not None:
            self.must_be_writable()
            return  # version 2 has no zero clusters: the backing file would show through
        self._clusterwise(offset, length, self._discard_clusters, True, None)

    def _clusterwise(
        self,
        offset: int,
        length: int,
        whole: Callable[[int, int, bool], None],
        unmap: bool,
        part: Callable[[int, int], None] | None,
    ) -> None:
        with self.operation():
            self._must_be_inside(offset, length)
            self.must_be_writable()
            with self._lock:
                self.mark_dirty(offset, length)
        mask = self.cluster_size - 1
        end = offset + length
        at = min((offset + mask) & ~mask, end)
        if part is not None:
            part(offset, at - offset)
        while at < end:
            # One table at a time: a discard of a whole disk must not hold the whole disk. Its size may be another one each time.
            with self.operation():
                self._must_be_inside(at, end - at)
                self.must_be_writable()
                last = end & ~mask if end != self.size else (end + mask) & ~mask  # nothing is behind the end of the disk
                stop = min((at >> self._l2_shift) + 1 << self._l2_shift, last)
                if at >= stop:
                    break
                with self._lock:
                    self.mark_dirty(at, stop - at)
                with self.gate.write(at, stop, exclusive=True):
                    whole(at, stop - at, unmap)
            self.commit_if_crowded()
            at = stop
        if part is not None:
            part(at, end - at)

    def _zero_part(self, offset: int, length: int) -> None:
        if length <= 0:
            return
        runs = self.map_range(offset, length)
        if all(r.kind == ZERO_PLAIN or (r.kind == UNALLOCATED and self.backing is None) for r in runs):
            return
        while length:
            n = min(length, len(_ZEROES))
            self.write_from(offset, [_ZEROES[:n]])
            offset += n
            length -= n

    def _zero_clusters(self, offset: int, length: int, unmap: bool) -> None:
        """Whole clusters of one L2 table; the gate is held."""
        if self.header.version < 3:
            if self.backing is None:
                self._discard_clusters(offset, length, True)
            else:
                self._write_zero_data(offset, length)
            return
        if self.header.autoclear & AUTOCLEAR_DATA_FILE_RAW:
            self.data_file.write_zeroes(offset, min(length, self.size - offset), unmap=unmap)
        self._set_clusters(offset, length, keep=not unmap, zero=True)

    def _discard_clusters(self, offset: int, length: int, unmap: bool) -> None:
        if self.header.autoclear & AUTOCLEAR_DATA_FILE_RAW:
            self.data_file.write_zeroes(offset, min(length, self.size - offset), unmap=unmap)
        self._set_clusters(offset, length, keep=False, zero=self.header.version >= 3 and self.backing is not None)

    def _set_clusters(self, offset: int, length: int, *, keep: bool, zero: bool) -> None:
        """Turn clusters into zero clusters (`zero`) or unallocated ones; `keep` keeps their space if it is theirs alone."""
        l1_index = offset >> self._l2_shift
        bits = self.cluster_bits
        with self._lock:
            if self._table(l1_index) is None and not (zero and self.backing is not None):
                return  # reads as zeroes already
            table = self._writable_table(l1_index)
            entries = table.entries
            first = offset >> bits & (1 << self.header.l2_bits) - 1
            extended = self.header.extended_l2
            words = 2 if extended else 1
            for i in range(first, first + (length + self.cluster_size - 1 >> bits)):
                entry = entries[words * i]
                stays = (keep or self.external) and entry & COPIED and not entry & COMPRESSED
                there = bool(entry & (OFFSET_MASK | COMPRESSED)) or (self.external and bool(entry & COPIED))
                has_zero = bool(entries[2 * i + 1]) if extended else bool(entry & ZERO)
                # A cluster without backing that is not there reads as zeroes as it is.
                new_zero = zero and (self.backing is not None or there or has_zero)
                if not zero and not there and not has_zero:
                    continue
                if not zero and self.external and there:
                    new_zero = True
                if stays:
                    new = (entry & OFFSET_MASK) | COPIED
                else:
                    new = 0
                    self._dereference(entry)
                if extended:
                    entries[2 * i + 1] = 0xFFFFFFFF << 32 if new_zero else 0
                elif new_zero:
                    new |= ZERO
                entries[words * i] = new
            self.l2.touch(table, words * first, words * (first + (length + self.cluster_size - 1 >> bits)))

    def _write_zero_data(self, offset: int, length: int) -> None:
        """Real zeroes in whole clusters, where the format has no other. The gate is held, or nothing else runs."""
        while length:
            n = min(length, len(_ZEROES))
            source = Cursor([_ZEROES[:n]])
            while n:
                done = self._write_piece(offset, source, n)
                offset += done
                length -= done
                n -= done
