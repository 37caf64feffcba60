"""Puts the virtio-serial controller and its ports together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.drivers.serial import Virtconsole, VirtioSerial, numbered, ports_of
from pystratovirt.errors import blame
from virtio_devices.console.device import ConsoleDevice

if TYPE_CHECKING:
    from pystratovirt.vm import VirtualMachine


def build_serial(vm: VirtualMachine, device: VirtioSerial, name: str) -> ConsoleDevice:
    """Return the controller with the ports that the command line has for it."""
    ports = numbered(ports_of(vm.config.devices))
    (loop,) = vm.loops(device.iothread)
    # Each port costs a guest two queues, so there are no more than can be used.
    console = ConsoleDevice(name, loop, device.max_ports or max((nr + 1 for nr, _ in ports), default=1))
    try:
        for nr, port in ports:
            option = f"-device {port.selector},id={port.id}"
            with blame(option):
                made = console.add_port(nr, port.name or port.id, console=isinstance(port, Virtconsole))
                made.connect(vm.open_chardev(vm.config.chardevs[port.chardev], option))
    except BaseException:
        console.close()
        raise
    return console
