"""A network that another process carries (vhost-user-net): a back end of `virtio_devices.net`, which serves the queues itself.

The control queue stays with the device. While the back end is away the link stays up, and frames wait in their queues: it is
expected back. Not here: the device, and the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from virtio_devices.device import DeviceError
from virtio_devices.net.backend import Backend, Lane
from virtio_devices.net.features import F_MRG_RXBUF, OFFLOADS
from virtio_devices.queue import SplitQueue
from virtio_devices.vhost_user.device import RING_FEATURES, queue_position
from virtio_devices.vhost_user.frontend import Ring
from virtio_devices.vhost_user.session import Job, Session
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner

_QUEUE_SIZE_MAX = 4096  # of the device; what a record of requests has room for


class VhostUserNetBackend(Backend):
    """The way to a network behind a vhost-user socket."""

    serves_queues = True

    def __init__(
        self,
        name: str,
        path: str,
        memory: GuestMemory,
        *,
        pairs: int = 1,
        retry: float | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to the back end at `path`, for up to `pairs` pairs of queues; `retry` as for disks.

        Raises DeviceError when nobody is there, or cannot serve so many.
        """
        self._session = session = Session(name, path, memory, retry=retry)
        # QEMU and DPDK count pairs in the answer to GET_QUEUE_NUM of a network back end, and so does everyone since.
        if pairs > max(1, session.queues):
            session.close()
            raise DeviceError(f"{name}: the back end at {path} has {max(1, session.queues)} pairs of queues, not {pairs}")
        self.name, self.pairs = name, pairs
        self.features = session.features & OFFLOADS
        self.queue_features = session.features & (RING_FEATURES | F_MRG_RXBUF)
        self._memory = memory
        self._report = report
        self._rings: dict[int, Ring] = {}
        self._offloads: int | None = None
        self._unusable = ""  # why nobody knows where this driver's rings stand
        self._owner: Owner | None = None
        session.start(self)

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        """Return a lane that moves nothing."""
        self._owner = owner
        return _Elsewhere(owner, pair, loop, -1)

    def set_offloads(self, features: int) -> None:
        """Take what the driver negotiated. A back end learns that once: a driver cannot change it while queues run."""
        if self._rings and features != self._offloads:
            raise DeviceError(f"{self.name}: the back end cannot change offloads while it runs")
        self._offloads = features
        self._unusable = ""  # asked for when a driver comes, and not after a pause

    def begin_pair(
        self,
        pair: int,
        memory: GuestMemory,
        features: int,
        queues: Sequence[SplitQueue],
        kicks: Sequence[int],
        calls: Sequence[int],
    ) -> None:
        """Let the back end serve a pair, as soon as there is one. Raises DeviceError after unusable(), for the same driver."""
        if self._unusable:
            raise DeviceError(self._unusable)
        rings = [
            Ring(2 * pair + at, queue, kick, call, queue.indices[0])
            for at, (queue, kick, call) in enumerate(zip(queues, kicks, calls, strict=True))
        ]
        if self._rings:
            self._session.add_rings(rings)
        else:
            chosen = features & (self.features | self.queue_features | RING_FEATURES)
            self._session.begin(Job(chosen, rings, queues=2 * self.pairs, queue_size=_QUEUE_SIZE_MAX, ledgers=False))
        self._rings |= {ring.index: ring for ring in rings}

    def end_pair(self, pair: int, queues: Sequence[SplitQueue]) -> None:
        """Take a pair back."""
        rings = [self._rings.pop(2 * pair + at) for at in range(2)]
        if self._rings:
            for ring in rings:
                self._session.stop_ring(ring.index)
        else:
            self._session.stop()
            self._session.forget()
        for ring in rings:
            queue_position(ring, self._memory)

    def close(self) -> None:
        """Hang up."""
        self._session.close()

    # For the session, on its thread

    def config_read(self, config: bytes) -> None:
        """Nothing to do: the configuration space is the device's."""

    def used(self, index: int) -> None:
        """Nothing to do: calls go to the driver straight."""

    def unusable(self, reason: str) -> None:
        """Turn the link down until another driver comes."""
        self._unusable = reason
        if self._owner is not None:
            self._owner.lost(reason)

    def report(self, text: str) -> None:
        """Tell people."""
        if self._report is not None:
            self._report(text)


class _Elsewhere(Lane):
    """A pair of queues that the back end serves."""

    def receive(self, queue: SplitQueue) -> None:
        """Nothing to do: the back end does it."""

    def transmit(self, queue: SplitQueue) -> None:
        """Nothing to do, as for receive()."""

    def guard(self) -> None:
        """Nothing to watch: the session does."""

    def drop_all(self, queue: SplitQueue) -> None:
        """Leave them in the ring: of a back end that has gone nobody knows which it has sent already, if not in order."""
