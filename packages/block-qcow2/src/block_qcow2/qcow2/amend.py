"""Changing what an image is while it keeps its content: refcount width, version, names, LUKS key slots.

Each change is prepared where nothing refers to it and takes effect by one write of the header. Not here: the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BlockError, ImageFormatError
from . import tables
from .bitmaps import present
from .counts import Counts
from .format import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPRESSED,
    COPIED,
    CRYPT_LUKS,
    CRYPT_NONE,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    INCOMPAT_DIRTY,
    OFFSET_MASK,
    REFCOUNT_OFFSET_MASK,
    V2_LENGTH,
    ZERO,
)
from .refcount import Refcounts
from .repair import write_structures
from .snapshots import fix_copied, load, read_table

if TYPE_CHECKING:
    from .image import Qcow2Image

_LARGEST_V2_STATE = (1 << 32) - 1


class AmendError(BlockError):
    """The image cannot be changed like that; it is as it was."""


def set_refcount_bits(image: Qcow2Image, bits: int) -> None:
    """Give every refcount another width; version 3 only.

    AmendError if a count does not fit; ImageCorruptError if a refcount block cannot be where the table says.
    """
    image.must_be_writable()
    order = bits.bit_length() - 1
    if bits != 1 << order or order > 6:
        raise AmendError(f"refcount_bits={bits}: expected a power of two up to 64")
    header = image.header
    if order == header.refcount_order:
        return
    if header.version < 3:
        raise AmendError("refcount_bits other than 16 need compat=1.1")
    with image.exclusive():
        old = image.refcounts
        for index, entry in enumerate(old.table):  # also those of clusters that the file does not have
            if entry & REFCOUNT_OFFSET_MASK:
                old.block_offset(index)
        image.commit()
        image.commit()  # with the counts that fell
        counts = Counts(header, old.end, memory=image.count_memory)
        old.fill(counts)
        values = counts.disk
        maximum = (1 << bits) - 1
        # The old structures are free in the new ones.
        at = header.refcount_table_offset >> header.cluster_bits
        for c in range(at, at + header.refcount_table_clusters):
            values[c] = 0
        for entry in old.table:
            if entry & REFCOUNT_OFFSET_MASK:
                values[(entry & REFCOUNT_OFFSET_MASK) >> header.cluster_bits] = 0
        highest = counts.highest()
        if highest > maximum:
            raise AmendError(f"a refcount of {highest} does not fit in {bits} bits: there are snapshots")
        _switch_refcounts(image, counts, order)


def _switch_refcounts(image: Qcow2Image, counts: Counts, order: int) -> None:
    """Write structures for `counts.disk` behind the end, and let the header name them, and their width, by one write."""
    header = image.header
    place = write_structures(image, order, counts, lambda part: counts.disk[part], end=image.refcounts.end)
    before = header.refcount_table_offset, header.refcount_table_clusters, header.refcount_order
    header.refcount_table_offset, header.refcount_table_clusters = place.offset, place.clusters
    header.refcount_order = order
    try:
        image.write_header()
    except OSError:
        header.refcount_table_offset, header.refcount_table_clusters, header.refcount_order = before
        image._broken = "the width of the refcounts could not be changed"  # which of the two is on the disk is not known
        raise
    image.file.refresh_size()
    with image._lock:
        old = image.refcounts
        image.refcounts = Refcounts(image.file, header, place.table, image._check_free)
        image.refcounts.cached_blocks = old.cached_blocks
        image.refcounts.on_block = image.reserved.add
        image.refcounts.end = place.end
        image._find_reserved()


def downgrade(image: Qcow2Image) -> None:
    """Make a version 3 image one of version 2. AmendError names what version 2 does not have."""
    image.must_be_writable()
    header = image.header
    if header.version == 2:
        return
    if header.incompatible & ~INCOMPAT_DIRTY:
        names = header.feature_names()
        bits = [names.get((0, b), f"bit {b}") for b in range(64) if header.incompatible >> b & 1]
        raise AmendError(f"Cannot downgrade an image with incompatible features set: {', '.join(bits)}")
    if header.refcount_order != 4:
        raise AmendError("compat=0.10 requires refcount_bits=16")
    if header.crypt_method != CRYPT_NONE:
        raise AmendError("compat=0.10 does not go with encryption")
    if present(header):
        raise AmendError("compat=0.10 has no dirty bitmaps: remove them first")
    snapshots = load(image.file, header)[0]
    if any(s.vm_state_size > _LARGEST_V2_STATE or s.disk_size != image.size for s in snapshots):
        raise AmendError("Internal snapshots prevent downgrade of image")
    with image.exclusive():
        image.commit()
        image.commit()
        seen: set[int] = set()
        freed: list[tuple[int, int]] = []
        for l1 in [image.l1, *(tables.load(image.file, s.l1_table_offset, s.l1_size) for s in snapshots)]:
            for index, entry in enumerate(l1):
                where = entry & OFFSET_MASK
                if where and where not in seen:
                    seen.add(where)
                    _expand_zeroes(image, where, index, freed)
        image.file.flush()
        with image._lock:
            image.l2.clear()
            for cluster, times in freed:
                image.refcounts.add(cluster, 1, -times)
        image.write_counts()
        if freed:
            fix_copied(image)
        old = (header.version, header.header_length, header.compatible, header.autoclear, list(header.extensions))
        header.version, header.header_length, header.compatible, header.autoclear = 2, V2_LENGTH, 0, 0
        header.set_extension(EXT_FEATURE_NAMES, None)
        try:
            image.write_whole_header()
        except ImageFormatError:
            header.version, header.header_length, header.compatible, header.autoclear, header.extensions = old
            raise


def _expand_zeroes(image: Qcow2Image, where: int, l1_index: int, freed: list[tuple[int, int]]) -> None:
    """Turn the zero clusters of one L2 table into unallocated ones or clusters full of zeroes. Nothing else is running.

    `freed` gets (cluster, how often) of what is referenced no more.
    """
    table = tables.from_bytes(read_table(image, where))
    changed = False
    # As often referenced as the table itself: snapshots may share it.
    owners = image.refcounts.get(where >> image.cluster_bits)
    for i, entry in enumerate(table):
        if entry & COMPRESSED or not entry & ZERO:
            continue
        changed = True
        host = entry & OFFSET_MASK
        if host & (image.cluster_size - 1):
            raise image._corrupt(f"L2 table at {where:#x}, entry {i}: cluster at {host:#x}")
        if host and image.refcounts.get(host >> image.cluster_bits) == 1:
            image._check_in_place(host, image.cluster_size)
            image.data_file.write_zeroes(host, image.cluster_size)
            table[i] = entry & ~ZERO
            continue
        if host:  # what stands there may be the data of a snapshot
            freed.append((host >> image.cluster_bits, owners))
        guest = (l1_index << image._l2_shift) + (i << image.cluster_bits)
        if image.backing is None or guest >= image.backing.size:
            table[i] = 0
            continue
        with image._lock:
            cluster, _, fresh = image._allocate(1)
            image.refcounts.add(cluster, 1, owners - 1)
        if not fresh:
            image.data_file.write_zeroes(cluster << image.cluster_bits, image.cluster_size)
        else:
            image.file.pwrite((cluster + 1 << image.cluster_bits) - 1, b"\0")  # the file reaches as far
        table[i] = cluster << image.cluster_bits | (COPIED if owners == 1 else 0)
    if changed:
        image.write_counts()
        image.file.pwrite(where, tables.to_bytes(table))


def set_data_file(image: Qcow2Image, name: str | None, raw: bool | None) -> None:
    """Change the name of the external data file, or say that it is no raw image of the disk any more. Looks at no file."""
    image.must_be_writable()
    header = image.header
    if not header.has_data_file:
        raise AmendError("data-file can only be set for images that use an external data file")
    if raw and not header.autoclear & AUTOCLEAR_DATA_FILE_RAW:
        raise AmendError("data-file-raw cannot be set on existing images")
    with image.exclusive():
        if name is not None:
            old = list(header.extensions)
            header.set_extension(EXT_DATA_FILE, name.encode("utf-8", "surrogateescape"))
            try:
                image.write_whole_header()
            except ImageFormatError:
                header.extensions = old
                raise
        if raw is False:
            header.autoclear &= ~AUTOCLEAR_DATA_FILE_RAW
            image.write_header()


class KeySlots:
    """The key slots of a LUKS image that is open for writing. Nothing of the guest's data changes."""

    def __init__(self, image: Qcow2Image) -> None:
        from .. import luks

        image.must_be_writable()
        where = image.header.luks_header
        if image.header.crypt_method != CRYPT_LUKS or where is None:
            raise AmendError("the image is not encrypted with LUKS: it has no key slots")
        self._luks = luks
        self._image = image
        self._offset, self._length = where

    def _read(self, at: int, n: int) -> bytes:
        return self._image.read_luks(at, n)

    def _write(self, at: int, data: bytes) -> None:
        if at + len(data) > self._length:
            raise ImageFormatError(f"LUKS key material at {at:#x}, expected inside the header of {self._length} bytes")
        self._image.file.pwrite(self._offset + at, data)
        self._image.file.flush()

    def add(self, unlock: bytes, new: bytes, *, slot: int | None = None, rounds: int = 200_000, force: bool = False) -> int:
        """Let `new` open the image too, which `unlock` opens now; the number of the slot that was taken."""
        header = self._luks.parse(self._read)
        key = self._luks.master_key(header, self._read, unlock)[0]
        if slot is None:
            free = [i for i, s in enumerate(header.slots) if not s.active]
            if not free:
                raise AmendError("Can't add a keyslot - all keyslots are in use")
            slot = free[0]
        elif header.slots[slot].active and not force:
            raise AmendError(f"Refusing to overwrite active keyslot {slot} - please erase it first")
        self._luks.set_slot(header, slot, key, new, rounds, self._write)
        return slot

    def erase(self, *, slot: int | None = None, old: bytes | None = None, force: bool = False) -> list[int]:
        """Forget one slot, or every slot that `old` opens; what was forgotten. The last one only with `force`: data are lost."""
        header = self._luks.parse(self._read)
        active = [i for i, s in enumerate(header.slots) if s.active]
        if slot is not None:
            if slot not in active and not force:
                raise AmendError(f"Given keyslot {slot} is already erased (inactive)")
            found = [slot]
        else:
            found = [i for i in active if old is not None and self._luks.opens(header, self._read, i, old)]
            if not found:
                raise AmendError("No keyslots match given (old) password for erase operation")
        if not set(active) - set(found) and not force:
            raise AmendError("All the active keyslots would be erased and all the data in the image with them - refusing")
        for i in found:
            self._luks.erase_slot(header, i, self._write)
        return found
