"""Virtual PC's VHD, fixed and dynamic. Source: Virtual Hard Disk Image Format Specification 1.0."""

from __future__ import annotations

from struct import Struct

from ..errors import UnsupportedFeatureError
from ..hostfile import HostFile
from .blocks import MAX_BLOCK, ForeignImage, Table


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
        self._blocks: Table | None = None
        if kind == 2:
            self.block_size = MAX_BLOCK
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
        self._blocks = self._table(table_at, entries, "I", "big", self._there)

    def _block(self, index: int) -> int | None:
        if self._blocks is None:
            return index * self.block_size
        entry = self._blocks[index]
        return entry * 512 + self._bitmap if self._there(entry) else None

    @staticmethod
    def _there(entry: int) -> bool:
        return entry != 0xFFFFFFFF

    def _skip(self, index: int, there: bool) -> int:
        return index if self._blocks is None else self._blocks.skip(index, there)
