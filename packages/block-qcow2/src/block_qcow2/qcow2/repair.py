"""Writing what a check found to be right: counts, whole refcount structures, single entries.

Each makes the image no worse at any moment than it was. Not here: deciding what is right (`check`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import ImageFormatError
from . import tables
from .counts import Counts
from .format import MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_OFFSET_MASK
from .image import Qcow2Image
from .refcount import TYPECODES, pack


class Fix(NamedTuple):
    """A table entry, where it stands in the file, and what it has to be."""

    offset: int
    entry: int


def write_entries(image: Qcow2Image, fixes: list[Fix]) -> None:
    """Write single entries of L2 tables."""
    for offset, entry in fixes:
        image.file.pwrite(offset, entry.to_bytes(8, "big"))
    with image._lock:
        image.l2.clear()
    image.file.flush()


def set_counts(image: Qcow2Image, changes: array[int]) -> bool:
    """Set the counts of clusters on the disk; `changes` are pairs of cluster and count. False if a block is missing for one."""
    image._compressed_at = 0
    missing = False
    pairs = iter(changes)
    with image._lock:
        for cluster, want in zip(pairs, pairs, strict=True):
            have = image.refcounts.get(cluster)
            block = cluster >> image.refcounts.block_bits
            if block >= len(image.refcounts.table) or not image.refcounts.table[block]:
                missing = True
                continue
            image.refcounts.add(cluster, 1, want - have)
    if not missing:
        image.write_counts()
    return not missing


def rebuild(image: Qcow2Image, counts: Counts, bad_blocks: set[int], *, keep: bool) -> None:
    """Write new refcount structures behind the end of the file, counting what was found, and let the header name them.

    `keep`: what only the old structures count stays counted.
    """
    header, bits = image.header, image.cluster_bits
    refcounts = image.refcounts
    found = counts.found
    # The old structures are free in the new ones.
    drop = list(
        range(header.refcount_table_offset >> bits, (header.refcount_table_offset >> bits) + header.refcount_table_clusters)
    )
    drop += [
        (e & REFCOUNT_OFFSET_MASK) >> bits
        for i, e in enumerate(refcounts.table)
        if e & REFCOUNT_OFFSET_MASK and i not in bad_blocks
    ]
    for c in drop:
        if c < counts.clusters and found[c]:
            found[c] -= 1
    maximum = refcounts.maximum

    def numbers(part: slice) -> Any:
        if isinstance(found, memoryview):
            kept = map(max, found[part], counts.disk[part]) if keep else found[part]
            return array("Q", [min(number, maximum) for number in kept])
        import numpy as np

        kept = np.maximum(found[part], counts.disk[part]) if keep else found[part]
        return np.minimum(kept.astype(np.uint64), np.uint64(maximum))

    place = write_structures(image, refcounts.order, counts, numbers, end=counts.clusters)
    header.refcount_table_offset, header.refcount_table_clusters = place.offset, place.clusters
    image.write_header()
    with image._lock:
        refcounts.replace(place.table, place.end)
        image._find_reserved()
    image.file.refresh_size()


class Structures(NamedTuple):
    """A refcount table that was written, with its blocks, which nothing names yet."""

    table: array[int]
    offset: int  # bytes
    clusters: int
    end: int  # one past the last cluster of them


def write_structures(image: Qcow2Image, order: int, counts: Counts, numbers: Callable[[slice], Any], *, end: int) -> Structures:
    """Write refcount structures of another width, or for other numbers, from cluster `end` on, where the file ends.

    `numbers` gives those of a slice of clusters, as numpy or `array` numbers. A file can be nearly all hole: only what was
    counted gets blocks. ImageFormatError if the table would be too large for any program.
    """
    bits, block_bits = image.cluster_bits, image.cluster_bits + 3 - order
    counted = set(counts.blocks(block_bits))
    blocks, clusters = len(counted), 1
    while True:  # the new structures are counted too
        indices = counted | set(range(end >> block_bits, (end + blocks + clusters - 1 >> block_bits) + 1))
        need = len(indices), -(-8 * (max(indices) + 1) >> bits)
        if need[0] <= blocks and need[1] <= clusters:
            break
        blocks, clusters = max(need[0], blocks), max(need[1], clusters)
    if clusters << bits > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageFormatError(f"the refcount table would take {clusters << bits} bytes, at most {MAX_REFCOUNT_TABLE_BYTES} work")
    table = array("Q", bytes(clusters << bits))
    typecode = TYPECODES.get(order, "B")
    for place, index in enumerate(sorted(indices), end):
        first, stop = index << block_bits, (index + 1) << block_bits
        block = array(typecode, [0]) * (stop - first)
        if first < end:
            part = numbers(slice(first, min(stop, end)))
            known = array(typecode, part if isinstance(part, array | memoryview) else part.astype(f"u{block.itemsize}").tobytes())
            block[: len(known)] = known
        for c in range(max(first, end), min(stop, end + blocks + clusters)):
            block[c - first] = 1
        table[index] = place << bits
        image.file.pwrite(table[index], pack(block, order))
    image.file.pwrite((end + blocks) << bits, tables.to_bytes(table))
    return Structures(table, (end + blocks) << bits, clusters, end + blocks + clusters)
