"""Block requests (virtio 1.2, section 5.2) from rings to a disk's channel and back. One thread, one channel, any number of rings.

Not here: how rings come to be (`session`), topology, secure erase, zones.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from struct import Struct
from typing import Any

from .virtqueue import QueueError, SplitQueue

# Feature bits (5.2.3 and 6)
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_CONFIG_WCE, F_MQ = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 11, 1 << 12
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32

# Request types and status (5.2.6)
_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IOERR, _UNSUPP = 0, 1, 2
_HEADER = Struct("<IIQ")  # type, reserved, sector
_SEGMENT = Struct("<QII")  # sector, num_sectors, flags
_UNMAP = 1
# virtio_blk_config (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology, writeback, unused, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg,
# write_zeroes_may_unmap, unused
_CONFIG = Struct("<QII4sI8sBBHIIIIIB3x")
_WRITEBACK_AT = 32
SERIAL_MAX = 20  # bytes (5.2.6)
_SEGMENT_SECTORS = 0x7F_FFFF  # of one discard or write-zeroes: just under 4 GiB
_SEGMENTS_IN_ONE_REQUEST = 126  # of data: what a ring of 128 has beside header and status
_ROUNDS = 10  # of one queue before the other descriptors of the loop have their turn
_BATCH = 32  # requests that are given back at once


class Ring:
    """One queue as the front end set it up. Descriptors are ours to close, -1 where there is none."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.next_avail = 0
        self.addresses: tuple[int, int, int] | None = None  # descriptors, available, used: user addresses
        self.kick = self.call = self.err = -1
        self.enabled = False
        self.broken = False
        self.queue: SplitQueue | None = None  # while it runs

    def publish(self) -> None:
        """Let the driver see what was given back, and interrupt it if it wants that."""
        if self.queue is not None and self.queue.publish():
            signal(self.call)


def signal(fd: int) -> None:
    """Raise an event; whoever has gone, or has more events than it looks at, misses nothing by not getting it."""
    if fd >= 0:
        with suppress(OSError):
            os.write(fd, b"\1\0\0\0\0\0\0\0")


class Blk:
    """The device behind the rings of one front end."""

    def __init__(self, disk: Any, *, queues: int, serial: bytes = b"") -> None:
        self._disk = disk
        self.queues = queues
        self._serial = serial.ljust(SERIAL_MAX, b"\0")
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
        self.features |= F_MQ if queues > 1 else 0
        if disk.read_only:
            self.features |= F_RO
        else:
            self.features |= F_CONFIG_WCE | F_WRITE_ZEROES | (F_DISCARD if disk.discard else 0)
        self.negotiated = 0
        self._capacity = disk.size & ~511  # bytes
        self._writeback = True
        self._channel = disk.channel()
        self.completion_fd: int = self._channel.completion_fd

    def close(self) -> None:
        self._channel.close()

    def reset(self) -> None:
        """A new driver will come."""
        self.negotiated = 0
        self._writeback = True

    # --- configuration space ---

    def config(self) -> bytes:
        discard = (_SEGMENT_SECTORS, 1, 1) if self._disk.discard else (0, 0, 0)
        return _CONFIG.pack(
            self._disk.size >> 9,
            0,
            _SEGMENTS_IN_ONE_REQUEST,
            b"",
            512,
            b"",
            self._writeback,
            0,
            self.queues,
            *discard,
            _SEGMENT_SECTORS,
            1,
            1,
        )

    def set_config(self, offset: int, data: bytes) -> bool:
        """Write to the configuration space: whether that may be written. Only the cache mode may."""
        if offset != _WRITEBACK_AT or data not in (b"\0", b"\1") or self._disk.read_only:
            return False
        self._writeback = data == b"\1"
        return True

    @property
    def _through(self) -> bool:
        """Every write survives power loss when it is answered (5.2.6.2): asked for, or from a driver that cannot flush."""
        return not self._writeback or not self.negotiated & F_FLUSH

    # --- requests ---

    def serve(self, ring: Ring) -> bool:
        """Take what is in a ring; whether there is more that another turn has to take. Raises QueueError, SharedMemoryError."""
        queue, channel = ring.queue, self._channel
        assert queue is not None
        try:
            for _ in range(_ROUNDS):
                queue.disable_kicks()
                for head, readable, writable in queue.chains():
                    self._start(ring, head, readable, writable)
                    if queue.unpublished >= _BATCH:
                        channel.submit()
                        ring.publish()
                channel.submit()
                ring.publish()
                if not queue.enable_kicks():
                    return False
            return True
        finally:
            channel.submit()
            ring.publish()

    def collect(self) -> None:
        """Answer what has finished."""
        rings = set()
        for token, result in self._channel.completions():
            self._finish(token, result)
            rings.add(token[0])
        self._channel.submit()
        for ring in rings:
            ring.publish()

    def drain(self) -> None:
        """Wait until everything that was taken is answered."""
        while self._channel.in_flight:
            self._channel.drain()
            self.collect()

    def _start(self, ring: Ring, head: int, readable: list[memoryview], writable: list[memoryview]) -> None:
        if not writable:
            raise QueueError(f"request {head} has no room for its status")
        last = writable[-1]
        status = last[-1:]
        if len(last) == 1:
            del writable[-1]
        else:
            writable[-1] = last[:-1]
        data = readable
        # What matters is copied: the driver may change its memory at any time.
        if readable and len(readable[0]) >= _HEADER.size:
            header = bytes(readable[0][: _HEADER.size])
            data = readable[1:] if len(readable[0]) == _HEADER.size else [readable[0][_HEADER.size :], *readable[1:]]
        else:
            header, data = _split(readable, _HEADER.size)
        if len(header) < _HEADER.size:
            raise QueueError(f"request {head} has a header of {len(header)} bytes")
        kind, _, sector = _HEADER.unpack(header)
        offset = sector << 9
        channel = self._channel
        result: int | None
        if kind == _IN:
            length = sum(map(len, writable))
            token = (ring, head, status, length + 1, False)
            result = channel.readv(offset, writable, token) if self._inside(offset, length) else -errno.EINVAL
        elif kind == _OUT:
            token = (ring, head, status, 1, self._through)
            result = channel.writev(offset, data, token) if self._inside(offset, sum(map(len, data))) else -errno.EINVAL
        elif kind == _FLUSH:
            token = (ring, head, status, 1, False)
            result = channel.flush(token) if not self._disk.read_only else 0
        elif kind == _GET_ID:
            left = self._serial
            for view in writable:
                n = min(len(view), len(left))
                view[:n], left = left[:n], left[n:]
            token = (ring, head, status, 1 + SERIAL_MAX - len(left), False)
            result = 0
        elif (kind == _WRITE_ZEROES and self.features & F_WRITE_ZEROES) or (kind == _DISCARD and self.features & F_DISCARD):
            token = (ring, head, status, 1, self._through)
            result = self._segment(kind, _split(data, _SEGMENT.size + 1)[0], token)
        else:
            token = (ring, head, status, 1, False)
            result = _NOT_OFFERED
        if result is not None:
            self._finish(token, result)

    def _inside(self, offset: int, length: int) -> bool:
        return not length & 511 and offset + length <= self._capacity

    def _segment(self, kind: int, data: bytes, token: Any) -> int | None:
        if len(data) != _SEGMENT.size:
            return -errno.EINVAL  # more than one, of which max_discard_seg knows nothing
        sector, count, flags = _SEGMENT.unpack(data)
        if flags & ~_UNMAP or (kind == _DISCARD and flags):
            return _NOT_OFFERED  # 5.2.6.2
        offset, length = sector << 9, count << 9
        if count > _SEGMENT_SECTORS or not self._inside(offset, length):
            return -errno.EINVAL
        result: int | None
        if kind == _DISCARD:
            result = self._channel.discard(offset, length, token)
        else:
            result = self._channel.write_zeroes(offset, length, token, bool(flags & _UNMAP))
        return result

    def _finish(self, token: Any, result: int) -> None:
        ring, head, status, written, through = token
        if through and not result:
            flushing: int | None = self._channel.flush((ring, head, status, written, False))
            if flushing is None:
                return
            result = flushing
        status[0] = _OK if not result else _UNSUPP if result == _NOT_OFFERED else _IOERR
        ring.queue.add_used(head, written)


_NOT_OFFERED = 1  # beside the results of a channel, which are never above 0


def _split(views: Iterable[memoryview], n: int) -> tuple[bytes, list[memoryview]]:
    """The first `n` bytes (or fewer, if there are no more), copied, and the rest."""
    taken = b""
    rest: list[memoryview] = []
    for view in views:
        part = bytes(view[: n - len(taken)])
        taken += part
        if len(part) < len(view):
            rest.append(view[len(part) :])
    return taken, rest
