"""boot_params, the zero page of the Linux boot protocol (Linux kernel, Documentation/arch/x86/zero-page.rst).

Everything that this machine does not have (video modes, EDD, APM, EFI) stays zero, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from vmm_core.x86_64.bzimage import HEADER_ROOM, SETUP_HEADER
from vmm_core.x86_64.layout import Microvm, Range
from vmm_core.x86_64.memory_map import E820_ENTRY, MapEntry

_U8 = Struct("<B").pack_into
_U16 = Struct("<H").pack_into
_U32 = Struct("<I").pack_into
_U64 = Struct("<Q").pack_into

_ACPI_RSDP_ADDR: Final = 0x70
_EXT_RAMDISK_IMAGE: Final = 0xC0
_EXT_RAMDISK_SIZE: Final = 0xC4
_EXT_CMD_LINE_PTR: Final = 0xC8
_E820_ENTRIES: Final = 0x1E8
_BOOT_FLAG: Final = 0x1FE
_HEADER: Final = 0x202
_VERSION: Final = 0x206
_TYPE_OF_LOADER: Final = 0x210
_RAMDISK_IMAGE: Final = 0x218
_RAMDISK_SIZE: Final = 0x21C
_CMD_LINE_PTR: Final = 0x228
_CMDLINE_SIZE: Final = 0x238
_E820_TABLE: Final = 0x2D0
_E820_MAX: Final = 128

_UNDEFINED_LOADER: Final = 0xFF

# For kernels that bring no setup header: as much of one as kernels look at behind the 64-bit entry point.
_NO_HEADER = bytearray(0x264 - SETUP_HEADER)
_U16(_NO_HEADER, _BOOT_FLAG - SETUP_HEADER, 0xAA55)
_NO_HEADER[_HEADER - SETUP_HEADER : _VERSION - SETUP_HEADER] = b"HdrS"
_U16(_NO_HEADER, _VERSION - SETUP_HEADER, 0x020C)
_U32(_NO_HEADER, _CMDLINE_SIZE - SETUP_HEADER, 2047)
DEFAULT_HEADER: Final = bytes(_NO_HEADER)


def zero_page(
    memory_map: Sequence[MapEntry], *, header: bytes = DEFAULT_HEADER, initrd: Range | None = None, rsdp: int | None = None
) -> bytes:
    """Return the 4096 bytes of the zero page.

    `header` is the kernel's own setup header (at most HEADER_ROOM - SETUP_HEADER bytes), `rsdp` the address of ACPI's root
    pointer. The command line lies where the layout says.
    """
    assert len(header) <= HEADER_ROOM - SETUP_HEADER
    assert len(memory_map) <= _E820_MAX
    page = bytearray(Microvm.ZERO_PAGE.size)
    page[SETUP_HEADER : SETUP_HEADER + len(header)] = header
    _U8(page, _TYPE_OF_LOADER, _UNDEFINED_LOADER)
    _U32(page, _CMD_LINE_PTR, Microvm.COMMAND_LINE.base & 0xFFFF_FFFF)
    _U32(page, _EXT_CMD_LINE_PTR, Microvm.COMMAND_LINE.base >> 32)
    base, size = initrd or (0, 0)
    _U32(page, _RAMDISK_IMAGE, base & 0xFFFF_FFFF)
    _U32(page, _EXT_RAMDISK_IMAGE, base >> 32)
    _U32(page, _RAMDISK_SIZE, size & 0xFFFF_FFFF)
    _U32(page, _EXT_RAMDISK_SIZE, size >> 32)
    _U64(page, _ACPI_RSDP_ADDR, rsdp or 0)
    _U8(page, _E820_ENTRIES, len(memory_map))
    for index, entry in enumerate(memory_map):
        E820_ENTRY.pack_into(page, _E820_TABLE + index * E820_ENTRY.size, *entry)
    return bytes(page)
