"""What all drivers' declarations share: an id, a place in the machine, and what they need of those in front of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import Parameters, key
from ..values import ID, Reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar

_NO_PCI = "a virtio-mmio device has no PCI address"

# Of drivers whose queues are not served here: there is nothing that a thread of ours could do.
NO_LOOP = "queues are served by the host's kernel, or by another process, which have threads of their own"
IOTHREAD = Reference("iothread", shared=True)

# Where a device goes (see `pystratovirt.slots`).
DISK, NET, OTHER = "disk", "net", "other"
NOWHERE = ""  # it is part of another device


class Device(Parameters):
    """A driver and its properties. `id` is empty when the driver allows none."""

    unknown: ClassVar[dict[str, str]] = dict.fromkeys(("bus", "addr", "multifunction"), _NO_PCI)
    place: ClassVar[str] = OTHER

    id: str = key(ID, default="", doc="name of the device")

    def join(self, others: Sequence[Device]) -> None:
        """Check the device against those in front of it on the command line. Raises BadKey."""
