"""VMware's VMDK: monolithicSparse and streamOptimized. Source: VMware Virtual Disk Format 5.0."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from struct import Struct

from ..errors import UnsupportedFeatureError
from ..hostfile import Cursor, HostFile
from .blocks import MAX_BLOCK, MAX_SIZE, PAGES, ForeignImage, Table

_UNPACKED = 1 << 20  # bytes of grains, or one grain


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
        magic, version, flags, capacity, grain, text_at, text_size, per_table, _, directory_at, _, _, _, packing = fields
        if magic != b"KDMV" or version not in (1, 2, 3):
            raise UnsupportedFeatureError(f"{self.path}: vmdk version {version}: only sparse extents of 1 to 3 are read")
        self.size, self.block_size = min(capacity, MAX_SIZE) * 512, min(grain, MAX_BLOCK) * 512
        self._packed = bool(flags & self._COMPRESSED)
        self._zero_grains = bool(flags & self._ZERO_GRAINS)
        if self._packed and packing != 1:
            raise UnsupportedFeatureError(f"{self.path}: vmdk compression {packing} is not known; 1 is deflate")
        self._descriptor(text_at * 512, text_size * 512)
        if not 0 < per_table <= 512:
            raise self._refuse(f"vmdk header: {per_table} grains a table, expected 1 to 512")
        self._per_table: int = per_table
        grains = -(-self.size // self.block_size) if self.block_size else 0
        self._check_shape(grains)
        self._directory = self._table(directory_at * 512, -(-grains // self._per_table), "I", "little", bool)
        self._tables: OrderedDict[int, Table] = OrderedDict()  # by their places: many entries may name the same one
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
        table = self._grain_table(number)
        sector = table[entry] if table is not None else 0
        return sector * 512 if self._there(sector) else None

    def _there(self, sector: int) -> bool:
        return sector > (1 if self._zero_grains else 0)

    def _grain_table(self, number: int) -> Table | None:
        where: int = self._directory[number]
        if not where:
            return None
        table = self._tables.get(where)
        if table is None:
            table = self._tables[where] = self._table(where * 512, self._per_table, "I", "little", self._there)
            while len(self._tables) > PAGES:
                self._tables.popitem(last=False)
        return table

    def _skip(self, index: int, there: bool) -> int:
        number, entry = divmod(index, self._per_table)
        while number < self._directory.count:
            table = self._grain_table(number)
            if table is None:
                if there:
                    break
                number, entry = max(self._directory.skip(number, False), number + 1), 0
            elif table.skip(entry, there) < table.count:
                break
            else:
                number, entry = number + 1, 0
        return number * self._per_table + entry

    def _read_part(self, index: int, inside: int, views: list[memoryview]) -> None:
        where = self._block(index)
        if where is None or not self._packed:
            super()._read_part(index, inside, views)
            return
        data = self._grains.get(where)
        if data is None:
            data = self._grains[where] = self._unpack(index, where)
            while len(self._grains) > max(_UNPACKED // self.block_size, 1):
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
