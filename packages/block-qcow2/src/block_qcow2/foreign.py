"""Images from elsewhere, to be read and converted: VDI, VHD (fixed, dynamic), VHDX, VMDK (monolithicSparse, streamOptimized).

Each is a table from blocks to places in the file. Read-only; images that need another file (differencing, split) are refused by
name, so nothing here opens anything. Every number is checked before it is used.

Sources: VirtualBox VDICore.h as described in QEMU's block/vdi.c comments; Virtual Hard Disk Image Format Specification 1.0;
[MS-VHDX]; VMware Virtual Disk Format 5.0. Not here: writing.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from struct import Struct
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .errors import ImageFormatError, UnsupportedFeatureError
from .hostfile import Cursor, HostFile, read_padded
from .image import ReadOnlyImage

if TYPE_CHECKING:
    from .qcow2.image import Extent

_MAX_TABLE_BYTES = 64 << 20  # of what stays in memory
_MAX_BLOCK = 64 << 20
_MAX_SIZE = 1 << 50
_ZEROES = bytes(1 << 16)
_UNPACKED = 16  # blocks


class ForeignImage(ReadOnlyImage):
    """A read-only image of fixed-size blocks. Subclasses find blocks."""

    format = ""
    read_only = True
    backing = None

    def __init__(self, file: HostFile) -> None:
        self.file = file
        self.path = file.path
        self.size = 0
        self.block_size = 0

    def _block(self, index: int) -> int | None:
        """Where a block's data are in the file, None for zeroes."""
        raise NotImplementedError

    def _refuse(self, what: str) -> ImageFormatError:
        return ImageFormatError(f"{self.path}: {what}")

    def _check_shape(self, blocks: int) -> None:
        size, block = self.size, self.block_size
        if not 0 < size <= _MAX_SIZE or not 512 <= block <= _MAX_BLOCK or block & (block - 1):
            raise self._refuse(f"{self.format} header: size {size}, blocks of {block} bytes")
        if blocks * 4 > _MAX_TABLE_BYTES or blocks < -(-size // block):
            raise self._refuse(f"{self.format} header: a table of {blocks} blocks for {size} bytes in blocks of {block}")

    def _table(self, offset: int, count: int, order: str) -> array[int]:
        if offset >= self.file.size:
            raise self._refuse(f"{self.format} block table at {offset:#x}, expected inside the file of {self.file.size} bytes")
        data = bytearray(4 * count)
        with memoryview(data) as view:
            read_padded(self.file, offset, [view])
        table = array("I")
        table.frombytes(data)
        if order != sys.byteorder:
            table.byteswap()
        return table

    # --- what every image does ---

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of an image of {self.size}")
        target = Cursor(buffers)
        while length:
            inside = offset % self.block_size
            n = min(self.block_size - inside, length)
            self._read_part(offset // self.block_size, inside, target.views(n))
            offset += n
            length -= n

    def _read_part(self, index: int, inside: int, views: list[memoryview]) -> None:
        where = self._block(index)
        if where is None:
            for view in views:
                view[:] = bytes(len(view)) if len(view) > len(_ZEROES) else _ZEROES[: len(view)]
            return
        if where >= self.file.size:
            raise self._refuse(f"{self.format} block {index} at {where:#x}, expected inside the file of {self.file.size} bytes")
        read_padded(self.file, where + inside, views)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        with memoryview(data) as view:
            self.read_into(offset, [view])
        return bytes(data)

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        from .qcow2.image import Extent

        end = self.size if length is None else min(offset + length, self.size)
        while offset < end:
            index = offset // self.block_size
            there = self._block(index) is not None
            stop = min((index + 1) * self.block_size, end)
            while stop < end and (self._block(stop // self.block_size) is not None) == there:
                stop = min(stop + self.block_size, end)
            yield Extent(offset, stop - offset, there, not there, False, None)
            offset = stop

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class VdiImage(ForeignImage):
    """VirtualBox's format."""

    format = "vdi"
    # signature, version, header size, type, flags, description, block map, data, geometry, disk size, block size, …
    _HEADER = Struct("<64xIIIII256xII16x4xQIIII16x16x16s16s")

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        fields = self._HEADER.unpack(file.pread(0, self._HEADER.size))
        _, version, _, kind, _, self._map_at, self._data_at, self.size, self.block_size, extra, blocks, _, link, parent = fields
        if version != 0x00010001 or kind not in (1, 2):
            raise UnsupportedFeatureError(
                f"{self.path}: vdi version {version:#x}, type {kind}: only 1.1, dynamic or static, is read"
            )
        if any(link) or any(parent):
            raise UnsupportedFeatureError(f"{self.path}: a vdi image that depends on another one is not supported")
        if extra:
            raise UnsupportedFeatureError(f"{self.path}: vdi blocks with {extra} extra bytes are not supported")
        self._check_shape(blocks)
        self._blocks = self._table(self._map_at, blocks, "little")

    def _block(self, index: int) -> int | None:
        entry = self._blocks[index]
        return self._data_at + entry * self.block_size if entry < 0xFFFFFFFE else None


class VhdImage(ForeignImage):
    """Virtual PC's format, fixed or dynamic."""

    format = "vpc"
    _FOOTER = Struct(">8sIIQI4sI4sQQHBBII")
    _DYNAMIC = Struct(">8sQQIII")
    # Programs that mean the size field; others mean the geometry (QEMU, block/vpc.c).
    _BY_SIZE = (b"win ", b"qem2", b"d2v ", b"tap\0", b"vs  ", b"wa\0\0")

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        footer = file.pread(0, 512)
        if footer[:8] != b"conectix":
            footer = file.pread(max(file.size - 512, 0), 512)
        fields = self._FOOTER.unpack_from(footer)
        if fields[0] != b"conectix":
            raise self._refuse("no vpc footer")
        data_at, creator, size, kind = fields[3], fields[5], fields[9], fields[13]
        cylinders, heads, sectors = fields[10:13]
        geometry = cylinders * heads * sectors
        by_geometry = creator not in self._BY_SIZE and geometry and geometry != 65535 * 16 * 255
        self.size = geometry * 512 if by_geometry else size
        self._bitmap = 0
        self._blocks: array[int] | None = None
        if kind == 2:
            self.block_size = _MAX_BLOCK
            if not 0 < self.size <= file.size:
                raise self._refuse(f"vpc footer: {self.size} bytes in a file of {file.size}")
            return
        if kind != 3:
            raise UnsupportedFeatureError(f"{self.path}: vpc type {kind}: only fixed and dynamic images are supported")
        if data_at + self._DYNAMIC.size > file.size:
            raise self._refuse(f"vpc dynamic header at {data_at:#x}, expected inside the file of {file.size} bytes")
        cookie, _, table_at, _, entries, self.block_size = self._DYNAMIC.unpack(file.pread(data_at, self._DYNAMIC.size))
        if cookie != b"cxsparse":
            raise self._refuse(f"no vpc dynamic header at {data_at:#x}")
        self._check_shape(entries)
        self._bitmap = -(-self.block_size // 512 // 8 // 512) * 512
        self._blocks = self._table(table_at, entries, "big")

    def _block(self, index: int) -> int | None:
        if self._blocks is None:
            return index * self.block_size
        entry = self._blocks[index]
        return entry * 512 + self._bitmap if entry != 0xFFFFFFFF else None


class VmdkImage(ForeignImage):
    """VMware's sparse extent with its descriptor inside; grains may be compressed."""

    format = "vmdk"
    # magic, version, flags, capacity, grain size, descriptor at, its size, entries a table, redundant directory, directory,
    # overhead, unclean, line ends, compression
    _HEADER = Struct("<4sIIQQQQIQQQB4sH")
    _COMPRESSED, _ZERO_GRAINS = 1 << 16, 1 << 2
    _AT_END = (1 << 64) - 1

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        fields = self._HEADER.unpack(file.pread(0, self._HEADER.size))
        if fields[9] == self._AT_END:  # streamOptimized: the directory became known at the end
            fields = self._HEADER.unpack(file.pread(max(file.size - 1024, 0), self._HEADER.size))
        magic, version, flags, capacity, grain, text_at, text_size, self._per_table, _, directory_at, _, _, _, packing = fields
        if magic != b"KDMV" or version not in (1, 2, 3):
            raise UnsupportedFeatureError(f"{self.path}: vmdk version {version}: only sparse extents of 1 to 3 are read")
        self.size, self.block_size = min(capacity, _MAX_SIZE) * 512, min(grain, _MAX_BLOCK) * 512
        self._packed = bool(flags & self._COMPRESSED)
        self._zero_grains = bool(flags & self._ZERO_GRAINS)
        if self._packed and packing != 1:
            raise UnsupportedFeatureError(f"{self.path}: vmdk compression {packing} is not known; 1 is deflate")
        self._descriptor(text_at * 512, text_size * 512)
        if not 0 < self._per_table <= 512:
            raise self._refuse(f"vmdk header: {self._per_table} grains a table")
        grains = -(-self.size // self.block_size) if self.block_size else 0
        self._check_shape(grains)
        self._directory = self._table(directory_at * 512, -(-grains // self._per_table), "little")
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._grains: OrderedDict[int, bytes] = OrderedDict()

    def _descriptor(self, at: int, size: int) -> None:
        if not 0 < size <= 1 << 20 or at + size > self.file.size:
            raise self._refuse("a vmdk extent without its descriptor inside: the file that describes it is not supported")
        pairs = {}
        for line in bytes(self.file.pread(at, size)).split(b"\0")[0].decode("utf-8", "replace").splitlines():
            name, equals, value = line.partition("=")
            if equals:
                pairs[name.strip()] = value.strip().strip('"')
        kind, parent = pairs.get("createType", ""), pairs.get("parentCID", "ffffffff")
        self._kind, self._cid, self._parent = kind, pairs.get("CID", ""), parent
        if kind not in ("monolithicSparse", "streamOptimized"):
            raise UnsupportedFeatureError(
                f"{self.path}: vmdk type {kind!r}: only monolithicSparse and streamOptimized are supported"
            )
        if parent.lower() != "ffffffff":
            raise UnsupportedFeatureError(f"{self.path}: a vmdk image that depends on another one is not supported")

    def details(self) -> dict[str, object]:
        """What the descriptor says, by qemu-img's names."""
        extent: dict[str, object] = {"compressed": True} if self._packed else {}
        extent |= {"virtual-size": self.size, "filename": self.path, "cluster-size": self.block_size, "format": ""}
        try:
            cid, parent = int(self._cid, 16), int(self._parent, 16)
        except ValueError:
            raise self._refuse(f"vmdk descriptor: CID={self._cid}, parentCID={self._parent}: expected numbers") from None
        return {"cid": cid, "parent-cid": parent, "create-type": self._kind, "extents": [extent]}

    def _block(self, index: int) -> int | None:
        number, entry = divmod(index, self._per_table)
        table = self._tables.get(number)
        if table is None:
            where = self._directory[number]
            table = self._table(where * 512, self._per_table, "little") if where else array("I", bytes(4 * self._per_table))
            self._tables[number] = table
            while len(self._tables) > 4096:
                self._tables.popitem(last=False)
        sector = table[entry]
        return None if not sector or (sector == 1 and self._zero_grains) else sector * 512

    def _read_part(self, index: int, inside: int, views: list[memoryview]) -> None:
        where = self._block(index)
        if where is None or not self._packed:
            super()._read_part(index, inside, views)
            return
        data = self._grains.get(where)
        if data is None:
            data = self._grains[where] = self._unpack(index, where)
            while len(self._grains) > _UNPACKED:
                self._grains.popitem(last=False)
        Cursor(views).copy_from(memoryview(data)[inside : inside + sum(map(len, views))])

    def _unpack(self, index: int, where: int) -> bytes:
        if where + 12 > self.file.size:
            raise self._refuse(f"vmdk grain {index} at {where:#x}, expected inside the file of {self.file.size} bytes")
        length = int.from_bytes(self.file.pread(where + 8, 4), "little")
        if not 0 < length <= 2 * self.block_size or where + 12 + length > self.file.size:
            raise self._refuse(f"vmdk grain {index}: {length} compressed bytes at {where:#x}")
        try:
            data = zlib.decompressobj().decompress(bytes(self.file.pread(where + 12, length)), self.block_size)
        except zlib.error as e:
            raise self._refuse(f"vmdk grain {index}: {e}") from None
        return data.ljust(self.block_size, b"\0")


class VhdxImage(ForeignImage):
    """Hyper-V's format, closed cleanly: a log that would have to be replayed is refused."""

    format = "vhdx"
    _REGION = Struct("<16sQII")
    _ITEM = Struct("<16sII8x")
    _BAT = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")  # 2DC27766-F623-4200-9D64-115E9BFD4A08
    _METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")  # 8B7CA206-4790-4B9A-B8FE-575F050F886E
    _PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")  # CAA16737-FA36-4D43-B3B6-33F0AA44E76B
    _SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")  # 2FA54224-CD1B-4876-B211-5DBED83BF4B8
    _SECTOR = bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f")  # 8141BF1D-A96F-4709-BA47-F233A8FAAB5F
    _PRESENT = 6

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        if bytes(file.pread(0, 8)) != b"vhdxfile":
            raise self._refuse("no vhdx file identifier")
        headers = [bytes(file.pread(at, 4096)) for at in (64 << 10, 128 << 10)]
        headers = [h for h in headers if h[:4] == b"head"]
        if not headers:
            raise self._refuse("no vhdx header")
        newest = max(headers, key=lambda h: int.from_bytes(h[8:16], "little"))
        if any(newest[48:64]):  # the log's identifier
            raise UnsupportedFeatureError(f"{self.path}: the vhdx image was not closed: its log has to be replayed first")
        regions = self._entries(192 << 10, b"regi", 8, 16, self._REGION)
        if self._BAT not in regions or self._METADATA not in regions:
            raise self._refuse("vhdx region table without block table or metadata")
        base = regions[self._METADATA][0]
        items = self._entries(base, b"metadata", 10, 32, self._ITEM)

        def number(item: bytes, length: int) -> int:
            if item not in items:
                raise self._refuse("vhdx metadata are not complete")
            return int.from_bytes(file.pread(base + items[item][0], length), "little")

        parameters = number(self._PARAMETERS, 8)
        if parameters >> 32 & 2:
            raise UnsupportedFeatureError(f"{self.path}: a vhdx image that depends on another one is not supported")
        self.size, self.block_size, sector = number(self._SIZE, 8), parameters & 0xFFFFFFFF, number(self._SECTOR, 4)
        if sector not in (512, 4096):
            raise self._refuse(f"vhdx logical sectors of {sector} bytes")
        blocks = -(-self.size // self.block_size) if self.block_size else 0
        self._check_shape(2 * blocks)
        self._ratio = max((sector << 23) // self.block_size, 1)
        where, length = regions[self._BAT]
        entries = blocks + (blocks - 1) // self._ratio
        if length < 8 * entries:
            raise self._refuse(f"vhdx block table of {length} bytes, expected at least {8 * entries}")
        words = self._table(where, 2 * entries, "little")
        self._blocks = [words[2 * i] | words[2 * i + 1] << 32 for i in range(entries)]

    def _entries(self, at: int, magic: bytes, count_at: int, first: int, shape: Struct) -> dict[bytes, tuple[int, int]]:
        table = bytes(self.file.pread(at, 64 << 10))
        count = int.from_bytes(table[count_at : count_at + 2], "little")
        if not table.startswith(magic) or first + count * shape.size > len(table):
            raise self._refuse(f"vhdx table at {at:#x}: {count} entries")
        found = {}
        for i in range(count):
            identifier, offset, length, *_ = shape.unpack_from(table, first + i * shape.size)
            found[identifier] = (offset, length)
        return found

    def _block(self, index: int) -> int | None:
        entry = self._blocks[index + index // self._ratio]
        return entry >> 20 << 20 if entry & 7 == self._PRESENT else None


_OPENERS = {"vhdx": VhdxImage, "vdi": VdiImage, "vpc": VhdImage, "vmdk": VmdkImage}
FORMATS = tuple(_OPENERS)


def probe(file: HostFile) -> str | None:
    """Which of these formats the file is in, if any."""
    start = bytearray(512)
    with memoryview(start) as view:
        read_padded(file, 0, [view])
    if start[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    if start[:4] == b"KDMV":
        return "vmdk"
    if start[:8] == b"conectix":
        return "vpc"
    if start[:8] == b"vhdxfile":
        return "vhdx"
    return None


def open_foreign(file: HostFile, fmt: str) -> ForeignImage:
    """Open an image of one of FORMATS. ImageFormatError, UnsupportedFeatureError."""
    try:
        return _OPENERS[fmt](file)
    except OSError as e:
        raise ImageFormatError(f"{file.path}: not a {fmt} image: {e.strerror}") from None
