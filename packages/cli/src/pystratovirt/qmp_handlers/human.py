"""The human monitor over QMP: a few lines of text that management tools still use (reference qmp, section 13.2).

Not here: everything that has a QMP command of its own and nobody asks for in text.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from pystratovirt.cmdline.backends import Drive
from pystratovirt.cmdline.drivers.base import DISK, NET
from pystratovirt.cmdline.errors import CommandLineError
from pystratovirt.qmp_handlers.block import refusals_as_replies
from qmp_protocol.commands.debug import HumanMonitorCommand
from qmp_protocol.errors import GENERIC_ERROR, QmpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pystratovirt.runtime import Runtime
    from pystratovirt.vm import VirtualMachine
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from virtio_devices.device import VirtioDevice
    from virtio_devices.net.device import NetDevice

_DRIVERS: Final = {DISK: "virtio-blk-device", NET: "virtio-net-device"}  # of what clients have plugged in
_NO_ICOUNT: Final = 2**64 - 1
_HEAD: Final = f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"


class Snapshot(Protocol):
    """One internal snapshot of an image (`block_qcow2.qcow2.snapshots.Snapshot`)."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def vm_state_size(self) -> int: ...
    @property
    def date_sec(self) -> int: ...
    @property
    def vm_clock_nsec(self) -> int: ...
    @property
    def icount(self) -> int: ...


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the human monitor."""

    @server.handler(HumanMonitorCommand)
    def human_monitor_command(arguments: HumanMonitorCommand, call: Call) -> Any:
        words = arguments.command_line.split(" ")
        count = 2 if words[0] == "info" else 1
        name, rest = " ".join(words[:count]), words[count:]
        command, wanted = _COMMANDS.get(name, (None, 0))
        if command is None:
            raise QmpError(GENERIC_ERROR, f"Unsupported command: {name[:64]}")
        if len(rest) != wanted:
            raise QmpError(GENERIC_ERROR, "Invalid number of arguments")
        with refusals_as_replies():
            return command(runtime.vm, *rest)


def _drive_add(vm: VirtualMachine, _: str, options: str) -> dict[str, Any]:
    """Add a drive that `options` describes as -drive does. The first word names a PCI device that no machine has."""
    try:
        vm.hotplug.add_drive(Drive.parse("drive_add", options))
    except CommandLineError as error:
        raise QmpError(GENERIC_ERROR, str(error)) from None
    return {}  # StratoVirt's answer; QEMU's is a line of text


def _drive_del(vm: VirtualMachine, name: str) -> dict[str, Any]:
    vm.hotplug.remove_drive(name)
    return {}


def _info_block(vm: VirtualMachine) -> str:
    lines = []
    for backend in vm.hotplug.backends(DISK):
        drive = vm.drives[backend.name]
        notes = [drive.format, *(["read-only"] if drive.readonly else [])]
        lines.append(f"{backend.name}: {drive.file} ({', '.join(notes)})")
        if backend.device is not None:
            lines.append(f"    Attached to:      {backend.device}")
        lines.append(f"    Cache mode:       {'writeback, direct' if drive.direct else 'writeback'}")
    return "".join(f"{line}\r\n" for line in lines)


def _info_network(vm: VirtualMachine) -> str:
    """QEMU's lines: each card, then the network that it is connected to; at the end the networks that no card has."""
    lines = []
    used = {backend.slot: backend.name for backend in vm.hotplug.backends(NET) if backend.slot is not None}
    for slot, name, driver, device in _devices(vm):
        if slot not in used:
            continue
        card = cast("NetDevice", device)
        lines.append(
            f"{name}: index=0,type=nic,model={driver},macaddr={card.mac.hex(':')},link={'up' if card.link_up else 'down'}"
        )
        lines.append(f" \\ {_network(vm, used[slot])}")
        if counted := card.counters():
            lines.append(f"    {_pairs(counted)}")
    lines += [_network(vm, backend.name) for backend in vm.hotplug.backends(NET) if backend.slot is None]
    return "".join(f"{line}\r\n" for line in lines)


def _network(vm: VirtualMachine, name: str) -> str:
    netdev = vm.netdevs[name]
    said = [
        f",{key.name}={key.kind.render(getattr(netdev, key.attribute))}"
        for key in netdev.keys.values()
        if key.name != "id" and getattr(netdev, key.attribute) != key.default
    ]
    return f"{name}: index=0,type={netdev.selector or 'none'}{''.join(said)}"


def _info_stats(vm: VirtualMachine) -> str:
    """What each device counts. Requests that the kernel or another process serves are counted there, and not here."""
    lines = []
    for _, name, driver, device in _devices(vm):
        if counted := device.counters():
            lines += [f"{name} ({driver}):", f"    {_pairs(counted)}"]
    return "".join(f"{line}\r\n" for line in lines)


def _pairs(counted: Mapping[str, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in counted.items())


def _devices(vm: VirtualMachine) -> Iterator[tuple[int, str, str, VirtioDevice]]:
    """Yield slot, name, driver and device of everything that is plugged in. What has no id is called by its slot."""
    plugged = {backend.slot: (backend.device, _DRIVERS[kind]) for kind in (DISK, NET) for backend in vm.hotplug.backends(kind)}
    for slot, (declared, device) in sorted(vm.slots.items()):
        name, driver = (declared.id, declared.selector) if declared is not None else plugged.get(slot, (None, ""))
        if name is not None and device is not None:
            yield slot, name or f"slot{slot}", driver, device


def _info_snapshots(vm: VirtualMachine) -> str:
    disks: Mapping[str, Any] = vm.disks
    return snapshot_table({name: disk.snapshots() for name, disk in disks.items() if hasattr(disk, "snapshots")})


def snapshot_table(images: Mapping[str, Sequence[Snapshot]]) -> str:
    """Return StratoVirt's text for the snapshots of each qcow2 image. Lines end with CR LF."""
    if not images:
        return "There is no snapshot available.\r\n"
    lines = ["List of snapshots present on all disks:", "None"]
    for name, snapshots in images.items():
        lines += ["", f"List of partial (non-loadable) snapshots on '{name}':", _HEAD]
        lines += [_row(snapshot) for snapshot in snapshots]
    return "".join(f"{line}\r\n" for line in lines)


def _row(snapshot: Snapshot) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
    hundredths = snapshot.vm_clock_nsec // 10_000_000
    seconds, hundredths = divmod(hundredths, 100)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{hundredths:02}"
    icount = "" if snapshot.icount == _NO_ICOUNT else str(snapshot.icount)
    # An image may hold bytes that are no UTF-8, and JSON has no place for them.
    ident, name = (text.encode("utf-8", "backslashreplace").decode() for text in (snapshot.id, snapshot.name))
    return f"{ident:<9} {name:<16} {snapshot.vm_state_size:>6} B{date:>20}{clock:>13}{icount:>11}"


# What a line does, and how many words follow its name
_COMMANDS: Final[dict[str, tuple[Callable[..., Any], int]]] = {
    "drive_add": (_drive_add, 2),
    "drive_del": (_drive_del, 1),
    "info block": (_info_block, 0),
    "info network": (_info_network, 0),
    "info snapshots": (_info_snapshots, 0),
    "info stats": (_info_stats, 0),
}
