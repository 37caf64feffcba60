"""Interrupt lines as a device sees them: something to raise, and nothing about the controller behind it.

Not here: message-signalled interrupts and routing, which belong to the hypervisor (`vmm_core.hypervisor`).
"""

from __future__ import annotations

from typing import Protocol


class InterruptLine(Protocol):
    """One wire into the interrupt controller, edge-triggered. Safe to use from any thread.

    `gsi` is the global system interrupt number of the wire (ACPI 6.5, section 5.2.13).
    """

    @property
    def gsi(self) -> int: ...

    def trigger(self) -> None:
        """Send one edge. Never blocks and never raises: a guest's behaviour cannot make an interrupt fail."""
        ...

    def fileno(self) -> int:
        """The event descriptor behind the wire: adding 1 to it sends an edge. For back ends in other processes."""
        ...
