"""Hyper-V's VHDX, closed cleanly. Source: [MS-VHDX]."""

from __future__ import annotations

from struct import Struct

from ..errors import UnsupportedFeatureError
from ..hostfile import HostFile
from .blocks import ForeignImage


class VhdxImage(ForeignImage):
    """Hyper-V's format, closed cleanly: a log that would have to be replayed is refused."""

    format = "vhdx"
    _REGION = Struct("<16sQII")  # identifier, offset, length, whether it has to be known
    _ITEM = Struct("<16sIII4x")  # identifier, offset, length, flags
    _BAT = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")  # 2DC27766-F623-4200-9D64-115E9BFD4A08
    _METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")  # 8B7CA206-4790-4B9A-B8FE-575F050F886E
    _PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")  # CAA16737-FA36-4D43-B3B6-33F0AA44E76B
    _SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")  # 2FA54224-CD1B-4876-B211-5DBED83BF4B8
    _SECTOR = bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f")  # 8141BF1D-A96F-4709-BA47-F233A8FAAB5F
    _PHYSICAL = bytes.fromhex("c748a3cd5d4471449cc9e9885251c556")  # CDA348C7-445D-4471-9CC9-E9885251C556
    _PAGE83 = bytes.fromhex("ab12cabee6b2234593efc309e000c746")  # BECA12AB-B2E6-4523-93EF-C309E000C746
    _PARENT = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")  # A8D35F2D-B30B-454D-ABF7-D3D84834AB0C
    _REGIONS, _ITEMS = (_BAT, _METADATA), (_PARAMETERS, _SIZE, _SECTOR, _PHYSICAL, _PAGE83, _PARENT)
    _REGION_REQUIRED, _ITEM_REQUIRED = 1 << 0, 1 << 2
    _PRESENT = 6

    def __init__(self, file: HostFile) -> None:
        super().__init__(file)
        if bytes(file.pread(0, 8)) != b"vhdxfile":
            raise self._refuse("no vhdx file identifier")
        # Of two headers one is valid at any time; the other may be half-written (2.2.2).
        headers = [bytes(file.pread(at, 4096)) for at in (64 << 10, 128 << 10)]
        headers = [h for h in headers if h[:4] == b"head" and checksum(h) == int.from_bytes(h[4:8], "little")]
        if not headers:
            raise self._refuse("no vhdx header, or none with the right checksum")
        newest = max(headers, key=lambda h: int.from_bytes(h[8:16], "little"))
        if any(newest[48:64]):  # the log's identifier
            raise UnsupportedFeatureError(f"{self.path}: the vhdx image was not closed: its log has to be replayed first")
        regions = self._entries(192 << 10, b"regi", 8, 16, self._REGION, self._REGIONS, self._REGION_REQUIRED)
        if self._BAT not in regions or self._METADATA not in regions:
            raise self._refuse("vhdx region table without block table or metadata")
        base = regions[self._METADATA][0]
        items = self._entries(base, b"metadata", 10, 32, self._ITEM, self._ITEMS, self._ITEM_REQUIRED)

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
        self._check_shape(blocks, 1 << 20, 1 << 28)
        self._ratio = (sector << 23) // self.block_size
        where, length = regions[self._BAT]
        entries = blocks + (blocks - 1) // self._ratio
        if length < 8 * entries:
            raise self._refuse(f"vhdx block table of {length} bytes, expected at least {8 * entries}")
        self._blocks = self._table(where, entries, "Q", "little", self._there)

    def _entries(
        self, at: int, magic: bytes, count_at: int, first: int, shape: Struct, known: tuple[bytes, ...], required: int
    ) -> dict[bytes, tuple[int, int]]:
        size = 64 << 10
        if at + size > self.file.size:
            raise self._refuse(f"vhdx table at {at:#x}, expected inside the file of {self.file.size} bytes")
        table = bytes(self.file.pread(at, size))
        count = int.from_bytes(table[count_at : count_at + 2], "little")
        if not table.startswith(magic) or first + count * shape.size > size:
            raise self._refuse(f"vhdx table at {at:#x}: {count} entries")
        found = {}
        for i in range(count):
            identifier, offset, length, flags = shape.unpack_from(table, first + i * shape.size)
            if identifier not in known and flags & required:
                raise UnsupportedFeatureError(f"{self.path}: vhdx table at {at:#x}: {identifier.hex()} is required and not known")
            found[identifier] = (offset, length)
        return found

    def _block(self, index: int) -> int | None:
        entry = self._blocks[index + index // self._ratio]
        return entry >> 20 << 20 if self._there(entry) else None

    @classmethod
    def _there(cls, entry: int) -> bool:
        return entry & 7 == cls._PRESENT

    def _skip(self, index: int, there: bool) -> int:
        at = self._blocks.skip(index + index // self._ratio, there)
        return max(at - at // (self._ratio + 1), index)  # every so many blocks there is an entry for a bitmap


def checksum(structure: bytes) -> int:
    """CRC-32C of a structure with zeroes in the checksum's place, bytes 4 to 8 ([MS-VHDX], 2.2.2)."""
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    crc = 0xFFFFFFFF
    for byte in structure[:4] + bytes(4) + structure[8:]:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
