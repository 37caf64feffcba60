"""The `-device` drivers that work. A class per driver; its members are the properties.

Drivers that are known but not supported yet stand in `notyet`. What a device does stands in virtio-devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .declare import Parameters, key
from .errors import BadKey
from .values import ID, Integer, PowerOfTwo, Reference, Text

if TYPE_CHECKING:
    from typing import ClassVar

_NO_PCI = "a virtio-mmio device has no PCI address"
U64_MAX = (1 << 64) - 1


class Device(Parameters):
    """A driver and its properties. `id` is empty when the driver allows none."""

    unknown: ClassVar[dict[str, str]] = dict.fromkeys(("bus", "addr", "multifunction"), _NO_PCI)

    id: str = key(ID, default="", doc="name of the device")


class VirtioBlk(Device, selector="virtio-blk-device"):
    """A disk."""

    id: str = key(ID, doc="name of the device")
    drive: str = key(Reference("drive"), doc="the -drive that holds its data")
    serial: str | None = key(Text(20), default=None, doc="serial number that the guest reads")
    iothread: str | None = key(Reference("iothread", shared=True), default=None, doc="the I/O thread that serves it")
    num_queues: int = key(Integer(1, 32, bits=16), default=1, doc="queues", note="StratoVirt's microvm always uses 1")
    queue_size: int = key(PowerOfTwo(4, 1024), default=256, doc="entries of a queue")
    bootindex: int | None = key(
        Integer(0, 255, bits=8), default=None, doc="accepted; a microvm boots its kernel", note="as in StratoVirt: no effect"
    )


class VirtioSerial(Device, selector="virtio-serial-device"):
    """The controller that consoles are plugged into. One per machine, in front of its ports."""

    max_ports: int = key(
        Integer(1, 31, bits=32), default=31, name="max_ports", doc="ports at most", note="one port for now, as in StratoVirt"
    )


class Virtconsole(Device, selector="virtconsole"):
    """A console port (hvc0 in a Linux guest)."""

    id: str = key(ID, doc="name of the device")
    chardev: str = key(Reference("chardev"), doc="the -chardev that it talks to")
    nr: int | None = key(Integer(0, 30, bits=32), default=None, doc="port number")

    def check(self) -> None:
        if self.nr:
            raise BadKey(f"nr={self.nr}", "a virtio-serial-device has one port, number 0")


class VirtioRng(Device, selector="virtio-rng-device"):
    """A source of random numbers."""

    rng: str = key(Reference("rng-random"), doc="the -object rng-random it reads")
    max_bytes: int | None = key(Integer(1, U64_MAX), default=None, doc="bytes in a period; with period")
    period: int | None = key(Integer(1, U64_MAX), default=None, doc="milliseconds; with max-bytes")

    def check(self) -> None:
        if (self.max_bytes is None) != (self.period is None):
            given, other = ("period", "max-bytes") if self.max_bytes is None else ("max-bytes", "period")
            raise BadKey(f"{given}={getattr(self, given.replace('-', '_'))}", f"needs {other} too")
        rate = self.rate
        if rate is not None and not 64 <= rate <= 1_000_000_000:
            raise BadKey(f"max-bytes={self.max_bytes}", f"{rate} bytes per second; must be 64 to 1000000000")

    @property
    def rate(self) -> int | None:
        """Bytes per second, or None for unlimited."""
        return self.max_bytes * 1000 // self.period if self.max_bytes is not None and self.period else None


DRIVERS: dict[str, type[Device]] = {
    "virtio-blk-device": VirtioBlk,
    "virtio-serial-device": VirtioSerial,
    "virtconsole": Virtconsole,
    "virtio-rng-device": VirtioRng,
}
