"""Reading guest data: from clusters, compressed clusters, the backing image, or nowhere (zeroes).

Not here: anything that changes the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..hostfile import Cursor, read_padded
from .format import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO, compressed_span
from .metadata import Metadata
from .tables import L2Table

UNALLOCATED, ZERO_PLAIN, NORMAL, COMPRESSED_DATA = range(4)
_ZERO_CHUNK = bytes(1 << 16)
_UNPACKED_CLUSTERS = 16  # kept: readers take a compressed cluster in pieces


class Source(Protocol):
    """A backing image, as far as reading from it goes."""

    size: int

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None: ...

    def close(self) -> None: ...


class Run(NamedTuple):
    """A guest range of one kind. `host` is an offset in the data file (NORMAL) or an L2 entry (COMPRESSED_DATA)."""

    kind: int
    host: int
    length: int


class Reader(Metadata):
    """An image that can be read."""

    backing: Source | None = None
    _inflate: Callable[[bytes | bytearray | memoryview, int], bytes] | None = None

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` with guest data from `offset`. ValueError outside the image; OSError, ImageFormatError."""
        length = sum(map(len, buffers))
        with self.operation():
            self._must_be_inside(offset, length)
            self._read(offset, Cursor(buffers), length)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        data = bytearray(length)
        with memoryview(data) as view:
            self.read_into(offset, [view])
        return bytes(data)

    def _must_be_inside(self, offset: int, length: int) -> None:
        """ValueError if the disk does not have that range. While a request is running its size stays what it is."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of an image of {self.size}")

    def map_range(self, offset: int, length: int) -> list[Run]:
        """What backs a guest range, in order; adjacent runs of one kind are joined. Not while the image is yours alone."""
        # A request too: a table that is read here must not come into the cache behind a snapshot that changed it on the disk.
        with self.operation(within=True), self._lock:
            return self._map(offset, length)

    def _read(self, offset: int, target: Cursor, length: int) -> None:
        """The operation is held by the caller."""
        with self._lock:
            found = self._map(offset, length)
        for kind, host, n in found:
            views = target.views(n)
            if kind == NORMAL:
                read_padded(self.data_file, host, views)
            elif kind == ZERO_PLAIN:
                fill_zero(views)
            elif kind == COMPRESSED_DATA:
                inside = offset & (self.cluster_size - 1)
                Cursor(views).copy_from(memoryview(self._unpack(host))[inside : inside + n])
            else:
                self._read_backing(offset, views, n)
            offset += n

    def _read_backing(self, offset: int, views: list[memoryview], length: int) -> None:
        backing = self.backing
        there = min(max(backing.size - offset, 0), length) if backing is not None else 0
        target = Cursor(views)
        if there and backing is not None:
            backing.read_into(offset, target.views(there))
        fill_zero(target.views(length - there))

    def _map(self, offset: int, length: int) -> list[Run]:
        """The lock is held (and may be let go while a table is read)."""
        found: list[Run] = []
        end = offset + length
        cluster_size, bits = self.cluster_size, self.cluster_bits
        index_mask = (1 << self.header.l2_bits) - 1
        extended, external = self.header.extended_l2, self.external
        kind = host = run = 0
        while offset < end:
            l1_index = offset >> self._l2_shift
            span_end = min((l1_index + 1) << self._l2_shift, end)
            table = self._table(l1_index)
            if table is None:
                if run and kind == UNALLOCATED:
                    run += span_end - offset
                else:
                    if run:
                        found.append(Run(kind, host, run))
                    kind, host, run = UNALLOCATED, 0, span_end - offset
                offset = span_end
                continue
            entries = table.entries
            while offset < span_end:
                n = min(cluster_size - (offset & (cluster_size - 1)), span_end - offset)
                index = offset >> bits & index_mask
                if extended:
                    this_kind, this_host, n = self._subcluster(table, index, offset, n)
                else:
                    entry = entries[index]
                    if entry & COMPRESSED:
                        this_kind, this_host = COMPRESSED_DATA, entry
                    elif entry & ZERO:
                        this_kind, this_host = ZERO_PLAIN, entry & OFFSET_MASK
                        if this_host:  # a cluster is kept for what will be written here
                            this_host += offset & (cluster_size - 1)
                    elif entry & OFFSET_MASK or (external and entry & COPIED):
                        this_kind = NORMAL
                        this_host = (entry & OFFSET_MASK) + (offset & (cluster_size - 1))
                        if this_host - (offset & (cluster_size - 1)) & (cluster_size - 1):
                            raise self._corrupt(
                                f"L2 table at {table.offset:#x}, entry {index}: cluster at {entry & OFFSET_MASK:#x}"
                            )
                    else:
                        this_kind, this_host = UNALLOCATED, 0
                follows = host + run if host or kind == NORMAL else 0
                if run and this_kind == kind and kind != COMPRESSED_DATA and this_host == follows:
                    run += n
                else:
                    if run:
                        found.append(Run(kind, host, run))
                    kind, host, run = this_kind, this_host, n
                offset += n
        if run:
            found.append(Run(kind, host, run))
        return found

    def _subcluster(self, table: L2Table, index: int, offset: int, n: int) -> tuple[int, int, int]:
        """(kind, host, length) of what is at `offset`, with extended L2 entries: up to `n` bytes of equal subclusters."""
        entry, bitmap = table.entries[2 * index], table.entries[2 * index + 1]
        if entry & COMPRESSED:
            return COMPRESSED_DATA, entry, n
        size = self.cluster_size // SUBCLUSTERS
        inside = offset & (self.cluster_size - 1)
        first = inside // size

        def kind_of(i: int) -> int:
            if bitmap >> i & 1:
                return NORMAL
            return ZERO_PLAIN if bitmap >> 32 + i & 1 else UNALLOCATED

        kind = kind_of(first)
        last = first
        while (last + 1) * size < inside + n and kind_of(last + 1) == kind:
            last += 1
        host = (entry & OFFSET_MASK) + inside if kind == NORMAL or (kind == ZERO_PLAIN and entry & OFFSET_MASK) else 0
        if entry & OFFSET_MASK & (self.cluster_size - 1) or (kind == NORMAL and not entry & OFFSET_MASK and not self.external):
            raise self._corrupt(f"L2 table at {table.offset:#x}, entry {index}: cluster at {entry & OFFSET_MASK:#x}")
        return kind, host, min((last + 1) * size - inside, n)

    def _unpack(self, entry: int) -> bytes:
        """The content of a compressed cluster."""
        with self._lock:
            found = self.unpacked.get(entry)
        if found is not None:
            return found
        if self.external:
            raise self._corrupt("a compressed cluster in an image with an external data file")
        offset, length = compressed_span(entry, self.cluster_bits)
        if offset >= self.file.size and offset >= self.file.refresh_size():
            raise self._corrupt(f"compressed cluster at {offset:#x}, expected inside the file")
        if self._inflate is None:
            from . import compress

            self._inflate = compress.decompressor(self.header.compression_type)
        packed = bytearray(length)
        with memoryview(packed) as view:
            read_padded(self.file, offset, [view])
        data = self._inflate(packed, self.cluster_size)
        with self._lock:
            self.unpacked[entry] = data
            while len(self.unpacked) > _UNPACKED_CLUSTERS:
                self.unpacked.popitem(last=False)
        return data


def fill_zero(views: Sequence[memoryview]) -> None:
    """Make every byte of `views` zero."""
    for view in views:
        for at in range(0, len(view), len(_ZERO_CHUNK)):
            part = view[at : at + len(_ZERO_CHUNK)]
            part[:] = _ZERO_CHUNK[: len(part)]
