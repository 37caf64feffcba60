"""Puts entropy devices together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt import log
from pystratovirt.errors import blame
from virtio_devices.rng import RngDevice, open_source

if TYPE_CHECKING:
    from pystratovirt.cmdline.drivers.rng import VirtioRng
    from pystratovirt.vm import VirtualMachine


def build_rng(vm: VirtualMachine, device: VirtioRng, name: str) -> RngDevice:
    """Return an entropy device on the source that `device` names."""
    (loop,) = vm.loops(device.iothread)
    with blame(f"-object rng-random,id={device.rng}"):
        source = open_source(vm.config.rngs[device.rng].filename)
    return RngDevice(name, loop, vm.clock, source, rate=device.rate or 0, report=log.warn)
