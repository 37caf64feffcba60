"""Finding what is wrong with an image, and repairing it without losing what can be reached.

References are counted from the header down and compared with the refcounts. Repairing raises counts that are too low, lowers
those that are too high, sets COPIED flags right, and rebuilds refcount structures that cannot be used. Guest data, and entries
that point somewhere impossible, are never touched. The messages are qemu-img's.

What cannot be read cannot be counted, and what only it names looks like a leak. So everything that can be counted is, but
where the counting is not complete no count is repaired; and where an entry points to an impossible place, no leak is freed: it
may be what the entry meant.

Not here: what a command prints at the end and its exit status (`cli`), the writing (`repair`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ..errors import ImageFormatError
from . import bitmaps, tables
from . import snapshots as snap
from .counts import Counts, TableFindings
from .format import (
    COMPRESSED,
    COPIED,
    EXT_LUKS,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    L1_RESERVED,
    OFFSET_MASK,
    REFCOUNT_OFFSET_MASK,
    ZERO,
)
from .image import Qcow2Image
from .repair import Fix, rebuild, set_counts, write_entries

# New refcount structures are a matter of one pass, flags of a second, the snapshot table of a third; the last finds nothing.
_REPAIRS = ("none", "leaks", "all")
_PASSES = 5
_MANY = 1 << 16  # findings of one kind that are remembered

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


def check(
    image: Qcow2Image,
    *,
    repair: str = "none",
    report: Report = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckResult:
    """Check `image` and repair "none", "leaks" or "all" of what is wrong. `report` gets a line for each finding.

    `progress` is told how many L2 tables, of how many at most, one pass has looked at.
    What was repaired is checked again: what `CheckResult` says is left was found in an image that nothing more was done to.
    Raises OSError when the image cannot be read or written, ValueError for another word than those three.
    """
    if repair not in _REPAIRS:
        raise ValueError(f"repair={repair!r}: expected one of {', '.join(_REPAIRS)}")
    return _check(image, repair, report, wholly=False, progress=progress)


def repair_if_dirty(image: Qcow2Image) -> None:
    """What writing to an image that was not closed properly begins with.

    ImageFormatError if that does not help; where what is wrong is more than counts and flags, not a byte was changed then.
    """
    if image.read_only or not image.needs_repair:
        return
    result = _check(image, "all", lambda line: None, wholly=True)
    if result.corruptions or result.check_errors:
        raise ImageFormatError(f"{image.path}: the image was not closed properly and cannot be repaired")


def _check(
    image: Qcow2Image,
    repair: str,
    report: Report,
    *,
    wholly: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckResult:
    with image.exclusive():
        if not image.read_only and not image._broken:
            image.commit()
            image.commit()
        elif not image.read_only and repair != "none":
            image.settle()
        leaks_fixed = corruptions_fixed = 0
        for _ in range(_PASSES):
            checker = _Checker(image, repair, report, wholly, progress)
            checker.run()
            result = checker.result
            if checker.outdated and result.corruptions == checker.outdated and not result.corruptions_fixed:
                _clear_marks(image)
                snap.rewrite_table(image)
                result.corruptions_fixed = checker.outdated
            leaks_fixed += result.leaks_fixed
            corruptions_fixed += result.corruptions_fixed
            if not (result.leaks_fixed or result.corruptions_fixed):
                break
        result.leaks_fixed, result.corruptions_fixed = leaks_fixed, corruptions_fixed
        if repair == "all" and not result.corruptions and not result.check_errors:
            _clear_marks(image)
        return result


def _clear_marks(image: Qcow2Image) -> None:
    """Nothing is wrong any more: the image may be written."""
    marks = INCOMPAT_DIRTY | INCOMPAT_CORRUPT
    if image.header.incompatible & marks:
        image.header.incompatible &= ~marks
        image.write_header()
    image._broken = None


class _Checker:
    def __init__(
        self, image: Qcow2Image, repair: str, report: Report, wholly: bool, progress: Callable[[int, int], None]
    ) -> None:
        self.image = image
        self.report = report
        self.progress = progress
        self.leaks = repair in ("leaks", "all")
        self.all = repair == "all"
        self.wholly = wholly  # repair everything or nothing
        self.result = CheckResult()
        self.incomplete = False  # something that names clusters could not be read
        self.lost = False  # an entry names no cluster that can be: a leak may be what it meant
        self.rebuild = False
        self.changed = False
        self.outdated = 0  # entries of the snapshot table to be written anew when nothing else is wrong

    def run(self) -> None:
        image, result = self.image, self.result
        image.refcounts.end = max(image.refcounts.end, -(-image.file.refresh_size() >> image.cluster_bits))
        self._count()
        if self.incomplete or result.check_errors or (self.wholly and self.lost):
            self.all = self.leaks = False
            self.outdated = 0
        if self.lost:
            self.leaks = False
        if self.all or self.leaks:
            image.claim()
        self._repair_entries()
        if self.rebuild and self.all:
            rebuild(image, self.counts, self.bad_blocks, keep=self.lost)
            result.corruptions_fixed += 1
            return  # the next pass looks at what was written
        self._compare()
        self._check_copied()
        result.total_clusters = -(-image.size >> image.cluster_bits)
        result.image_end_offset = self.counts.end() << image.cluster_bits

    # --- counting ---

    def _count(self) -> None:
        image, header = self.image, self.image.header
        clusters = -(-image.file.size >> image.cluster_bits)
        length = self._read_snapshots()
        total = len(image.l1) + sum(s.l1_size for s in self.snapshots)
        self.counts = counts = Counts(header, clusters, l1_entries=total, memory=image.count_memory)
        self.wrong: list[tuple[int, int, int]] = []  # (index, entry, refcount)
        self.many_wrong = False  # and not all of them are in `wrong`
        self.fixes: list[Fix] = []
        self._read_disk_counts()
        self._add("header", 0, image.cluster_size)
        self._count_l1(image.l1, header.l1_table_offset, 1, active=True)
        l1_tables = self._disjoint("snapshot L1 table", ((s.l1_table_offset, s.l1_size * 8) for s in self.snapshots))
        for offset, size, times in l1_tables:
            self._count_l1(tables.load(image.file, offset, size // 8), offset, times, active=False)
        if length:
            self._add("snapshot table", header.snapshots_offset, length)
        self._count_extensions()
        for done, (offset, times, active, table) in enumerate(snap.l2_tables(image, counts)):
            self.progress(done, total)
            self._found(offset, counts.add_l2(table, times, active=active), active)
        self._find_shared()  # before the refcount structures: those that are in somebody's place are made anew
        self._add("refcount table", header.refcount_table_offset, header.refcount_table_clusters << image.cluster_bits)
        for index, entry in enumerate(image.refcounts.table):
            if entry & REFCOUNT_OFFSET_MASK and index not in self.bad_blocks:
                self._add(f"refcount block {index}", entry & REFCOUNT_OFFSET_MASK, image.cluster_size)
                where = (entry & REFCOUNT_OFFSET_MASK) >> image.cluster_bits
                if where < clusters and counts.found[where] != 1:
                    self._corruption(f"ERROR refcount block {index} refcount={counts.found[where]}")
                    self.rebuild = True

    def _find_shared(self) -> None:
        """Tables that are something else too: repairing their flags would write into somebody's data."""
        image, bits = self.image, self.image.cluster_bits
        self.shared = self.counts.shared_tables()
        for offset in sorted(self.shared):
            self._corruption(f"ERROR L2 table at {offset:#x} is something else too")
            self.lost = True
        start = image.header.l1_table_offset
        l1 = range(start >> bits, -(-(start + 8 * len(image.l1)) >> bits))
        if any(c < self.counts.clusters and self.counts.found[c] != 1 for c in l1):
            self._corruption("ERROR the L1 table is something else too")
            self.incomplete = True

    def _read_snapshots(self) -> int:
        """Set `snapshots` to what can be read of the table; return the length of that."""
        self.snapshots: list[snap.Snapshot] = []
        length = 0
        try:
            for snapshot, end in snap.entries(self.image.file, self.image.header):
                length = end
                self.snapshots.append(snapshot)
                if not snapshot.complete:
                    self.outdated += self.all
                    verb = "Repairing" if self.all else "ERROR"
                    self._corruption(f"{verb} snapshot table entry {len(self.snapshots) - 1} is incomplete")
        except ImageFormatError as e:
            self._unreadable(f"ERROR failed to read the snapshot table: {e}")
        return length

    def _read_disk_counts(self) -> None:
        image = self.image
        self.bad_blocks: set[int] = set()
        seen: set[int] = set()
        for index, entry in enumerate(image.refcounts.table):
            offset = entry & REFCOUNT_OFFSET_MASK
            if entry & ~REFCOUNT_OFFSET_MASK:
                self._corruption(f"ERROR refcount table entry {index} has reserved bits set")
                self.rebuild = True
            if not offset:
                continue
            if offset in seen:
                self._corruption(f"ERROR refcount block {index} is another one too")  # and so not read again and again
            elif offset & (image.cluster_size - 1):
                self._corruption(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            elif offset >> image.cluster_bits >= self.counts.clusters:
                self._corruption(f"ERROR refcount block {index} is outside image")
            else:
                seen.add(offset)
                if index << image.refcounts.block_bits < self.counts.clusters:
                    self.counts.set_disk(index << image.refcounts.block_bits, image.refcounts.raw_block(index))
                continue
            self.bad_blocks.add(index)
            self.rebuild = True

    def _count_l1(self, l1: array[int], offset: int, times: int, *, active: bool) -> None:
        if len(l1):
            self._add("L1 table", offset, len(l1) * 8, times)
        for entry in l1:
            if entry & L1_RESERVED:
                self._corruption(f"ERROR found L1 entry with reserved bits set: {entry:x}")
        for i, entry in self.counts.add_tables(l1, times, active=active):
            self.incomplete = True  # nothing below it can be counted
            where = entry & OFFSET_MASK
            if where & (self.image.cluster_size - 1):
                self._corruption(f"ERROR l2_offset={where:x}: Table is not cluster aligned; L1 entry corrupted")
            else:
                self._outside(f"L2 table of L1 entry {i}", where)

    def _found(self, table: int, found: TableFindings, active: bool) -> None:
        """What one L2 table told."""
        for index, bad in found.outside:
            self._outside(f"L2 table at {table:#x}, entry {index}", bad & OFFSET_MASK)
        for index, bad in found.misaligned:
            self._misaligned(table, index, bad)
        for _, bad in found.reserved:
            self._corruption(f"ERROR found l2 entry with reserved bits set: {bad:x}")
        for _, bad in found.wrong_bitmap:
            if bad & COMPRESSED:
                self._corruption(f"ERROR compressed cluster with non-zero subcluster allocation bitmap, entry={bad:#x}")
            else:
                self._corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map")
                self.lost = True
        if active:
            r = self.result
            if not self.many_wrong:
                self.wrong += found.wrong_copied
                self.many_wrong = len(self.wrong) > _MANY
            r.allocated_clusters += found.clusters + found.compressed
            r.compressed_clusters += found.compressed
            r.fragmented_clusters += found.fragmented + found.compressed

    def _misaligned(self, table: int, index: int, entry: int) -> None:
        if self.image.header.extended_l2:
            with_data = bool(int.from_bytes(self.image.file.pread(table + 16 * index + 8, 8), "big") & 0xFFFFFFFF)
        else:
            with_data = not entry & ZERO
        offset = entry & OFFSET_MASK
        if with_data:
            self._corruption(f"ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            self.lost = True
        else:  # it reads as zeroes wherever it points
            verb = "Repairing" if self.all else "ERROR"
            self._corruption(f"{verb} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.")
            extended = self.image.header.extended_l2
            self.fixes.append(Fix(table + index * (16 if extended else 8), 0 if extended else ZERO))

    def _count_extensions(self) -> None:
        """What header extensions reference: bitmaps (section "Bitmaps extension") and the LUKS header."""
        image, header = self.image, self.image.header
        luks = header.extension(EXT_LUKS)
        if luks is not None and len(luks) == 16:
            self._add("LUKS header", int.from_bytes(luks[:8], "big"), int.from_bytes(luks[8:], "big"))
        named: list[tuple[int, int]] = []
        try:
            named.extend((b.table_offset, b.table_size * 8) for b in bitmaps.entries(image.file, header))
        except ImageFormatError as e:
            self._unreadable(f"ERROR failed to read the bitmap directory: {e}")
        where = bitmaps.directory(header)
        if where is not None:
            self._add("bitmap directory", *where)
        for offset, size, times in self._disjoint("bitmap table", named):
            self._add("bitmap table", offset, size, times)
            for entry, repeats in Counter(tables.load(image.file, offset, size // 8)).items():
                at = entry & OFFSET_MASK
                if at & (image.cluster_size - 1):
                    self._corruption(f"ERROR bitmap table at {offset:#x}: cluster at {at:#x} is not aligned")
                    self.lost = True
                elif at and not self._add(f"bitmap table at {offset:#x}", at, image.cluster_size, times * repeats):
                    self.lost = True

    def _disjoint(self, what: str, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """(offset, length, how often) of different ranges. One that cuts into another is an error: each is read once."""
        kept = []
        end = 0
        for (offset, length), times in sorted(Counter(r for r in ranges if r[1]).items()):
            if offset < end:
                self._unreadable(f"ERROR {what} of {length} bytes at {offset:#x} overlaps another one")
                continue
            kept.append((offset, length, times))
            end = offset + length
        return kept

    def _add(self, what: str, offset: int, length: int, times: int = 1) -> bool:
        if self.counts.add(offset, length, times):
            return True
        self._outside(what, offset)
        return False

    def _outside(self, what: str, offset: int) -> None:
        self._corruption(
            f"ERROR: counting reference for region exceeding the end of the file by one cluster or more: {what}: "
            f"offset {offset:#x}"
        )
        self.lost = True

    def _unreadable(self, line: str) -> None:
        self.report(line)
        self.result.check_errors += 1
        self.incomplete = True

    def _corruption(self, line: str) -> None:
        self.report(line)
        self.result.corruptions += 1

    # --- comparing and repairing ---

    def _repair_entries(self) -> None:
        """Entries that read as zeroes wherever they point."""
        fixes = [f for f in self.fixes if f.offset & -self.image.cluster_size not in self.shared]
        if self.all and fixes:
            write_entries(self.image, fixes)
            self.result.corruptions -= len(fixes)
            self.result.corruptions_fixed += len(fixes)

    def _compare(self) -> None:
        image, r = self.image, self.result
        changes = array("Q")  # pairs of cluster and count: there may be as many as clusters
        highest = maximum = image.refcounts.maximum
        for cluster, have, want in self.counts.differences():
            highest = max(highest, want)
            leak = have > want
            if leak and self.incomplete:
                continue  # who references it may not have been counted
            fix = self.leaks if leak else self.all
            if fix and want > maximum:
                fix = False
            word = "Repairing" if fix else "Leaked" if leak else "ERROR"
            self.report(f"{word} cluster {cluster} refcount={have} reference={want}")
            if fix:
                changes.extend((cluster, want))
                r.leaks_fixed += leak
                r.corruptions_fixed += not leak
            else:
                r.leaks += leak
                r.corruptions += not leak
        if highest > maximum:
            wide = max(8, 1 << (highest.bit_length() - 1).bit_length())
            self.report(
                f"A refcount of {highest} does not fit in {1 << image.header.refcount_order} bits: "
                f"'amend -o refcount_bits={wide}' widens them, then repair, or 'convert' what can be read"
            )
        if changes:
            self.changed = True
            if not set_counts(image, changes):
                rebuild(image, self.counts, self.bad_blocks, keep=self.lost)
            pairs = iter(changes)
            for cluster, want in zip(pairs, pairs, strict=True):
                self.counts.disk[cluster] = want

    def _check_copied(self) -> None:
        """COPIED must be set if and only if the count is 1 (sections "L1 table entry", "L2 table entry")."""
        image = self.image
        verb = "Repairing" if self.all else "ERROR"
        found = 0
        for _, entry, refcount in self._wrong_flags():
            kind = "compressed" if entry & COMPRESSED else "data"
            self.report(f"{verb} OFLAG_COPIED {kind} cluster: l2_entry={entry:x} refcount={refcount}")
            found += 1
        for i, entry in enumerate(image.l1):
            where = entry & OFFSET_MASK
            if not where or where & (image.cluster_size - 1) or where >> image.cluster_bits >= self.counts.clusters:
                continue
            count = int(self.counts.disk[where >> image.cluster_bits])
            if (count == 1) != bool(entry & COPIED):
                self.report(f"{verb} OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={count}")
                found += 1
        if self.all and found:
            snap.fix_copied(image, leave=self.shared)
            self.result.corruptions_fixed += found
        else:
            self.result.corruptions += found

    def _wrong_flags(self) -> Iterator[tuple[int, int, int]]:
        """(index, entry, refcount) of entries of active L2 tables whose flag is not what the count says."""
        if not (self.changed or self.shared or self.many_wrong):
            yield from self.wrong
            return
        # What was just repaired decides, and so many are not remembered.
        again = Counts(self.image.header, self.counts.clusters, memory=self.image.count_memory, beside=self.counts)
        again.disk = self.counts.disk
        for offset, _, active, table in snap.l2_tables(self.image, self.counts):
            if active and offset not in self.shared:
                yield from again.add_l2(table, active=True).wrong_copied
