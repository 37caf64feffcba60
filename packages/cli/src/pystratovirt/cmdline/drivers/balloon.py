"""The memory balloon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import key
from ..errors import BadKey
from ..values import ID, SWITCH, Integer
from .base import IOTHREAD, Device

if TYPE_CHECKING:
    from collections.abc import Sequence

U32_MAX = (1 << 32) - 1


class VirtioBalloon(Device, selector="virtio-balloon-device"):
    """Memory that the guest does without for the host's sake. One per machine; QMP's `balloon` sets its size."""

    id: str = key(ID, doc="name of the device")
    deflate_on_oom: bool = key(SWITCH, default=False, doc="the guest may take memory back rather than end a process")
    free_page_reporting: bool = key(SWITCH, default=False, doc="the guest reports pages that it does not use, unasked")
    auto_balloon: bool = key(SWITCH, default=False, doc="a guest driver made for StratoVirt sets the size itself")
    membuf_percent: int = key(
        Integer(0, U32_MAX, bits=32), default=50, doc="what that driver keeps free, in percent; 20 to 80 with auto-balloon"
    )
    monitor_interval: int = key(
        Integer(0, U32_MAX, bits=32), default=10, doc="seconds between its looks; 5 to 300 with auto-balloon"
    )
    guest_stats_polling_interval: int = key(
        Integer(0, 86400, "seconds", bits=32),
        default=0,
        doc="how often the guest is asked for statistics, which `query-balloon` then shows; 0: never",
        note="not in StratoVirt; QEMU's name",
    )
    iothread: str | None = key(IOTHREAD, default=None, doc="the I/O thread that serves it", note="not in StratoVirt")

    def check(self) -> None:
        if self.auto_balloon:
            for name, value, low, high in (
                ("membuf-percent", self.membuf_percent, 20, 80),
                ("monitor-interval", self.monitor_interval, 5, 300),
            ):
                if not low <= value <= high:
                    raise BadKey(f"{name}={value}", f"must be {low} to {high}")

    def join(self, others: Sequence[Device]) -> None:
        if any(isinstance(other, VirtioBalloon) for other in others):
            raise BadKey("", "one virtio-balloon-device per machine")
