"""The memory map that guests are given: which guest-physical addresses are RAM, and which to keep away from.

Source: ACPI 6.5, section 15 (the E820 types); reference machine-x86_64, section 9.3. Handed over in the zero page or the PVH
start info, which use the same types.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final, NamedTuple

from vmm_core.errors import BootError
from vmm_core.x86_64.layout import Microvm, Range

RAM: Final = 1  # ACPI 6.5, table 15.6: AddressRangeMemory
RESERVED: Final = 2  # AddressRangeReserved

E820_ENTRY: Final = Struct("<QQI")


class MapEntry(NamedTuple):
    """`size` bytes from `base` on are of E820 type `type`."""

    base: int
    size: int
    type: int


def memory_map(ram: Iterable[tuple[int, int]]) -> list[MapEntry]:
    """Return the map of a machine with RAM at `ram`, pairs of (base, size): ascending, disjoint, nothing empty.

    All RAM is listed but for a PC's video memory and expansion ROMs (0xA0000 to 0xDFFFF), where guests probe for both.
    Raises BootError when the first region does not start at 0 or ends below 2 MiB.
    """
    low, *high = (Range(base, size) for base, size in ram)
    if low.base != 0 or low.size < 2 << 20:
        raise BootError(f"{low.size} bytes of RAM at {low.base:#x} are too few to boot from; at least 2 MiB at 0 are needed")
    entries = [
        MapEntry(0, Microvm.LOW_RAM_TOP, RAM),
        MapEntry(Microvm.LOW_RAM_TOP, 0xA_0000 - Microvm.LOW_RAM_TOP, RESERVED),
        MapEntry(*Microvm.FIRMWARE_AREA, RESERVED),
        MapEntry(Microvm.KERNEL_BASE, low.end - Microvm.KERNEL_BASE, RAM),
        MapEntry(*Microvm.KVM_IDENTITY_MAP, RESERVED),
        MapEntry(*Microvm.KVM_TSS, RESERVED),
        *(MapEntry(*region, RAM) for region in high),
    ]
    return sorted(entries)
