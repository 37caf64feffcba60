"""Puts the virtio-serial controller and its ports together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.drivers.serial import Virtconsole, VirtioSerial
from pystratovirt.errors import blame
from virtio_devices.console import ConsoleDevice

if TYPE_CHECKING:
    from pystratovirt.vm import VirtualMachine


def build_serial(vm: VirtualMachine, device: VirtioSerial, name: str) -> ConsoleDevice:
    """Return the controller with the ports that the command line has for it."""
    console = ConsoleDevice(name, vm.main_loop)
    for port in vm.config.devices:
        if isinstance(port, Virtconsole):
            option = f"-device virtconsole,id={port.id}"
            with blame(option):
                console.port.connect(vm.open_chardev(vm.config.chardevs[port.chardev], option))
    return console
