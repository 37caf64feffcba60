"""Puts socket devices together."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pystratovirt import log
from pystratovirt.errors import VmError, blame

if TYPE_CHECKING:
    from pystratovirt.cmdline.drivers.vsock import VhostVsock, VirtioVsock
    from pystratovirt.vm import VirtualMachine
    from virtio_devices.device import VirtioDevice

VHOST_VSOCK = "/dev/vhost-vsock"


def build_vhost_vsock(vm: VirtualMachine, device: VhostVsock, name: str) -> VirtioDevice:
    """Return a socket device on the kernel's vhost, with the passed descriptor if there is one."""
    from virtio_devices.vhost_kernel import VhostKernel
    from virtio_devices.vsock.vhost import VhostVsockDevice

    option = f"-device vhost-vsock-device,id={device.id}"
    with blame(option):
        if device.vhostfd is None:
            vhost = VhostKernel.open(name, VHOST_VSOCK)
        else:
            vhost = VhostKernel(name, _inherited(option, device.vhostfd))
        return VhostVsockDevice(name, vm.main_loop, vm.machine.memory, device.guest_cid, vhost)


def build_virtio_vsock(vm: VirtualMachine, device: VirtioVsock, name: str) -> VirtioDevice:
    """Return a socket device on unix sockets of the host."""
    from virtio_devices.vsock.user import UserVsockDevice

    (loop,) = vm.loops(device.iothread)
    with blame(f"-device virtio-vsock-device,id={device.id}"):
        return UserVsockDevice(name, loop, device.guest_cid, device.path, report=log.warn)


def _inherited(option: str, fd: int) -> int:
    """Take over a descriptor that this process was started with. What it opened itself is nobody's to name."""
    inherited = False
    with suppress(OSError):
        inherited = os.get_inheritable(fd)
    if not inherited:
        raise VmError(f"{option}: vhostfd={fd}: no descriptor that was passed by that number, or it is in use")
    os.set_inheritable(fd, False)
    return fd
