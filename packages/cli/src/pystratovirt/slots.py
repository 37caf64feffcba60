"""Which virtio-mmio slot a device gets (reference machine-x86_64, section 8.1).

Slots 0 to 3 are for disks and 4 and 5 for network devices: clients fill and empty them while the machine runs. Devices of the
command line take the next one of their kind, and every other device one behind them, in the order given. A network device whose
frames the host's kernel or another process moves (vhost, vhost-user) counts among the others.

StratoVirt ends a start with a fifth disk; here, when the machine has ACPI, it goes behind as well, and cannot be replaced then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pystratovirt.cmdline.drivers.base import DISK, NET, NOWHERE, OTHER
from pystratovirt.cmdline.errors import CommandLineError, show

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pystratovirt.cmdline.drivers.base import Device
    from pystratovirt.cmdline.drivers.net import VirtioNet
    from pystratovirt.cmdline.netdevs import Netdev

DISK_SLOTS = range(4)
NET_SLOTS = range(4, 6)
LEGACY_END = 11  # of StratoVirt's machine, and of one whose guest learns of devices from the MP table
ACPI_END = 41  # as many as have an interrupt of their own (`vmm_core.x86_64.layout`)


def place(devices: Sequence[Device], netdevs: Mapping[str, Netdev], *, acpi: bool, ignored: bool = False) -> list[int | None]:
    """Return the slot of each device, None for one that is part of another. Raises CommandLineError when there is no room.

    `acpi`: the machine has ACPI; `ignored`: its guest is told not to look.
    """
    disks, nets = iter(DISK_SLOTS), iter(NET_SLOTS)
    others = iter(range(NET_SLOTS.stop, ACPI_END if acpi and not ignored else LEGACY_END))
    found: list[int | None] = []
    for device in devices:
        if device.place == NOWHERE:
            found.append(None)
            continue
        kind = _kind(device, netdevs)
        slot = next(disks, None) if kind == DISK else next(nets, None) if kind == NET else None
        if slot is None and (acpi or kind == OTHER):
            slot = next(others, None)
        if slot is None:
            raise CommandLineError("-device", f"{device.selector}: id={show(device.id)}", _full(kind, acpi, ignored))
        found.append(slot)
    return found


def _kind(device: Device, netdevs: Mapping[str, Netdev]) -> str:
    """Return which slots a device goes into."""
    if device.place != NET:
        return device.place
    from pystratovirt.cmdline.netdevs import Tap, VhostUser  # of use to those only that have a network

    netdev = netdevs[cast("VirtioNet", device).netdev]
    return OTHER if isinstance(netdev, VhostUser) or (isinstance(netdev, Tap) and netdev.vhost) else NET


def _full(kind: str, acpi: bool, ignored: bool) -> str:
    disks, nets = len(DISK_SLOTS), len(NET_SLOTS)
    end = LEGACY_END if ignored else ACPI_END
    if acpi:
        who = "a guest that is told acpi=off finds" if ignored else "a microvm has room for"
        return f"{who} {end - NET_SLOTS.stop} devices beside {disks} disks and {nets} network devices"
    others = LEGACY_END - NET_SLOTS.stop
    number, what = {DISK: (disks, "disks"), NET: (nets, "network devices")}.get(kind, (others, "other devices"))
    return f"a microvm without ACPI has room for {number} {what}"
