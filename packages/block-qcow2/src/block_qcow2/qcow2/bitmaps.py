"""Persistent dirty bitmaps (section "Bitmaps extension"): which parts of the disk were written since somebody looked.

While an image is open for writing its enabled bitmaps are followed in memory and carry the in-use flag on the disk: after a
crash they are known to be wrong. Storing writes everything anew, switches the header over, and frees the old.

Not here: what a bitmap is used for (backups).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING

from ..errors import BlockError, ImageFormatError
from ..hostfile import HostFile, read_padded
from . import tables
from .format import AUTOCLEAR_BITMAPS, EXT_BITMAPS, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, OFFSET_MASK, Header

if TYPE_CHECKING:
    from .image import Qcow2Image

_EXTENSION = Struct(">IIQQ")  # nb_bitmaps, reserved, directory size, directory offset
_ENTRY = Struct(">QIIBBHI")  # table_offset, table_size, flags, type, granularity_bits, name_size, extra_data_size
_FLAGS_AT = 12
IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
_TYPE_DIRTY = 1
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
_MAX_NAME = 1023
# What one bitmap may take in memory, and all that are loaded together: 64 MiB follow 32 TiB in the usual 64 KiB pieces.
_MAX_BYTES = 64 << 20
MAX_LOADED_BYTES = 128 << 20
_MAX_TABLE_ENTRIES = 1 << 22  # of all bitmaps together: 2 GiB of bitmaps in the smallest clusters, which nobody has


class BitmapError(BlockError):
    """The bitmap asked for does not exist, exists already, or cannot be used."""


class Bitmap:
    """One bitmap. `bits` has one bit a granule, least significant first; it is loaded on first use."""

    def __init__(self, name: str, granularity_bits: int, flags: int = AUTO) -> None:
        self.name = name
        self.granularity_bits = granularity_bits
        self.flags = flags
        self.table_offset = 0
        self.table_size = 0  # entries
        self.extra = b""
        self.bits: bytearray | None = None

    @property
    def enabled(self) -> bool:
        return bool(self.flags & AUTO)

    @property
    def consistent(self) -> bool:
        """False after a crash while it was followed: what it says cannot be trusted."""
        return not self.flags & IN_USE


def present(header: Header) -> bool:
    """Whether the image has bitmaps that mean something: a writer that does not know them clears the bit."""
    return bool(header.autoclear & AUTOCLEAR_BITMAPS) and header.extension(EXT_BITMAPS) is not None


def entries(file: HostFile, header: Header) -> Iterator[Bitmap]:
    """Each entry of the directory. ImageFormatError names one that is wrong."""
    data = header.extension(EXT_BITMAPS)
    if not present(header) or data is None:
        return
    if len(data) != _EXTENSION.size:
        raise ImageFormatError(f"{file.path}: bitmaps extension of {len(data)} bytes, expected {_EXTENSION.size}")
    count, _, size, at = _EXTENSION.unpack(data)
    if not 0 < count <= MAX_BITMAPS or not 0 < size <= MAX_BITMAP_DIRECTORY_BYTES:
        raise ImageFormatError(f"{file.path}: bitmaps extension: {count} bitmaps in a directory of {size} bytes")
    header.check_range("bitmap directory", at, size, file.refresh_size())
    raw = bytearray(size)
    with memoryview(raw) as view:
        read_padded(file, at, [view])
    pos = total = 0
    for i in range(count):
        if pos + _ENTRY.size > size:
            raise ImageFormatError(f"{file.path}: bitmap directory entry {i} is outside the directory of {size} bytes")
        offset, length, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(raw, pos)
        names = pos + _ENTRY.size + extra_size
        what = f"{file.path}: bitmap directory entry {i}"
        if names + name_size > size or not 0 < name_size <= _MAX_NAME:
            raise ImageFormatError(f"{what}: a name of {name_size} bytes, expected 1 to {_MAX_NAME} inside the directory")
        if kind != _TYPE_DIRTY or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
            raise ImageFormatError(f"{what}: type {kind}, granularity_bits {bits}: expected type 1 and 9 to 31")
        if extra_size and not flags & EXTRA_COMPATIBLE:
            raise ImageFormatError(f"{what}: extra data that must be understood")
        header.check_range(f"{what}: bitmap table", offset, length * 8, file.size)
        total += length
        if total > _MAX_TABLE_ENTRIES:
            raise ImageFormatError(f"{what}: bitmap tables of more than {_MAX_TABLE_ENTRIES} entries together")
        bitmap = Bitmap(bytes(raw[names : names + name_size]).decode("utf-8", "surrogateescape"), bits, flags)
        bitmap.table_offset, bitmap.table_size = offset, length
        bitmap.extra = bytes(raw[pos + _ENTRY.size : names])
        yield bitmap
        pos += -(-(_ENTRY.size + extra_size + name_size) // 8) * 8


def directory(header: Header) -> tuple[int, int] | None:
    """Offset and length of the directory, if there is one."""
    data = header.extension(EXT_BITMAPS)
    if not present(header) or data is None or len(data) != _EXTENSION.size:
        return None
    _, _, size, at = _EXTENSION.unpack(data)
    return at, size


def places(file: HostFile, header: Header) -> Iterator[tuple[int, int]]:
    """Offset and length of the directory, of the tables that it names, and of what they name. ImageFormatError as entries()."""
    tables_of = {(b.table_offset, b.table_size) for b in entries(file, header)}
    where = directory(header)
    if where is not None:
        yield where
    for offset, size in tables_of:
        yield offset, 8 * size
        for entry in tables.load(file, offset, size):
            if entry & OFFSET_MASK:
                yield entry & OFFSET_MASK, header.cluster_size


def load(file: HostFile, header: Header) -> list[Bitmap]:
    """The directory. ImageFormatError names what is wrong."""
    return list(entries(file, header))


class Bitmaps:
    """The bitmaps of an image that is open for writing (or, for looking, reading)."""

    def __init__(self, image: Qcow2Image) -> None:
        self.image = image
        self.list = load(image.file, image.header)
        self._following = False

    def find(self, name: str) -> Bitmap:
        for bitmap in self.list:
            if bitmap.name == name:
                return bitmap
        raise BitmapError(f"Dirty bitmap '{name}' not found")

    def bits(self, bitmap: Bitmap) -> bytearray:
        """The content. BitmapError if it cannot be trusted or is too large; ImageFormatError if its table is wrong."""
        if bitmap.bits is not None:
            return bitmap.bits
        if not bitmap.consistent and not self._following:
            raise BitmapError(f"Bitmap '{bitmap.name}' is inconsistent: it can only be removed")
        size = self._bytes(bitmap)
        cluster = self.image.cluster_size
        if bitmap.table_size != -(-size // cluster):
            have, want = bitmap.table_size, -(-size // cluster)
            raise ImageFormatError(f"{self.image.path}: bitmap '{bitmap.name}': a table of {have} entries, expected {want}")
        self._make_room(bitmap, size)
        bits = bytearray(bitmap.table_size * cluster)
        with memoryview(bits) as view:
            for i, entry in enumerate(tables.load(self.image.file, bitmap.table_offset, bitmap.table_size)):
                part = view[i * cluster : (i + 1) * cluster]
                offset = entry & OFFSET_MASK
                if offset:
                    self.image.header.check_range(f"bitmap '{bitmap.name}'", offset, cluster, self.image.file.size)
                    read_padded(self.image.file, offset, [part])
                elif entry & 1:
                    part[:] = b"\xff" * cluster
                part.release()
        bitmap.bits = bits[:size]
        return bitmap.bits

    def _make_room(self, bitmap: Bitmap, size: int) -> None:
        """Refuse to hold more than MAX_LOADED_BYTES: many bitmaps may share the clusters of a small file."""
        total = size + sum(len(b.bits) for b in self.list if b.bits is not None)
        if total > MAX_LOADED_BYTES:
            raise BitmapError(f"Bitmap '{bitmap.name}' makes {total} bytes of bitmaps, at most {MAX_LOADED_BYTES} work together")

    def must_fit(self, size: int) -> None:
        """BitmapError if the bitmaps that are loaded would take too much for a disk of `size` bytes."""
        total = sum(self._bytes(b, size) for b in self.list if b.bits is not None)
        if total > MAX_LOADED_BYTES:
            raise BitmapError(f"a disk of {size} bytes takes {total} bytes of bitmaps, at most {MAX_LOADED_BYTES} work together")

    def _bytes(self, bitmap: Bitmap, disk_size: int | None = None) -> int:
        granules = -(-(self.image.size if disk_size is None else disk_size) >> bitmap.granularity_bits)
        size = -(-granules // 8)
        if size > _MAX_BYTES:
            raise BitmapError(f"Bitmap '{bitmap.name}' takes {size} bytes, at most {_MAX_BYTES} work")
        return size

    # --- changes; store() makes them last ---

    def add(self, name: str, granularity: int = 65536) -> Bitmap:
        bits = granularity.bit_length() - 1
        if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS or granularity != 1 << bits:
            raise BitmapError(f"granularity {granularity}: expected a power of two from 512 to 2 GiB")
        if not 0 < len(name.encode("utf-8", "surrogateescape")) <= _MAX_NAME:
            raise BitmapError(f"the name of a bitmap takes 1 to {_MAX_NAME} bytes")
        if any(b.name == name for b in self.list):
            raise BitmapError(f"Bitmap already exists: {name}")
        if self.image.header.version < 3:
            raise BitmapError("version 2 images have no bitmaps: compat=1.1 is needed")
        bitmap = Bitmap(name, bits)
        size = self._bytes(bitmap)
        self._make_room(bitmap, size)
        bitmap.bits = bytearray(size)
        self.list.append(bitmap)
        return bitmap

    def remove(self, name: str) -> None:
        self.list.remove(self.find(name))

    def clear(self, name: str) -> None:
        bits = self.bits(self.find(name))
        bits[:] = bytes(len(bits))

    def enable(self, name: str, on: bool = True) -> None:
        bitmap = self.find(name)
        self.bits(bitmap)
        bitmap.flags = bitmap.flags | AUTO if on else bitmap.flags & ~AUTO

    def merge(self, name: str, source: Bitmap, content: bytearray) -> None:
        """Mark in `name` whatever `source`, whose bits are `content`, marks."""
        target = self.find(name)
        self.bits(target)
        granule = 1 << source.granularity_bits
        for first, end in marked(content):
            self._mark(target, first * granule, min(end * granule, self.image.size) - first * granule)

    def _mark(self, bitmap: Bitmap, offset: int, length: int) -> None:
        bits = bitmap.bits
        if bits is None or length <= 0:
            return
        first, last = offset >> bitmap.granularity_bits, (offset + length - 1) >> bitmap.granularity_bits
        if last >> 3 == first >> 3:
            bits[first >> 3] |= (0xFF << (first & 7)) & (0xFF >> (7 - (last & 7)))
            return
        bits[first >> 3] |= 0xFF << (first & 7) & 0xFF
        bits[(first >> 3) + 1 : last >> 3] = b"\xff" * ((last >> 3) - (first >> 3) - 1)
        bits[last >> 3] |= 0xFF >> (7 - (last & 7))

    # --- following writes ---

    def follow(self) -> None:
        """Load what is enabled and mark it in use on the disk: from here on mark() keeps it right."""
        chosen = [b for b in self.list if b.enabled and b.consistent]
        if not chosen:
            self._following = True
            return
        for bitmap in chosen:
            self.bits(bitmap)
        self._following = True
        for bitmap in chosen:
            bitmap.flags |= IN_USE
        self._write_flags()

    def mark(self, offset: int, length: int) -> None:
        """A guest range is being written. The image's lock is held."""
        for bitmap in self.list:
            if bitmap.flags & AUTO:
                self._mark(bitmap, offset, length)

    def resized(self) -> None:
        """The disk has another size: what is added is clean."""
        for bitmap in self.list:
            if bitmap.bits is not None:
                size = self._bytes(bitmap)
                bitmap.bits = bitmap.bits[:size] + bytes(max(size - len(bitmap.bits), 0))

    def release(self) -> None:
        """End following: store what was followed, without the in-use flag. What fails leaves them followed."""
        if not self._following:
            return
        self._following = False
        followed = [b for b in self.list if b.bits is not None and not b.consistent]
        for bitmap in followed:
            bitmap.flags &= ~IN_USE
        try:
            if followed:
                self.store()
        except BaseException:
            self._following = True
            for bitmap in followed:
                bitmap.flags |= IN_USE
            self._write_flags_again()
            raise

    def _write_flags(self) -> None:
        data = self.image.header.extension(EXT_BITMAPS)
        assert data is not None
        at = _EXTENSION.unpack(data)[3]
        for bitmap in self.list:
            self.image.file.pwrite(at + _FLAGS_AT, bitmap.flags.to_bytes(4, "big"))
            name = len(bitmap.name.encode("utf-8", "surrogateescape"))
            at += -(-(_ENTRY.size + len(bitmap.extra) + name) // 8) * 8
        self.image.file.flush()

    def _write_flags_again(self) -> None:
        """The header may name the new directory already, which says that nobody writes any more."""
        try:
            self._write_flags()
        except OSError:
            self.image._broken = "dirty bitmaps could neither be stored nor be followed on"

    # --- to the disk ---

    def store(self) -> None:
        """Write all bitmaps and the directory anew, let the header name them, free what it named before."""
        image = self.image
        self._allocated: list[tuple[int, int]] = []
        try:
            extension, writes, old = self._lay_out()
            image.commit()
            for offset, data in writes:
                image.file.pwrite(offset, data)
        except BaseException:
            with image._lock:
                for first, clusters in self._allocated:
                    image.refcounts.add(first, clusters, -1)
                    image.reserved.difference_update(range(first, first + clusters))
            raise
        image.replace_extension(EXT_BITMAPS, extension, AUTOCLEAR_BITMAPS)
        with image._lock:
            for cluster in sorted(old):
                image._free_later(cluster, 1)
        image.commit()

    def _lay_out(self) -> tuple[bytes | None, list[tuple[int, bytes]], set[int]]:
        """The extension, what has to be written where before it counts, and the clusters that are free then."""
        bits = self.image.cluster_bits
        old = set(self._old_clusters())
        writes: list[tuple[int, bytes]] = []
        directory = b""
        for bitmap in self.list:
            content = bitmap.bits
            if content is not None:
                self._place(bitmap, content, writes)
            else:  # not loaded: stays where it is
                old.difference_update(self._clusters_of(bitmap))
            name = bitmap.name.encode("utf-8", "surrogateescape")
            entry = _ENTRY.pack(
                bitmap.table_offset,
                bitmap.table_size,
                bitmap.flags,
                _TYPE_DIRTY,
                bitmap.granularity_bits,
                len(name),
                len(bitmap.extra),
            )
            entry += bitmap.extra + name
            directory += entry + bytes(-len(entry) % 8)
        extension = None
        if directory:
            at = self._allocate(-(-len(directory) >> bits))
            writes.append((at, directory.ljust(-(-len(directory) >> bits) << bits, b"\0")))
            extension = _EXTENSION.pack(len(self.list), 0, len(directory), at)
        return extension, writes, old

    def _place(self, bitmap: Bitmap, content: bytearray, writes: list[tuple[int, bytes]]) -> None:
        cluster = self.image.cluster_size
        entries = array("Q")
        for at in range(0, len(content), cluster):
            part = bytes(content[at : at + cluster])
            if not any(part):
                entries.append(0)
            elif part.count(0xFF) == cluster:
                entries.append(1)
            else:
                where = self._allocate(1)
                writes.append((where, part.ljust(cluster, b"\0")))
                entries.append(where)
        clusters = -(-len(entries) * 8 // cluster)
        bitmap.table_size = len(entries)
        bitmap.table_offset = self._allocate(clusters) if clusters else 0
        if clusters:
            writes.append((bitmap.table_offset, tables.to_bytes(entries).ljust(clusters * cluster, b"\0")))

    def _allocate(self, clusters: int) -> int:
        image = self.image
        with image._lock:
            first = image._allocate_adjacent(clusters)
            image.reserved.update(range(first, first + clusters))
        self._allocated.append((first, clusters))
        return first << image.cluster_bits

    def _old_clusters(self) -> list[int]:
        """Clusters of what the header names now."""
        image, bits = self.image, self.image.cluster_bits
        where = directory(image.header)
        if where is None:
            return []
        at, size = where
        found = list(range(at >> bits, -(-(at + size) >> bits)))
        for bitmap in load(image.file, image.header):
            found += self._clusters_of(bitmap)
        return found

    def _clusters_of(self, bitmap: Bitmap) -> list[int]:
        bits = self.image.cluster_bits
        found = list(range(bitmap.table_offset >> bits, -(-(bitmap.table_offset + 8 * bitmap.table_size) >> bits)))
        entries = tables.load(self.image.file, bitmap.table_offset, bitmap.table_size)
        return found + [(e & OFFSET_MASK) >> bits for e in entries if e & OFFSET_MASK]


def extents(bits: bytes | bytearray, granularity_bits: int, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """(length, 1 if marked) of adjacent parts of a range, at most `limit` of them; lengths in bytes."""
    found: list[tuple[int, int]] = []
    end = offset + length
    last = (end - 1) >> granularity_bits
    while offset < end and len(found) < limit:
        first = offset >> granularity_bits
        state = bits[first >> 3] >> (first & 7) & 1
        stop = _run_end(bits, first, last, state) << granularity_bits
        found.append((min(stop, end) - offset, state))
        offset = stop
    return found


def _run_end(bits: bytes | bytearray, at: int, last: int, state: int) -> int:
    """The first granule from `at` on whose bit is not `state`, or one behind `last`."""
    whole = 0xFF if state else 0
    while at <= last:
        if not at & 7 and bits[at >> 3] == whole:
            at += 8
        elif bits[at >> 3] >> (at & 7) & 1 != state:
            return at
        else:
            at += 1
    return last + 1


def marked(bits: bytes | bytearray) -> list[tuple[int, int]]:
    """(first, end) granules of each run of set bits."""
    found: list[tuple[int, int]] = []
    for i, byte in enumerate(bits):
        if not byte:
            continue
        for bit in range(8):
            if byte >> bit & 1:
                n = 8 * i + bit
                if found and found[-1][1] == n:
                    found[-1] = (found[-1][0], n + 1)
                else:
                    found.append((n, n + 1))
    return found
