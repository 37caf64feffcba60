"""VirtualBox's VDI. Source: VDICore.h as described in the comments of QEMU's block/vdi.c."""

from __future__ import annotations

from struct import Struct

from ..errors import UnsupportedFeatureError
from ..hostfile import HostFile
from .blocks import ForeignImage


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
        self._blocks = self._table(self._map_at, blocks, "I", "little", self._there)

    def _block(self, index: int) -> int | None:
        entry = self._blocks[index]
        return self._data_at + entry * self.block_size if self._there(entry) else None

    @staticmethod
    def _there(entry: int) -> bool:
        return entry < 0xFFFFFFFE

    def _skip(self, index: int, there: bool) -> int:
        return self._blocks.skip(index, there)
