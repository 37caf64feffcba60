"""Which virtio-mmio slot a device gets (reference machine-x86_64, section 8.1).

Slots 0 to 3 are for disks and 4 and 5 for network devices: clients fill and empty them while the machine runs. Devices of the
command line take the next one of their kind, and every other device one behind them, in the order given. StratoVirt ends a start
with a fifth disk; here, when the machine has ACPI, it goes behind as well, and cannot be replaced then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.drivers.base import DISK, NET, NOWHERE
from pystratovirt.cmdline.errors import CommandLineError, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pystratovirt.cmdline.drivers.base import Device

DISK_SLOTS = range(4)
NET_SLOTS = range(4, 6)
LEGACY_END = 11  # of StratoVirt's machine, and of one without ACPI
ACPI_END = 41  # as many as have an interrupt of their own (`vmm_core.x86_64.layout`)


def place(devices: Sequence[Device], *, acpi: bool) -> list[int | None]:
    """Return the slot of each device, None for one that is part of another. Raises CommandLineError when there is no room."""
    disks, nets = iter(DISK_SLOTS), iter(NET_SLOTS)
    others = iter(range(NET_SLOTS.stop, ACPI_END if acpi else LEGACY_END))
    found: list[int | None] = []
    for device in devices:
        if device.place == NOWHERE:
            found.append(None)
            continue
        slot = next(disks, None) if device.place == DISK else next(nets, None) if device.place == NET else None
        if slot is None and (acpi or device.place not in (DISK, NET)):
            slot = next(others, None)
        if slot is None:
            raise CommandLineError("-device", f"{device.selector}: id={show(device.id)}", _full(device.place, acpi))
        found.append(slot)
    return found


def _full(place: str, acpi: bool) -> str:
    disks, nets = len(DISK_SLOTS), len(NET_SLOTS)
    if acpi:
        return f"a microvm has room for {ACPI_END - NET_SLOTS.stop} devices beside {disks} disks and {nets} network devices"
    others = LEGACY_END - NET_SLOTS.stop
    number, what = {DISK: (disks, "disks"), NET: (nets, "network devices")}.get(place, (others, "other devices"))
    return f"a microvm without ACPI has room for {number} {what}"
