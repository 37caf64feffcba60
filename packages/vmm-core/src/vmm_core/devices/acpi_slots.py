"""Slots that a guest finds a device in later: the register that its ACPI asks, and the event that makes it ask.

A slot that is empty at power-on is described to the guest as a device that is not there. When it is filled, its bit appears in
the register, and an event says where to look. It stays there until the next reset even if the slot is emptied: Linux has no way
to let go of a device that ACPI told of (drivers/acpi/acpi_platform.c never unregisters one), and would not take it a second
time. What it sees of an emptied slot is up to the device: no capacity, no link.

Not here: the AML that reads the register (`vmm_core.acpi.devices`), and the devices.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from vmm_core.devices.acpi_pm import FIRST_SLOT, SLOTS
from vmm_core.state import expect, expect_range, versioned

if TYPE_CHECKING:
    from collections.abc import Callable


@versioned(1)
class AcpiSlotsState(NamedTuple):
    """Bit n is slot n: empty at the last power-on; filled since; filled now or not one of these slots."""

    empty: int
    appeared: int
    filled: int


class AcpiSlots:
    """A device of the memory bus: four bytes, read-only."""

    def __init__(self, raise_event: Callable[[int], None]) -> None:
        """`raise_event` adds to the events that the guest has not read (`acpi_pm.AcpiPm.raise_event`)."""
        self._raise_event = raise_event
        self._lock = Lock()
        self._empty = self._appeared = 0
        self._filled = (1 << SLOTS) - 1

    @property
    def empty(self) -> list[int]:
        """The slots that the tables of the next power-on, or of the first, describe as empty."""
        return [number for number in range(SLOTS) if not self._filled >> number & 1]

    def fill(self, number: int) -> None:
        """A slot has a device. Tell the guest, if it does not know."""
        bit = _bit(number)
        with self._lock:
            self._filled |= bit
            new = self._empty & ~self._appeared & bit
            self._appeared |= new
        if new:
            self._raise_event(FIRST_SLOT << number)

    def clear(self, number: int) -> None:
        """A slot has no device any more, which is what the next power-on finds."""
        with self._lock:
            self._filled &= ~_bit(number)

    def read(self, offset: int, size: int) -> int:
        """Which empty slots have been filled."""
        return self._appeared >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing can be written."""

    def reset(self) -> None:
        """Power on: tables are about to be made of what is filled now."""
        with self._lock:
            self._empty, self._appeared = (1 << SLOTS) - 1 & ~self._filled, 0

    def save(self) -> AcpiSlotsState:
        """Take the state."""
        with self._lock:
            return AcpiSlotsState(self._empty, self._appeared, self._filled)

    def restore(self, state: object) -> None:
        """Put a state back. Raises StateError. No event: the event register's own state has it."""
        new = expect(state, AcpiSlotsState, "acpi-slots")
        for name, value in zip(new._fields, new, strict=True):
            expect_range(value, 0, (1 << SLOTS) - 1, f"acpi-slots.{name}")
        with self._lock:
            self._empty, self._appeared, self._filled = new


def _bit(number: int) -> int:
    if not 0 <= number < SLOTS:
        raise ValueError(f"slot {number} has no event; those are 0 to {SLOTS - 1}")
    return 1 << number
