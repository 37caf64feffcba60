"""The virtio-serial controller and its ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import key
from ..errors import BadKey
from ..values import ID, Integer, Reference
from .base import IOTHREAD, NOWHERE, Device

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import ClassVar

MAX_PORTS = 31


class VirtioSerial(Device, selector="virtio-serial-device"):
    """The controller that consoles are plugged into. One per machine, in front of its ports."""

    max_ports: int | None = key(
        Integer(1, MAX_PORTS, bits=32),
        default=None,
        name="max_ports",
        doc="ports at most; default: as many as there are",
        note="StratoVirt's microvm has one port, whatever is asked for",
    )
    iothread: str | None = key(
        IOTHREAD, default=None, doc="the I/O thread that serves it and its ports", note="not in StratoVirt"
    )

    def join(self, others: Sequence[Device]) -> None:
        if any(isinstance(other, VirtioSerial) for other in others):
            raise BadKey("", "one virtio-serial-device per machine")


class SerialPort(Device):
    """What the two kinds of port share."""

    unknown: ClassVar[dict[str, str]] = {
        **Device.unknown,
        "bus": "there is one virtio-serial-device, and every port belongs to it: leave this out",
    }
    place: ClassVar[str] = NOWHERE

    id: str = key(ID, doc="name of the device")
    chardev: str = key(Reference("chardev"), doc="the -chardev that it talks to")
    nr: int | None = key(
        Integer(0, MAX_PORTS - 1, bits=32), default=None, doc="port number; default: the next, and 0 for the first virtconsole"
    )
    name: str | None = key(ID, default=None, doc="name that the guest sees; default: the id", note="not in StratoVirt")

    def join(self, others: Sequence[Device]) -> None:
        controller = next((other for other in others if isinstance(other, VirtioSerial)), None)
        if controller is None:
            raise BadKey("", "needs a virtio-serial-device in front of it")
        *before, (nr, _) = numbered([*ports_of(others), self])
        limit = controller.max_ports or MAX_PORTS
        if nr >= limit:
            raise BadKey("" if self.nr is None else f"nr={nr}", f"port {nr} of {limit}: the first is number 0")
        for taken, other in before:
            if taken == nr:
                raise BadKey(f"nr={nr}", f"{other.selector} {other.id} has this number")


class Virtconsole(SerialPort, selector="virtconsole"):
    """A port that is a console (hvc0 in a Linux guest)."""


class Virtserialport(SerialPort, selector="virtserialport"):
    """A port that programs in the guest open by its name (/dev/virtio-ports/NAME in a Linux guest)."""

    def check(self) -> None:
        if self.nr == 0:
            raise BadKey("nr=0", "port 0 is for a virtconsole")


def ports_of(devices: Iterable[Device]) -> list[SerialPort]:
    """Return the ports among `devices`, in their order."""
    return [device for device in devices if isinstance(device, SerialPort)]


def numbered(ports: Iterable[SerialPort]) -> list[tuple[int, SerialPort]]:
    """Give each port its number, as StratoVirt does: 0 for a first virtconsole, otherwise one more than the highest so far."""
    found: list[tuple[int, SerialPort]] = []
    for port in ports:
        taken = [nr for nr, _ in found]
        if port.nr is not None:
            nr = port.nr
        elif isinstance(port, Virtconsole) and 0 not in taken:
            nr = 0
        else:
            nr = max(taken, default=0) + 1
        found.append((nr, port))
    return found
