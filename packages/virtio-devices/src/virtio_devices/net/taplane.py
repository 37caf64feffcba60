"""One queue pair over one queue of a tap: a frame is one system call, and its header is the virtio one.

The next frame's size is not known before it is read. Small frames are read many in a row, a buffer of the driver's for each and
nothing of the interpreter in between; large ones one by one, with as much room as the last ones needed. What is too much for the
room lands in memory of ours and is copied, so no frame is cut.

Not here: the tap itself (`tap`).
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from errno import EAGAIN, EBADFD
from itertools import accumulate, islice, repeat
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from operator import le
from struct import Struct

from virtio_devices.net.backend import BYTES, FRAMES, Lane
from virtio_devices.net.buffers import peek
from virtio_devices.net.features import ETHERNET, HEADER
from virtio_devices.queue import QueueError, Singles, SplitQueue
from vmm_core.loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_devices.net.backend import Owner
    from virtio_devices.net.filter import RxFilter

# What a tap answers that takes no more frames now, or none any more. Anything else (an interface that is down, nonsense in the
# header) is about one frame, which is lost.
_STOP = (EAGAIN, EBADFD)
_MANY = 8  # frames to be sent that are taken at once sooner than one by one
_SPILL = 0x1_2000  # bytes: more than a frame of 64 KiB with every header
_FIRST = 18  # bytes of a frame that a filter looks at: addresses, type and a VLAN's tag
_BEGINNING = Struct(f"{HEADER}x{_FIRST}s").unpack_from
_FADE = 5  # how slowly it is forgotten that frames were large: by a 32nd with each smaller one


class TapLane(Lane):
    """One queue of a tap."""

    def __init__(self, owner: Owner, pair: int, loop: Loop, fd: int) -> None:
        """Make a lane at rest."""
        super().__init__(owner, pair, loop, fd)
        # For what is too much for the room that is offered, one for each frame of a row; pages that nobody needs are not there.
        self._area = mmap(-1, FRAMES * _SPILL, MAP_PRIVATE | MAP_ANONYMOUS)
        area = memoryview(self._area)
        self._spills = [area[at : at + _SPILL] for at in range(0, len(area), _SPILL)]
        # Frames that were read and are not the driver's yet, as they did not fit or wait for more buffers.
        self._backlog: deque[bytes] = deque()
        self._expected = self._row = 1
        self._wanted: tuple[RxFilter, bytes] | None = None  # how the last frame began that was, and by which filter

    def begin(self, mergeable: bool) -> None:
        """Get ready for a new driver."""
        super().begin(mergeable)
        self._drop_backlog()
        self._expected = self._row = 1  # length of the next frame, and how many are read in a row

    def receive(self, queue: SplitQueue) -> None:
        """Read frames into the driver's buffers."""
        if self.enabled and not self.dead:
            try:
                self._receive(queue)
            finally:
                self._owner.publish(self._rx, queue)
        else:
            self._drop_backlog()  # nobody is to have it later, when it is old

    def _drop_backlog(self) -> None:
        self.rx_dropped += len(self._backlog)
        self._backlog.clear()

    def _receive(self, queue: SplitQueue) -> None:
        buffers = self._buffers
        frames, budget = FRAMES, BYTES
        while frames > 0 and budget > 0:
            if self._backlog and not self._deliver(queue):
                return
            expected = self._expected
            if buffers.room < expected and not buffers.fill(queue, expected) and not buffers.count:
                if self._starve(queue):
                    return
                continue
            if buffers.each_holds(expected):
                lengths = self._read_row(queue, min(self._row, frames))
            else:
                lengths = self._read_one(queue, expected)
            if lengths is None:
                return
            frames -= len(lengths)
            budget -= sum(lengths)
        # The tap tells of frames that it has, and not of those that were read.
        if not self._backlog or self._deliver(queue):
            self._hungry(queue)

    def _read_row(self, queue: SplitQueue, most: int) -> Sequence[int] | None:
        """Read frames that are likely to fit into a buffer each. Return their lengths; None to stop, with everything done."""
        buffers = self._buffers
        views = buffers.views(most)
        lengths: list[int] = []
        failure: OSError | None = None
        try:
            # What was read before a failure is in the list.
            lengths.extend(map(os.readv, repeat(self._fd), map(list, zip(views, self._spills))))  # noqa: B905 (more spills)
        except OSError as error:
            failure = error
        count = len(lengths)
        if count:
            self._row = min(2 * count, FRAMES)
            if self._all_wanted(views, lengths):
                buffers.give_each(queue, lengths)
                self._expected = max(*lengths, self._expected - (self._expected >> _FADE))
                self.rx_frames += count
                self.rx_bytes += sum(lengths) - count * HEADER
            elif not self._keep(views, lengths):
                self._deliver(queue)
                self._die("end of file")
                return None
        elif failure:
            self._row = 2
        if failure is None:
            return lengths
        if self._backlog and not self._deliver(queue):
            return None
        if failure.errno == EAGAIN:
            self._hungry(queue)
        else:
            self._die(failure.strerror or str(failure))
        return None

    def _all_wanted(self, views: Sequence[memoryview], lengths: Sequence[int]) -> bool:
        """Tell whether each is a frame, not a tiny one, that lies in its buffer and that the driver wants."""
        if min(lengths) < HEADER + _FIRST or not all(map(le, lengths, map(len, views))):
            return False
        rx_filter = self._owner.rx_filter
        if rx_filter is None:
            return True
        # Most of a row are of one conversation.
        return all(rx_filter.accepts(beginning) for (beginning,) in set(map(_BEGINNING, islice(views, len(lengths)))))

    def _keep(self, views: Sequence[memoryview], lengths: Sequence[int]) -> bool:
        """Put what was read in a row, frames that are wanted, where it waits for its buffers. False at an end of file."""
        for view, spill, length in zip(views, self._spills, lengths):  # noqa: B905 (as many as there are lengths)
            if not length:
                return False
            self._keep_one([view, spill], length)
        self._area.madvise(MADV_DONTNEED)
        return True

    def _keep_one(self, vector: Sequence[memoryview], length: int) -> None:
        """Keep one that was read into `vector`, if it is a frame that is whole and wanted."""
        if length < HEADER + ETHERNET or length >= sum(map(len, vector)):
            self.rx_dropped += 1
        elif not self._unwanted(peek(vector, HEADER, min(_FIRST, length - HEADER))):  # what lies behind it is none of it
            self._backlog.append(peek(vector, 0, length))

    def _read_one(self, queue: SplitQueue, expected: int) -> Sequence[int] | None:
        """Read one frame. As _read_row()."""
        buffers = self._buffers
        vector, room = buffers.offer(expected)
        vector.append(self._spills[0])
        try:
            length = os.readv(self._fd, vector)
        except BlockingIOError:
            self._hungry(queue)
            return None
        except OSError as error:
            self._die(error.strerror or str(error))
            return None
        if length < HEADER + _FIRST or length > room:
            if not length:
                self._die("end of file")
                return None
            self._keep_one(vector, length)
        elif self._wants(vector):
            buffers.give(queue, length)
            self._expected = max(length, expected - (expected >> _FADE))
            self.rx_frames += 1
            self.rx_bytes += length - HEADER
        return (length,)

    def _wants(self, vector: Sequence[memoryview]) -> bool:
        """Tell whether the driver wants the frame that was read into `vector`; count it if not."""
        rx_filter = self._owner.rx_filter
        if rx_filter is None:
            return True
        if len(vector[0]) < HEADER + _FIRST:
            return not self._unwanted(peek(vector, HEADER, _FIRST))
        beginning: bytes = _BEGINNING(vector[0])[0]
        if self._wanted == (rx_filter, beginning):  # of the same conversation as the last one
            return True
        if self._unwanted(beginning):
            return False
        self._wanted = rx_filter, beginning
        return True

    def _deliver(self, queue: SplitQueue) -> bool:
        """Copy the frames that wait into buffers. False while those are missing."""
        backlog, buffers = self._backlog, self._buffers
        while backlog:
            data = backlog[0]
            length = len(data)
            while buffers.room < length:
                if buffers.fill(queue, length):
                    continue
                # Drivers make new buffers available when they have taken back some: waiting for more would be for ever.
                if buffers.count and (not buffers.mergeable or 2 * buffers.count >= queue.size):
                    length = 0
                elif self._starve(queue):
                    return False
            backlog.popleft()
            if not length:
                self.rx_dropped += 1
                continue
            buffers.store(0, data)
            buffers.give(queue, length)
            self._expected = max(self._expected, length)
            self.rx_frames += 1
            self.rx_bytes += length - HEADER
        return True

    def transmit(self, queue: SplitQueue) -> None:
        """Write the driver's frames."""
        if self.dead or not self.enabled:
            self.drop_all(queue)
        elif not self._blocked:
            try:
                self._transmit(queue)
            finally:
                self._owner.publish(self._tx, queue)

    def _transmit(self, queue: SplitQueue) -> None:
        """Flat, and nothing in it that a frame does not need: this is the hot path."""
        fd, writev, add_used = self._fd, os.writev, queue.add_used
        budget, frames = BYTES, FRAMES
        queue.disable_kicks()
        while budget >= 0 and frames:
            if queue.available >= _MANY and (run := queue.take_singles(frames, 0)) and run[0]:
                done, sent = self._write_row(queue, run, budget)
                if self._blocked or self.dead:
                    return
                frames -= done
                budget -= sent
                continue
            for head, readable, writable in queue.chains():
                if writable or not readable:
                    raise QueueError("a frame to send has to be readable, and nothing else")
                try:
                    length = writev(fd, readable)
                except OSError as error:
                    if error.errno in _STOP:
                        queue.put_back()
                        self._stop_sending(queue, error)
                        return
                    self.tx_dropped += 1
                    length = 0
                else:
                    self.tx_frames += 1
                    self.tx_bytes += length - HEADER
                add_used(head, 0)
                budget -= length
                frames -= 1
                if budget < 0 or not frames:
                    break
            else:
                if not queue.enable_kicks():
                    return
                queue.disable_kicks()
        self._owner.serve_later(self._tx)

    def _write_row(self, queue: SplitQueue, run: Singles, budget: int) -> tuple[int, int]:
        """Write frames of one piece each, as far as the budget and the network allow. Return how many, and their bytes."""
        heads, starts, lengths, ends = run
        if sum(lengths) > budget:
            most = bisect_left(list(accumulate(lengths)), budget) + 1  # with the one that uses it up
            queue.put_back(len(heads) - most)
            heads, starts = heads[:most], starts[:most]
        # Every frame in turn with nothing of the interpreter in between; after one that the network refuses, the next one.
        writes = map(os.write, repeat(self._fd), map(queue.window.__getitem__, map(slice, starts, ends)))
        sent: list[int] = []
        lost = 0
        stop: OSError | None = None
        while True:
            try:
                sent.extend(writes)
                break
            except OSError as error:
                if error.errno in _STOP:
                    stop = error
                    break
                lost += 1
        done = len(sent) + lost
        queue.put_back(len(heads) - done)
        queue.add_all_used(heads[:done], [0] * done)
        total = sum(sent)
        self.tx_frames += len(sent)
        self.tx_bytes += total - len(sent) * HEADER
        self.tx_dropped += lost
        if stop:
            self._stop_sending(queue, stop)
        return done, total

    def _stop_sending(self, queue: SplitQueue, error: OSError) -> None:
        """Wait until the network takes frames again, or for nothing when it has gone. What was not sent is in the ring."""
        if error.errno == EAGAIN:
            self._blocked = True
            self._watch(self._mask | WRITE)
        else:
            self._die("the other side has gone")
            self.drop_all(queue)
