"""Accesses of a size that no bus knows: an instruction across a page end reaches us in pieces of 1 to 8 bytes."""

from __future__ import annotations

from vmm_core.bus import Bus


def read_bytes(bus: Bus, address: int, length: int) -> int:
    """Read `length` bytes one by one."""
    return sum(bus.read(address + at, 1) << 8 * at for at in range(length))


def write_bytes(bus: Bus, address: int, length: int, value: int) -> None:
    """Write `length` bytes one by one."""
    for at in range(length):
        bus.write(address + at, 1, value >> 8 * at & 0xFF)
