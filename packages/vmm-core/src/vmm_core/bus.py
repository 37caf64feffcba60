"""Address buses: port I/O, memory-mapped I/O and the test socket find their devices through the same class.

A bus maps disjoint ranges to devices and hands each one accesses relative to its own base. What hits nothing reads as
all ones and swallows writes, as on hardware.

Not here: guest RAM (`vmm_core.guestmem`), and doorbells that the hypervisor turns into events by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple, Protocol

from vmm_core.errors import BusError


class BusDevice(Protocol):
    """A device's face to a bus. Called on vCPU threads, several at once: a device guards its own state.

    Neither method may raise on anything that a guest does.
    """

    def read(self, offset: int, size: int) -> int:
        """Answer a read of `size` bytes (1, 2, 4 or 8) at `offset` within the device, as a little-endian value."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write of `size` bytes (1, 2, 4 or 8) at `offset` within the device."""
        ...


class Mapping(NamedTuple):
    """A device's place on a bus: addresses `base` to `base + length - 1`."""

    base: int
    length: int
    device: BusDevice
    name: str


class Bus:
    """Disjoint address ranges, found by bisection.

    The tables are replaced, never changed in place, so that vCPU threads look up without a lock while devices come and go.
    `add` and `remove` belong to the thread that owns the machine.
    """

    def __init__(self, name: str, size: int) -> None:
        """Make an empty bus of addresses 0 to `size - 1`; `name` appears in error messages."""
        self.name = name
        self.size = size
        self._table: tuple[list[int], list[Mapping]] = ([], [])

    @property
    def mappings(self) -> list[Mapping]:
        """Every mapping, in order of address."""
        return list(self._table[1])

    def add(self, base: int, length: int, device: BusDevice, name: str) -> None:
        """Place a device. Raises BusError when the range is empty, leaves the bus, or overlaps another device's."""
        if length <= 0 or base < 0 or base + length > self.size:
            raise BusError(f"{self.name}: {name} at {base:#x}+{length:#x} does not fit a bus of {self.size:#x} addresses")
        for other in self._table[1]:
            if base < other.base + other.length and other.base < base + length:
                raise BusError(
                    f"{self.name}: {name} at {base:#x}+{length:#x} overlaps {other.name} at {other.base:#x}+{other.length:#x}"
                )
        table = sorted([*self._table[1], Mapping(base, length, device, name)], key=lambda m: m.base)
        self._table = ([m.base for m in table], table)

    def remove(self, base: int) -> None:
        """Take away the device that starts at `base`. Raises BusError when none does."""
        table = [m for m in self._table[1] if m.base != base]
        if len(table) == len(self._table[1]):
            raise BusError(f"{self.name}: no device starts at {base:#x}")
        self._table = ([m.base for m in table], table)

    def find(self, address: int) -> Mapping | None:
        """Return the mapping that `address` is in, or None."""
        bases, table = self._table
        at = bisect_right(bases, address) - 1
        if at >= 0 and address < table[at].base + table[at].length:
            return table[at]
        return None

    def read(self, address: int, size: int) -> int:
        """Read `size` bytes at `address`; all ones where no device answers the whole access."""
        bases, table = self._table
        at = bisect_right(bases, address) - 1
        if at >= 0:
            base, length, device, _ = table[at]
            offset = address - base
            if offset + size <= length:
                return device.read(offset, size)
        return (1 << (8 * size)) - 1

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes at `address`; dropped where no device takes the whole access."""
        bases, table = self._table
        at = bisect_right(bases, address) - 1
        if at >= 0:
            base, length, device, _ = table[at]
            offset = address - base
            if offset + size <= length:
                device.write(offset, size, value)
