"""Network devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import key
from ..values import ID, SWITCH, Kind, PowerOfTwo, Reference
from .base import IOTHREAD, NET, Device

if TYPE_CHECKING:
    from typing import ClassVar


class Mac(Kind[bytes]):
    """An Ethernet address of one device."""

    allowed = "six bytes as xx:xx:xx:xx:xx:xx, of one device"

    def parse(self, text: str) -> bytes:
        parts = text.split(":")
        if len(parts) != 6 or not all(len(part) == 2 and part.isalnum() for part in parts):  # fromhex() skips blanks
            raise ValueError(f"must be {self.allowed}")
        try:
            mac = bytes.fromhex("".join(parts))
        except ValueError:
            raise ValueError(f"must be {self.allowed}") from None
        if mac[0] & 1 or not any(mac):
            raise ValueError("is no address of one device: the first byte's lowest bit says so" if mac[0] & 1 else "is nobody's")
        return mac

    def render(self, value: bytes) -> str:
        return value.hex(":")


class VirtioNet(Device, selector="virtio-net-device"):
    """A network card."""

    place: ClassVar[str] = NET

    netdev: str = key(Reference("netdev"), doc="the -netdev that it is connected to")
    mac: bytes | None = key(
        Mac(),
        default=None,
        doc="its address; 52:54:00:12:34:56 and the following by default",
        note="a multicast address or zeroes: refused (StratoVirt takes it; no guest brings up a card with it)",
    )
    mq: bool = key(SWITCH, default=False, doc="the guest may use all pairs of queues that the -netdev has")
    iothread: str | None = key(IOTHREAD, default=None, doc="the I/O thread that serves it")
    queue_size: int = key(PowerOfTwo(256, 4096), default=256, doc="entries of a queue")
    vectors: str | None = key(
        ID, default=None, doc="accepted; there are no message interrupts", note="as in StratoVirt: no effect"
    )
