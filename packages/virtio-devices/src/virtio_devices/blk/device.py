"""The block device (virtio 1.2, section 5.2): requests from its queues to a disk's channels and back.

Each queue is served by the loop that owns it, through that loop's own channel, so queues share nothing but the rate limit. A
disk may come and go while a driver is active: without one the capacity is 0 and every request fails.

Not here: image formats, engines, zero detection (the disk's), and topology or lifetime requests, which are not offered.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from struct import Struct

from virtio_devices.blk.statistics import (
    DISCARDS,
    FAILED,
    FLUSHES,
    READ_BYTES,
    READS,
    WRITES,
    WRITTEN_BYTES,
    ZEROES,
    Statistics,
)
from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, DeviceError, VirtioDevice
from virtio_devices.limit import LeakyBucket
from virtio_devices.queue import Chain, QueueError, SplitQueue
from vmm_core.loop import READ, Loop, Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.blk.backend import Channel, Disk
    from vmm_core.clock import Clock

SERIAL_MAX = 20  # 5.2.6: the device ID string
QUEUES_MAX = 32

# Feature bits (5.2.3), as masks
F_SEG_MAX, F_RO, F_FLUSH, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 2, 1 << 5, 1 << 9, 1 << 12, 1 << 13, 1 << 14

# Request types and status (5.2.6)
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

_HEADER = Struct("<IIQ")  # virtio_blk_req: type, reserved, sector
_SEGMENT = Struct("<QII")  # virtio_blk_discard_write_zeroes: sector, num_sectors, flags
_UNMAP = 1
_SEGMENT_SECTORS = 0x7F_FFFF  # of one discard or write-zeroes: just under 4 GiB

# virtio_blk_config (5.2.4): capacity, size_max, seg_max, geometry, blk_size, topology, writeback, unused, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg,
# write_zeroes_may_unmap, unused
_CONFIG = Struct("<QII4sI8sBBHIIIIIB3x")

_NOT_OFFERED = 1  # beside the results of a channel, which are never above 0

# After a kick a queue is served at most this often before the other descriptors of its loop have their turn.
_ROUNDS = 10
# Finished requests are published after this many bytes of data, each request counting as 16 KiB on top: a driver should not
# wait for the last of a long batch to hear of the first, nor take an interrupt for each.
_BATCH = 1 << 20
_REQUEST = 1 << 14

# With more pieces of guest memory than this in requests that wait for the disk, on one loop, no more are taken until some have
# come back: each piece costs some hundred bytes of ours, and a driver could have thousands of requests of a thousand pieces wait.
# With 4 KiB a piece these are 256 MiB under way.
_PIECES = 1 << 16

# StratoVirt lets a second's worth of requests pass at once. Over 20 s that alone is 5 % too much, and a guest that stops and
# goes gets twice its rate; a tenth of a second is enough to keep an engine's batches full.
_BURST = 100_000_000  # ns

# queue index, head, status byte, used length, whether a flush must follow, how many pieces it has: all that completing a request
# needs
_Token = tuple[int, int, memoryview, int, bool, int]


class _Lane:
    """One loop's share of the device. Belongs to that loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.indices: list[int] = []
        self.channel: Channel | None = None
        self.capacity = 0  # bytes, in whole sectors; 0 exactly without a channel
        self.timers: dict[int, Timer] = {}  # queue index: what will serve the queue again when the limit allows it
        self.pieces = 0  # of the requests that wait for the disk
        self.counted = list(Statistics())  # by the indices of `statistics`


class BlkDevice(VirtioDevice):
    """A virtio block device."""

    device_type = 2

    def __init__(
        self,
        name: str,
        loops: Sequence[Loop],
        clock: Clock,
        *,
        disk: Disk | None = None,
        serial: str = "",
        num_queues: int = 1,
        queue_size: int = 256,
        read_only: bool = False,
        discard: bool = False,
        write_zeroes: bool = False,
        iops: int = 0,
        bps: int = 0,
    ) -> None:
        """Make a device on `disk`, which its owner closes after the device, or on none yet.

        `discard` and `write_zeroes` offer these requests. `iops` limits requests a second over all queues, `bps` the bytes of
        data they carry; 0 is no limit.

        Raises DeviceError for a serial number over 20 bytes, ValueError for a number or size of queues that cannot be.
        """
        if not 1 <= num_queues <= QUEUES_MAX:
            raise ValueError(f"{name}: {num_queues} queues; there are 1 to {QUEUES_MAX}")
        if not 2 < queue_size <= 1024 or queue_size & (queue_size - 1):
            raise ValueError(f"{name}: queue size {queue_size} is not a power of two from 4 to 1024")
        read_only = read_only or (disk is not None and disk.read_only)
        features = F_INDIRECT_DESC | F_EVENT_IDX | F_SEG_MAX | F_FLUSH
        features |= (F_RO if read_only else 0) | (F_MQ if num_queues > 1 else 0)
        features |= (F_DISCARD if discard else 0) | (F_WRITE_ZEROES if write_zeroes else 0)
        config = _CONFIG.pack(
            disk.size // 512 if disk else 0,
            0,
            queue_size - 2,  # header and status take two descriptors
            b"",
            0,
            b"",
            0,
            0,
            num_queues if num_queues > 1 else 0,
            *((_SEGMENT_SECTORS, 1, 1) if discard else (0, 0, 0)),
            *((_SEGMENT_SECTORS, 1, 1) if write_zeroes else (0, 0, 0)),
        )
        super().__init__(name, loops, features=features, queue_sizes=[queue_size] * num_queues, config=config)
        self._disk = disk
        self._serial = self._padded(serial)
        self._read_only = read_only
        self._clock = clock
        self._buckets = self._limits(iops, bps)
        lanes: dict[Loop, _Lane] = {}
        self._lanes: list[_Lane] = []  # by queue
        for index, loop in enumerate(self._loops):
            lane = lanes.setdefault(loop, _Lane(loop))
            lane.indices.append(index)
            self._lanes.append(lane)
        self._all_lanes = list(lanes.values())

    # The disk, from the thread that owns the machine

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk."""
        return self._disk is not None

    @property
    def statistics(self) -> Statistics:
        """What the disk that is there has been asked for."""
        return Statistics(*map(sum, zip(*(lane.counted for lane in self._all_lanes), strict=True)))

    def counters(self) -> dict[str, int]:
        """Return the statistics of the disk that is there."""
        return self.statistics._asdict()

    def attach(self, disk: Disk, *, serial: str = "", iops: int = 0, bps: int = 0) -> None:
        """Put a disk in, with its serial number and its limits, and tell the driver.

        What a driver has negotiated stays: for one that does not know that a disk is read-only, writing just fails.

        Raises DeviceError when there is a disk, the serial number is too long, or a channel to the disk cannot be opened.
        """
        with self._lock:
            if self._disk is not None:
                raise DeviceError(f"{self.name}: has a disk already")
            self._serial = self._padded(serial)
            self._disk = disk
            for lane in self._all_lanes:
                lane.counted = list(Statistics())
            if self.active:
                try:
                    self._open_channels()
                except DeviceError:
                    self._disk = None
                    raise
            self._set_limits(iops, bps)
            self._read_only = disk.read_only
            if not self.active:
                self._offer()
            self._set_config(0, (disk.size // 512).to_bytes(8, "little"))

    def detach(self) -> None:
        """Take the disk out, and tell the driver. Requests under way are waited for. Raises DeviceError when there is none."""
        with self._lock:
            if self._disk is None:
                raise DeviceError(f"{self.name}: has no disk")
            self._close_channels()
            self._disk = None  # not before: what cannot come to rest stays, and can be taken out later
            self._set_limits(0, 0)
            self._read_only = False
            if not self.active:
                self._offer()
            self._set_config(0, bytes(8))

    def disk_resized(self) -> None:
        """Take over the disk's new size, and tell the driver."""
        with self._lock:
            if self._disk is None:
                return
            size = self._disk.size
            for lane in self._all_lanes:
                if lane.channel is not None:

                    def resize(lane: _Lane = lane) -> None:
                        lane.capacity = size & ~511

                    lane.loop.run(resize)
            self._set_config(0, (size // 512).to_bytes(8, "little"))

    def close(self) -> None:
        """Reset, and close the channels. The disk is its owner's."""
        with self._lock:
            super().close()
            self._close_channels()

    def _limits(self, iops: int, bps: int) -> tuple[LeakyBucket | None, LeakyBucket | None]:
        """Return the buckets of requests and of bytes."""
        return (
            LeakyBucket(self._clock, iops, _BURST) if iops else None,
            LeakyBucket(self._clock, bps, _BURST) if bps else None,
        )

    def _set_limits(self, iops: int, bps: int) -> None:
        """Have the limits of another disk. What waits for the old ones to allow it, for as long as they say, waits no more."""
        self._buckets = self._limits(iops, bps)
        for lane in self._all_lanes:

            def serve(lane: _Lane = lane) -> None:
                for index, timer in lane.timers.items():
                    timer.cancel()
                    self._kick_later(index)
                lane.timers.clear()

            lane.loop.run(serve)

    def _padded(self, serial: str) -> bytes:
        encoded = serial.encode(errors="surrogateescape")
        if len(encoded) > SERIAL_MAX:
            raise DeviceError(f"{self.name}: a serial number has at most {SERIAL_MAX} bytes")
        return encoded.ljust(SERIAL_MAX, b"\0")

    def _offer(self) -> None:
        """Offer to the next driver what suits the disk."""
        self.features = self.features & ~F_RO | (F_RO if self._read_only else 0)

    def _start(self) -> None:
        self._open_channels()

    def _open_channels(self) -> None:
        disk = self._disk
        if disk is None:
            return
        for lane in self._all_lanes:
            if lane.channel is not None:
                continue

            def begin(lane: _Lane = lane) -> None:
                channel = disk.channel()
                lane.channel, lane.capacity = channel, disk.size & ~511
                lane.loop.add_fd(channel.completion_fd, READ, lambda _events: self._completed(lane))

            try:
                lane.loop.run(begin)
            except Exception as error:  # a disk has errors of its own, which this package does not know
                self._close_channels()
                raise DeviceError(f"{self.name}: {error}") from error

    def _close_channels(self) -> None:
        for lane in self._all_lanes:

            def end(lane: _Lane = lane) -> None:
                self._finish(lane)
                channel, lane.channel, lane.capacity = lane.channel, None, 0
                if channel is not None:
                    lane.loop.remove_fd(channel.completion_fd)
                    channel.close()

            lane.loop.run(end)

    # Requests: on the loop that owns the queue

    def _process(self, index: int, queue: SplitQueue) -> None:
        lane = self._lanes[index]
        if lane.pieces > _PIECES or index in lane.timers:
            return
        for _ in range(_ROUNDS):
            queue.disable_kicks()
            limited = self._buckets != (None, None)
            self._serve(lane, index, queue, self._admitted(lane, index, queue) if limited else queue.chains())
            if not queue.enable_kicks() or lane.pieces > _PIECES or index in lane.timers:
                return
        self._kick_later(index)

    def _admitted(self, lane: _Lane, index: int, queue: SplitQueue) -> Iterator[Chain]:
        """Yield what is available as far as the limits allow it; what they do not allow stays in the ring until a timer."""
        requests, data = self._buckets
        for _ in range(queue.size):
            if not queue.pending:
                return
            # How many bytes a request has is known when it has been taken: it passes when the ones before it are paid for.
            delay = (data.take(0) if data else 0) or (requests.take(1) if requests else 0)
            if delay:

                def again() -> None:
                    del lane.timers[index]
                    self._guarded(index, self._process)

                lane.timers[index] = lane.loop.call_later(delay, again)
                return
            for chain in queue.chains():
                if data:
                    _, readable, writable = chain
                    data.charge(max(sum(map(len, readable)) + sum(map(len, writable)) - _HEADER.size - 1, 0))
                yield chain
                break

    def _serve(self, lane: _Lane, index: int, queue: SplitQueue, requests: Iterable[Chain]) -> None:
        """Serve requests and publish them. Flat, and nothing in it that a 4 KiB read does not need: this is the hot path."""
        capacity, channel, add_used, header = lane.capacity, lane.channel, queue.add_used, _HEADER.unpack_from
        writethrough = not self.negotiated & F_FLUSH
        budget = _BATCH
        pieces = 0
        reads = read_bytes = writes = written_bytes = failed = 0
        try:
            for head, readable, writable in requests:
                if not readable or not writable:
                    raise QueueError("a request without header or without status byte")
                if len(readable[0]) == 16:
                    kind, _, sector = header(readable[0])
                    del readable[0]
                else:
                    kind, sector = _take_header(readable)
                status = writable[-1]
                if len(status) == 1:
                    del writable[-1]
                else:
                    writable[-1], status = status[:-1], status[-1:]
                if kind == IN:
                    if not writable:
                        raise QueueError("a read without room for data")
                    pieces = len(writable)
                    length = len(writable[0]) if pieces == 1 else sum(map(len, writable))
                    offset = sector << 9
                    if channel is None or length & 511 or offset + length > capacity:
                        result: int | None = -errno.EIO
                    else:
                        reads += 1
                        read_bytes += length
                        result = channel.readv(offset, writable, (index, head, status, length + 1, False, pieces))
                    budget -= length + _REQUEST
                    written = length + 1
                elif kind == OUT:
                    if not readable:
                        raise QueueError("a write without data")
                    pieces = len(readable)
                    length = len(readable[0]) if pieces == 1 else sum(map(len, readable))
                    offset = sector << 9
                    written = 1 + sum(map(len, writable)) if writable else 1
                    if channel is None or length & 511 or offset + length > capacity or self._read_only:
                        result = -errno.EIO
                    else:
                        writes += 1
                        written_bytes += length
                        result = channel.writev(offset, readable, (index, head, status, written, writethrough, pieces))
                        if writethrough and result == 0:
                            result = channel.flush((index, head, status, written, False, pieces))
                    budget -= length + _REQUEST
                else:
                    written = 1 + sum(map(len, writable))
                    pieces = 0
                    result = self._other(lane, kind, readable, writable, (index, head, status, written, False, 0))
                    budget -= _REQUEST
                if result is None:
                    lane.pieces += pieces
                    if lane.pieces > _PIECES:
                        break
                    continue
                if result == 0:
                    status[0] = S_OK
                else:
                    failed += 1
                    status[0] = S_UNSUPP if result == _NOT_OFFERED else S_IOERR
                add_used(head, written)
                if budget < 0:
                    budget = _BATCH
                    if channel is not None:
                        channel.submit()
                    self._used(index, queue)
        finally:
            # Also when the ring turns out broken: what was handed to the disk before must not be forgotten there.
            if channel is not None:
                channel.submit()
            counted = lane.counted
            if reads:
                counted[READS] += reads
                counted[READ_BYTES] += read_bytes
            if writes:
                counted[WRITES] += writes
                counted[WRITTEN_BYTES] += written_bytes
            counted[FAILED] += failed
        self._used(index, queue)

    def _other(self, lane: _Lane, kind: int, readable: list[memoryview], writable: list[memoryview], token: _Token) -> int | None:
        """Serve everything but reads and writes. Returns the channel's result, or _NOT_OFFERED."""
        channel = lane.channel
        if kind in (DISCARD, WRITE_ZEROES):
            segment = _peek(readable, _SEGMENT.size + 1)
            if len(segment) < _SEGMENT.size:
                raise QueueError(f"a segment of {len(segment)} bytes")
        if channel is None:
            return -errno.EIO
        if kind == FLUSH:
            lane.counted[FLUSHES] += 1
            return channel.flush(token)
        if kind == GET_ID:
            serial = self._serial
            for view in writable:
                part, serial = serial[: len(view)], serial[len(view) :]
                view[: len(part)] = part
            return 0
        if kind not in (DISCARD, WRITE_ZEROES) or not self.negotiated & (F_DISCARD if kind == DISCARD else F_WRITE_ZEROES):
            return _NOT_OFFERED
        if len(segment) > _SEGMENT.size:  # one segment is what max_discard_seg and max_write_zeroes_seg allow
            return _NOT_OFFERED
        sector, count, flags = _SEGMENT.unpack(segment)
        if flags & ~_UNMAP or (kind == DISCARD and flags):
            return _NOT_OFFERED
        if count > _SEGMENT_SECTORS or (sector + count) << 9 > lane.capacity or self._read_only:
            return -errno.EIO
        if count == 0:
            return 0
        if kind == DISCARD:
            lane.counted[DISCARDS] += 1
            return channel.discard(sector << 9, count << 9, token)
        lane.counted[ZEROES] += 1
        if self.negotiated & F_FLUSH:
            return channel.write_zeroes(sector << 9, count << 9, token, bool(flags & _UNMAP))
        result = channel.write_zeroes(sector << 9, count << 9, (*token[:4], True, 0), bool(flags & _UNMAP))
        return channel.flush(token) if result == 0 else result

    def _completed(self, lane: _Lane) -> None:
        """Give finished requests back to their queues."""
        channel = lane.channel
        if channel is None:
            return
        touched: dict[int, SplitQueue] = {}
        flushing = False
        full = lane.pieces > _PIECES
        for (index, head, status, written, flush, pieces), result in channel.completions():
            if flush and result == 0:
                flushing = True
                answer = channel.flush((index, head, status, written, False, pieces))
                if answer is None:
                    continue
                result = answer
            lane.pieces -= pieces
            queue = self.queues[index]
            if queue is None or self.broken:
                continue
            if result == 0:
                status[0] = S_OK
            else:
                lane.counted[FAILED] += 1
                status[0] = S_IOERR
            queue.add_used(head, written)
            touched[index] = queue
        if flushing:
            channel.submit()
        for index, queue in touched.items():
            self._used(index, queue)
        if full and lane.pieces <= _PIECES:
            # In turns: the first one may have enough in its ring to fill the room again, each time.
            lane.indices.append(lane.indices.pop(0))
            for index in lane.indices:
                self._kick_later(index)

    def _finish(self, lane: _Lane) -> None:
        """Wait for everything that a lane has under way, and give it back."""
        channel = lane.channel
        while channel is not None and channel.in_flight:
            channel.submit()
            channel.drain()
            self._completed(lane)

    def _drain(self, loop: Loop) -> None:
        for lane in self._all_lanes:
            if lane.loop is loop:
                self._finish(lane)

    def _stop(self) -> None:
        for lane in self._all_lanes:

            def forget(lane: _Lane = lane) -> None:
                for timer in lane.timers.values():
                    timer.cancel()
                lane.timers.clear()

            lane.loop.run(forget)
        self._offer()


def _take_header(readable: list[memoryview]) -> tuple[int, int]:
    """Take a header that is not a descriptor of its own out of `readable`; return type and sector."""
    header = b""
    while len(header) < _HEADER.size:
        if not readable:
            raise QueueError(f"a header of {len(header)} bytes")
        view = readable[0]
        wanted = _HEADER.size - len(header)
        header += bytes(view[:wanted])
        if len(view) > wanted:
            readable[0] = view[wanted:]
        else:
            del readable[0]
    kind, _, sector = _HEADER.unpack(header)
    return kind, sector


def _peek(views: list[memoryview], count: int) -> bytes:
    """Return a copy of the first `count` bytes, or of all when there are fewer."""
    data = b""
    for view in views:
        data += bytes(view[: count - len(data)])
        if len(data) == count:
            break
    return data
