"""What carries frames between a device and a network: the face that taps, streams and vhost have in common.

A back end has one lane for each pair of queues. A lane belongs to the loop that owns the pair, moves frames between the pair and
one descriptor, and watches that descriptor only while there is something to do: a driver without receive buffers costs nothing.

Not here: what features mean, control commands, and the life of a device (`device`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC
from virtio_devices.net.buffers import Buffers
from virtio_devices.net.features import F_MRG_RXBUF
from virtio_devices.queue import SplitQueue
from vmm_core.loop import READ, WRITE, Loop, Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from virtio_devices.net.filter import RxFilter
    from vmm_core.guestmem import GuestMemory

    class Owner(Protocol):
        """What a lane needs of its device. On the lane's loop."""

        @property
        def working(self) -> bool:
            """Whether queues may be touched now."""
            ...

        @property
        def rx_filter(self) -> RxFilter | None:
            """What decides which frames the driver wants; None for all."""
            ...

        def publish(self, index: int, queue: SplitQueue) -> None:
            """Publish what was given back."""
            ...

        def serve(self, index: int) -> None:
            """Serve a queue now."""
            ...

        def serve_later(self, index: int) -> None:
            """Serve a queue after the loop's other work."""
            ...

        def lost(self, reason: str) -> None:
            """Note that the network is gone for good."""
            ...


# One turn of a queue ends after this many frames, or bytes, so that the other direction and other devices have theirs; and what
# was done until then is published, so that a driver need not wait for the end of a long queue.
FRAMES, BYTES = 64, 1 << 18

_RETRY_NS = 1_000_000_000  # to wait with watching when the host has no room for another watch


class Statistics(NamedTuple):
    """What went through since the device was made. Frames and bytes of frames, without headers; as the guest sees directions."""

    rx_frames: int = 0
    rx_bytes: int = 0
    rx_dropped: int = 0  # too large for the driver's buffers, or not a frame
    rx_filtered: int = 0  # not for this driver, as it said over the control queue
    tx_frames: int = 0
    tx_bytes: int = 0
    tx_dropped: int = 0  # refused by the network, or without one


class Lane:
    """One pair of queues and the descriptor behind it. Belongs to a loop, like the pair."""

    def __init__(self, owner: Owner, pair: int, loop: Loop, fd: int) -> None:
        """Make a lane at rest. The descriptor is the back end's and does not block."""
        self.enabled = False  # the driver uses this pair
        self.dead = False
        self.rx_frames = self.rx_bytes = self.rx_dropped = self.rx_filtered = 0
        self.tx_frames = self.tx_bytes = self.tx_dropped = 0
        self.loop = loop
        self._owner = owner
        self._rx, self._tx = 2 * pair, 2 * pair + 1
        self._fd = fd
        self._mask = 0
        self._again: Timer | None = None  # will try to watch
        self._blocked = False  # frames to send wait for the descriptor
        self._kicks_wanted = True
        self._buffers = Buffers()

    def begin(self, mergeable: bool) -> None:
        """Get ready for a new driver. `mergeable`: VIRTIO_NET_F_MRG_RXBUF was negotiated."""
        self._buffers.begin(mergeable=mergeable)
        self._kicks_wanted = True

    def receive(self, queue: SplitQueue) -> None:
        """Move frames to the driver, as long as there are frames and buffers; then wait for what is missing."""
        raise NotImplementedError

    def transmit(self, queue: SplitQueue) -> None:
        """Move the driver's frames out, as long as there are any and the network takes them; then wait for what is missing."""
        raise NotImplementedError

    def rest(self, rx: SplitQueue | None) -> None:
        """Stop watching, and put receive buffers back into their ring."""
        self._watch(0)
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._blocked = False
        if rx is not None:
            self._buffers.put_back(rx)
        self._buffers.clear()

    def guard(self) -> None:
        """Notice when the network is gone, until rest(). For a pair that the back end serves."""

    def drop_all(self, queue: SplitQueue) -> None:
        """Take the driver's frames and send none."""
        for head, _, _ in queue.chains():
            queue.add_used(head, 0)
            self.tx_dropped += 1
        self._owner.publish(self._tx, queue)
        if queue.enable_kicks():
            self._owner.serve_later(self._tx)

    # For subclasses

    def _watch(self, mask: int) -> None:
        """Watch the descriptor for `mask`, and for nothing at all when that is 0: a dead one would be reported for ever."""
        if mask == self._mask:
            return
        if not mask:
            self.loop.remove_fd(self._fd)
        elif self._mask:
            self.loop.modify_fd(self._fd, mask)
        else:
            try:
                self.loop.add_fd(self._fd, mask, self._event)
            except OSError:  # the user's limit of watches is reached, or memory is short
                if self._again is None:
                    self._again = self.loop.call_later(_RETRY_NS, self._look_again, host=True)
                return
        self._mask = mask

    def _look_again(self) -> None:
        """Do what would have been done if there had been a watch, and try to watch again."""
        self._again = None
        self._event(READ | WRITE)

    def _event(self, events: int) -> None:
        if not self._owner.working:
            self._watch(0)  # broken: nobody reads, and the descriptor would stay ready
        elif events & ~(READ | WRITE):
            self._die("the other side has gone")
        else:
            if events & WRITE:
                self._blocked = False
                self._watch(self._mask & ~WRITE)
                self._owner.serve(self._tx)
            if events & READ:
                self._owner.serve(self._rx)

    def _die(self, reason: str) -> None:
        self._watch(0)
        if not self.dead:
            self.dead = True
            self._owner.lost(reason)
            self._owner.serve_later(self._tx)  # frames that waited for the network wait for nothing now, and no kick will come

    def _starve(self, queue: SplitQueue) -> bool:
        """Wait for receive buffers, and not for frames. False when there are some after all."""
        self._kicks_wanted = True
        if queue.enable_kicks():
            return False
        self._watch(self._mask & ~READ)
        return True

    def _hungry(self, queue: SplitQueue) -> None:
        """Wait for frames, and not for receive buffers."""
        if self._kicks_wanted:
            self._kicks_wanted = False
            queue.disable_kicks()
        self._watch(self._mask | READ)

    def _unwanted(self, header: bytes) -> bool:
        """Tell whether the driver does not want the frame that begins with `header`."""
        rx_filter = self._owner.rx_filter
        if rx_filter is None or rx_filter.accepts(header):
            return False
        self.rx_filtered += 1
        return True

    def statistics(self) -> Statistics:
        """Return the counters."""
        return Statistics(*(getattr(self, name) for name in Statistics._fields))


class Backend:
    """A way to a network. Made by whoever opens it, and closed by its owner after the device has let go of it."""

    name = ""  # for messages
    pairs = 1  # lanes that there are
    features = 0  # of OFFLOADS, what it can carry
    queue_features = F_INDIRECT_DESC | F_EVENT_IDX | F_MRG_RXBUF  # what whoever serves the queues can do
    serves_queues = False  # itself, so that no lane may

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        """Return a lane for a pair of queues."""
        raise NotImplementedError

    def alive(self) -> bool:
        """Tell whether there is a network behind it. On any thread."""
        return True

    def obituary(self) -> str:
        """Return why the network has gone, if that is known; it may take a moment to find out. On one thread at a time."""
        return ""

    def set_offloads(self, features: int) -> None:
        """Deliver frames as a driver with these of GUEST_OFFLOADS takes them. Raises OSError or DeviceError."""

    def set_pairs(self, count: int) -> None:
        """Spread frames over the first `count` lanes; the descriptors of the others may not be watched. Raises OSError."""

    def begin_pair(
        self,
        pair: int,
        memory: GuestMemory,
        features: int,
        queues: Sequence[SplitQueue],
        kicks: Sequence[int],
        calls: Sequence[int],
    ) -> None:
        """Serve a pair's queues, receive and transmit, from where they stand, when `serves_queues`.

        Raises DeviceError or OSError.
        """
        raise NotImplementedError

    def end_pair(self, pair: int, queues: Sequence[SplitQueue]) -> None:
        """Stop, and leave the queues where they stand then. Raises DeviceError or QueueError; the pair is stopped even so."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back. Twice is fine."""
