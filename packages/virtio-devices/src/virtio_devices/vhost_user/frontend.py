"""The front end's side of a vhost-user conversation: which messages, in which order, over one connection.

Every method waits for the back end, for at most the connection's limit, and raises BackEndError when it cannot be used any
more; the connection is closed then. Source: the specification (see `protocol`).

Not here: what to do then (`session`), and threads.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence

from virtio_devices.device import F_VERSION_1
from virtio_devices.queue import SplitQueue
from virtio_devices.vhost_user import protocol as vu
from virtio_devices.vhost_user.connection import Connection
from virtio_devices.vhost_user.protocol import BackEndError, InflightArea, ProtocolError, Region
from vmm_core.errors import VmmError
from vmm_core.guestmem import GuestMemory

_PROTOCOL = vu.P_MQ | vu.P_REPLY_ACK | vu.P_INFLIGHT_SHMFD | vu.P_RESET_DEVICE
_CHANGES_MAX = 64  # messages of the back end that are read at a time; the rest waits for the next turn


class MemoryNotShared(VmmError):
    """Guest memory that no other process can see. The words are StratoVirt's."""

    def __init__(self) -> None:
        super().__init__("Failed to initial vhost user memory map, consider using command mem-share=on")


class Ring:
    """One virtqueue as a back end is told of it. `base` is where it goes on; None: where the used ring says."""

    __slots__ = ("base", "call", "enabled", "index", "kick", "queue")

    def __init__(self, index: int, queue: SplitQueue, kick: int, call: int, base: int | None, enabled: bool = True) -> None:
        self.index, self.queue = index, queue
        self.kick, self.call = kick, call  # event descriptors, their owner's
        self.base = base
        self.enabled = enabled


class Inflight:
    """The back end's record of requests under way: outlives it, and is given to its successor."""

    def __init__(self, fd: int, area: InflightArea) -> None:
        """Take over `fd`."""
        self.fd, self.area = fd, area

    @classmethod
    def of(cls, content: bytes, queues: int, queue_size: int) -> Inflight:
        """Make a record with this content, of a saved state. Raises OSError."""
        fd = os.memfd_create("vhost-user-inflight", os.MFD_CLOEXEC)
        record = cls(fd, InflightArea(len(content), 0, queues, queue_size))
        try:
            os.ftruncate(fd, len(content))
            os.pwrite(fd, content, 0)
        except OSError:
            record.close()
            raise
        return record

    def content(self) -> bytes:
        """Return what is in it now; shorter than its size when the back end cut the file. Raises OSError."""
        return os.pread(self.fd, self.area.size, self.area.offset)

    def close(self) -> None:
        """Give the file back. Twice is fine."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def memory_regions(memory: GuestMemory) -> list[Region]:
    """Return the memory table. Raises MemoryNotShared when another process cannot map guest memory.

    User addresses are guest addresses: the specification leaves them to the front end, and no address of this process gets out.
    """
    if not memory.shared or memory.fd < 0:
        raise MemoryNotShared
    if len(memory.regions) > vu.MAX_REGIONS:
        raise VmmError(f"vhost-user: guest memory in {len(memory.regions)} regions; at most {vu.MAX_REGIONS}")
    return [Region(region.base, region.size, region.base, region.offset) for region in memory.regions]


class FrontEnd:
    """One conversation. `features`, `protocol`, `queues` and `config` are what the back end said of itself."""

    def __init__(self, connection: Connection, *, config_size: int = 0, records: bool = True) -> None:
        """`config_size` bytes of configuration space are the back end's; 0 when it has none to give.

        `records`: it may keep the record of requests under way, if it can.
        """
        self.connection = connection
        self.features = 0
        self.protocol = 0  # what both sides can
        self.queues = 0  # how many it has at most; 0 when it does not say
        self.config = b""
        self.rings: Sequence[Ring] = ()  # that it serves
        self._config_size = config_size
        self._records = records
        self._channel: Connection | None = None  # "Back-end communication"

    def close(self) -> None:
        """Hang up. Twice is fine."""
        self.connection.close()
        if self._channel is not None:
            self._channel.close()

    @property
    def channel_fd(self) -> int:
        """The descriptor on which the back end speaks first; -1 when it does not."""
        return -1 if self._channel is None else self._channel.fileno()

    # Before the driver

    def negotiate(self) -> None:
        """Learn what the back end can, and begin the session."""
        call, tell = self.connection.call, self.connection.tell
        self.features = vu.read_u64(call(vu.GET_FEATURES))
        if not self.features & F_VERSION_1:
            raise BackEndError("knows legacy virtio only")
        if self.features & vu.F_PROTOCOL_FEATURES:
            wanted = _PROTOCOL | (vu.P_BACKEND_REQ | vu.P_CONFIG if self._config_size else 0)
            if not self._records:
                wanted &= ~vu.P_INFLIGHT_SHMFD
            self.protocol = vu.read_u64(call(vu.GET_PROTOCOL_FEATURES)) & wanted
            tell(vu.SET_PROTOCOL_FEATURES, vu.u64(self.protocol))
            self.connection.acknowledged = bool(self.protocol & vu.P_REPLY_ACK)
        tell(vu.SET_OWNER)
        if self.protocol & vu.P_MQ:
            self.queues = vu.read_u64(call(vu.GET_QUEUE_NUM))
        if self.protocol & vu.P_BACKEND_REQ:
            self._open_channel()
        if self._config_size:
            if not self.protocol & vu.P_CONFIG:
                raise BackEndError("does not give its configuration space")
            self.read_config()

    def read_config(self) -> bytes:
        """Return the configuration space as it is now."""
        size = self._config_size
        answer = self.connection.call(vu.GET_CONFIG, vu.config_space(0, bytes(size)))
        self.config = vu.read_config_space(answer, 0, size)
        return self.config

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand on what the driver wrote."""
        self.connection.tell(vu.SET_CONFIG, vu.config_space(offset, data))

    def reset_device(self) -> None:
        """Let the back end forget the driver, if it knows how to be asked. While no ring runs."""
        if self.protocol & vu.P_RESET_DEVICE:
            self.connection.tell(vu.RESET_DEVICE)

    # While a driver is there

    def new_inflight(self, queues: int, queue_size: int) -> Inflight | None:
        """Return a fresh record for requests under way; None when the back end keeps none."""
        if not self.protocol & vu.P_INFLIGHT_SHMFD:
            return None
        payload = vu.inflight(InflightArea(0, 0, queues, queue_size))
        answer, fds = self.connection.call_with_fds(vu.GET_INFLIGHT_FD, payload, (), 1)
        try:
            area = vu.read_inflight(answer)
        except ProtocolError:
            os.close(fds[0])
            raise
        return Inflight(fds[0], area._replace(queues=queues, queue_size=queue_size))

    def set_up(self, features: int, memory: GuestMemory) -> None:
        """Tell what was negotiated, and where guest memory is."""
        regions = memory_regions(memory)
        own = vu.F_PROTOCOL_FEATURES if self.features & vu.F_PROTOCOL_FEATURES else 0
        missing = features & ~self.features
        if missing:
            raise BackEndError(f"no longer offers features {missing:#x}, which the driver has taken")
        self.connection.tell(vu.SET_FEATURES, vu.u64(features | own))
        self.connection.tell(vu.SET_MEM_TABLE, vu.memory_table(regions), [memory.fd] * len(regions))

    def give_inflight(self, inflight: Inflight | None) -> None:
        """Give the back end the record to go on with, if it keeps one. After set_up()."""
        if inflight is not None and self.protocol & vu.P_INFLIGHT_SHMFD:
            self.connection.tell(vu.SET_INFLIGHT_FD, vu.inflight(inflight.area), [inflight.fd])

    def start(self, rings: Sequence[Ring], memory: GuestMemory, err: int) -> None:
        """Hand over the rings, enabled as they say. After set_up(). `err` is what the back end tells a broken ring by."""
        tell = self.connection.tell
        for ring in rings:
            index, queue = ring.index, ring.queue
            base = memory.load(queue.used + 2, 2) if ring.base is None else ring.base
            tell(vu.SET_VRING_NUM, vu.vring_state(index, queue.size))
            tell(vu.SET_VRING_BASE, vu.vring_state(index, base))
            tell(vu.SET_VRING_ADDR, vu.vring_addr(index, queue.desc, queue.used, queue.avail))
            tell(vu.SET_VRING_ERR, vu.u64(index), [err])
            tell(vu.SET_VRING_CALL, vu.u64(index), [ring.call])
            tell(vu.SET_VRING_KICK, vu.u64(index), [ring.kick])
            ring.base = None  # from here on only the back end knows
        self.rings = [*self.rings, *rings]
        for ring in rings:
            self.enable(ring.index, ring.enabled)
            # "Ring states": the first kick starts a ring. And the driver may have kicked while nobody was there.
            os.eventfd_write(ring.kick, 1)

    def enable(self, index: int, enabled: bool) -> None:
        """Let a ring have effects, or none. Without protocol features a ring is always enabled."""
        if self.features & vu.F_PROTOCOL_FEATURES:
            self.connection.tell(vu.SET_VRING_ENABLE, vu.vring_state(index, int(enabled)))

    def settle(self, rings: Sequence[Ring], memory: GuestMemory, seconds: float) -> None:
        """Wait until everything that the driver made available has come back, for at most `seconds`. No ring is stopped.

        Only for a device that answers every request, whose driver adds no more. A back end that is asked to stop earlier may give
        up requests, or answer them later.
        """
        import select  # of the way out only

        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        pause = 1
        for ring in rings:
            used, avail, size = ring.queue.used + 2, ring.queue.avail + 2, ring.queue.size
            while 0 < (memory.load(avail, 2) - memory.load(used, 2)) & 0xFFFF <= size:
                # There is nothing to wait on: the call descriptor is the driver's.
                if time.monotonic() > deadline or poll.poll(pause):
                    return
                pause = min(2 * pause, 16)

    def stop(self, ring: Ring) -> None:
        """Take a ring back; its `base` is where the back end came to."""
        self.enable(ring.index, False)
        answer = self.connection.call(vu.GET_VRING_BASE, vu.vring_state(ring.index, 0))
        index, base = vu.read_vring_state(answer)
        if index != ring.index or base > 0xFFFF:
            raise ProtocolError(f"position {base} of ring {index} where that of ring {ring.index} was due")
        ring.base = base
        self.rings = [other for other in self.rings if other is not ring]

    # What the back end says by itself

    def changes(self, changed: Callable[[], None]) -> None:
        """Read what is on the channel, and call `changed` once if the configuration space has changed. Never blocks for long."""
        channel = self._channel
        if channel is None:
            return
        config_changed = False
        for _ in range(_CHANGES_MAX):
            message = channel.poll()
            if message is None:
                break
            known = message.request == vu.BACKEND_CONFIG_CHANGE and not message.payload
            config_changed |= known
            if message.flags & vu.NEED_REPLY and self.protocol & vu.P_REPLY_ACK:
                # Before anything is asked: the back end may wait for this and nothing else.
                channel.limit(max(0.0, self.connection.left))
                channel.send(vu.encode(message.request, vu.u64(0 if known else 1), vu.REPLY))
        if config_changed:
            changed()

    def _open_channel(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = Connection(ours)
            self.connection.tell(vu.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
