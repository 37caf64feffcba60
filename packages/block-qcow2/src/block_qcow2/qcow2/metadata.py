"""The living metadata of an open image: which cluster is where, what is dirty, and the order in which it goes to the disk.

The order (issue: power loss at any write leaves at worst leaks) is kept by one procedure, `commit`:

1. refcount blocks, then (barrier) refcount table entries: a reference is counted before it exists;
2. barrier: what is referenced, data and new L2 tables' predecessors alike, is on the disk before the reference;
3. L2 tables; barrier; L1 entries; barrier;
4. only now counts of what was dereferenced fall, and only when no request that may still use it is running.

Not here: guest reads and writes (`reader`, `writer`), snapshots, checking.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from ..errors import ImageCorruptError, ImageFormatError, ImageReadOnlyError
from ..hostfile import HostFile
from ..ranges import RangeGate
from . import tables
from .format import COPIED, CRYPT_NONE, INCOMPAT_CORRUPT, OFFSET_MASK, Header
from .refcount import Refcounts, TableFull
from .tables import L2Cache, L2Table

_L2_CACHE_BYTES = 32 << 20
_PENDING_LIMIT = 65536  # ranges waiting to be freed: more make a commit


class Metadata:
    """Everything below `_lock` is guarded by it; host I/O happens outside it, except for a missing refcount block."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        *,
        read_only: bool,
        data_file: HostFile | None = None,
        l2_cache_bytes: int = 0,
        discard: bool = False,
    ) -> None:
        self.file = file
        self.header = header
        self.read_only = read_only
        self.discard_freed = discard
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.external = data_file is not None
        self.encrypted = header.crypt_method != CRYPT_NONE
        self.data_file = data_file or file
        self._l2_shift = header.cluster_bits + header.l2_bits
        self._l2_mask = (1 << header.l2_bits) - 1  # of a cluster's index in its table
        self._extended = header.extended_l2
        self._l2_words = header.cluster_size // 8
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._commit_lock = threading.RLock()
        self._header_lock = threading.Lock()  # from what the header is to be until that is in the file; the last one taken
        self.gate = RangeGate()  # of guest ranges: allocating requests have their clusters alone
        self._operations: dict[int, None] = {}  # running requests, oldest first
        self._next_operation = 0
        self._exclusive = False
        self._committing = False  # what a commit took is clean in memory, and not on the disk yet
        self._loading: dict[int, threading.Event] = {}
        self._broken: str | None = None
        self._unready = False  # something has to be looked at before the first change
        self._misplaced: str | None = None  # two structures of the metadata that are in the same place
        self.refcount_cache_bytes = 0  # 0: the usual limit
        self.count_memory = 0  # bytes that counting all references may take, 0: the usual limit
        self._load_tables(l2_cache_bytes or _L2_CACHE_BYTES)

    def _load_tables(self, l2_cache_bytes: int) -> None:
        """Read what is always in memory. Nothing is dirty, and nothing is running."""
        file, header = self.file, self.header
        self.size = header.size
        self.l1 = tables.load(file, header.l1_table_offset, header.l1_size) if header.l1_size else array("Q")
        self._l1_dirty: set[int] = set()
        self._l2_cache_bytes = l2_cache_bytes
        self.l2 = L2Cache(l2_cache_bytes // header.cluster_size)
        self.unpacked: OrderedDict[int, bytes] = OrderedDict()  # compressed clusters by L2 entry
        self._pending: list[tuple[int, int, int]] = []  # (operation number, first cluster, count): to be freed when it may be
        table = tables.load(file, header.refcount_table_offset, (header.refcount_table_clusters << self.cluster_bits) // 8)
        self.refcounts = Refcounts(file, header, table, self._check_free)
        if self.refcount_cache_bytes:
            self.refcounts.cached_blocks = max(self.refcount_cache_bytes // header.cluster_size, 4)
        self.reserved: set[int] = set()  # clusters of metadata, which no guest write may touch
        self.refcounts.on_block = self.reserved.add
        self._find_reserved()

    # --- requests ---

    @contextmanager
    def operation(self, *, within: bool = False) -> Iterator[None]:
        """A request is running: what it may be using is not given to anybody else before it ends. `within`: as begin()."""
        number = self.begin(within=within)
        try:
            yield
        finally:
            self.end(number)

    def begin(self, *, within: bool = False) -> int:
        """Begin a request, and return the number to end() it with. Waits for what needs the image alone, and has priority.

        `within`: by a thread that may have requests to end. It waits only for somebody who waits for none of them any more.
        """
        with self._lock:
            while self._exclusive and not (within and self._operations):
                self._changed.wait()
            self._next_operation += 1
            self._operations[self._next_operation] = None
            return self._next_operation

    def end(self, number: int) -> None:
        with self._lock:
            del self._operations[number]
            if self._exclusive:
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nothing else is running: for snapshots, resizing, checking."""
        with self._lock:
            while self._exclusive:
                self._changed.wait()
            self._exclusive = True
        try:
            with self._lock:
                while self._operations:
                    self._changed.wait()
            with self._commit_lock:
                yield
        finally:
            with self._lock:
                self._exclusive = False
                self._changed.notify_all()

    def mark_dirty(self, offset: int, length: int) -> None:
        """A guest range is being written. The lock is held."""

    def must_be_writable(self) -> None:
        if self._broken:
            raise ImageCorruptError(f"{self.file.path}: writes are refused: {self._broken}")
        if self.read_only:
            raise ImageReadOnlyError(f"{self.file.path}: the image is open for reading")

    # --- lookups; the lock is held ---

    def _table(self, l1_index: int) -> L2Table | None:
        """The L2 table of an L1 entry, None if there is none. May let go of the lock while it reads."""
        while True:
            entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
            offset = entry & OFFSET_MASK
            if not offset:
                return None
            table = self.l2.get(offset)
            if table is not None:
                return table
            self._load(offset, f"L1 entry {l1_index}")

    def _load(self, offset: int, whose: str) -> None:
        """Read an L2 table into the cache. Lets go of the lock meanwhile."""
        if offset & (self.cluster_size - 1) or offset >> self.cluster_bits >= self.refcounts.end:
            raise self._corrupt(f"{whose}: L2 table at {offset:#x}, expected a cluster inside the file")
        event = self._loading.get(offset)
        if event is None:
            event = self._loading[offset] = threading.Event()
            self._lock.release()
            try:
                entries = tables.load(self.file, offset, self._l2_words)
            finally:
                self._lock.acquire()
                del self._loading[offset]
                event.set()
            # Nobody else can have put one there: they wait for this one.
            self.l2.put(L2Table(offset, entries))
            return
        self._lock.release()
        try:
            event.wait()
        finally:
            self._lock.acquire()

    def _writable_table(self, l1_index: int) -> L2Table:
        """An L2 table that may be changed: a new one, or a copy of one that snapshots share."""
        while True:
            old = self._table(l1_index)
            entry = self.l1[l1_index]
            if old is not None and entry & COPIED:
                return old
            cluster, _, _ = self._allocate(1)
            if self.l1[l1_index] == entry:
                break
            self.refcounts.add(cluster, 1, -1)  # somebody else made it while the lock was away
        self.l2.drop(cluster << self.cluster_bits)
        entries = array("Q", old.entries) if old is not None else array("Q", bytes(self.cluster_size))
        table = L2Table(cluster << self.cluster_bits, entries)
        self.l2.put(table)
        self.l2.touch(table, 0, len(entries))
        self.l1[l1_index] = table.offset | COPIED
        self._l1_dirty.add(l1_index)
        self.reserved.add(cluster)
        if old is not None:
            self._free_later(old.offset >> self.cluster_bits, 1)
        return table

    def _allocate(self, want: int) -> tuple[int, int, bool]:
        """Refcounts.allocate, growing the refcount table if it must. May let go of the lock."""
        while True:
            try:
                return self.refcounts.allocate(want)
            except TableFull as e:
                self._grow(e.needed)

    def _allocate_adjacent(self, count: int) -> int:
        while True:
            try:
                return self.refcounts.allocate_adjacent(count)
            except TableFull as e:
                self._grow(e.needed)

    def _grow(self, needed: int) -> None:
        self._lock.release()
        try:
            with self._commit_lock:
                self._lock.acquire()
                try:
                    offset, clusters = self.refcounts.grow_table(needed)
                    if clusters:
                        self._free_later(offset >> self.cluster_bits, clusters)
                finally:
                    self._lock.release()
        finally:
            self._lock.acquire()

    def _free_later(self, cluster: int, count: int) -> None:
        """The reference is gone from memory; it counts until it is gone from the disk and nobody uses it."""
        if self._pending:
            _, first, n = self._pending[-1]
            if first + n == cluster:
                self._pending[-1] = (self._next_operation, first, n + count)
                return
        self._pending.append((self._next_operation, cluster, count))

    # --- protection ---

    def _find_reserved(self) -> None:
        """Learn anew where the metadata are. What two structures share is not written: either would destroy the other."""
        self.reserved.clear()
        self._misplaced = None
        if self.read_only:
            return
        for what, clusters in self._metadata():
            if self._misplaced is None and not self.reserved.isdisjoint(clusters):
                where = next(c for c in clusters if c in self.reserved) << self.cluster_bits
                self._misplaced = f"{what} at {where:#x}, expected outside of the other metadata"
            self.reserved.update(clusters)

    def _metadata(self) -> Iterator[tuple[str, Collection[int]]]:
        """The clusters of each structure, L2 tables last."""
        h, bits = self.header, self.cluster_bits
        yield "header", (0,)
        for what, offset, length in (
            ("L1 table", h.l1_table_offset, h.l1_size * 8),
            ("refcount table", h.refcount_table_offset, h.refcount_table_clusters << bits),
            ("LUKS header", *(h.luks_header or (0, 0))),
        ):
            yield what, range(offset >> bits, -(-(offset + length) >> bits))
        blocks = [e >> bits for e in self.refcounts.table if e]
        distinct = set(blocks)
        yield "refcount block", distinct
        if len(distinct) < len(blocks):
            yield "refcount block", (next(c for c, n in Counter(blocks).items() if n > 1),)
        yield from self._other_metadata()
        yield "L2 table", l2_clusters(self.l1, bits)

    def _other_metadata(self) -> Iterator[tuple[str, Collection[int]]]:
        """As `_metadata`, of what is not always there."""
        return iter(())

    def _check_free(self, first: int, count: int) -> None:
        if not self.reserved.isdisjoint(range(first, first + count)):
            raise self._corrupt(f"the clusters at {first << self.cluster_bits:#x} hold metadata but their refcount is 0")

    def _check_in_place(self, host: int, length: int) -> None:
        """Refuse to write guest data over metadata or outside the file. The lock is held."""
        if not self.external and not self._holds_data(host, length):
            raise self._corrupt(f"guest data at {host:#x}, expected inside the file and outside of its metadata")

    def _holds_data(self, host: int, length: int) -> bool:
        """Whether guest data may be written there: inside the file, and outside of its metadata. The lock is held."""
        first, end = host >> self.cluster_bits, -(-(host + length) >> self.cluster_bits)
        return end <= self.refcounts.end and self.reserved.isdisjoint(range(first, end))

    def _corrupt(self, what: str) -> ImageCorruptError:
        """The image is found wrong: remember, mark it (version 3), refuse further writes."""
        if not self.read_only and not self._broken:
            self._broken = what
            if self.header.version >= 3:
                with self._header_lock:
                    self.header.incompatible |= INCOMPAT_CORRUPT
                    try:
                        self.file.pwrite(0, self.header.pack_fields())
                        self.file.flush()
                    except OSError:
                        pass  # the error that is being reported matters more
        return ImageCorruptError(f"{self.file.path}: {what}")

    # --- to the disk ---

    def write_header(self) -> None:
        """Write the fixed fields of the header, with a barrier on both sides."""
        self.file.flush()
        with self._header_lock:
            self.file.pwrite(0, self.header.pack_fields())
        self.file.flush()

    def commit_if_crowded(self) -> None:
        if self.l2.crowded or self.refcounts.crowded or len(self._pending) > _PENDING_LIMIT:
            self.commit()

    def commit(self, *, wrong: bool = False) -> None:
        """Make everything that finished before survive power loss. Raises OSError: then it is still to be done.

        `wrong`: also in an image that was found wrong. Then no count falls: a check finds those that are too high.
        """
        with self._commit_lock:
            with self._lock:
                if self._broken and not wrong:
                    raise ImageCorruptError(f"{self.file.path}: {self._broken}")
                # What takes memory comes first: if there is none, everything is as dirty as it was.
                l2_dirty = [(t, *t.dirty_part()) for t in self.l2.dirty.values() if t.dirty]
                l1 = [(i, self.l1[i].to_bytes(8, "big")) for i in sorted(self._l1_dirty)]
                blocks, table_entries = self.refcounts.take_dirty()
                for table, *_ in l2_dirty:
                    table.clean()
                    table.pinned += 1
                self.l2.dirty.clear()
                self._l1_dirty.clear()
                pending, self._pending = self._pending, []
                self._committing = True
            written = False
            try:
                self._write_in_order(blocks, table_entries, [(t.offset + s * 8, data) for t, s, _, data in l2_dirty], l1)
                written = True
            finally:
                with self._lock:
                    self._committing = False
                    self.refcounts.finish(written)
                    for table, start, end, _ in l2_dirty:
                        table.pinned -= 1
                        if not written and self.l2.get(table.offset) is table:
                            self.l2.touch(table, start, end)
                    if not written:
                        self._l1_dirty.update(i for i, _ in l1)
                        self._pending = pending + self._pending
            if pending and not wrong:
                self._release_freed(pending)
                self._write_fallen_counts()

    def write_counts(self) -> None:
        """Write the refcount blocks and table entries that changed, with a barrier behind. Nothing else is running."""
        with self._lock:
            blocks, table_entries = self.refcounts.take_dirty()
        written = False
        try:
            self._write_in_order(blocks, table_entries, [], [])
            written = True
        finally:
            with self._lock:
                self.refcounts.finish(written)

    def _write_fallen_counts(self) -> None:
        """Blocks may be written at any time; now, so that an image that was flushed has no leaks. No barrier is needed."""
        with self._lock:
            blocks = self.refcounts.take_blocks()
        written = False
        try:
            for offset, data in blocks:
                self.file.pwrite(offset, data)
            written = True
        finally:
            with self._lock:
                self.refcounts.finish(written)

    def _write_in_order(
        self,
        blocks: list[tuple[int, bytes]],
        table_entries: list[tuple[int, bytes]],
        l2: list[tuple[int, bytes]],
        l1: list[tuple[int, bytes]],
    ) -> None:
        pwrite, barrier = self.file.pwrite, self.file.flush
        if self.external:
            self.data_file.flush()
        for offset, data in blocks:
            pwrite(offset, data)
        if table_entries:
            barrier()
            for offset, data in table_entries:
                pwrite(offset, data)
        barrier()
        if l2:
            for offset, data in l2:
                pwrite(offset, data)
            barrier()
        if l1:
            for index, data in l1:
                pwrite(self.header.l1_table_offset + 8 * index, data)
            barrier()

    def _release_freed(self, pending: list[tuple[int, int, int]]) -> None:
        """Count down what the disk no longer references, as far as no running request may be using it.

        Counts that cannot be read, which is an OSError, fall with the next commit.
        """
        with self._lock:
            oldest = next(iter(self._operations), self._next_operation + 1)
            ready = [p for p in pending if p[0] < oldest]
            # A request that dereferences something is running while it does so: the rest waits for the next commit.
            self._pending = [p for p in pending if p[0] >= oldest] + self._pending
        fallen = 0
        try:
            if self.discard_freed:
                self._discard(ready)
            with self._lock:
                for _, first, count in ready:
                    self._count_down(first, count)
                    fallen += 1
        except OSError:
            with self._lock:
                self._pending = ready[fallen:] + self._pending
            raise

    def _discard(self, ready: list[tuple[int, int, int]]) -> None:
        """Give the host what will be free."""
        for _, first, count in ready:
            with self._lock:
                gone = [c for c in range(first, first + count) if self.refcounts.get(c) == 1]
            for start, n in runs(gone):
                try:
                    self.file.discard(start << self.cluster_bits, n << self.cluster_bits)
                except OSError:
                    break  # space that cannot be given back is no reason to fail

    def _count_down(self, first: int, count: int) -> None:
        """The lock is held."""
        try:
            freed = self.refcounts.add(first, count, -1)
        except ImageFormatError as e:
            raise self._corrupt(str(e)) from None
        if freed:
            self.unpacked.clear()  # their entries may come to mean something else
        for cluster in freed:
            self.reserved.discard(cluster)
            self.l2.drop(cluster << self.cluster_bits)


def l2_clusters(l1: array[int], cluster_bits: int) -> set[int]:
    """Where the L2 tables are that an L1 table names."""
    return {(e & OFFSET_MASK) >> cluster_bits for e in l1 if e & OFFSET_MASK}


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of adjacent ones."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][0] + found[-1][1] == n:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((n, 1))
    return found
