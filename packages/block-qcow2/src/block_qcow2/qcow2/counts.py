"""Counting the references of a whole image: one number a host cluster, filled table by table.

With numpy (extra `fast`) a table is a few vector operations, without it a loop; the results are the same. A file can be far
larger than what is in it, so the numbers lie in memory that costs nothing until it is written to, and only what was counted
is looked at.

Not here: what the numbers are compared with.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import BlockError
from . import tables
from .format import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, Header, compressed_span
from .refcount import unpack

_CHUNK_BITS = 16
_CHUNK = 1 << _CHUNK_BITS  # clusters that are looked at together
CLUSTERS_MAX = 1 << 36  # of a file that can be counted: 4 PiB with clusters of 64 KiB
_HUGE_BELOW = 128 << 20  # bytes of numbers: more may be a trap, in which every number touched costs 2 MiB
_MAP_NORESERVE = 0x4000  # Linux, asm-generic/mman.h
_PAGE = mmap.PAGESIZE
_UNIT_BITS = 10  # clusters whose numbers of 4 bytes share a page: what memory is charged by
MEMORY_LIMIT = 2 << 30  # bytes of numbers: enough for 15 TiB of data in clusters of 64 KiB
MEMORY_VARIABLE = "BLOCK_QCOW2_COUNT_MEMORY"  # of the environment: another limit, in MiB


class TableFindings(NamedTuple):
    """What one L2 table references. Lists are of (index, entry)."""

    clusters: int  # normal and preallocated
    compressed: int
    fragmented: int  # normal ones that do not follow the one before
    outside: list[tuple[int, int]]  # that point out of the file
    misaligned: list[tuple[int, int]]
    wrong_copied: list[tuple[int, int, int]]  # (index, entry, refcount on disk)
    reserved: list[tuple[int, int]]  # with reserved bits set
    wrong_bitmap: list[tuple[int, int]]  # whose subclusters cannot be allocated: there is no cluster, or it is compressed


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError:
        return None
    return np


class Counts:
    """`found[c]`: references to cluster c; `disk[c]`: its refcount on the disk. For the clusters of a file, and no others."""

    def __init__(
        self,
        header: Header,
        clusters: int,
        *,
        l1_entries: int = 0,
        use_numpy: bool = True,
        memory: int = 0,
        beside: Counts | None = None,
    ) -> None:
        """`l1_entries`: of all tables that will be counted.

        `memory`: how many bytes the numbers may take, 0 for what the environment says or else MEMORY_LIMIT; those of `beside`,
        which stay, are counted too. Raises BlockError when there are too many clusters to count; everything that counts does
        when the limit is reached.
        """
        self._limit = memory or _limit_of_environment()
        self._used: int = beside._used if beside is not None else 0
        if clusters > CLUSTERS_MAX:
            raise BlockError(f"the file has {clusters} clusters, at most {CLUSTERS_MAX} can be counted")
        self.header = header
        self.clusters = clusters
        self._np = _numpy() if use_numpy else None
        # One cluster may be named by every entry of every table, and every table by every L1 entry.
        self._wide = l1_entries << header.l2_bits >= 1 << 32
        self.found: Any = self._numbers(self._wide)
        self.disk: Any = self._numbers(header.refcount_order == 6)
        self._named: Any = None  # references to L2 tables, by cluster
        self._active = memoryview(b"")  # 1 for L2 tables of the active image, by cluster
        self._touched: set[int] = set()  # chunks in which anything was counted
        self._table_units: set[int] = set()  # in which an L2 table is
        self._unit_cost = 2 * _PAGE if not self._wide and header.refcount_order < 6 else 4 * _PAGE
        units = (clusters >> _UNIT_BITS) + 1
        self._units: Any = _zeroes("B", units)  # 1 for those that are charged
        if self._np:
            self._units = self._np.frombuffer(self._units, self._np.uint8)
        self._next = 0  # the host cluster that would continue the last one of this table

    def _numbers(self, wide: bool) -> Any:
        numbers = _zeroes("Q" if wide else "I", self.clusters)
        return (
            self._np.frombuffer(numbers, self._np.uint64 if wide else self._np.uint32)[: self.clusters] if self._np else numbers
        )

    def _touch(self, first: int, end: int) -> None:
        """Have clusters `first` to `end - 1` looked at."""
        if first >= end:
            return
        low, high = first >> _UNIT_BITS, (end - 1 >> _UNIT_BITS) + 1
        if high - low == 1:
            fresh = int(not self._units[low])
        elif self._np:
            fresh = high - low - int(self._np.count_nonzero(self._units[low:high]))
        else:
            fresh = bytes(self._units[low:high]).count(0)
        if fresh:
            self._units[low:high] = 1 if self._np else b"\1" * (high - low)
            self._charge(fresh, range(first >> _CHUNK_BITS, (end - 1 >> _CHUNK_BITS) + 1))

    def _touch_scattered(self, host: Any) -> None:
        """Have an array of clusters looked at. (numpy)"""
        np: Any = self._np
        units = host >> _UNIT_BITS
        fresh = units[self._units[units] == 0]
        if len(fresh):
            fresh = np.unique(fresh)
            self._units[fresh] = 1
            self._charge(len(fresh), np.unique(fresh >> (_CHUNK_BITS - _UNIT_BITS)).tolist())

    def _charge(self, units: int, chunks: Iterable[int]) -> None:
        """Before memory is written to. What is far from everything else costs some pages more: those that say where it is."""
        before = len(self._touched)
        self._touched.update(chunks)
        self._pay(units * self._unit_cost + (len(self._touched) - before) * 4 * _PAGE)

    def _pay(self, size: int) -> None:
        self._used += size
        if self._used > self._limit:
            raise BlockError(
                f"counting the references of this image takes more memory than {self._limit >> 20} MiB, the limit: "
                f"{MEMORY_VARIABLE}=MIB in the environment, or count_memory of the image, sets another one"
            )

    def _chunks(self) -> Iterator[slice]:
        for number in sorted(self._touched):
            yield slice(number << _CHUNK_BITS, min((number + 1) << _CHUNK_BITS, self.clusters))

    def blocks(self, bits: int) -> list[int]:
        """The numbers of the pieces of 2**bits clusters in which anything was counted, ascending."""
        found: set[int] = set()
        for chunk in self._chunks():
            found.update(range(chunk.start >> bits, (chunk.stop - 1 >> bits) + 1))
        return sorted(found)

    def set_disk(self, first: int, block: bytes | bytearray) -> None:
        """A refcount block, which counts clusters from `first`."""
        order, np = self.header.refcount_order, self._np
        if np and order >= 3:
            values = np.frombuffer(block, np.dtype(f">u{1 << order - 3}"))
        else:
            values = unpack(block, order)
        n = min(len(values), self.clusters - first)
        if n <= 0 or block.count(0) == len(block):
            return
        self._touch(first, first + n)
        self.disk[first : first + n] = values[:n] if np else array(self.disk.format, values[:n])

    def add(self, offset: int, length: int, times: int = 1) -> bool:
        """Count `times` references to every cluster of a range; False if some of it is outside the file."""
        bits = self.header.cluster_bits
        first, end = offset >> bits, -(-(offset + length) >> bits)
        self._touch(first, min(end, self.clusters))
        if self._np and end - first > 1:
            self.found[first : min(end, self.clusters)] += self.found.dtype.type(times)
        else:
            for c in range(first, min(end, self.clusters)):
                self.found[c] += times
        return end <= self.clusters

    def add_tables(self, l1: array[int], times: int = 1, *, active: bool = False) -> list[tuple[int, int]]:
        """Count `times` the L2 tables that an L1 table names; return the (index, entry) that name none that can be.

        What the tables name is counted by add_l2() for each of tables(): once, whoever names a table how often.
        """
        if self._named is None:
            self._named = self._numbers(self._wide)
            self._active = _zeroes("B", self.clusters)
        bits, mask = self.header.cluster_bits, self.header.cluster_size - 1
        bad = []
        for i, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            c = offset >> bits
            if offset & mask or c >= self.clusters:
                bad.append((i, entry))
                continue
            self._touch(c, c + 1)
            if c >> _UNIT_BITS not in self._table_units:
                self._table_units.add(c >> _UNIT_BITS)
                self._pay(self._unit_cost)
            self._named[c] += times
            self.found[c] += times
            if active:
                self._active[c] = 1
        return bad

    def tables(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, references, whether it is of the active image) of each L2 table that was named, ascending."""
        if self._named is None:
            return
        bits = self.header.cluster_bits
        for chunk in self._chunks():
            for c in self._nonzero(self._named[chunk], chunk.start):
                yield c << bits, int(self._named[c]), bool(self._active[c])

    def _nonzero(self, part: Any, first: int) -> list[int]:
        if self._np:
            return (self._np.nonzero(part)[0] + first).tolist()  # type: ignore[no-any-return]
        return [c for c, number in enumerate(part, first) if number]

    def shared_tables(self) -> set[int]:
        """The offsets of L2 tables that something else than an L1 table references too: they are data, or no tables at all."""
        bits = self.header.cluster_bits
        return {offset for offset, times, _ in self.tables() if int(self.found[offset >> bits]) != times}

    def add_l2(self, raw: bytes | bytearray, times: int = 1, *, active: bool) -> TableFindings:
        """Count what an L2 table references, `times`. `active`: look at fragmentation and the COPIED flags too."""
        self._next = 0
        if self._np:
            return self._add_l2_numpy(raw, times, active)
        return self._add_l2_plain(raw, times, active)

    def _add_l2_plain(self, raw: bytes | bytearray, times: int, active: bool) -> TableFindings:
        words = tables.from_bytes(raw)
        bitmaps = None
        if self.header.extended_l2:
            words, bitmaps = words[::2], words[1::2]
        bits, mask, limit = self.header.cluster_bits, self.header.cluster_size - 1, self.clusters
        external = self.header.has_data_file
        found, disk = self.found, self.disk
        clusters = compressed = fragmented = 0
        unit = -1
        outside, misaligned, wrong, reserved, wrong_bitmap = [], [], [], [], []
        for i, entry in enumerate(words):
            if entry & COMPRESSED:
                compressed += 1
                if bitmaps is not None and bitmaps[i]:
                    wrong_bitmap.append((i, entry))
                if not self.add(*compressed_span(entry, bits), times):
                    outside.append((i, entry))
                if entry & COPIED and active:
                    wrong.append((i, entry, 0))
                continue
            if entry & L2_RESERVED:
                reserved.append((i, entry))
            offset = entry & OFFSET_MASK
            if not offset or external:
                if bitmaps is not None and not (offset or (external and entry & COPIED)) and bitmaps[i] & 0xFFFFFFFF:
                    wrong_bitmap.append((i, entry))
                clusters += external and bool(entry & (OFFSET_MASK | COPIED))
                continue
            clusters += 1
            if offset & mask:
                misaligned.append((i, entry))
                continue
            c = offset >> bits
            if c >= limit:
                outside.append((i, entry))
                continue
            if c >> _UNIT_BITS != unit:
                unit = c >> _UNIT_BITS
                self._touch(c, c + 1)
            found[c] += times
            if active:
                fragmented += bool(self._next) and c != self._next
                self._next = c + 1
                if (disk[c] == 1) != bool(entry & COPIED):
                    wrong.append((i, entry, disk[c]))
        return TableFindings(clusters, compressed, fragmented, outside, misaligned, wrong, reserved, wrong_bitmap)

    def _add_l2_numpy(self, raw: bytes | bytearray, times: int, active: bool) -> TableFindings:
        np: Any = self._np
        words = np.frombuffer(raw, np.dtype(">u8")).astype(np.uint64)
        outside: list[tuple[int, int]] = []
        wrong: list[tuple[int, int, int]] = []
        external = self.header.has_data_file

        def listed(chosen: Any) -> list[tuple[int, int]]:
            return [(i, int(words[i])) for i in np.nonzero(chosen)[0].tolist()] if chosen.any() else []

        flags = words & np.uint64(COMPRESSED)
        wrong_bitmap: list[tuple[int, int]] = []
        if self.header.extended_l2:
            words, bitmaps = words[::2], words[1::2]
            flags = words & np.uint64(COMPRESSED)
            absent = (words & np.uint64(OFFSET_MASK | COPIED if external else OFFSET_MASK)) == 0
            wrong_bitmap = listed(
                np.where(flags != 0, bitmaps != 0, absent & ((bitmaps & np.uint64(0xFFFFFFFF)) != 0)),
            )
        bits = self.header.cluster_bits
        compressed = 0
        reserved = listed(((words & np.uint64(L2_RESERVED)) != 0) & (flags == 0))
        if flags.any():
            packed = np.nonzero(flags)[0]
            compressed = len(packed)
            for i in packed.tolist():
                entry = int(words[i])
                if not self.add(*compressed_span(entry, bits), times):
                    outside.append((i, entry))
                if entry & COPIED and active:
                    wrong.append((i, entry, 0))
            words = words.copy()
            words[packed] = 0
        if external:
            used = int(np.count_nonzero(words & np.uint64(OFFSET_MASK | COPIED)))
            return TableFindings(used, compressed, 0, outside, [], wrong, reserved, wrong_bitmap)
        offsets = words & np.uint64(OFFSET_MASK)
        index = np.nonzero(offsets)[0]
        clusters = len(index)
        if clusters < len(words):
            words, offsets = words[index], offsets[index]
        misaligned: list[tuple[int, int]] = []
        host = (offsets >> np.uint64(bits)).astype(np.int64)
        bad = (offsets & np.uint64(self.header.cluster_size - 1)) != 0
        far = host >= self.clusters
        if bad.any() or far.any():
            misaligned = [(int(index[i]), int(words[i])) for i in np.nonzero(bad)[0].tolist()]
            outside += [(int(index[i]), int(words[i])) for i in np.nonzero(far & ~bad)[0].tolist()]
            good = ~far & ~bad
            index, host, words = index[good], host[good], words[good]
        if not len(host):
            return TableFindings(clusters, compressed, 0, outside, misaligned, wrong, reserved, wrong_bitmap)
        steps = np.diff(host)
        jumps = int(np.count_nonzero(steps != 1))
        step = self.found.dtype.type(times)
        if not jumps:
            self._touch(int(host[0]), int(host[-1]) + 1)
        else:
            self._touch_scattered(host)
        if not jumps:
            self.found[int(host[0]) : int(host[0]) + len(host)] += step
        elif (steps > 0).all():
            self.found[host] += step
        else:  # perhaps twice the same
            unique, repeats = np.unique(host, return_counts=True)
            self.found[unique] += repeats.astype(self.found.dtype) * step
        fragmented = 0
        if active:
            fragmented = jumps
            counts = self.disk[host]
            off = (counts == 1) != ((words & np.uint64(COPIED)) != 0)
            if off.any():
                wrong += [(int(index[i]), int(words[i]), int(counts[i])) for i in np.nonzero(off)[0].tolist()]
        return TableFindings(clusters, compressed, fragmented, outside, misaligned, wrong, reserved, wrong_bitmap)

    def with_copied(self, raw: bytes | bytearray) -> bytes | None:
        """An L2 table with its COPIED flags as `disk` says; None if it is like that. Impossible entries stay as they are."""
        np: Any = self._np
        step = 2 if self.header.extended_l2 else 1
        bits, mask = self.header.cluster_bits, self.header.cluster_size - 1
        if self.header.has_data_file:
            return None
        if np is None:
            words = tables.from_bytes(raw)
            for i in range(0, len(words), step):
                entry = words[i]
                offset = entry & OFFSET_MASK
                if entry & COMPRESSED:
                    words[i] = entry & ~COPIED
                elif offset and not offset & mask and offset >> bits < self.clusters:
                    words[i] = entry | COPIED if self.disk[offset >> bits] == 1 else entry & ~COPIED
            changed = tables.to_bytes(words)
            return changed if changed != raw else None
        all_words = np.frombuffer(raw, np.dtype(">u8")).astype(np.uint64)
        entries = all_words[::step]
        packed = (entries & np.uint64(COMPRESSED)) != 0
        offsets = entries & np.uint64(OFFSET_MASK)
        host = (offsets >> np.uint64(bits)).astype(np.int64)
        sane = (offsets != 0) & ((offsets & np.uint64(mask)) == 0) & (host < self.clusters) & ~packed
        plain, marked = entries & np.uint64(~COPIED & (1 << 64) - 1), entries | np.uint64(COPIED)
        first = int(host[0])
        if sane.all() and int(host[-1]) - first == len(host) - 1 and (host[1:] - host[:-1] == 1).all():
            wanted = np.where(self.disk[first : first + len(host)] == 1, marked, plain)  # what was written in one go
        else:
            alone = np.zeros(len(entries), bool)
            alone[sane] = self.disk[host[sane]] == 1
            wanted = np.where(alone, marked, np.where(sane | packed, plain, entries))
        if (wanted == entries).all():
            return None
        all_words[::step] = wanted
        return bytes(all_words.astype(np.dtype(">u8")).tobytes())

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, refcount on disk, references) where the two differ, ascending."""
        for chunk in self._chunks():
            disk, found = self.disk[chunk], self.found[chunk]
            if self._np:
                for i in self._np.nonzero(found != disk)[0].tolist():
                    yield chunk.start + i, int(disk[i]), int(found[i])
            elif disk != found:
                for c, (have, want) in enumerate(zip(disk, found, strict=True), chunk.start):
                    if have != want:
                        yield c, have, want

    def highest(self) -> int:
        """The highest refcount on the disk."""
        return max((int(max(self.disk[c]) if not self._np else self.disk[c].max()) for c in self._chunks()), default=0)

    def end(self) -> int:
        """One past the highest cluster that is referenced or counted."""
        for chunk in reversed(list(self._chunks())):
            used = [self._nonzero(numbers[chunk], chunk.start)[-1:] for numbers in (self.found, self.disk)]
            if last := [c for few in used for c in few]:
                return max(last) + 1
        return 0


def _limit_of_environment() -> int:
    text = os.environ.get(MEMORY_VARIABLE)
    if text is None:
        return MEMORY_LIMIT
    if not (text.isascii() and text.isdecimal()):
        raise BlockError(f"{MEMORY_VARIABLE}={text}: expected a number of MiB")
    return int(text) << 20


def _zeroes(code: str, count: int) -> memoryview:
    """`count` numbers of a type of `array`, writable, in memory that costs nothing until it is written to."""
    size = array(code).itemsize * max(count, 1)
    try:
        region = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, ValueError, OverflowError) as error:
        raise BlockError(f"no memory to count {count} clusters: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # an eighth of the time of a check is page faults otherwise
            region.madvise(mmap.MADV_HUGEPAGE if size <= _HUGE_BELOW else mmap.MADV_NOHUGEPAGE)
    return memoryview(region).cast(code)  # type: ignore[call-overload, no-any-return]
