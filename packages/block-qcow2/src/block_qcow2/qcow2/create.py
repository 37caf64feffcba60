"""Making new qcow2 images. Not here: what goes into them, or which file may be overwritten."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from .. import locks
from ..errors import ImageFormatError
from ..hostfile import HostFile
from ..prealloc import Report, fill
from . import tables
from .format import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_NAMES,
    CRYPT_LUKS,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_FEATURE_NAMES,
    EXT_LUKS,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DATA_FILE,
    INCOMPAT_EXTENDED_L2,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_VIRTUAL_SIZE,
    MIN_CLUSTER_BITS,
    V2_LENGTH,
    Header,
    feature_name_table,
)
from .refcount import pack

if TYPE_CHECKING:
    from ..luks import Spec
    from .image import Qcow2Image


class Options(NamedTuple):
    """What a new image is like; qemu-img's names and defaults."""

    version: int = 3  # compat=0.10 is 2, compat=1.1 is 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    extended_l2: bool = False
    compression_type: str = "zlib"
    lazy_refcounts: bool = False
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    preallocation: str = "off"  # off, metadata, falloc, full
    passphrase: bytes | None = None  # encrypt with LUKS
    luks_rounds: int = 200_000  # PBKDF2 iterations
    luks_spec: Spec | None = None  # ciphers, if not aes-256 in xts-plain64
    nocow: bool = False  # no copy-on-write of the file, where its file system has that
    extent_size_hint: int = 0  # bytes, 0 for none; where the file system has that


def check_options(size: int, o: Options) -> None:
    """Refuse what no image can be. ImageFormatError names the option and what it may be."""
    bits = o.cluster_size.bit_length() - 1
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS or o.cluster_size != 1 << bits:
        raise ImageFormatError(f"cluster_size={o.cluster_size}: expected a power of two from 512 to 2097152")
    if o.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ImageFormatError(f"refcount_bits={o.refcount_bits}: expected a power of two up to 64")
    if o.compression_type not in COMPRESSION_NAMES.values():
        raise ImageFormatError(f"compression_type={o.compression_type}: expected zlib or zstd")
    if o.preallocation not in ("off", "metadata", "falloc", "full"):
        raise ImageFormatError(f"preallocation={o.preallocation}: expected off, metadata, falloc or full")
    if o.version not in (2, 3):
        raise ImageFormatError(f"compat version {o.version}: expected 2 (0.10) or 3 (1.1)")
    if o.version == 2:
        for name, given in (
            ("refcount_bits", o.refcount_bits != 16),
            ("extended_l2", o.extended_l2),
            ("compression_type", o.compression_type != "zlib"),
            ("lazy_refcounts", o.lazy_refcounts),
            ("data_file", o.data_file is not None),
        ):
            if given:
                raise ImageFormatError(f"{name} needs compat=1.1")
    if o.extended_l2 and o.cluster_size < 16384:
        raise ImageFormatError("extended_l2 needs a cluster_size of 16384 or more")
    if o.passphrase is not None and (o.preallocation != "off" or o.data_file or o.version == 2):
        raise ImageFormatError("encryption goes with neither preallocation nor data_file nor compat=0.10")
    if o.data_file_raw and not o.data_file:
        raise ImageFormatError("data_file_raw needs data_file")
    if o.data_file and o.backing_file and o.data_file_raw:
        raise ImageFormatError("data_file_raw and backing_file do not go together")
    if o.backing_file is not None and len(os.fsencode(o.backing_file)) > MAX_BACKING_NAME:
        raise ImageFormatError(f"backing_file: expected at most {MAX_BACKING_NAME} bytes")
    if o.backing_format and not o.backing_file:
        raise ImageFormatError("backing_fmt needs backing_file")
    if o.preallocation != "off" and o.backing_file and not o.extended_l2:
        raise ImageFormatError("preallocation and backing_file go together only with extended_l2")
    if not 0 <= size <= MAX_VIRTUAL_SIZE:
        raise ImageFormatError(f"size={size}: expected 0 to 2^63-1")
    if -(-size >> (2 * bits - (4 if o.extended_l2 else 3))) * 8 > MAX_L1_BYTES:
        raise ImageFormatError(f"size={size}: too large for clusters of {o.cluster_size} bytes")


def write_empty(file: HostFile, size: int, o: Options) -> None:
    """Write the metadata of an empty image of `size` bytes into the empty `file`, and flush it."""
    check_options(size, o)
    h = Header()
    h.version = o.version
    h.cluster_bits = o.cluster_size.bit_length() - 1
    h.size = size
    h.refcount_order = o.refcount_bits.bit_length() - 1
    if o.version == 2:
        h.header_length = V2_LENGTH
    if o.extended_l2:
        h.incompatible |= INCOMPAT_EXTENDED_L2
    if o.compression_type == "zstd":
        h.incompatible |= INCOMPAT_COMPRESSION
        h.compression_type = 1
    if o.lazy_refcounts:
        h.compatible |= COMPAT_LAZY_REFCOUNTS
    if o.version >= 3:
        h.set_extension(EXT_FEATURE_NAMES, feature_name_table())
    if o.data_file:
        h.incompatible |= INCOMPAT_DATA_FILE
        h.set_extension(EXT_DATA_FILE, os.fsencode(o.data_file))
        if o.data_file_raw:
            h.autoclear |= AUTOCLEAR_DATA_FILE_RAW
    if o.backing_file:
        h.backing_file = os.fsencode(o.backing_file)
        if o.backing_format:
            h.set_extension(EXT_BACKING_FORMAT, o.backing_format.encode())
    bits = h.cluster_bits
    luks_header = b""
    if o.passphrase is not None:
        from ..luks import format_header

        luks_header = format_header(o.passphrase, rounds=o.luks_rounds, spec=o.luks_spec)
        h.crypt_method = CRYPT_LUKS
        h.set_extension(EXT_LUKS, bytes(16))
    luks_clusters = -(-len(luks_header) >> bits)
    l1_clusters = max(-(-h.l1_needed * 8 >> bits), 1)
    # Cluster 0 is the header, then the refcount table, its blocks, the L1 table, the LUKS header.
    per_block = 1 << bits + 3 - h.refcount_order
    table_clusters = blocks = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters + luks_clusters
        need_blocks = -(-total // per_block)
        need_table = -(-need_blocks * 8 >> bits)
        if need_blocks <= blocks and need_table <= table_clusters:
            break
        blocks, table_clusters = max(need_blocks, blocks), max(need_table, table_clusters)
    h.refcount_table_offset, h.refcount_table_clusters = 1 << bits, table_clusters
    first_block = 1 + table_clusters
    h.l1_table_offset, h.l1_size = (first_block + blocks) << bits, h.l1_needed or 1
    table = array("Q", [(first_block + i) << bits for i in range(blocks)])
    counts = array({3: "B", 4: "H", 5: "I", 6: "Q"}.get(h.refcount_order, "B"), [1]) * total
    counts.extend(array(counts.typecode, [0]) * (blocks * per_block - total))
    for i in range(blocks):
        file.pwrite((first_block + i) << bits, pack(counts[i * per_block : (i + 1) * per_block], h.refcount_order))
    file.pwrite(1 << bits, tables.to_bytes(table) + bytes((table_clusters << bits) - 8 * len(table)))
    file.pwrite(h.l1_table_offset, bytes(l1_clusters << bits))
    if luks_header:
        at = h.l1_table_offset + (l1_clusters << bits)
        h.set_extension(EXT_LUKS, at.to_bytes(8, "big") + len(luks_header).to_bytes(8, "big"))
        file.pwrite(at, luks_header.ljust(luks_clusters << bits, b"\0"))
    file.flush()
    # The header last: a file that is cut off before is no image rather than half of one.
    file.pwrite(0, h.pack())
    file.flush()
    file.refresh_size()


def make_data_file(path: str, size: int, made: Callable[[str], None]) -> None:
    """The external data file of a new image: `size` bytes of nothing. A file that is there is emptied, unless it is in use."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    file = HostFile(path)
    try:
        locks.lock(file.fd, path, write=True)
        made(path)
        if not file.is_block:
            file.truncate(0)
            file.truncate(size)
    finally:
        file.close()


def _reach(file: HostFile, end: int) -> None:
    """Make a file at least as long."""
    if file.size < end:
        file.truncate(end)


def preallocate(image: Qcow2Image, start: int, mode: str, report: Report | None = None) -> None:
    """Give the unmapped clusters from byte `start` on their place ("metadata"), its space ("falloc"), or zeroes ("full")."""
    from .format import COPIED

    bits, shift = image.cluster_bits, image._l2_shift
    words = 2 if image.header.extended_l2 else 1
    start = at = -(-start >> bits) << bits
    old_end = image.size if image.external else image.refcounts.end << bits
    while at < image.size:
        stop = min((at >> shift) + 1 << shift, image.size)
        with image.operation(), image._lock:
            table, stale = image._writable_table(at >> shift), False
            index = begin = (at - (at >> shift << shift)) >> bits
            total = begin + (-(-(stop - at) >> bits))
            while index < total:
                if image.external:
                    first, count = (at >> bits) + index - begin, total - index
                else:
                    first, count, _ = image._allocate(total - index)
                    if first << bits < image.file.size:  # free again, and with what was in it
                        image.file.write_zeroes(first << bits, count << bits)
                        stale = True
                for i in range(count):
                    table.entries[words * (index + i)] = (first + i) << bits | COPIED
                    if words == 2 and image.backing is None:
                        table.entries[2 * (index + i) + 1] = 0xFFFFFFFF
                index += count
            if stale:
                image.file.flush()
            image.l2.touch(table, words * begin, words * total)
            if not image.external:
                _reach(image.file, image.refcounts.end << bits)  # before the disk has a reference to what is behind its end
        image.commit_if_crowded()
        at = stop
        if report is not None and mode == "metadata":
            report(at - start, image.size - start)
    image.flush()
    end = image.size if image.external else image.refcounts.end << bits
    file = image.data_file
    _reach(file, end)
    if mode == "full" and image.backing is None:
        at, zeroes = start, bytes(1 << 20)
        while at < image.size:
            image.write(at, zeroes[: image.size - at])
            at = min(at + len(zeroes), image.size)
            if report is not None:
                report(at - start, image.size - start)
    elif mode != "metadata":
        fill(file, 0 if start == 0 else min(start, old_end), end, "falloc", report)
