"""Finding what is wrong with an image, and repairing it without losing what can be reached.

References are counted from the header down and compared with the refcounts. Repairing raises counts that are too low, lowers
those that are too high, sets COPIED flags right, and rebuilds refcount structures that cannot be used. Guest data, and entries
that point somewhere impossible, are never touched. The messages are qemu-img's.

Not here: what a command prints at the end and its exit status (`cli`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from struct import Struct

from ..errors import ImageFormatError
from . import snapshots as snap
from . import tables
from .bitmaps import present
from .counts import Counts
from .format import (
    COMPRESSED,
    COPIED,
    EXT_BITMAPS,
    EXT_LUKS,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    MAX_BITMAP_DIRECTORY_BYTES,
    OFFSET_MASK,
    REFCOUNT_OFFSET_MASK,
)
from .image import Qcow2Image
from .refcount import pack

_BITMAP_ENTRY = Struct(">QIIBBHI")  # table_offset, table_size, flags, type, granularity_bits, name_size, extra_data_size

Report = Callable[[str], None]


class CheckResult:
    """What a check found. Counts are of what is left; `*_fixed` of what was repaired."""

    def __init__(self) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.allocated_clusters = 0
        self.compressed_clusters = 0
        self.fragmented_clusters = 0
        self.total_clusters = 0
        self.image_end_offset = 0

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)


def check(image: Qcow2Image, *, repair: str = "none", report: Report = lambda line: None) -> CheckResult:
    """Check `image` and repair "none", "leaks" or "all" of what is wrong. `report` gets a line for each finding.

    Raises OSError when the image cannot be read or written.
    """
    with image.exclusive():
        if not image.read_only and not image._broken:
            image.commit()
            image.commit()
        checker = _Checker(image, repair, report)
        checker.run()
        result = checker.result
        if repair == "all" and not result.corruptions and not result.check_errors:
            marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT
            if image.header.incompatible & marks:
                image.header.incompatible &= ~marks
                image.write_header()
            image._broken = None
        return result


def repair_if_dirty(image: Qcow2Image) -> None:
    """What writing to an image that was not closed properly begins with. ImageFormatError if that does not help."""
    if image.read_only or not image.needs_repair:
        return
    result = check(image, repair="all")
    if result.corruptions or result.check_errors:
        raise ImageFormatError(f"{image.path}: the image was not closed properly and cannot be repaired")


class _Checker:
    def __init__(self, image: Qcow2Image, repair: str, report: Report) -> None:
        self.image = image
        self.report = report
        self.leaks = repair in ("leaks", "all")
        self.all = repair == "all"
        self.result = CheckResult()
        self.rebuild = False
        self.changed = False
        self.snapshots: list[snap.Snapshot] = []

    def run(self) -> None:
        image, result = self.image, self.result
        image.refcounts.end = max(image.refcounts.end, -(-image.file.refresh_size() >> image.cluster_bits))
        self._count()
        if self.rebuild and self.all:
            self._rebuild()
            result.corruptions = 0  # counted again
            self._count()
        self._compare()
        self._check_copied()
        result.total_clusters = -(-image.size >> image.cluster_bits)
        result.image_end_offset = self.counts.end() << image.cluster_bits

    # --- counting ---

    def _count(self) -> None:
        image, header = self.image, self.image.header
        clusters = -(-image.file.size >> image.cluster_bits)
        self.counts = counts = Counts(header, clusters)
        self.tables: list[tuple[int, int]] = []  # (L1 index, L2 offset) of the active image
        self.wrong: list[tuple[int, int, int]] = []  # (index, entry, refcount)
        r = self.result
        r.allocated_clusters = r.compressed_clusters = r.fragmented_clusters = 0
        self._read_disk_counts()
        self._add("header", 0, image.cluster_size)
        self._count_l1(image.l1, header.l1_table_offset, active=True)
        try:
            self.snapshots, length = snap.load(image.file, header)
        except ImageFormatError as e:
            self._corruption(f"ERROR failed to read the snapshot table: {e}")
            r.check_errors += 1
            return
        for s in self.snapshots:
            self._count_l1(tables.load(image.file, s.l1_table_offset, s.l1_size), s.l1_table_offset, active=False)
        if length:
            self._add("snapshot table", header.snapshots_offset, length)
        self._count_extensions()
        self._add("refcount table", header.refcount_table_offset, header.refcount_table_clusters << image.cluster_bits)
        for index, entry in enumerate(image.refcounts.table):
            if entry & REFCOUNT_OFFSET_MASK and index not in self.bad_blocks:
                self._add(f"refcount block {index}", entry & REFCOUNT_OFFSET_MASK, image.cluster_size)
                where = (entry & REFCOUNT_OFFSET_MASK) >> image.cluster_bits
                if where < clusters and counts.found[where] != 1:
                    self._corruption(f"ERROR refcount block {index} refcount={counts.found[where]}")
                    self.rebuild = True

    def _read_disk_counts(self) -> None:
        image = self.image
        self.bad_blocks: set[int] = set()
        for index, entry in enumerate(image.refcounts.table):
            offset = entry & REFCOUNT_OFFSET_MASK
            if entry & ~REFCOUNT_OFFSET_MASK:
                self._corruption(f"ERROR refcount table entry {index} has reserved bits set")
            if not offset:
                continue
            if offset & (image.cluster_size - 1):
                self._corruption(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            elif offset >> image.cluster_bits >= self.counts.clusters:
                self._corruption(f"ERROR refcount block {index} is outside image")
            else:
                self.counts.set_disk(index << image.refcounts.block_bits, image.refcounts.raw_block(index))
                continue
            self.bad_blocks.add(index)
            self.rebuild = True

    def _count_l1(self, l1: array[int], offset: int, *, active: bool) -> None:
        image = self.image
        if len(l1):
            self._add("L1 table", offset, len(l1) * 8)
        r = self.result
        for i, entry in enumerate(l1):
            where = entry & OFFSET_MASK
            if not where:
                continue
            if where & (image.cluster_size - 1):
                self._corruption(f"ERROR l2_offset={where:x}: Table is not cluster aligned; L1 entry corrupted")
                continue
            if not self._add(f"L2 table of L1 entry {i}", where, image.cluster_size):
                continue
            if active:
                self.tables.append((i, where))
            found = self.counts.add_l2(snap.read_table(image, where), active=active)
            for index, bad in found.outside:
                self._corruption(
                    f"ERROR: counting reference for region exceeding the end of the file by one cluster or more: L2 table at "
                    f"{where:#x}, entry {index}: offset {bad & OFFSET_MASK:#x}"
                )
            for _, bad in found.misaligned:
                self._corruption(f"ERROR offset={bad & OFFSET_MASK:x}: Cluster is not properly aligned; L2 entry corrupted.")
            if active:
                self.wrong += found.wrong_copied
                r.allocated_clusters += found.clusters + found.compressed
                r.compressed_clusters += found.compressed
                r.fragmented_clusters += found.fragmented + found.compressed

    def _count_extensions(self) -> None:
        """What header extensions reference: bitmaps (section "Bitmaps extension") and the LUKS header."""
        image, header = self.image, self.image.header
        luks = header.extension(EXT_LUKS)
        if luks is not None and len(luks) == 16:
            self._add("LUKS header", int.from_bytes(luks[:8], "big"), int.from_bytes(luks[8:], "big"))
        data = header.extension(EXT_BITMAPS)
        if not present(header) or data is None or len(data) < 24:
            return
        count, size, at = int.from_bytes(data[:4], "big"), int.from_bytes(data[8:16], "big"), int.from_bytes(data[16:24], "big")
        if size > min(MAX_BITMAP_DIRECTORY_BYTES, image.file.size) or not self._add("bitmap directory", at, size):
            self._corruption(f"ERROR bitmap directory of {size} bytes at {at:#x}")
            return
        directory = image.file.pread(at, size) if at + size <= image.file.size else bytearray()
        pos = 0
        for i in range(count):
            if pos + _BITMAP_ENTRY.size > len(directory):
                self._corruption(f"ERROR bitmap directory entry {i} is outside the directory")
                return
            offset, entries, _, _, _, name_size, extra = _BITMAP_ENTRY.unpack_from(directory, pos)
            pos += -(-(_BITMAP_ENTRY.size + name_size + extra) // 8) * 8
            if entries * 8 > image.file.size or not self._add(f"bitmap table {i}", offset, entries * 8):
                self._corruption(f"ERROR bitmap table {i} at {offset:#x}")
                continue
            for entry in tables.load(image.file, offset, entries):
                if entry & OFFSET_MASK:
                    self._add(f"bitmap {i}", entry & OFFSET_MASK, image.cluster_size)

    def _add(self, what: str, offset: int, length: int) -> bool:
        if self.counts.add(offset, length):
            return True
        self._corruption(
            f"ERROR: counting reference for region exceeding the end of the file by one cluster or more: {what} at {offset:#x}"
        )
        return False

    def _corruption(self, line: str) -> None:
        self.report(line)
        self.result.corruptions += 1

    # --- comparing and repairing ---

    def _compare(self) -> None:
        image, r = self.image, self.result
        changes: list[tuple[int, int]] = []
        for cluster, have, want in self.counts.differences():
            leak = have > want
            fix = self.leaks if leak else self.all
            if fix and want > image.refcounts.maximum:
                fix = False
            word = "Repairing" if fix else "Leaked" if leak else "ERROR"
            self.report(f"{word} cluster {cluster} refcount={have} reference={want}")
            if fix:
                changes.append((cluster, want))
                r.leaks_fixed += leak
                r.corruptions_fixed += not leak
            else:
                r.leaks += leak
                r.corruptions += not leak
        if not changes:
            return
        self.changed = True
        image._compressed_at = 0
        # Raising first: at no moment does the disk count less than what is referenced.
        missing = False
        with image._lock:
            for cluster, want in changes:
                have = image.refcounts.get(cluster)
                block = cluster >> image.refcounts.block_bits
                if block >= len(image.refcounts.table) or not image.refcounts.table[block]:
                    missing = True
                    continue
                image.refcounts.add(cluster, 1, want - have)
        if missing:
            self._rebuild()
        else:
            snap._Transition._write_counts(image)
        for cluster, want in changes:
            self.counts.disk[cluster] = want

    def _rebuild(self) -> None:
        """Write new refcount structures behind the end of the file, counting what was found, and let the header name them."""
        image, header, bits = self.image, self.image.header, self.image.cluster_bits
        refcounts = image.refcounts
        found = self.counts.found
        # The old structures are free in the new ones.
        drop = list(
            range(header.refcount_table_offset >> bits, (header.refcount_table_offset >> bits) + header.refcount_table_clusters)
        )
        drop += [
            (e & REFCOUNT_OFFSET_MASK) >> bits
            for i, e in enumerate(refcounts.table)
            if e & REFCOUNT_OFFSET_MASK and i not in self.bad_blocks
        ]
        for c in drop:
            if c < self.counts.clusters and found[c]:
                found[c] -= 1
        start = self.counts.clusters
        per_block = 1 << refcounts.block_bits
        blocks = clusters = 1
        while True:
            need = (-(-(start + blocks + clusters) // per_block), -(-blocks * 8 >> bits))
            if need == (blocks, clusters):
                break
            blocks, clusters = max(need[0], blocks), max(need[1], clusters)
        table = array("Q", [(start + i) << bits for i in range(blocks)]) + array("Q", bytes((clusters << bits) - 8 * blocks))
        empty = refcounts._empty_block()
        for i in range(blocks):
            block = array(empty.typecode, empty)
            for c in range(i * per_block, min((i + 1) * per_block, start)):
                block[c % per_block] = min(int(found[c]), refcounts.maximum)
            for c in range(max(i * per_block, start), min((i + 1) * per_block, start + blocks + clusters)):
                block[c % per_block] = 1
            image.file.pwrite(table[i], pack(block, refcounts.order))
        image.file.pwrite((start + blocks) << bits, tables.to_bytes(table))
        header.refcount_table_offset, header.refcount_table_clusters = (start + blocks) << bits, clusters
        image.write_header()
        with image._lock:
            refcounts.replace(table, start + blocks + clusters)
            image.reserved.clear()
            image._find_reserved()
        image.file.refresh_size()
        self.rebuild = False
        self.changed = True
        self.result.corruptions_fixed += 1

    def _check_copied(self) -> None:
        """COPIED must be set if and only if the count is 1 (sections "L1 table entry", "L2 table entry")."""
        image = self.image
        if self.changed:  # what was just repaired decides
            again = Counts(image.header, self.counts.clusters)
            again.disk = self.counts.disk
            self.wrong = []
            for _, where in self.tables:
                self.wrong += again.add_l2(snap.read_table(image, where), active=True).wrong_copied
        verb = "Repairing" if self.all else "ERROR"
        lines = []
        for _, entry, refcount in self.wrong:
            kind = "compressed" if entry & COMPRESSED else "data"
            lines.append(f"{verb} OFLAG_COPIED {kind} cluster: l2_entry={entry:x} refcount={refcount}")
        for i, where in self.tables:
            count = int(self.counts.disk[where >> image.cluster_bits])
            if (count == 1) != bool(image.l1[i] & COPIED):
                lines.append(f"{verb} OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={image.l1[i]:x} refcount={count}")
        for line in lines:
            self.report(line)
        if self.all and lines:
            snap.fix_copied(image)
            self.result.corruptions_fixed += len(lines)
        else:
            self.result.corruptions += len(lines)
