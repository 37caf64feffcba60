"""What both socket devices are for the guest: three queues, a context id, and news of a change of hosts.

Not here: who moves the packets (`vhost`, `user`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from virtio_devices.device import VirtioDevice
from virtio_devices.queue import QueueError, SplitQueue
from virtio_devices.vsock.packet import CID_MAX, CID_MIN
from vmm_core.loop import Loop

RX, TX, EVENT = 0, 1, 2  # 5.10.2: from the host, to the host, events
QUEUE_SIZE = 256

_TRANSPORT_RESET = bytes(4)  # struct virtio_vsock_event with id 0 (5.10.6.7)


class VsockDevice(VirtioDevice):
    """A socket device. Subclasses serve RX and TX."""

    device_type = 19

    def __init__(self, name: str, loops: Sequence[Loop], guest_cid: int, *, features: int) -> None:
        """`guest_cid` is the guest's address, CID_MIN to CID_MAX. Raises ValueError for another one."""
        if not CID_MIN <= guest_cid <= CID_MAX:
            raise ValueError(f"{name}: guest-cid {guest_cid} is not within {CID_MIN} to {CID_MAX}")
        super().__init__(name, loops, features=features, queue_sizes=[QUEUE_SIZE] * 3, config=guest_cid.to_bytes(8, "little"))
        self.guest_cid = guest_cid
        self._owes_reset = False  # the driver believes in connections of another process

    def restore(self, state: Any) -> None:
        """Go on as the same device. No connection came along, which the driver is told when the device works again (5.10.6.7)."""
        super().restore(state)
        self._owes_reset = True

    def reset(self) -> None:
        """Forget the driver; the next one has no connections."""
        with self._lock:
            if self.active:
                self._owes_reset = False
            super().reset()

    def _send_events(self, index: int, queue: SplitQueue) -> None:
        """Tell of what happened, if there is something. The driver's other buffers stay in the ring until there is."""
        if not self._owes_reset:
            return
        for head, _, writable in queue.chains():
            if not writable or len(writable[0]) < len(_TRANSPORT_RESET):
                raise QueueError("a buffer without room for an event")
            writable[0][: len(_TRANSPORT_RESET)] = _TRANSPORT_RESET
            queue.add_used(head, len(_TRANSPORT_RESET))
            self._owes_reset = False
            break
        self._used(index, queue)
        if self._owes_reset and queue.enable_kicks():
            self._kick_later(index)  # there were no buffers, and now there are
