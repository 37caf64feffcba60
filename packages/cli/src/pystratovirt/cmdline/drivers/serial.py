"""The virtio-serial controller and its ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import key
from ..errors import BadKey
from ..values import ID, Integer, Reference
from .base import NOWHERE, Device

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar


class VirtioSerial(Device, selector="virtio-serial-device"):
    """The controller that consoles are plugged into. One per machine, in front of its ports."""

    max_ports: int = key(
        Integer(1, 31, bits=32), default=31, name="max_ports", doc="ports at most", note="one port for now, as in StratoVirt"
    )

    def join(self, others: Sequence[Device]) -> None:
        if any(isinstance(other, VirtioSerial) for other in others):
            raise BadKey("", "one virtio-serial-device per machine")


class Virtconsole(Device, selector="virtconsole"):
    """A console port (hvc0 in a Linux guest)."""

    place: ClassVar[str] = NOWHERE

    id: str = key(ID, doc="name of the device")
    chardev: str = key(Reference("chardev"), doc="the -chardev that it talks to")
    nr: int | None = key(Integer(0, 30, bits=32), default=None, doc="port number")

    def check(self) -> None:
        if self.nr:
            raise BadKey(f"nr={self.nr}", "a virtio-serial-device has one port, number 0")

    def join(self, others: Sequence[Device]) -> None:
        if not any(isinstance(other, VirtioSerial) for other in others):
            raise BadKey("", "needs a virtio-serial-device in front of it")
        if any(isinstance(other, Virtconsole) for other in others):
            raise BadKey("", "the virtio-serial-device has one port, it is taken")
