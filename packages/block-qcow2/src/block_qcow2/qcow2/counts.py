"""Counting the references of a whole image: one number a host cluster, filled table by table.

With numpy (extra `fast`) a table is a few vector operations, without it a loop; the results are the same.
Not here: what the numbers are compared with.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import tables
from .format import COMPRESSED, COPIED, OFFSET_MASK, Header, compressed_span
from .refcount import unpack

_CHUNK = 1 << 20


class TableFindings(NamedTuple):
    """What one L2 table references."""

    clusters: int  # normal and preallocated
    compressed: int
    fragmented: int  # normal ones that do not follow the one before
    outside: list[tuple[int, int]]  # (index, entry) that point out of the file
    misaligned: list[tuple[int, int]]
    wrong_copied: list[tuple[int, int, int]]  # (index, entry, refcount on disk)


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError:
        return None
    return np


class Counts:
    """`found[c]`: references to cluster c; `disk[c]`: its refcount on the disk. For the clusters of a file, and no others."""

    def __init__(self, header: Header, clusters: int, *, use_numpy: bool = True) -> None:
        self.header = header
        self.clusters = clusters
        self._np = _numpy() if use_numpy else None
        np = self._np
        self.found: Any = np.zeros(clusters, np.uint32) if np else array("I", bytes(4 * clusters))
        self.disk: Any = np.zeros(clusters, np.uint64) if np and header.refcount_order == 6 else None
        if self.disk is None:
            self.disk = np.zeros(clusters, np.uint32) if np else array("Q" if header.refcount_order == 6 else "I", bytes(0))
            if not np:
                self.disk.frombytes(bytes(self.disk.itemsize * clusters))
        self._next = 0  # the host cluster that would continue the last one of this table

    def set_disk(self, first: int, block: bytes | bytearray) -> None:
        """A refcount block, which counts clusters from `first`."""
        order, np = self.header.refcount_order, self._np
        if np and order >= 3:
            values = np.frombuffer(block, np.dtype(f">u{1 << order - 3}"))
        else:
            values = unpack(block, order)
        n = min(len(values), self.clusters - first)
        if n <= 0:
            return
        if np:
            self.disk[first : first + n] = values[:n]
        else:
            self.disk[first : first + n] = array(self.disk.typecode, values[:n])

    def add(self, offset: int, length: int) -> bool:
        """Count a reference to every cluster of a range; False if some of it is outside the file."""
        bits = self.header.cluster_bits
        first, end = offset >> bits, -(-(offset + length) >> bits)
        for c in range(first, min(end, self.clusters)):
            self.found[c] += 1
        return end <= self.clusters

    def add_l2(self, raw: bytes | bytearray, *, active: bool) -> TableFindings:
        """Count what an L2 table references. `active`: look at fragmentation and the COPIED flags too."""
        self._next = 0
        if self._np:
            return self._add_l2_numpy(raw, active)
        return self._add_l2_plain(raw, active)

    def _add_l2_plain(self, raw: bytes | bytearray, active: bool) -> TableFindings:
        words = tables.from_bytes(raw)
        if self.header.extended_l2:
            words = words[::2]
        bits, mask, limit = self.header.cluster_bits, self.header.cluster_size - 1, self.clusters
        external = self.header.has_data_file
        found, disk = self.found, self.disk
        clusters = compressed = fragmented = 0
        outside, misaligned, wrong = [], [], []
        for i, entry in enumerate(words):
            if entry & COMPRESSED:
                compressed += 1
                if not self.add(*compressed_span(entry, bits)):
                    outside.append((i, entry))
                if entry & COPIED and active:
                    wrong.append((i, entry, 0))
                continue
            offset = entry & OFFSET_MASK
            if not offset or external:
                clusters += bool(entry & (OFFSET_MASK | COPIED))
                continue
            clusters += 1
            if offset & mask:
                misaligned.append((i, entry))
                continue
            c = offset >> bits
            if c >= limit:
                outside.append((i, entry))
                continue
            found[c] += 1
            if active:
                fragmented += bool(self._next) and c != self._next
                self._next = c + 1
                if (disk[c] == 1) != bool(entry & COPIED):
                    wrong.append((i, entry, disk[c]))
        return TableFindings(clusters, compressed, fragmented, outside, misaligned, wrong)

    def _add_l2_numpy(self, raw: bytes | bytearray, active: bool) -> TableFindings:
        np: Any = self._np
        words = np.frombuffer(raw, np.dtype(">u8")).astype(np.uint64)
        if self.header.extended_l2:
            words = words[::2]
        bits = self.header.cluster_bits
        outside: list[tuple[int, int]] = []
        wrong: list[tuple[int, int, int]] = []
        compressed = 0
        flags = words & np.uint64(COMPRESSED)
        if flags.any():
            packed = np.nonzero(flags)[0]
            compressed = len(packed)
            for i in packed.tolist():
                entry = int(words[i])
                if not self.add(*compressed_span(entry, bits)):
                    outside.append((i, entry))
                if entry & COPIED and active:
                    wrong.append((i, entry, 0))
            words = words.copy()
            words[packed] = 0
        if self.header.has_data_file:
            used = int(np.count_nonzero(words & np.uint64(OFFSET_MASK | COPIED)))
            return TableFindings(used, compressed, 0, outside, [], wrong)
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
            return TableFindings(clusters, compressed, 0, outside, misaligned, wrong)
        steps = np.diff(host)
        jumps = int(np.count_nonzero(steps != 1))
        if not jumps:
            self.found[int(host[0]) : int(host[0]) + len(host)] += 1
        elif (steps > 0).all():
            self.found[host] += 1
        else:  # perhaps twice the same
            unique, times = np.unique(host, return_counts=True)
            self.found[unique] += times.astype(self.found.dtype)
        fragmented = 0
        if active:
            fragmented = jumps
            counts = self.disk[host]
            off = (counts == 1) != ((words & np.uint64(COPIED)) != 0)
            if off.any():
                wrong += [(int(index[i]), int(words[i]), int(counts[i])) for i in np.nonzero(off)[0].tolist()]
        return TableFindings(clusters, compressed, fragmented, outside, misaligned, wrong)

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
        alone = np.zeros(len(entries), bool)
        alone[sane] = self.disk[host[sane]] == 1
        plain = entries & np.uint64(~COPIED & (1 << 64) - 1)
        wanted = np.where(alone, entries | np.uint64(COPIED), np.where(sane | packed, plain, entries))
        if (wanted == entries).all():
            return None
        all_words[::step] = wanted
        return bytes(all_words.astype(np.dtype(">u8")).tobytes())

    def differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, refcount on disk, references) where the two differ, ascending."""
        if self._np:
            for c in self._np.nonzero(self.found != self.disk)[0].tolist():
                yield c, int(self.disk[c]), int(self.found[c])
            return
        for c, (have, want) in enumerate(zip(self.disk, self.found, strict=True)):
            if have != want:
                yield c, have, want

    def end(self) -> int:
        """One past the highest cluster that is referenced or counted."""
        if self._np:
            for start in range((self.clusters - 1) // _CHUNK * _CHUNK, -1, -_CHUNK):
                part = slice(start, start + _CHUNK)
                used = self._np.nonzero((self.found[part] != 0) | (self.disk[part] != 0))[0]
                if len(used):
                    return start + int(used[-1]) + 1
            return 0
        return next((c + 1 for c in range(self.clusters - 1, -1, -1) if self.found[c] or self.disk[c]), 0)
