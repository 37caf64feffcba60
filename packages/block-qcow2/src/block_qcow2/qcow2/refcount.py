"""Reference counts of host clusters, and the allocator that lives on them (section "Host cluster management").

Invariant that everything here rests on: the counts in memory never fall before the reference that they counted is gone from
the disk. So a refcount block may be written at any time: at worst it counts what nobody references, which is a leak.

Guarded by the image's lock. Not here: who references what, and when decrements become allowed (`image`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ImageCorruptError, ImageFormatError
from ..hostfile import HostFile, read_padded
from . import tables
from .format import MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_OFFSET_MASK, Header

if TYPE_CHECKING:
    from .counts import Counts

TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}  # by refcount_order; smaller counts are unpacked to bytes
_CACHED_BLOCKS = 512  # of 64 KiB, that is what counts 1 TiB; the usual limit


def unpack(data: bytes | bytearray, order: int) -> array[int]:
    """Counts of a refcount block, one an element."""
    if order >= 3:
        return tables.from_bytes(data, TYPECODES[order])
    bits = 1 << order
    mask = (1 << bits) - 1
    count = 8 // bits
    table = [bytes(byte >> i * bits & mask for i in range(count)) for byte in range(256)]
    return array("B", b"".join(map(table.__getitem__, data)))


def pack(block: array[int], order: int) -> bytes:
    """A refcount block as it stands on the disk."""
    if order >= 3:
        return tables.to_bytes(block)
    bits = 1 << order
    packed = bytes(len(block) * bits // 8)
    value = 0
    # As big integers, one step a position in the byte instead of one a cluster.
    raw = block.tobytes()
    for i in range(8 // bits):
        value |= int.from_bytes(raw[i :: 8 // bits], "little") << i * bits
    return value.to_bytes(len(packed), "little")


def first_zero(block: array[int], start: int) -> int:
    """The first index from `start` whose count is 0, or -1. `array.index` would compare objects, 30 times as slow."""
    if not block[start]:
        return start
    data, width = block.tobytes(), block.itemsize
    zero = bytes(width)
    at = data.find(zero, start * width)
    while at >= 0 and at % width:
        at = data.find(zero, at + 1)
    return at // width if at >= 0 else -1


class TableFull(Exception):
    """The refcount table has no room for a block: the caller lets go of the image's lock and has it grow."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed  # entries


class Refcounts:
    """Counts by cluster number. `check_free(first, count)` is asked before clusters are given away; it raises."""

    def __init__(self, file: HostFile, header: Header, table: array[int], check_free: Callable[[int, int], None]) -> None:
        self.file = file
        self.header = header
        self.table = table
        self.order = header.refcount_order
        self.maximum = (1 << (1 << self.order)) - 1
        self.block_bits = header.cluster_bits + 3 - self.order  # log2 of the counts in a block
        self.cached_blocks = _CACHED_BLOCKS
        self.hint = 0  # no free cluster is below
        self.end = -(-file.size >> header.cluster_bits)  # clusters: nothing was ever written from here on
        self.on_block: Callable[[int], None] = lambda cluster: None
        self._check_free = check_free
        self._blocks: OrderedDict[int, array[int]] = OrderedDict()
        self._dirty: set[int] = set()
        self._dirty_table: set[int] = set()
        self._writing: set[int] = set()  # blocks that a commit took: not on disk yet, so not to be forgotten
        self._writing_table: set[int] = set()

    # --- counts ---

    def get(self, cluster: int) -> int:
        """The count of a cluster."""
        block = self._block(cluster >> self.block_bits)
        return block[cluster & ((1 << self.block_bits) - 1)] if block is not None else 0

    def add(self, cluster: int, count: int, delta: int) -> list[int]:
        """Add `delta` to `count` clusters; return those that fell to 0.

        Nothing changes if one would leave its range, or cannot be read.
        """
        bits = self.block_bits
        mask = (1 << bits) - 1
        freed = []
        c = cluster
        try:
            for c in range(cluster, cluster + count):
                block = self._block(c >> bits)
                value = (block[c & mask] if block is not None else 0) + delta
                if block is None or not 0 <= value <= self.maximum:
                    raise self._out_of_range(c, value)
                block[c & mask] = value
                self._dirty.add(c >> bits)
                if not value:
                    freed.append(c)
        except (OSError, ImageCorruptError):
            for undo in range(cluster, c):
                block = self._block(undo >> bits)  # dirty, so in memory
                assert block is not None
                block[undo & mask] -= delta
            raise
        if freed and freed[0] < self.hint:
            self.hint = freed[0]
        return freed

    def add_many(self, counts: Counts, delta: int) -> None:
        """Add `delta` times `counts.found[c]` to the count of every cluster c. Nothing changes if one would leave its range."""
        bits, references = self.block_bits, counts.found
        plan: list[tuple[int, array[int]]] = []
        for index in counts.blocks(bits):
            part = references[index << bits : (index + 1) << bits]
            if not any(part) if isinstance(part, memoryview) else not part.any():
                continue
            block = self._block(index)
            if block is None:
                raise ImageCorruptError(f"refcount table entry {index}: no block counts clusters that are in use")
            plan.append((index, self._added(block, part, delta, index << bits)))
        for index, new in plan:
            self._blocks[index] = new
            self._dirty.add(index)
            if delta < 0:
                self.hint = min(self.hint, index << bits)

    def _added(self, block: array[int], part: Any, delta: int, first: int) -> array[int]:
        if isinstance(part, memoryview):
            new = array(block.typecode, block)
            for i, n in enumerate(part):
                if n:
                    value = block[i] + delta * n
                    if not 0 <= value <= self.maximum:
                        raise self._out_of_range(first + i, value)
                    new[i] = value
            return new
        import numpy as np

        values = np.frombuffer(block, dtype=f"u{block.itemsize}")[: len(part)]
        room = values if delta < 0 else np.subtract(np.uint64(self.maximum), values, dtype=np.uint64)
        over = np.nonzero(part > room)[0]
        if len(over):
            i = int(over[0])
            raise self._out_of_range(first + i, block[i] + delta * int(part[i]))
        new = array(block.typecode, block)
        target = np.frombuffer(new, dtype=f"u{block.itemsize}")[: len(part)]
        if delta > 0:
            target += part.astype(target.dtype)
        else:
            target -= part.astype(target.dtype)
        return new

    def fill(self, counts: Counts) -> None:
        """Give every count to `counts.set_disk`. Nothing is dirty."""
        for index, entry in enumerate(self.table[: (counts.clusters - 1 >> self.block_bits) + 1]):
            if entry & REFCOUNT_OFFSET_MASK:
                counts.set_disk(index << self.block_bits, self.raw_block(index))

    def raw_block(self, index: int) -> bytes | bytearray:
        """A block as it stands on the disk."""
        block = self._blocks.get(index)
        if block is not None:
            return pack(block, self.order)
        data = bytearray(self.header.cluster_size)
        with memoryview(data) as view:
            read_padded(self.file, self.block_offset(index), [view])
        return data

    def _out_of_range(self, cluster: int, value: int) -> ImageCorruptError:
        where = cluster << self.header.cluster_bits
        return ImageCorruptError(f"refcount of the cluster at {where:#x} would become {value}, expected 0 to {self.maximum}")

    # --- allocation ---

    def allocate(self, want: int) -> tuple[int, int, bool]:
        """Give away up to `want` adjacent clusters: (first, number, whether they were never written). Their count is 1."""
        bits = self.block_bits
        size = 1 << bits
        at = self.hint
        while True:
            block = self._block(at >> bits)
            if block is None:
                self._create_block(at)
                continue
            start = first_zero(block, at & (size - 1))
            if start < 0:
                at = self.hint = ((at >> bits) + 1) << bits
                continue
            first = (at >> bits << bits) + start
            fresh = first >= self.end
            limit = min(start + want, size) if fresh else min(start + want, size, start + self.end - first)
            end = start + 1
            while end < limit and not block[end]:
                end += 1
            self._check_free(first, end - start)
            for i in range(start, end):
                block[i] = 1
            self._dirty.add(at >> bits)
            self.hint = first + end - start
            self.end = max(self.end, self.hint)
            return first, end - start, fresh

    def allocate_adjacent(self, count: int) -> int:
        """Give away exactly `count` adjacent clusters; return the first. Their count is 1."""
        bits = self.block_bits
        size = 1 << bits
        start = at = self.hint
        while at - start < count:
            block = self._block(at >> bits)
            if block is None:
                self._create_block(at)
                start = at = at + 1
            elif block[at & (size - 1)]:
                free = first_zero(block, at & (size - 1))
                start = at = (at >> bits << bits) + (free if free >= 0 else size)
            else:
                at += 1
        self._check_free(start, count)
        self.add(start, count, 1)
        self.end = max(self.end, start + count)
        return start

    # --- blocks and the table ---

    def _block(self, index: int) -> array[int] | None:
        block = self._blocks.get(index)
        if block is not None:
            return block
        if index >= len(self.table) or not self.table[index] & REFCOUNT_OFFSET_MASK:
            return None
        data = bytearray(self.header.cluster_size)
        with memoryview(data) as view:
            read_padded(self.file, self.block_offset(index), [view])
        if len(self._blocks) >= self.cached_blocks:
            for old in self._blocks:
                if old not in self._dirty and old not in self._writing:
                    del self._blocks[old]
                    break
        block = self._blocks[index] = unpack(data, self.order)
        return block

    def block_offset(self, index: int) -> int:
        """Where a refcount block stands; ImageCorruptError if that cannot be."""
        offset = self.table[index] & REFCOUNT_OFFSET_MASK
        if not offset or offset & (self.header.cluster_size - 1) or offset >> self.header.cluster_bits >= self.end:
            raise ImageCorruptError(f"refcount table entry {index}: block at {offset:#x}, expected a cluster inside the file")
        return offset

    def _empty_block(self) -> array[int]:
        return array(TYPECODES.get(self.order, "B"), [0]) * (1 << self.block_bits)

    def _create_block(self, cluster: int) -> None:
        """Make the block that counts `cluster`, there. Raises TableFull."""
        index = cluster >> self.block_bits
        if index >= len(self.table):
            raise TableFull(index + 1)
        self._check_free(cluster, 1)
        block = self._empty_block()
        block[cluster & ((1 << self.block_bits) - 1)] = 1
        self._blocks[index] = block
        self._dirty.add(index)
        self.table[index] = cluster << self.header.cluster_bits
        self._dirty_table.add(index)
        self.end = max(self.end, cluster + 1)
        self.on_block(cluster)

    @property
    def crowded(self) -> bool:
        """Most of the cached blocks are dirty: time to write them."""
        return len(self._dirty) * 2 > self.cached_blocks

    def grow_table(self, needed: int) -> tuple[int, int]:
        """Move the table to the end of the file with room for `needed` entries; return (offset, clusters) of the old one.

        No commit may be running. On disk when this returns, in this order: all blocks, the new table, the header.
        """
        header, bits = self.header, self.header.cluster_bits
        if needed <= len(self.table):
            return 0, 0
        per_cluster = header.cluster_size // 8
        first_index = max(needed - 1, -(-self.end >> self.block_bits))
        start = first_index << self.block_bits  # no block counts these clusters yet, and nothing stands there
        clusters = blocks = 1
        while True:  # the new table and its blocks are counted by those blocks
            length = max(first_index + blocks, len(self.table) * 3 // 2)
            fits = (-(-length // per_cluster), (clusters + blocks - 1 >> self.block_bits) + 1)
            if fits == (clusters, blocks):
                break
            clusters, blocks = max(fits[0], clusters), max(fits[1], blocks)
        if clusters << bits > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageFormatError(
                f"the refcount table would take {clusters << bits} bytes, at most {MAX_REFCOUNT_TABLE_BYTES} work"
            )
        table = self.table + array("Q", bytes(8 * (clusters * per_cluster - len(self.table))))
        added = {}
        for i in range(blocks):
            added[first_index + i] = self._empty_block()
            table[first_index + i] = (start + clusters + i) << bits
        for c in range(start, start + clusters + blocks):
            added[c >> self.block_bits][c & ((1 << self.block_bits) - 1)] = 1
        self.write_blocks()
        for index, block in added.items():
            self.file.pwrite(table[index], pack(block, self.order))
        self.file.pwrite(start << bits, tables.to_bytes(table))
        self.file.flush()
        old = header.refcount_table_offset, header.refcount_table_clusters
        header.refcount_table_offset, header.refcount_table_clusters = start << bits, clusters
        try:
            self.file.pwrite(0, header.pack_fields())
            self.file.flush()
        except OSError:
            header.refcount_table_offset, header.refcount_table_clusters = old
            raise
        self.table = table
        self._blocks.update(added)
        self._dirty_table.clear()
        self.end = start + clusters + blocks
        for c in range(start, self.end):
            self.on_block(c)
        return old

    def replace(self, table: array[int], end: int) -> None:
        """Other structures, written by somebody else, count from now on."""
        self.table, self.end, self.hint = table, end, 0
        self._blocks.clear()
        self._dirty.clear()
        self._dirty_table.clear()

    # --- writing back ---

    @property
    def dirty(self) -> bool:
        return bool(self._dirty or self._dirty_table)

    def take_dirty(self) -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        """What has to be written: blocks, then (after a barrier) table entries, as (offset, bytes). Ends with finish()."""
        blocks = [(self.block_offset(i), pack(self._blocks[i], self.order)) for i in sorted(self._dirty)]
        base = self.header.refcount_table_offset
        entries = [(base + 8 * i, self.table[i].to_bytes(8, "big")) for i in sorted(self._dirty_table)]
        self._writing, self._dirty = self._dirty, set()
        self._writing_table, self._dirty_table = self._dirty_table, set()
        return blocks, entries

    def take_blocks(self) -> list[tuple[int, bytes]]:
        """As take_dirty(), but only blocks that the table on the disk names already."""
        there = self._dirty - self._dirty_table
        blocks = [(self.block_offset(i), pack(self._blocks[i], self.order)) for i in sorted(there)]
        self._writing, self._dirty = there, self._dirty & self._dirty_table
        return blocks

    def finish(self, written: bool) -> None:
        """What take_dirty() gave is on disk; or it is not, and dirty again."""
        if not written:
            self._dirty |= self._writing
            self._dirty_table |= self._writing_table
        self._writing, self._writing_table = set(), set()

    def write_blocks(self) -> None:
        """Write every dirty block now. No commit may be running."""
        for index in sorted(self._dirty):
            self.file.pwrite(self.block_offset(index), pack(self._blocks[index], self.order))
            self._dirty.discard(index)
