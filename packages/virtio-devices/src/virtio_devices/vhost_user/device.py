"""A virtio device whose queues another process serves: features, queues and configuration space over vhost-user.

Kicks go straight to the back end, and its calls straight to the interrupt: this process takes no part in a request. Only when the
back end keeps no record of its requests under way, and they matter, calls come through here, to keep one (`ledger`).

While there is no back end the guest's requests wait. Not here: the protocol and its thread (`session`), and what is particular
to a disk, a file system or a network card (their modules).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError, VirtioDevice
from virtio_devices.queue import QueueError
from virtio_devices.vhost_user.frontend import Inflight, Ring
from virtio_devices.vhost_user.protocol import INFLIGHT_MAX
from virtio_devices.vhost_user.session import Job, Session
from vmm_core.errors import StateError
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop
from vmm_core.state import expect, versioned

# What a driver may be offered of what concerns queues. Everything else that a back end may offer there needs a transport's help
# (packed rings, notification data, ring reset), an address translation, or is its own affair (bits 24, 26, 30).
RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1


@versioned(1)
class VhostUserState(NamedTuple):
    """What the transport does not save. `inflight` is the back end's record of requests that it has not answered yet."""

    device_type: int
    config: bytes
    inflight: bytes | None


class VhostUserDevice(VirtioDevice):
    """Base class of the devices whose every queue is the back end's."""

    def __init__(
        self,
        name: str,
        loop: Loop,
        memory: GuestMemory,
        session: Session,
        *,
        features: int,
        queue_sizes: Sequence[int],
        config: bytes,
        records: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Take over `session` and start it. `features` are what a driver is offered.

        `records` says that a request must not be lost or done twice when the back end is replaced.
        """
        super().__init__(name, [loop], features=features, queue_sizes=queue_sizes, config=config)
        self._memory = memory
        self._session = session
        self._report = report
        self._records = records
        self._ledgers = False
        self._calls: list[int] = []  # event descriptors of our own, for ledgers
        self._rings: list[Ring] = []
        self._other_config = False  # than the driver of a restored state has read
        self._writing = threading.Lock()  # orders the driver's writes to the configuration space and what the back end says of it
        session.start(self)

    @property
    def connected(self) -> bool:
        """Whether there is a back end at present."""
        return self._session.connected

    def counters(self) -> dict[str, int]:
        """Return whether there is a back end, how many there were, and the requests that wait for it or are with it.

        What it does with them is its own to count.
        """
        waiting = 0
        for queue in self.queues:
            if queue is not None:
                offered, answered = (self._memory.load(ring + 2, 2) for ring in (queue.avail, queue.used))  # 2.7.6, 2.7.8: idx
                waiting += min(offered - answered & 0xFFFF, queue.size)  # a driver may write anything there
        return {"connected": int(self.connected), "back_ends": self._session.found, "waiting": waiting}

    def close(self) -> None:
        """Reset, and hang up."""
        with self._lock:
            super().close()
            self._session.close()

    # Life: the thread that changes it waits where it says so in `session`

    def _start(self) -> None:
        assert self._notifier is not None
        self.handed_over = frozenset(range(len(self.queues)))
        self._ledgers = self._records and not self._session.keeps_record
        if self._ledgers:
            for _ in self.queues:
                self._calls.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def _stop(self) -> None:
        self._session.forget()
        for fd in self._calls:
            os.close(fd)
        self._calls.clear()

    def _go(self) -> None:
        super()._go()
        assert self._notifier is not None
        if self.broken:
            return  # nobody knows where its rings stand
        rings = [
            Ring(
                index,
                queue,
                self._kicks[index],
                self._calls[index] if self._ledgers else self._notifier.used_fd(index),
                queue.indices[0],
            )
            for index, queue in enumerate(self.queues)
            if queue is not None
        ]
        self._rings = rings
        queue_size = max(self.queue_sizes)
        self._session.begin(
            Job(self.negotiated, rings, queues=len(self.queue_sizes), queue_size=queue_size, ledgers=self._ledgers)
        )
        if self._other_config:
            self._other_config = False
            self._notifier.config_changed()

    def _halt(self) -> None:
        self._session.stop()
        for ring in self._rings:
            if self.queues[ring.index] is not None:
                queue_position(ring, self._memory)
        self._rings = []
        super()._halt()

    def stop_queue(self, index: int) -> None:
        """Stop using one queue."""
        with self._lock:
            if self.active and self.queues[index] is not None:
                if self._running:
                    self._session.stop_ring(index)
                self.queues[index] = None

    # Configuration space

    def config_read(self, config: bytes) -> None:
        """Take the back end's configuration space (`session.Owner`)."""
        with self._writing:
            shown = self._shown(self._session.as_written(config))
            if shown != self._config[1]:
                self._set_config(0, shown)

    def _shown(self, config: bytes) -> bytes:
        """Return what the driver sees of the back end's configuration space. For subclasses."""
        return self._config[1]

    # For the session, on its thread

    def used(self, index: int) -> None:
        """Hand on a call."""
        if self._notifier is not None:
            self._notifier.queue_used(index)

    def unusable(self, reason: str) -> None:
        """Give up on this driver."""
        self._break(reason)

    def report(self, text: str) -> None:
        """Tell people."""
        if self._report is not None:
            self._report(text)

    # Saved state

    def save(self) -> VhostUserState:
        """Return the configuration space, and the record of requests under way. While paused.

        Raises StateError when there are such requests and no record: nobody else could finish them.
        """
        content: bytes | None = None
        record = self._session.record()
        queues = [queue for queue in self.queues if queue is not None]
        if record is not None:
            if not any(queue.pending or queue.in_flight for queue in queues):
                return VhostUserState(self.device_type, self._config[1], None)
            try:
                content = record.content()
            except OSError as error:
                raise StateError(f"{self.name}: the record of requests under way: {error.strerror}") from None
            if len(content) != record.area.size:
                raise StateError(f"{self.name}: the back end has cut the record of requests under way")
        elif busy := sum(queue.in_flight for queue in queues):
            raise StateError(f"{self.name}: the back end has {busy} requests under way, and keeps no record of them")
        return VhostUserState(self.device_type, self._config[1], content)

    def restore(self, state: Any) -> None:
        """Put a saved state back, before or after the transport's. Raises StateError when it does not fit."""
        saved = expect(state, VhostUserState, self.name)
        if saved.device_type != self.device_type or len(saved.config) != len(self._config[1]):
            raise StateError(f"{self.name}: state of device type {saved.device_type} with {len(saved.config)} bytes to configure")
        if saved.inflight is not None:
            if not 0 < len(saved.inflight) <= INFLIGHT_MAX:
                raise StateError(f"{self.name}: a record of {len(saved.inflight)} bytes")
            if not self._session.keeps_record:
                raise StateError(f"{self.name}: the back end keeps no record of requests under way, the one before did")
            try:
                record = Inflight.of(saved.inflight, len(self.queue_sizes), max(self.queue_sizes))
            except OSError as error:
                raise StateError(f"{self.name}: the record of requests under way: {error.strerror}") from None
            self._session.give_record(record)
        # The back end's own configuration space counts; a guest that moved is told of what differs.
        self._other_config = saved.config != self._config[1]


def queue_position(ring: Ring, memory: GuestMemory) -> None:
    """Put where a ring that was taken back stands into its queue."""
    used = memory.load(ring.queue.used + 2, 2)
    try:
        ring.queue.set_indices(used if ring.base is None else ring.base, used)
    except QueueError:
        # A back end that says where it cannot be, or a driver that wrote into the used ring.
        ring.queue.set_indices(used, used)


def offered(session: Session, wanted: int) -> int:
    """Return the features that a driver is offered: what the back end has of `wanted` and of what concerns queues."""
    return session.features & (wanted | RING_FEATURES)


def enough_queues(name: str, session: Session, queues: int) -> None:
    """Check that the back end can serve `queues`. Raises DeviceError."""
    if session.queues and queues > session.queues:
        raise DeviceError(f"{name}: the back end at {session.path} has {session.queues} queues, not {queues}")
    if queues > 1 and not session.queues:
        raise DeviceError(f"{name}: the back end at {session.path} has no more than one queue")
