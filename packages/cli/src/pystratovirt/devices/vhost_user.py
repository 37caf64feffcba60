"""Puts devices together that another process serves, over the unix socket that a chardev names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt import log
from pystratovirt.cmdline.backends import SocketChardev
from pystratovirt.errors import VmError, blame
from virtio_devices.device import DeviceError, VirtioDevice

if TYPE_CHECKING:
    from pystratovirt.cmdline.drivers.vhost_user import VhostUserBlk, VhostUserFs
    from pystratovirt.cmdline.netdevs import VhostUser
    from pystratovirt.vm import VirtualMachine
    from virtio_devices.net.backend import Backend

_NOT_SHARED = "When configuring the vhost-user-fs-device or vhost-user-fs-pci device, the memory must be shared."


def build_blk(vm: VirtualMachine, device: VhostUserBlk, name: str) -> VirtioDevice:
    """Return a disk that the process behind the chardev serves."""
    from virtio_devices.vhost_user.blk import VhostUserBlk as Disk

    with blame(f"-device vhost-user-blk-device,id={device.id}"):
        path, retry = _socket(vm, device.chardev, client=True)
        return Disk(
            name,
            vm.main_loop,
            vm.machine.memory,
            path,
            num_queues=device.num_queues,
            queue_size=device.queue_size,
            retry=retry,
            report=log.warn,
        )


def build_fs(vm: VirtualMachine, device: VhostUserFs, name: str) -> VirtioDevice:
    """Return a folder that the process behind the chardev serves."""
    from virtio_devices.vhost_user.fs import VhostUserFs as Folder

    option = f"-device vhost-user-fs-device,id={device.id}"
    if not vm.machine.memory.shared:
        raise VmError(f"{option}: {_NOT_SHARED}")
    with blame(option):
        path, retry = _socket(vm, device.chardev, client=False)
        return Folder(name, vm.main_loop, vm.machine.memory, path, tag=device.tag, retry=retry, report=log.warn)


def open_network(vm: VirtualMachine, netdev: VhostUser) -> Backend:
    """Return the network that the process behind the chardev carries. Raises DeviceError."""
    from virtio_devices.vhost_user.net import VhostUserNetBackend

    path, retry = _socket(vm, netdev.chardev, client=True)
    return VhostUserNetBackend(netdev.id, path, vm.machine.memory, pairs=netdev.queues, retry=retry, report=log.warn)


def _socket(vm: VirtualMachine, name: str, *, client: bool) -> tuple[str, float | None]:
    """Return where to connect, and after how many seconds again (None: soon, and less and less often).

    Raises DeviceError for what is no unix socket, and when `client` for one to listen on. (Kata writes server,nowait for
    virtiofsd, and StratoVirt connects.)
    """
    chardev = vm.declared_chardevs.get(name)
    if chardev is None or vm.uses_chardev(name):
        raise DeviceError(f'Chardev "{name}" not found or is in use')
    if not isinstance(chardev, SocketChardev) or chardev.path is None:
        raise DeviceError(f'Chardev "{name}" backend should be unix-socket type.')
    if client and chardev.server:
        raise DeviceError(f"Argument 'server' or 'nowait' is not need for chardev '{chardev.path}'")
    return chardev.path, chardev.reconnect or None
