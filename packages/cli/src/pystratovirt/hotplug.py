"""Devices that come and go while the machine runs: back ends by name, and the six slots they go into (reference qmp, section 9).

Slots 0 to 3 have a disk each and 4 and 5 a network device, from the start and always: a disk without an image has no capacity, a
network device without a network no link. Plugging gives a device its back end, and unplugging takes it away, so that a guest
that looks at the devices once, at boot, sees both. A guest with ACPI looks again (`vmm_core.devices.acpi_slots`).

A device is plugged under the name of its back end, and unplugging it lets go of both, as StratoVirt's clients expect. Messages
are StratoVirt's where it has one. Every operation either happens or leaves everything as it was.

Not here: QMP (`qmp_handlers`), and what back ends and devices are.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from pystratovirt.cmdline.drivers.base import DISK, NET, NOWHERE
from pystratovirt.cmdline.values import ID
from pystratovirt.slots import DISK_SLOTS, NET_SLOTS
from vmm_core.errors import VmmError
from vmm_core.machine.core import VmStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from pystratovirt.cmdline.backends import Drive, SocketChardev
    from pystratovirt.cmdline.netdevs import Netdev
    from pystratovirt.vm import VirtualMachine
    from virtio_devices.blk.device import BlkDevice
    from virtio_devices.net.device import NetDevice

REPLACEABLE = len(DISK_SLOTS) + len(NET_SLOTS)
_SLOTS = {DISK: DISK_SLOTS, NET: NET_SLOTS}
_WORDS = {DISK: "block", NET: "net"}
_DRIVERS = {DISK: "blk", NET: "net"}  # what a driver of the kind has in its name
_REMEMBERED = 64
_CHARDEVS = 64  # a client could else have the process remember any number of them


class HotPlugError(Exception):
    """What was asked for cannot be done; one line."""


class CloseError(HotPlugError):
    """Something is gone as asked for, but what was cached of it may not be on the disk."""


class Backend:
    """A drive or a network that a device can be plugged with, or is."""

    def __init__(self, kind: str, name: str, device: str | None = None, slot: int | None = None) -> None:
        self.kind = kind
        self.name = name  # of the drive or netdev
        self.device = device  # the id of the device that has it; empty when that has none
        self.slot = slot
        self.mac: bytes | None = None  # the slot's own address, while this has brought another


class HotPlug:
    """What is plugged into a running machine, and what could be. Belongs to the machine's thread."""

    def __init__(self, vm: VirtualMachine) -> None:
        """Take over what the command line plugged."""
        self._vm = vm
        self._backends: list[Backend] = []
        # Back ends that went with their device: clients may remove them by name afterwards.
        self._gone: OrderedDict[tuple[str, str], None] = OrderedDict()
        for slot, plugged in sorted(vm.slots.items()):
            device = plugged.declaration
            if device is not None and device.place in _SLOTS:
                name = getattr(device, "drive" if device.place == DISK else "netdev", None)
                if name is not None:
                    self._backends.append(Backend(device.place, name, device.id, slot))
        used = {(backend.kind, backend.name) for backend in self._backends}
        waiting = [(DISK, name) for name in vm.drives] + [(NET, name) for name in vm.netdevs]
        self._backends += [Backend(kind, name) for kind, name in waiting if (kind, name) not in used]

    # Back ends

    def add_drive(self, drive: Drive) -> None:
        """Open an image, for a device to come. Raises HotPlugError."""
        from block_qcow2.errors import BlockError, ImageInUseError
        from pystratovirt.drives import open_image

        self._expect_alive()
        for other in self._vm.drives.values():
            if other.file == drive.file and not (other.readonly and drive.readonly):
                raise HotPlugError(
                    f"Failed to add drive {drive.file}, file can only be shared with read_only. "
                    "Is it used more than once or another process using the same file?"
                )
        secrets = self._vm.config.secrets
        if drive.key_secret is not None and drive.key_secret not in secrets:
            raise HotPlugError(f"encrypt.key-secret: no -object secret has the id {drive.key_secret}")
        with suppress(OSError, ValueError):  # opening it says why
            # Before it is opened: for a watchdog or a tape that alone is too much.
            mode = os.stat(drive.file).st_mode  # noqa: PTH116 - pathlib is not imported at a start
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise HotPlugError(f"{drive.file} is not a regular file or block device.")
        try:
            disk = open_image(drive, secrets)
        except ImageInUseError:
            raise HotPlugError(
                f"Failed to get {'read' if drive.readonly else 'write'} lock on file: {drive.file}. "
                "Is it used more than once or another process using the same file?"
            ) from None
        except BlockError as error:
            raise HotPlugError(f"failed to open the file for block {drive.file}. Error: {error}") from None
        try:
            self._register(Backend(DISK, drive.id))
        except HotPlugError:
            disk.close()
            raise
        self._vm.drives[drive.id], self._vm.disks[drive.id] = drive, disk
        self._gone.pop((DISK, drive.id), None)

    def remove_drive(self, name: str) -> None:
        """Close an image that no device uses, or that went with its device. Raises HotPlugError."""
        self._remove(DISK, name, "Drive")

    def add_netdev(self, netdev: Netdev, take: Callable[[str], int | None]) -> None:
        """Open a network, for a device to come. `take` as in `devices.net.open_netdev`. Raises HotPlugError."""
        from pystratovirt.cmdline.netdevs import Unconnected
        from pystratovirt.devices.net import open_network

        self._expect_alive()
        backend = Backend(NET, netdev.id)
        self._register(backend)
        try:
            if not isinstance(netdev, Unconnected):
                self._vm.networks[netdev.id] = open_network(self._vm, netdev, take)
        except (VmmError, OSError) as error:
            self._backends.remove(backend)
            raise HotPlugError(f"Add netdev error: {error}") from None
        except BaseException:  # no room for a module, a thread
            self._backends.remove(backend)
            raise
        self._vm.netdevs[netdev.id] = netdev
        self._gone.pop((NET, netdev.id), None)

    def remove_netdev(self, name: str) -> None:
        """Close a network that no device uses, or that went with its device. Raises HotPlugError."""
        self._remove(NET, name, "Netdev")

    # Character devices

    def add_chardev(self, chardev: SocketChardev) -> None:
        """Take note of a socket that a network may be reached by. Nothing is connected yet. Raises HotPlugError."""
        self._expect_alive()
        declared = self._vm.declared_chardevs
        if chardev.id in declared:
            raise HotPlugError(f'Chardev "{chardev.id}" has been added')
        if len(declared) >= _CHARDEVS:
            raise HotPlugError(f"at most {_CHARDEVS} character devices")
        declared[chardev.id] = chardev

    def remove_chardev(self, name: str) -> None:
        """Forget a character device that nothing uses. Raises HotPlugError."""
        self._expect_alive()
        if name not in self._vm.declared_chardevs:
            raise HotPlugError(f"Chardev {name} not found")
        if self._vm.uses_chardev(name) or any(name == monitor.chardev for monitor in self._vm.config.monitors):
            raise HotPlugError(f"Chardev {name} is in use")
        del self._vm.declared_chardevs[name]

    def _register(self, backend: Backend) -> None:
        if any(backend.name in (other.name, other.device) for other in self._backends):
            raise HotPlugError(f"{backend.name} is already registered.")
        if sum(1 for other in self._backends if other.slot is None or other.slot < REPLACEABLE) >= REPLACEABLE:
            # Two spaces: StratoVirt's.
            raise HotPlugError(f"A maximum of  {REPLACEABLE} replaceable devices are supported.")
        self._backends.append(backend)

    def _remove(self, kind: str, name: str, what: str) -> None:
        self._expect_alive()
        found = next((backend for backend in self._backends if (backend.kind, backend.name) == (kind, name)), None)
        if found is None:
            if (kind, name) not in self._gone:
                raise HotPlugError(f"{what} {name} not found")
            del self._gone[kind, name]
            return
        if found.device is not None:
            user = f"device {found.device}" if found.device else "a device without an id"
            raise HotPlugError(f"{what} {name} is in use: {user} has it")
        self._release(found)

    def _release(self, backend: Backend) -> None:
        from block_qcow2.errors import BlockError

        self._backends.remove(backend)
        if backend.kind == NET:
            self._vm.close_netdev(backend.name)
            return
        try:
            self._vm.close_drive(backend.name)
        except (BlockError, OSError) as error:
            raise CloseError(f"{backend.name} is closed, but may lack what was written last: {error}") from None

    # Devices

    def plug(
        self,
        device: str,
        driver: str,
        addr: str | None,
        lun: int | None,
        *,
        drive: str | None = None,
        netdev: str | None = None,
        serial: str = "",
        mac: bytes | None = None,
    ) -> None:
        """Put a back end into a slot, under the id `device`. Raises HotPlugError.

        `addr` is the slot's number among its kind, decimal or with 0x; without one `lun` + 1 is; without both, 0. The back end is
        the one called as the device or, when there is none, the one called `drive` or `netdev`; of a drive and a network of one
        name, as the command line may have given them, the one that fits the driver. `serial` is a disk's. `mac` is a network
        device's, and of no effect when a driver has the device already.
        """
        self._expect_alive()
        try:
            ID.parse(device)
        except ValueError as error:
            raise HotPlugError(f"id: {error}") from None
        number = _slot_number(device, addr, lun)
        kind = next((kind for kind in (NET, DISK) if _DRIVERS[kind] in driver), None)
        found = self._find(device, kind) or self._find(device) or self._waiting_as((drive, netdev), kind)
        if found is None:
            raise HotPlugError("Failed to find device configuration.")
        if kind is None:
            raise HotPlugError("Unsupported replaceable device type.")
        if number >= len(_SLOTS[kind]):
            raise HotPlugError(f"A maximum of {_WORDS[kind]} {len(_SLOTS[kind])} replaceable devices are supported.")
        if found.kind != kind:
            raise HotPlugError(f"The device type is {_DRIVERS[kind]}, but the target config is not for this type.")
        slot = _SLOTS[kind][number]
        if any(each.slot == slot for each in self._backends):
            raise HotPlugError(f"The slot {number} is occupied already.")
        if found.device is not None or device in self._device_ids():
            raise HotPlugError(f"Device id {device} existed")
        try:
            self._attach(found, slot, serial, mac)
        except VmmError as error:
            raise HotPlugError(f"{device}: failed to update config. {error}") from None
        found.device, found.slot = device, slot
        self._vm.machine.fill(slot)

    def unplug(self, device: str) -> None:
        """Take a device's back end out of its slot and close it; or a back end that no device has.

        Raises HotPlugError; CloseError when it is done all the same.
        """
        self._expect_alive()
        if not device:  # those of the command line that have no id are not all meant by it
            raise HotPlugError("id: empty")
        found = self._find(device)
        if found is None:
            raise HotPlugError(f"Device {device} not found")
        if found.slot is not None:
            if found.slot >= REPLACEABLE:
                raise HotPlugError(f"Device {device} is in no slot that can be emptied")
            try:
                self._detach(found)
            except VmmError as error:
                raise HotPlugError(f"{device}: failed to update config. {error}") from None
            self._vm.machine.clear(found.slot)
            self._vm.slots[found.slot] = self._vm.slots[found.slot]._replace(declaration=None)
        self._gone[found.kind, found.name] = None
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        self._release(found)

    def backends(self, kind: str) -> list[Backend]:
        """Return the back ends of a kind: those in slots by slot, then the others."""
        chosen = [backend for backend in self._backends if backend.kind == kind]
        return sorted(chosen, key=lambda backend: (backend.slot is None, backend.slot))

    def _find(self, device: str, kind: str | None = None) -> Backend | None:
        """Return the back end of a device, or the one that waits for a device of its name; of any kind without `kind`."""
        fit = (each for each in self._backends if each.device == device and kind in (None, each.kind))
        return next(fit, None) or self._unplugged(device, kind)

    def _waiting_as(self, names: tuple[str | None, ...], kind: str | None) -> Backend | None:
        """Return a back end with one of `names` that waits for a device; one of the kind, if there is any."""
        waiting = (self._unplugged(name, fit) for fit in (kind, None) for name in names if name)
        return next((each for each in waiting if each is not None), None)

    def _unplugged(self, name: str, kind: str | None = None) -> Backend | None:
        waiting = (each for each in self._backends if each.name == name and each.device is None)
        return next((each for each in waiting if kind in (None, each.kind)), None)

    def _device_ids(self) -> set[str]:
        """Return the ids of all devices that there are now; what was unplugged has given its id back."""
        ids = {plugged.declaration.id for plugged in self._vm.slots.values() if plugged.declaration is not None}
        ids |= {part.id for part in self._vm.config.devices if part.place == NOWHERE}
        return ids | {backend.device for backend in self._backends if backend.device is not None}

    def _attach(self, backend: Backend, slot: int, serial: str, mac: bytes | None) -> None:
        device = self._vm.slots[slot].device
        if backend.kind == NET:
            card = cast("NetDevice", device)
            if backend.name in self._vm.networks:  # or it is connected to nothing
                card.attach(self._vm.networks[backend.name])
            if mac is not None and not card.active:  # a driver has read its address; StratoVirt never changes it
                backend.mac = card.mac
                card.give_mac(mac)
        else:
            drive, disk = self._vm.drives[backend.name], self._vm.disks[backend.name]
            cast("BlkDevice", device).attach(disk, serial=serial, iops=drive.iops_total or 0, bps=drive.bps_total or 0)

    def _detach(self, backend: Backend) -> None:
        assert backend.slot is not None
        device = cast("BlkDevice | NetDevice", self._vm.slots[backend.slot].device)
        if backend.kind == DISK or backend.name in self._vm.networks:
            device.detach()
        if backend.mac is not None:  # else it would be the next network's, and its own may be back in another slot by then
            cast("NetDevice", device).give_mac(backend.mac)

    def _expect_alive(self) -> None:
        if self._vm.machine.status is VmStatus.SHUTDOWN:
            raise HotPlugError("the machine has ended")


def _slot_number(device: str, addr: str | None, lun: int | None) -> int:
    if addr is None:
        return 0 if lun is None else lun + 1
    digits, base = (addr[2:], 16) if addr[:2] in ("0x", "0X") else (addr, 10)
    try:
        if not digits.isalnum() or not digits.isascii() or len(digits) > 16:
            raise ValueError
        return int(digits, base)
    except ValueError:
        raise HotPlugError(f"Invalid addr for device {device}") from None
