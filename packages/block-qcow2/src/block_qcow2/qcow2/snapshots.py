"""Internal snapshots: the table (section "Snapshots") and creating, deleting and applying them.

A snapshot is a copy of the L1 table; every cluster below it counts one more reference. While counts and COPIED flags change
all over the image, version 3 images carry the dirty bit: after a power loss in between, opening for writing repairs them.

Not here: guest I/O, which stands still meanwhile; VM state, which is kept and counted but not read.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple, Self

from ..errors import BlockError, ImageCorruptError, ImageFormatError
from ..hostfile import HostFile, read_padded
from . import tables
from .counts import Counts
from .format import (
    COPIED,
    INCOMPAT_DIRTY,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    Header,
)
from .image import Qcow2Image

# l1_table_offset, l1_size, id_str_size, name_size, date_sec, date_nsec, vm_clock_nsec, vm_state_size, extra_data_size
_ENTRY = Struct(">QIHHIIQII")
_EXTRA = Struct(">QQQ")  # vm_state_size, virtual disk size, icount
_MAX_EXTRA = 1024
NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """One entry of the snapshot table."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int  # entries
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int  # bytes
    disk_size: int  # bytes; what the image was when it was taken
    icount: int = NO_ICOUNT
    extra: bytes = b""  # extra data past what is known
    complete: bool = True  # version 3 wants the first two fields of the extra data

    def pack(self) -> bytes:
        extra = _EXTRA.pack(self.vm_state_size, self.disk_size, self.icount) + self.extra
        ident, name = self.id.encode("utf-8", "surrogateescape"), self.name.encode("utf-8", "surrogateescape")
        data = _ENTRY.pack(
            self.l1_table_offset,
            self.l1_size,
            len(ident),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            min(self.vm_state_size, 0xFFFFFFFF),
            len(extra),
        )
        data += extra + ident + name
        return data + bytes(-len(data) % 8)


class SnapshotError(BlockError):
    """The snapshot asked for does not exist, exists already, or cannot be taken."""


def entries(file: HostFile, header: Header) -> Iterator[tuple[Snapshot, int]]:
    """Each entry of the snapshot table with the length of the table up to its end. ImageFormatError names one that is wrong."""
    at = header.snapshots_offset
    file.refresh_size()
    limit = min(at + MAX_SNAPSHOT_TABLE_BYTES, file.size)
    for i in range(header.nb_snapshots):
        what = f"{file.path}: snapshot table entry {i} at {at:#x}"
        if at + _ENTRY.size > limit:
            raise ImageFormatError(f"{what}: expected inside the file and a table of {MAX_SNAPSHOT_TABLE_BYTES} bytes")
        l1, l1_size, id_size, name_size, sec, nsec, clock, vm_size, extra_size = _ENTRY.unpack(file.pread(at, _ENTRY.size))
        at += _ENTRY.size
        if extra_size > _MAX_EXTRA or at + extra_size + id_size + name_size > limit:
            raise ImageFormatError(f"{what}: {extra_size} bytes of extra data, expected at most {_MAX_EXTRA} inside the file")
        data = bytes(file.pread(at, extra_size + id_size + name_size))
        extra = data[:extra_size]
        vm_state = int.from_bytes(extra[:8], "big") if extra_size >= 8 else vm_size
        disk_size = int.from_bytes(extra[8:16], "big") if extra_size >= 16 else header.size
        icount = int.from_bytes(extra[16:24], "big") if extra_size >= 24 else NO_ICOUNT
        if l1_size * 8 > MAX_L1_BYTES:
            raise ImageFormatError(f"{what}: l1_size is {l1_size}, expected at most {MAX_L1_BYTES // 8}")
        header.check_range(f"{what}: L1 table", l1, l1_size * 8, file.size)
        ident = data[extra_size : extra_size + id_size].decode("utf-8", "surrogateescape")
        name = data[extra_size + id_size :].decode("utf-8", "surrogateescape")
        at += -(-len(data) // 8) * 8
        complete = header.version < 3 or extra_size >= 16
        yield (
            Snapshot(ident, name, l1, l1_size, sec, nsec, clock, vm_state, disk_size, icount, extra[24:], complete),
            at - header.snapshots_offset,
        )


def load(file: HostFile, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshot table and its length in bytes. ImageFormatError names the entry that is wrong."""
    found: list[Snapshot] = []
    length = 0
    for snapshot, end in entries(file, header):
        found.append(snapshot)
        length = end
    return found, length


def places(file: HostFile, header: Header) -> Iterator[tuple[int, int]]:
    """Offset and length of the table and of the L1 tables that it names. ImageFormatError as entries()."""
    length, wrong = 0, None
    try:
        for snapshot, end in entries(file, header):
            length = end
            yield snapshot.l1_table_offset, 8 * snapshot.l1_size
    except ImageFormatError as e:
        wrong = e
    if length:
        yield header.snapshots_offset, length
    if wrong is not None:
        raise wrong


class Snapshots:
    """The snapshots of an image that is open for writing (or, for listing, reading)."""

    def __init__(self, image: Qcow2Image, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """`progress` is told how many of how many L2 tables have been gone through, while snapshots are changed."""
        self.image = image
        self.progress = progress
        self.list = load(image.file, image.header)[0]

    def find(self, name: str, *, by_id: bool = False) -> Snapshot:
        """The first snapshot of that name, or of that id if `by_id` and no id matches before. SnapshotError without one."""
        if by_id:
            for s in self.list:
                if s.id == name:
                    return s
        for s in self.list:
            if s.name == name:
                return s
        raise SnapshotError(f"Snapshot with name {name} does not exist")

    def create(self, name: str, *, vm_clock_nsec: int = 0, date_ns: int | None = None) -> Snapshot:
        """Keep the present content under `name`. SnapshotError if the name is taken or the table is full."""
        image, bits = self.image, self.image.cluster_bits
        image.must_be_writable()
        if len(name.encode("utf-8", "surrogateescape")) > 0xFFFF:
            raise SnapshotError("the name of a snapshot takes at most 65535 bytes")
        if image.external:
            raise SnapshotError("an image with an external data file has no snapshots")
        if any(s.name == name for s in self.list):
            raise SnapshotError(f"Snapshot {name} exists!")
        if len(self.list) >= MAX_SNAPSHOTS:
            raise SnapshotError(f"The number of snapshots exceed the maximum limit {MAX_SNAPSHOTS}")
        now = time.time_ns() if date_ns is None else date_ns
        ident = str(max((int(s.id) for s in self.list if s.id.isascii() and s.id.isdecimal()), default=0) + 1)
        with image.exclusive(), _Transition(image, self.progress) as change:
            first = change.write_l1_copy(image.l1)
            snapshot = Snapshot(
                ident, name, first << bits, len(image.l1), now // 10**9 & 0xFFFFFFFF, now % 10**9, vm_clock_nsec, 0, image.size
            )
            change.count(image.l1, 1)
            change.put_table([*self.list, snapshot])
        self._adopt(change)
        return snapshot

    def delete(self, snapshot: Snapshot) -> None:
        """Forget a snapshot; what only it needed becomes free."""
        image, bits = self.image, self.image.cluster_bits
        image.must_be_writable()
        with image.exclusive(), _Transition(image, self.progress) as change:
            l1 = tables.load(image.file, snapshot.l1_table_offset, snapshot.l1_size)
            change.put_table([s for s in self.list if s is not snapshot])
            change.count(l1, -1)
            change.free(snapshot.l1_table_offset >> bits, -(-snapshot.l1_size * 8 >> bits))
        self._adopt(change)

    def apply(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot: present content is lost, the snapshot stays, the size becomes what it was then."""
        image = self.image
        image.must_be_writable()
        with image.exclusive(), _Transition(image, self.progress) as change:
            l1 = tables.load(image.file, snapshot.l1_table_offset, snapshot.l1_size)
            shift = image.cluster_bits + image.header.l2_bits
            needed = -(-snapshot.disk_size >> shift)
            if needed * 8 > MAX_L1_BYTES:
                raise ImageFormatError(f"snapshot {snapshot.name}: disk size {snapshot.disk_size} is too large")
            image.must_not_overlap(l1)
            if image.bitmaps is not None:
                image.bitmaps.must_fit(snapshot.disk_size)
            l1.extend(array("Q", bytes(8 * max(needed - len(l1), 0))))
            change.count(l1, 1)
            change.replace_l1(l1, snapshot.disk_size)
        self._adopt(change)

    def _adopt(self, change: _Transition) -> None:
        if change.snapshots is not None:
            self.list = change.snapshots


class _Transition:
    """One change of the snapshots. Counts go up first; the header names what is new; counts go down last.

    Everything else stands still, and nothing is dirty when it begins.
    """

    def __init__(self, image: Qcow2Image, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.image = image
        self._progress = progress
        self._seen = self._expected = 0  # L2 tables
        self.snapshots: list[Snapshot] | None = None
        self._counted: list[array[int]] = []
        self._down: list[array[int]] = []
        self._freed: list[tuple[int, int]] = []
        self._allocated: list[tuple[int, int]] = []
        self._l1: array[int] | None = None
        self._flags_changed = False

    def __enter__(self) -> Self:
        image = self.image
        image.commit()
        image.commit()  # with the counts that fell
        if image.header.version >= 3:
            image.header.incompatible |= INCOMPAT_DIRTY
            image.write_header()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        image = self.image
        if kind is not None:
            self._undo(image)
            return
        try:
            self._prepare(image)
        except BaseException:
            self._undo(image)
            raise
        try:
            self._finish(image)
        except BaseException:
            # On disk the dirty bit is set: the next one who opens the image for writing repairs it.
            image._broken = "a snapshot operation failed half-way"
            raise

    def _undo(self, image: Qcow2Image) -> None:
        """Nothing names what was prepared. Counts may be too high on the disk: the dirty bit says so until a check."""
        try:
            for l1 in self._counted:
                add_references(image, l1, -1)
            with image._lock:
                for first, count in self._allocated:
                    image.refcounts.add(first, count, -1)
                    image.reserved.difference_update(range(first, first + count))
            if self._flags_changed:
                image.write_counts()
                fix_copied(image)
            self._clean(image)
        except (OSError, BlockError):
            image._broken = "a snapshot operation could not be undone"

    def _tables(self, tables: int) -> None:
        """As many tables more were gone through."""
        self._seen += tables
        self._progress(min(self._seen, self._expected), self._expected)

    def _prepare(self, image: Qcow2Image) -> None:
        """Everything that can be done before the header names it."""
        image.write_counts()
        if self._counted and self._l1 is None:
            # What the snapshot is about to share must not be written in place, also after a power loss: version 2 has no mark
            # that says that its flags cannot be trusted.
            self._flags_changed = True
            fix_copied(image, seen=self._tables)
        if self._l1 is not None:
            data = tables.to_bytes(self._l1) + bytes(-len(self._l1) * 8 % image.cluster_size)
            image.file.pwrite(self._new_l1_at, data)

    def _finish(self, image: Qcow2Image) -> None:
        header, bits = image.header, image.cluster_bits
        old_l1 = image.l1, header.l1_table_offset
        if self._l1 is not None:
            header.l1_table_offset, header.l1_size, header.size = self._new_l1_at, len(self._l1), self._new_size
        if self.snapshots is not None:
            header.nb_snapshots = len(self.snapshots)
            header.snapshots_offset = self._table_at
        image.write_header()
        with image._lock:
            image.l2.clear()
            image.unpacked.clear()
            image._compressed_at = 0  # that cluster may go with a snapshot
            if self._l1 is not None:
                image.l1, image.size = self._l1, header.size
                if image.bitmaps is not None:
                    image.bitmaps.resized()
                image.mark_dirty(0, image.size)
        for l1 in self._down:
            add_references(image, l1, -1, self._tables)
        if self._l1 is not None:
            add_references(image, old_l1[0], -1, self._tables)
            self._freed.append((old_l1[1] >> bits, -(-len(old_l1[0]) * 8 >> bits)))
        with image._lock:
            for first, count in self._freed:
                image.refcounts.add(first, count, -1)
                image.reserved.difference_update(range(first, first + count))
        image.write_counts()
        if self._down or self._l1 is not None:
            fix_copied(image, seen=self._tables)
        with image._lock:
            image._find_reserved()
        self._clean(image)

    def _clean(self, image: Qcow2Image) -> None:
        if image.header.version >= 3:
            image.write_counts()
            image.header.incompatible &= ~INCOMPAT_DIRTY
            image.write_header()

    # --- what changes ---

    def _allocate(self, count: int) -> int:
        image = self.image
        with image._lock:
            first = image._allocate_adjacent(count)
            image.reserved.update(range(first, first + count))
        self._allocated.append((first, count))
        return first

    def write_l1_copy(self, l1: array[int]) -> int:
        """A copy of an L1 table, without COPIED flags; return its first cluster."""
        image = self.image
        clusters = max(-(-len(l1) * 8 >> image.cluster_bits), 1)
        first = self._allocate(clusters)
        copy = array("Q", [e & ~COPIED for e in l1])
        image.file.pwrite(
            first << image.cluster_bits, tables.to_bytes(copy) + bytes((clusters << image.cluster_bits) - 8 * len(l1))
        )
        return first

    def replace_l1(self, l1: array[int], size: int) -> None:
        """`l1` becomes the active table, `size` the virtual size."""
        clusters = max(-(-len(l1) * 8 >> self.image.cluster_bits), 1)
        self._new_l1_at = self._allocate(clusters) << self.image.cluster_bits
        self._new_size = size
        self._expected += sum(map(bool, l1))  # what was active loses its references, too
        self._l1 = array("Q", [e & ~COPIED for e in l1])

    def count(self, l1: array[int], delta: int) -> None:
        """Everything below `l1` gets or loses a reference."""
        # Once for the counts and once for the flags; what is replaced loses its references too.
        self._expected += sum(map(bool, l1)) + sum(map(bool, self.image.l1))
        if delta > 0:
            add_references(self.image, l1, 1, self._tables)
            self._counted.append(l1)
        else:
            self._down.append(l1)

    def free(self, cluster: int, count: int) -> None:
        if count:
            self._freed.append((cluster, count))

    def put_table(self, snapshots: list[Snapshot]) -> None:
        """Write a new snapshot table; the old one becomes free."""
        image, bits = self.image, self.image.cluster_bits
        old_bytes = load(image.file, image.header)[1]  # a repair may have made it longer just before
        data = b"".join(s.pack() for s in snapshots)
        if len(data) > MAX_SNAPSHOT_TABLE_BYTES:
            raise SnapshotError("Snapshot table is too big")
        self._table_at = 0
        if data:
            clusters = -(-len(data) >> bits)
            self._table_at = self._allocate(clusters) << bits
            image.file.pwrite(self._table_at, data + bytes((clusters << bits) - len(data)))
        self.snapshots = snapshots
        if old_bytes:
            self.free(image.header.snapshots_offset >> bits, -(-old_bytes >> bits))


def rewrite_table(image: Qcow2Image) -> None:
    """Write the snapshot table anew, with all that its entries should have. Nothing else is running, and nothing is wrong."""
    found, _ = load(image.file, image.header)
    with _Transition(image) as change:
        change.put_table(found)


def _ignore(tables: int) -> None:
    pass


def add_references(image: Qcow2Image, l1: array[int], delta: int, seen: Callable[[int], None] = _ignore) -> None:
    """Add `delta` to the count of every L2 table below `l1` and of every cluster below those. Nothing else is running.

    `seen` is told of L2 tables that have been gone through.
    """
    counts = Counts(image.header, image.refcounts.end, l1_entries=len(l1), memory=image.count_memory)
    for i, entry in counts.add_tables(l1):
        raise image._corrupt(f"L1 entry {i}: L2 table at {entry & OFFSET_MASK:#x}, expected a cluster inside the file")
    for offset, times, _, table in l2_tables(image, counts):
        found = counts.add_l2(table, times, active=False)
        seen(1)
        for index, bad in found.outside + found.misaligned:
            raise image._corrupt(f"L2 table at {offset:#x}, entry {index}: cluster at {bad & OFFSET_MASK:#x}")
    with image._lock:
        try:
            image.refcounts.add_many(counts, delta)
        except ImageCorruptError as e:
            if delta < 0:
                raise
            # Nothing is wrong with the image: its counts are only too narrow.
            bits = 1 << image.header.refcount_order
            raise SnapshotError(f"{image.path}: {bits} bits a refcount are too few for another snapshot: {e}") from None


def fix_copied(image: Qcow2Image, leave: frozenset[int] | set[int] = frozenset(), seen: Callable[[int], None] = _ignore) -> None:
    """Make the COPIED flags of the active tables say what the counts say, except of L2 tables at the offsets in `leave`.

    The caches are empty or agree with the disk. `seen` as in add_references().
    """
    header = image.header
    counts = Counts(header, image.refcounts.end, memory=image.count_memory)
    with image._lock:
        image.refcounts.fill(counts)
        image.l2.clear()
    impossible = {i for i, _ in counts.add_tables(image.l1)}  # a check reports them; there is nothing to correct
    for offset, _, _, table in l2_tables(image, counts):
        seen(1)
        if offset in leave:
            continue
        changed = counts.with_copied(table)
        if changed is not None:
            image.file.pwrite(offset, changed)
    for i, entry in enumerate(image.l1):
        if entry & OFFSET_MASK and i not in impossible:
            alone = counts.disk[(entry & OFFSET_MASK) >> image.cluster_bits] == 1
            image.l1[i] = entry | COPIED if alone else entry & ~COPIED
    image.file.flush()
    if len(image.l1):
        image.file.pwrite(header.l1_table_offset, tables.to_bytes(image.l1))
        image.file.flush()


def l2_tables(image: Qcow2Image, counts: Counts) -> Iterator[tuple[int, int, bool, bytearray]]:
    """As `counts.tables`, with what is in the tables; without those in holes of the file, which name nothing."""
    size = image.cluster_size
    for offset, times, active in counts.tables():
        if not image.file.is_hole(offset, size):
            yield offset, times, active, read_table(image, offset)


def read_table(image: Qcow2Image, offset: int) -> bytearray:
    """One cluster of metadata as it stands on the disk; what lies past the end of the file is zero."""
    raw = bytearray(image.cluster_size)
    with memoryview(raw) as view:
        read_padded(image.file, offset, [view])
    return raw
