"""Writing what a check found to be right: counts, whole refcount structures, single entries.

Each makes the image no worse at any moment than it was. Not here: deciding what is right (`check`).
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from . import tables
from .counts import Counts
from .format import REFCOUNT_OFFSET_MASK
from .image import Qcow2Image
from .refcount import pack


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


def set_counts(image: Qcow2Image, changes: list[tuple[int, int]]) -> bool:
    """Set the counts of clusters, as (cluster, count), on the disk. False if a block for one of them is missing."""
    image._compressed_at = 0
    missing = False
    with image._lock:
        for cluster, want in changes:
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
    start = counts.clusters
    per_block = 1 << refcounts.block_bits
    blocks = clusters = 1
    while True:
        need = (-(-(start + blocks + clusters) // per_block), -(-blocks * 8 >> bits))
        if need == (blocks, clusters):
            break
        blocks, clusters = max(need[0], blocks), max(need[1], clusters)
    table = array("Q", [(start + i) << bits for i in range(blocks)]) + array("Q", bytes((clusters << bits) - 8 * blocks))
    empty, counted = refcounts._empty_block(), set(counts.blocks(refcounts.block_bits))
    for i in range(blocks):
        block = array(empty.typecode, empty)
        # A file can be nearly all hole: there is nothing to look for where nothing was counted.
        for c in range(i * per_block, min((i + 1) * per_block, start)) if i in counted else ():
            number = int(found[c])
            if keep:
                number = max(number, int(counts.disk[c]))
            block[c % per_block] = min(number, refcounts.maximum)
        for c in range(max(i * per_block, start), min((i + 1) * per_block, start + blocks + clusters)):
            block[c % per_block] = 1
        image.file.pwrite(table[i], pack(block, refcounts.order))
    image.file.pwrite((start + blocks) << bits, tables.to_bytes(table))
    header.refcount_table_offset, header.refcount_table_clusters = (start + blocks) << bits, clusters
    image.write_header()
    with image._lock:
        refcounts.replace(table, start + blocks + clusters)
        image._find_reserved()
    image.file.refresh_size()
