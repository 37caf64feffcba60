"""The qcow2 on-disk format: every constant and structure, with its section in QEMU's docs/interop/qcow2.txt.

The image is hostile: `Header.parse` checks every number against the format's limits and the length of the file before anything
uses it. Not here: tables and what to do with them.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from ..errors import ImageFormatError, UnsupportedFeatureError

MAGIC = 0x514649FB  # "QFI\xfb"

# Header (section "Header"), bytes 0 to 71 of every version, 72 to 103 of version 3, then compression_type.
_V2 = Struct(">IIQIIQIIQQIIQ")
_V3 = Struct(">QQQII")
V2_LENGTH, V3_LENGTH, V3_FULL_LENGTH = 72, 104, 112

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
# QEMU's limits: what it does not open, nobody needs. Each bounds what a hostile header makes us read into memory.
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
MAX_BACKING_NAME = 1023
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_LUKS_HEADER_BYTES = 64 << 20
MAX_VIRTUAL_SIZE = (1 << 63) - 1

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1
COMPRESSION_NAMES = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

INCOMPAT_DIRTY, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_COMPRESSION, INCOMPAT_EXTENDED_L2 = (1 << i for i in range(5))
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW = 1 << 0, 1 << 1

_FEATURES = (  # type (0 incompatible, 1 compatible, 2 autoclear), bit, the name that QEMU writes
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)
_KNOWN_INCOMPAT = 0x1F

# Header extensions (section "Header extensions")
EXT_END, EXT_BACKING_FORMAT, EXT_FEATURE_NAMES = 0x00000000, 0xE2792ACA, 0x6803F857
EXT_BITMAPS, EXT_LUKS, EXT_DATA_FILE = 0x23852875, 0x0537BE77, 0x44415441
_EXTENSION = Struct(">II")
_FEATURE_NAME = Struct(">BB46s")

# Table entries (sections "L1 table entry", "L2 table entry", "Refcount table entry")
OFFSET_MASK = 0x00FFFFFFFFFFFE00
REFCOUNT_OFFSET_MASK = 0xFFFFFFFFFFFFFE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1 << 0
L1_RESERVED, L2_RESERVED = 0x7F000000000001FF, 0x3F000000000001FE
SUBCLUSTERS = 32  # of one cluster, with extended L2 entries


class Extension(NamedTuple):
    """One header extension as it stands in the image."""

    kind: int
    data: bytes


class Header:
    """A checked header with its extensions. Offsets and sizes in bytes unless the name says otherwise."""

    def __init__(self) -> None:
        self.version = 3
        self.backing_file_offset = 0
        self.backing_file: bytes | None = None
        self.cluster_bits = 16
        self.size = 0
        self.crypt_method = CRYPT_NONE
        self.l1_size = 0  # entries
        self.l1_table_offset = 0
        self.refcount_table_offset = 0
        self.refcount_table_clusters = 0
        self.nb_snapshots = 0
        self.snapshots_offset = 0
        self.incompatible = 0
        self.compatible = 0
        self.autoclear = 0
        self.refcount_order = 4
        self.header_length = V3_FULL_LENGTH
        self.compression_type = COMPRESSION_ZLIB
        self.unknown_fields = b""  # header bytes past those that are known: kept
        self.extensions: list[Extension] = []

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & INCOMPAT_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible & INCOMPAT_DATA_FILE)

    @property
    def l2_bits(self) -> int:
        """log2 of the number of clusters that one L2 table maps."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def l1_needed(self) -> int:
        """L1 entries that the virtual size needs."""
        return -(-self.size >> (self.cluster_bits + self.l2_bits)) if self.size else 0

    @property
    def luks_header(self) -> tuple[int, int] | None:
        """Offset and length of the LUKS header (section "Full disk encryption header pointer")."""
        data = self.extension(EXT_LUKS)
        return (int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")) if data and len(data) == 16 else None

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of a kind, or None."""
        return next((e.data for e in self.extensions if e.kind == kind), None)

    @classmethod
    def parse(cls, data: bytes | bytearray, file_size: int) -> Header:
        """Parse the start of an image: at least its first cluster, or all of it if it is shorter.

        ImageFormatError where the header breaks the format; UnsupportedFeatureError where it needs what is not known.
        """
        if len(data) < V2_LENGTH or int.from_bytes(data[:4], "big") != MAGIC:
            raise ImageFormatError("not a qcow2 image: no magic number at offset 0")
        h = cls()
        (
            _,
            h.version,
            h.backing_file_offset,
            backing_size,
            h.cluster_bits,
            h.size,
            h.crypt_method,
            h.l1_size,
            h.l1_table_offset,
            h.refcount_table_offset,
            h.refcount_table_clusters,
            h.nb_snapshots,
            h.snapshots_offset,
        ) = _V2.unpack_from(data)
        if h.version not in (2, 3):
            raise UnsupportedFeatureError(f"qcow2 version {h.version}: only 2 and 3 are known")
        if not MIN_CLUSTER_BITS <= h.cluster_bits <= MAX_CLUSTER_BITS:
            raise ImageFormatError(f"header: cluster_bits is {h.cluster_bits}, expected {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")
        if h.version == 2:
            h.header_length = V2_LENGTH
        else:
            h._parse_v3(data)
        end = min(len(data), h.cluster_size)
        names_end = h._parse_extensions(data, min(h.backing_file_offset or end, end))
        h._check_features(file_size)
        h._check_tables(file_size)
        if h.backing_file_offset:
            if backing_size > MAX_BACKING_NAME or h.backing_file_offset + backing_size > end:
                raise ImageFormatError(
                    f"header: backing file name of {backing_size} bytes at {h.backing_file_offset:#x}, expected up to "
                    f"{MAX_BACKING_NAME} bytes inside the first cluster"
                )
            if h.backing_file_offset < names_end:
                raise ImageFormatError(f"header: backing file name at {h.backing_file_offset:#x} overlaps the header extensions")
            if backing_size:
                h.backing_file = bytes(data[h.backing_file_offset : h.backing_file_offset + backing_size])
        return h

    def _parse_v3(self, data: bytes | bytearray) -> None:
        if len(data) < V3_LENGTH:
            raise ImageFormatError(f"header: the file ends at {len(data)}, expected at least {V3_LENGTH} bytes")
        fields = _V3.unpack_from(data, V2_LENGTH)
        self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length = fields
        if not V3_LENGTH <= self.header_length <= min(self.cluster_size, len(data)):
            raise ImageFormatError(
                f"header: header_length is {self.header_length}, expected {V3_LENGTH} to {min(self.cluster_size, len(data))}"
            )
        if self.refcount_order > 6:
            raise ImageFormatError(f"header: refcount_order is {self.refcount_order}, expected 0 to 6")
        if self.header_length > V3_LENGTH:
            self.compression_type = data[V3_LENGTH]
        self.unknown_fields = bytes(data[V3_FULL_LENGTH : self.header_length])

    def _parse_extensions(self, data: bytes | bytearray, end: int) -> int:
        at = self.header_length
        while at + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack_from(data, at)
            at += _EXTENSION.size
            if kind == EXT_END:
                return at
            if length > end - at:
                raise ImageFormatError(
                    f"header extension {kind:#010x} at {at - 8:#x}: length {length}, expected at most {end - at}"
                )
            self.extensions.append(Extension(kind, bytes(data[at : at + length])))
            at += -(-length // 8) * 8
        return min(at, end)

    def feature_names(self) -> dict[tuple[int, int], str]:
        """(type, bit) to name: the specification's, and those that the image's feature name table adds."""
        names = {}
        table = self.extension(EXT_FEATURE_NAMES) or b""
        for at in range(0, len(table) - _FEATURE_NAME.size + 1, _FEATURE_NAME.size):
            kind, bit, name = _FEATURE_NAME.unpack_from(table, at)
            names[kind, bit] = name.split(b"\0")[0].decode("utf-8", "replace")
        return names | {(kind, bit): name for kind, bit, name in _FEATURES}

    def _check_features(self, file_size: int) -> None:
        unknown = self.incompatible & ~_KNOWN_INCOMPAT
        if unknown:
            names = self.feature_names()
            listed = [
                f'"{names[0, bit]}" (bit {bit})' if (0, bit) in names else f"bit {bit}" for bit in range(64) if unknown >> bit & 1
            ]
            raise UnsupportedFeatureError(f"the image needs features that are not known: {', '.join(listed)}")
        if self.crypt_method not in (CRYPT_NONE, CRYPT_AES, CRYPT_LUKS):
            raise UnsupportedFeatureError(f"encryption method {self.crypt_method} is not known")
        with_type = bool(self.incompatible & INCOMPAT_COMPRESSION)
        if with_type != (self.compression_type != COMPRESSION_ZLIB):
            raise ImageFormatError(
                f"header: compression type {self.compression_type} does not go with the compression type bit {int(with_type)}"
            )
        if self.compression_type not in COMPRESSION_NAMES:
            raise UnsupportedFeatureError(f"compression type {self.compression_type} is not known; 0 is zlib, 1 is zstd")
        if self.extended_l2 and self.cluster_bits < 14:
            raise ImageFormatError(f"header: extended L2 entries need clusters of 16 KiB or more, not {self.cluster_size} bytes")
        if self.autoclear & AUTOCLEAR_DATA_FILE_RAW and not self.has_data_file:
            self.autoclear &= ~AUTOCLEAR_DATA_FILE_RAW

    def _check_tables(self, file_size: int) -> None:
        if self.size > MAX_VIRTUAL_SIZE:
            raise ImageFormatError(f"header: virtual size is {self.size}, expected less than 2^63")
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise ImageFormatError(f"header: l1_size is {self.l1_size}, expected at most {MAX_L1_BYTES // 8}")
        if self.l1_size < self.l1_needed:
            raise ImageFormatError(f"header: l1_size is {self.l1_size}, expected at least {self.l1_needed} for size {self.size}")
        table = self.refcount_table_clusters << self.cluster_bits
        if not 0 < table <= MAX_REFCOUNT_TABLE_BYTES:
            raise ImageFormatError(
                f"header: refcount_table_clusters is {self.refcount_table_clusters}, expected 1 to "
                f"{MAX_REFCOUNT_TABLE_BYTES >> self.cluster_bits}"
            )
        if self.nb_snapshots > MAX_SNAPSHOTS:
            raise ImageFormatError(f"header: nb_snapshots is {self.nb_snapshots}, expected at most {MAX_SNAPSHOTS}")
        self.check_range("L1 table", self.l1_table_offset, self.l1_size * 8, file_size)
        self.check_range("refcount table", self.refcount_table_offset, table, file_size)
        if self.crypt_method == CRYPT_LUKS:
            if self.luks_header is None:
                raise ImageFormatError("header: a LUKS image without the extension that says where its LUKS header is")
            if not 0 < self.luks_header[1] <= MAX_LUKS_HEADER_BYTES:
                raise ImageFormatError(f"LUKS header: {self.luks_header[1]} bytes, expected up to {MAX_LUKS_HEADER_BYTES}")
            self.check_range("LUKS header", *self.luks_header, file_size)
        self.check_range("snapshot table", self.snapshots_offset, self.nb_snapshots * 40, file_size)

    def check_range(self, what: str, offset: int, length: int, file_size: int) -> None:
        """Refuse a structure that is misaligned, overlaps the header cluster or starts outside the file."""
        if not length:
            return
        if offset & (self.cluster_size - 1):
            raise ImageFormatError(f"{what}: offset {offset:#x} is not a multiple of the cluster size {self.cluster_size}")
        # The last cluster of a file may be cut: what is missing of it reads as zeroes. More than that is no table of this file.
        if not self.cluster_size <= offset or offset + length > -(-file_size >> self.cluster_bits) << self.cluster_bits:
            raise ImageFormatError(f"{what}: {length} bytes at {offset:#x}, expected inside the file of {file_size} bytes")

    def pack_fields(self) -> bytes:
        """The fixed fields, header_length bytes: what a change of a table or a feature bit rewrites."""
        data = _V2.pack(
            MAGIC,
            self.version,
            self.backing_file_offset if self.backing_file else 0,
            len(self.backing_file or b""),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version >= 3:
            data += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length)
            if self.header_length > V3_LENGTH:
                data += bytes([self.compression_type]) + bytes(7) + self.unknown_fields
        return data[: self.header_length]

    def pack(self) -> bytes:
        """The whole first cluster: fields, extensions, backing file name. ImageFormatError if they do not fit.

        The table of feature names, which is for people to read, gives way to what the image needs.
        """
        data = self._pack()
        if len(data) > self.cluster_size and self.extension(EXT_FEATURE_NAMES) is not None:
            self.set_extension(EXT_FEATURE_NAMES, None)
            data = self._pack()
        if len(data) > self.cluster_size:
            raise ImageFormatError(
                f"header, extensions and backing file name take {len(data)} bytes, expected {self.cluster_size}"
            )
        return data + bytes(self.cluster_size - len(data))

    def _pack(self) -> bytes:
        extensions = self._packed_extensions()
        self.backing_file_offset = self.header_length + len(extensions) if self.backing_file else 0
        return self.pack_fields() + extensions + (self.backing_file or b"")

    def _packed_extensions(self, without: int | None = None) -> bytes:
        return b"".join(
            _EXTENSION.pack(e.kind, len(e.data)) + e.data + bytes(-len(e.data) % 8) for e in self.extensions if e.kind != without
        ) + _EXTENSION.pack(EXT_END, 0)

    def packed_length(self, *, without: int | None = None) -> int:
        """Bytes of the fields and of the extensions, but for those of a kind."""
        return self.header_length + len(self._packed_extensions(without))

    def pack_at(self, name_at: int) -> bytes:
        """The first cluster as pack() makes it, but with the backing file name, if there is one, at `name_at`."""
        self.backing_file_offset = name_at if self.backing_file else 0
        data = bytearray(self.cluster_size)
        head = self.pack_fields() + self._packed_extensions()
        data[: len(head)] = head
        if self.backing_file:
            data[name_at : name_at + len(self.backing_file)] = self.backing_file
        return bytes(data)

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Add, replace or (None) remove an extension."""
        self.extensions = [e for e in self.extensions if e.kind != kind]
        if data is not None:
            self.extensions.insert(0, Extension(kind, data))


def feature_name_table() -> bytes:
    """The table of known feature names that new images carry (section "Feature name table")."""
    return b"".join(_FEATURE_NAME.pack(kind, bit, name.encode()) for kind, bit, name in _FEATURES)


def compressed_span(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and length in bytes of a compressed cluster's data (section "Compressed Clusters Descriptor").

    The length ends at a sector: what follows the compressed stream in it belongs to somebody else.
    """
    shift = 62 - (cluster_bits - 8)
    offset = entry & ((1 << shift) - 1)
    sectors = (entry & ((1 << 62) - 1)) >> shift
    return offset, (sectors + 1) * 512 - (offset & 511)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry for `length` compressed bytes at `offset`."""
    shift = 62 - (cluster_bits - 8)
    sectors = ((offset + length - 1) >> 9) - (offset >> 9)
    return COMPRESSED | sectors << shift | offset
