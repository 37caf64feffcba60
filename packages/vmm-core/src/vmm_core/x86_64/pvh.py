"""The start info of the PVH boot protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

An ELF kernel with a PHYS32_ENTRY note is entered in 32-bit protected mode with the address of this structure in EBX.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from vmm_core.x86_64.layout import Microvm, Range
from vmm_core.x86_64.memory_map import MapEntry

_MAGIC: Final = 0x336E_C578  # "xEn3" with bit 7 of the E set
# hvm_start_info: magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr, memmap_entries
_START_INFO = Struct("<IIIIQQQQIxxxx")
_MODULE = Struct("<QQQQ")  # hvm_modlist_entry: paddr, size, cmdline_paddr, reserved
_MEMMAP_ENTRY = Struct("<QQII")  # hvm_memmap_table_entry: addr, size, type, reserved; types as in E820


def start_info(memory_map: Sequence[MapEntry], *, initrd: Range | None = None, rsdp: int | None = None) -> bytes:
    """Return what belongs at the layout's PVH_START: start info, module list and memory map, one behind the other.

    `rsdp` is the address of ACPI's root pointer. The command line lies where the layout says.
    """
    modules = Microvm.PVH_START.base + _START_INFO.size
    entries = modules + _MODULE.size
    parts = [
        _START_INFO.pack(
            _MAGIC,
            1,
            0,
            1 if initrd else 0,
            modules if initrd else 0,
            Microvm.COMMAND_LINE.base,
            rsdp or 0,
            entries,
            len(memory_map),
        ),
        _MODULE.pack(*(initrd or (0, 0)), 0, 0),
        *(_MEMMAP_ENTRY.pack(*entry, 0) for entry in memory_map),
    ]
    data = b"".join(parts)
    assert len(data) <= Microvm.PVH_START.size
    return data
