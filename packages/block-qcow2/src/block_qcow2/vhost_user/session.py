"""One front end: its messages, its memory, its rings. The front end is as hostile as its guest.

A mistake in a message ends the session (or is answered by a failure, where the front end asked for answers); a mistake in a ring
ends that ring, and its error descriptor says so. Rings are never changed under requests: those are waited for before.

Not here: the wire (`protocol`), requests (`blk`), the socket (`server`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from ..errors import BlockError
from . import protocol as p
from .blk import F_EVENT_IDX, F_INDIRECT_DESC, Blk, Ring, signal
from .memory import SharedMemory, SharedMemoryError, map_file
from .virtqueue import QueueError, Record, SplitQueue

_RING_FEATURES = F_EVENT_IDX | F_INDIRECT_DESC


class Loop(Protocol):
    """What watches descriptors."""

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        """Call `ready` whenever `fd` is readable. Raises OSError where it cannot be watched."""
        ...

    def forget(self, fd: int) -> None: ...

    def soon(self, work: Callable[[], None]) -> None:
        """Call `work` after everything that is ready now."""
        ...


class Session:
    """The state of one front end. Everything runs on the loop's thread; close() waits for requests and gives everything back."""

    def __init__(self, connection: p.Connection, device: Blk, loop: Loop, report: Callable[[str], None]) -> None:
        self._connection = connection
        self._device = device
        self._loop = loop
        self._report = report
        self._memory = SharedMemory()
        self._rings = [Ring(i) for i in range(device.queues)]
        self._protocol_features = 0
        self._records: list[Record] = []
        loop.watch(device.completion_fd, device.collect)
        self._handlers: dict[int, Callable[[p.Message], bytes | None]] = {
            p.GET_FEATURES: lambda m: p.U64.pack(device.features | p.F_PROTOCOL_FEATURES),
            p.SET_FEATURES: self._set_features,
            p.SET_OWNER: lambda m: None,
            p.RESET_OWNER: self._reset,
            p.RESET_DEVICE: self._reset,
            p.GET_PROTOCOL_FEATURES: lambda m: p.U64.pack(p.PROTOCOL_FEATURES),
            p.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            p.GET_QUEUE_NUM: lambda m: p.U64.pack(device.queues),
            p.SET_MEM_TABLE: self._set_mem_table,
            p.GET_MAX_MEM_SLOTS: lambda m: p.U64.pack(32),
            p.ADD_MEM_REG: self._add_mem_reg,
            p.REM_MEM_REG: self._rem_mem_reg,
            p.SET_VRING_NUM: self._set_vring_num,
            p.SET_VRING_ADDR: self._set_vring_addr,
            p.SET_VRING_BASE: self._set_vring_base,
            p.GET_VRING_BASE: self._get_vring_base,
            p.SET_VRING_KICK: self._set_vring_kick,
            p.SET_VRING_CALL: self._set_vring_call,
            p.SET_VRING_ERR: self._set_vring_err,
            p.SET_VRING_ENABLE: self._set_vring_enable,
            p.GET_CONFIG: self._get_config,
            p.SET_CONFIG: self._set_config,
            p.GET_INFLIGHT_FD: self._get_inflight_fd,
            p.SET_INFLIGHT_FD: self._set_inflight_fd,
        }

    def close(self) -> None:
        """Finish the requests, and let go of everything that is the front end's."""
        for ring in self._rings:
            self._stop(ring)
            for name in ("kick", "call", "err"):
                self._replace(ring, name, -1)
        self._loop.forget(self._device.completion_fd)
        self._device.close()
        self._connection.close()
        self._records.clear()
        self._memory = SharedMemory()

    def handle(self, message: p.Message) -> None:
        """Do what a message asks, and answer it. BlockError ends the session."""
        handler = self._handlers.get(message.request)
        acknowledge = message.need_reply and bool(self._protocol_features & p.F_REPLY_ACK)
        try:
            if handler is None:
                raise p.ProtocolError(f"message {message.request} is not known")
            answer = handler(message)
        except BlockError as e:
            if not acknowledge:
                raise
            self._report(str(e))
            self._connection.reply(message.request, p.U64.pack(1))
            return
        finally:
            p.close_all(message.fds)
        if answer is not None:
            self._connection.reply(message.request, answer)
        elif acknowledge and message.request != p.GET_INFLIGHT_FD:
            self._connection.reply(message.request, p.U64.pack(0))

    # --- features, memory, configuration ---

    def _set_features(self, message: p.Message) -> None:
        features = _u64(message)
        unknown = features & ~(self._device.features | p.F_PROTOCOL_FEATURES)
        if unknown:
            raise p.ProtocolError(f"features {unknown:#x} were not offered")
        changed = (features ^ self._device.negotiated) & (_RING_FEATURES | p.F_PROTOCOL_FEATURES)
        self._device.negotiated = features
        if changed:
            self._again()

    def _set_protocol_features(self, message: p.Message) -> None:
        features = _u64(message)
        if features & ~p.PROTOCOL_FEATURES:
            raise p.ProtocolError(f"protocol features {features & ~p.PROTOCOL_FEATURES:#x} were not offered")
        self._protocol_features = features

    def _reset(self, message: p.Message) -> None:
        for ring in self._rings:
            self._stop(ring)
            ring.enabled = ring.broken = False
            ring.next_avail = 0
        self._device.reset()

    def _set_mem_table(self, message: p.Message) -> None:
        count = p.REGIONS.unpack_from(message.payload)[0] if len(message.payload) >= p.REGIONS.size else 0
        if not 0 < count <= p.MAX_TABLE or len(message.payload) < p.REGIONS.size + count * p.REGION.size:
            raise p.ProtocolError(f"a memory table of {count} regions in {len(message.payload)} bytes")
        if len(message.fds) != count:
            raise p.ProtocolError(f"{len(message.fds)} descriptors for {count} regions")
        memory = SharedMemory()
        for i in range(count):
            guest, size, user, offset = p.REGION.unpack_from(message.payload, p.REGIONS.size + i * p.REGION.size)
            memory.add(guest, size, user, offset, message.fds[i])
        self._again(lambda: setattr(self, "_memory", memory))

    def _add_mem_reg(self, message: p.Message) -> None:
        if len(message.payload) != 8 + p.REGION.size or len(message.fds) != 1:
            raise p.ProtocolError(f"a memory region in {len(message.payload)} bytes with {len(message.fds)} descriptors")
        guest, size, user, offset = p.REGION.unpack_from(message.payload, 8)
        self._memory.add(guest, size, user, offset, message.fds[0])

    def _rem_mem_reg(self, message: p.Message) -> None:
        if len(message.payload) != 8 + p.REGION.size:
            raise p.ProtocolError(f"a memory region in {len(message.payload)} bytes")
        guest, size, user, _ = p.REGION.unpack_from(message.payload, 8)
        self._again(lambda: self._memory.remove(guest, size, user))

    def _get_config(self, message: p.Message) -> bytes:
        offset, size, data = _config(message)
        if not size or offset + size > p.MAX_CONFIG or len(data) != size:
            return b""  # the answer that means failure
        config = self._device.config().ljust(p.MAX_CONFIG, b"\0")
        return p.CONFIG.pack(offset, size, 0) + config[offset : offset + size]

    def _set_config(self, message: p.Message) -> None:
        offset, size, data = _config(message)
        if len(data) != size or not self._device.set_config(offset, data):
            raise p.ProtocolError(f"{size} bytes at {offset} of the configuration space cannot be written")

    # --- inflight ---

    def _get_inflight_fd(self, message: p.Message) -> None:
        _, _, queues, size = _inflight(message)
        self._check_inflight(queues, size)
        total = queues * Record.bytes_needed(size)
        fd = os.memfd_create("vhost-user-blk inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            import fcntl

            os.ftruncate(fd, total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._connection.reply(message.request, p.INFLIGHT.pack(total, 0, queues, size), (fd,))
        finally:
            os.close(fd)

    def _set_inflight_fd(self, message: p.Message) -> None:
        total, offset, queues, size = _inflight(message)
        self._check_inflight(queues, size)
        step = Record.bytes_needed(size)
        if total < queues * step or len(message.fds) != 1:
            raise p.ProtocolError(f"an inflight buffer of {total} bytes for {queues} queues of {size}")
        if any(ring.queue for ring in self._rings):
            raise p.ProtocolError("an inflight buffer while rings are running")
        view = map_file(message.fds[0], offset, queues * step)
        self._records = [Record(view[i * step : (i + 1) * step], size) for i in range(queues)]

    def _check_inflight(self, queues: int, size: int) -> None:
        if not 0 < queues <= len(self._rings) or not 0 < size <= 32768:
            raise p.ProtocolError(f"an inflight buffer for {queues} queues of {size}, there are {len(self._rings)} queues")

    # --- rings ---

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise p.ProtocolError(f"ring {index}, there are {len(self._rings)}")
        return self._rings[index]

    def _state(self, message: p.Message) -> tuple[Ring, int]:
        if len(message.payload) != p.VRING_STATE.size:
            raise p.ProtocolError(f"message {message.request} of {len(message.payload)} bytes")
        index, number = p.VRING_STATE.unpack(message.payload)
        return self._ring(index), number

    def _stopped(self, message: p.Message) -> tuple[Ring, int]:
        ring, number = self._state(message)
        if ring.queue is not None:
            raise p.ProtocolError(f"message {message.request} while ring {ring.index} is running")
        return ring, number

    def _set_vring_num(self, message: p.Message) -> None:
        ring, number = self._stopped(message)
        if not 0 < number <= 32768 or number & (number - 1):
            raise p.ProtocolError(f"ring {ring.index}: size {number} is not a power of two up to 32768")
        ring.size = number

    def _set_vring_base(self, message: p.Message) -> None:
        ring, number = self._stopped(message)
        if number > 0xFFFF:
            raise p.ProtocolError(f"ring {ring.index}: base {number}")
        ring.next_avail = number

    def _set_vring_addr(self, message: p.Message) -> None:
        if len(message.payload) != p.VRING_ADDR.size:
            raise p.ProtocolError(f"ring addresses in {len(message.payload)} bytes")
        index, flags, desc, used, avail, _ = p.VRING_ADDR.unpack(message.payload)
        ring = self._ring(index)
        if flags:
            raise p.ProtocolError(f"ring {index}: flags {flags:#x}: logging was not offered")
        self._stop(ring)
        ring.addresses = (desc, avail, used)
        self._start(ring)

    def _get_vring_base(self, message: p.Message) -> bytes:
        ring, _ = self._state(message)
        self._stop(ring)
        self._replace(ring, "kick", -1)
        self._replace(ring, "call", -1)
        ring.broken = False
        return p.VRING_STATE.pack(ring.index, ring.next_avail)

    def _descriptor(self, message: p.Message) -> tuple[Ring, int]:
        value = _u64(message)
        ring = self._ring(value & p.INDEX_MASK)
        if len(message.fds) != (0 if value & p.NO_FD else 1):
            raise p.ProtocolError(f"message {message.request} with {len(message.fds)} descriptors")
        if value & p.NO_FD:
            return ring, -1
        try:
            os.set_blocking(message.fds[0], False)  # a pipe would hold us up; events neither need nor notice this
        except OSError as e:
            raise p.ProtocolError(f"message {message.request} with a descriptor that is no event: {e.strerror}") from e
        return ring, message.fds.pop()

    def _set_vring_kick(self, message: p.Message) -> None:
        ring, fd = self._descriptor(message)
        if fd < 0:
            raise p.ProtocolError(f"ring {ring.index} without a kick descriptor: rings are not polled here")
        self._stop(ring)
        self._replace(ring, "kick", fd)
        ring.broken = False
        self._start(ring)

    def _set_vring_call(self, message: p.Message) -> None:
        ring, fd = self._descriptor(message)
        self._replace(ring, "call", fd)
        # What finished before there was anybody to tell. One interrupt too many does no harm.
        if ring.queue is not None:
            signal(fd)

    def _set_vring_err(self, message: p.Message) -> None:
        ring, fd = self._descriptor(message)
        self._replace(ring, "err", fd)

    def _set_vring_enable(self, message: p.Message) -> None:
        ring, number = self._state(message)
        ring.enabled = bool(number)
        if ring.enabled:
            self._start(ring)
        else:
            self._stop(ring)

    def _replace(self, ring: Ring, name: str, fd: int) -> None:
        """Keep another descriptor (-1: none) in place of the one there is."""
        old: int = getattr(ring, name)
        setattr(ring, name, fd)
        if old >= 0:
            os.close(old)

    def _again(self, change: Callable[[], None] | None = None) -> None:
        """Do something that no ring may be running under."""
        for ring in self._rings:
            self._stop(ring)
        try:
            if change is not None:
                change()
        finally:
            for ring in self._rings:
                self._start(ring)

    def _start(self, ring: Ring) -> None:
        """Run a ring as soon as all that takes is there."""
        enabled = ring.enabled or not self._device.negotiated & p.F_PROTOCOL_FEATURES
        if ring.queue is not None or ring.kick < 0 or not ring.addresses or not enabled or ring.broken:
            return
        negotiated = self._device.negotiated
        addresses, ring.addresses = ring.addresses, None  # kept only if they are good
        ring.queue = SplitQueue(
            self._memory,
            ring.size,
            *addresses,
            next_avail=ring.next_avail,
            event_idx=bool(negotiated & F_EVENT_IDX),
            indirect=bool(negotiated & F_INDIRECT_DESC),
            record=self._records[ring.index] if ring.index < len(self._records) else None,
        )
        ring.addresses = addresses
        try:
            self._loop.watch(ring.kick, lambda: self._kicked(ring))
        except OSError as e:
            ring.queue = None
            raise p.ProtocolError(f"ring {ring.index}: the kick descriptor cannot be waited for: {e.strerror}") from e
        self._serve(ring)  # a kick may have come before, and requests of an earlier back end come without one

    def _stop(self, ring: Ring) -> None:
        if ring.queue is None:
            return
        self._loop.forget(ring.kick)
        self._device.drain()
        ring.next_avail = ring.queue.next_avail
        ring.queue = None

    def _kicked(self, ring: Ring) -> None:
        try:
            gone = not os.read(ring.kick, 8)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            self._loop.forget(ring.kick)  # readable for ever, and nothing to read
        self._serve(ring)

    def _serve(self, ring: Ring) -> None:
        if ring.queue is None or ring.broken:
            return
        try:
            if self._device.serve(ring):
                self._loop.soon(lambda: self._serve(ring))
        except (QueueError, SharedMemoryError) as e:
            ring.broken = True
            self._loop.forget(ring.kick)
            signal(ring.err)
            self._report(f"ring {ring.index} is not served any more: {e}")


def _u64(message: p.Message) -> int:
    if len(message.payload) != p.U64.size:
        raise p.ProtocolError(f"message {message.request} of {len(message.payload)} bytes")
    value: int = p.U64.unpack(message.payload)[0]
    return value


def _config(message: p.Message) -> tuple[int, int, bytes]:
    if len(message.payload) < p.CONFIG.size:
        raise p.ProtocolError(f"message {message.request} of {len(message.payload)} bytes")
    offset, size, _ = p.CONFIG.unpack_from(message.payload)
    return offset, size, message.payload[p.CONFIG.size :]


def _inflight(message: p.Message) -> tuple[int, int, int, int]:
    if len(message.payload) < p.INFLIGHT.size - 4:
        raise p.ProtocolError(f"message {message.request} of {len(message.payload)} bytes")
    total, offset, queues, size = p.INFLIGHT.unpack(message.payload.ljust(p.INFLIGHT.size, b"\0")[: p.INFLIGHT.size])
    return total, offset, queues, size
