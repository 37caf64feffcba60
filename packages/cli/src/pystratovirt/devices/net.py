"""Puts network devices together, and opens what they are connected to."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from pystratovirt import log
from virtio_devices.device import DeviceError
from virtio_devices.net.device import NetDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pystratovirt.cmdline.drivers.net import VirtioNet
    from pystratovirt.cmdline.netdevs import Connected, Tap, User
    from pystratovirt.vm import VirtualMachine
    from virtio_devices.net.backend import Backend

MAC_FIRST, MAC_LAST = bytes.fromhex("525400123456"), bytes.fromhex("5254001234fe")  # reference virtio, section 6.2


def build_net(vm: VirtualMachine, device: VirtioNet, name: str) -> NetDevice:
    """Return a network card on the netdev that `device` names."""
    backend = vm.networks[device.netdev]
    return NetDevice(
        name,
        vm.loops(device.iothread),
        vm.machine.memory,
        mac=device.mac or _free_mac(vm),
        backend=backend,
        pairs=backend.pairs if device.mq else 1,
        queue_size=device.queue_size,
        report=log.warn,
    )


def empty_net(vm: VirtualMachine, slot: int) -> NetDevice:
    """Return a network card that is connected to nothing yet: clients may connect it later, guests see no link until then."""
    return NetDevice(f"net-slot{slot}", [vm.main_loop], vm.machine.memory, mac=_free_mac(vm), report=log.warn)


def _free_mac(vm: VirtualMachine) -> bytes:
    """Return the first default address that no card has, nor is to have."""
    used = {getattr(device, "mac", None) for device in vm.config.devices}
    used |= {plugged.device.mac for plugged in vm.slots.values() if isinstance(plugged.device, NetDevice)}
    for last in range(MAC_FIRST[5], MAC_LAST[5] + 1):
        mac = bytes([*MAC_FIRST[:5], last])
        if mac not in used:
            return mac
    raise DeviceError("Failed to get a free mac address")


def open_network(vm: VirtualMachine, netdev: Connected, take: Callable[[str], int | None]) -> Backend:
    """Open what a -netdev or netdev_add of any type describes, as open_netdev() does."""
    from pystratovirt.cmdline.netdevs import VhostUser  # most machines have empty slots only

    if isinstance(netdev, VhostUser):
        from pystratovirt.devices import vhost_user

        return vhost_user.open_network(vm, netdev)
    return open_netdev(netdev, take)


def open_netdev(netdev: Tap | User, take: Callable[[str], int | None] = lambda _name: None) -> Backend:
    """Open what a -netdev or netdev_add describes. The caller closes it, after the device that uses it has let go of it.

    `take` hands over the descriptor that a client passed under a name, which is closed when opening fails. What has no such
    name is the number of a descriptor that this process inherited, which stays open then.

    Raises DeviceError, which names the netdev and the reason.
    """
    from pystratovirt.cmdline.netdevs import User

    if isinstance(netdev, User):
        from virtio_devices.net.passt import PasstBackend

        options = (("-t", netdev.tcp_ports), ("-u", netdev.udp_ports))
        return PasstBackend(netdev.id, netdev.path, [word for pair in options if pair[1] for word in pair if word])
    from virtio_devices.net.tap import adopt_tap, open_tap

    with ExitStack() as undo:
        fds = _descriptors(netdev.id, netdev.descriptors, take, undo)
        vhost_fds = _descriptors(netdev.id, netdev.vhost_descriptors, take, undo)
        if fds:
            tap = adopt_tap(netdev.id, fds)
        else:
            tap = open_tap(netdev.id, netdev.ifname or "", netdev.pairs)
            undo.callback(tap.close)
        backend: Backend = tap
        if netdev.vhost:
            from virtio_devices.net.vhost import open_vhost

            backend = open_vhost(tap, vhost_fds)
        undo.pop_all()
        return backend


def _descriptors(netdev: str, names: Sequence[str], take: Callable[[str], int | None], undo: ExitStack) -> list[int]:
    fds = []
    for name in names:
        fd = take(name)
        if fd is None:
            fd = _inherited(netdev, name)
            undo.callback(os.set_inheritable, fd, True)
        else:
            undo.callback(os.close, fd)
        if fd in fds:  # 3 and 03
            raise DeviceError(f"{netdev}: {name}: the same descriptor twice")
        fds.append(fd)
    return fds


def _inherited(netdev: str, name: str) -> int:
    """Return the descriptor whose number is `name`. What this process opened itself, or has taken over, is nobody's to name."""
    fd, inherited = -1, False
    if name.isascii() and name.isdigit() and len(name) < 10:
        fd = int(name)
        with suppress(OSError):
            inherited = os.get_inheritable(fd)
    if not inherited:
        raise DeviceError(f"{netdev}: {name}: no descriptor that was passed by that name or number, or it is in use")
    return fd
