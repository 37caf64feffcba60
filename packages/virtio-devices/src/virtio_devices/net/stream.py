"""A network behind a stream socket: each frame is a 4-byte big-endian length and the frame (QEMU's `-netdev stream`).

No virtio header travels, so nothing is left unfinished by either side: no offloads. Frames are received into a buffer of ours,
many with one call, and copied from there; they are sent from guest memory, many with one call.

Not here: who is at the other end and how it came there (`passt`).
"""

from __future__ import annotations

import os
from select import POLLRDHUP, poll
from socket import SO_SNDBUF, SOL_SOCKET, socket
from struct import Struct

from virtio_devices.net.backend import BYTES, FRAMES, Backend, Lane
from virtio_devices.net.buffers import IOV_MAX
from virtio_devices.net.features import ETHERNET, HEADER
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner

_LENGTH = Struct(">I")
FRAME_MAX = 0x1_0400  # bytes: 64 KiB of payload and more headers than there are
_BUFFER = 1 << 18
_NO_HEADER = bytes(HEADER)


class StreamLane(Lane):
    """The one lane of a stream."""

    def __init__(self, owner: Owner, pair: int, loop: Loop, fd: int, backend: StreamBackend) -> None:
        """Make a lane at rest."""
        super().__init__(owner, pair, loop, fd)
        self._backend = backend
        self._in = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0  # what of it has been received and not delivered
        self._out = b""  # what was taken from the driver and not sent: the rest of a frame must follow its beginning

    def _die(self, reason: str) -> None:
        super()._die(self._backend.obituary() or reason)

    def receive(self, queue: SplitQueue) -> None:
        """Copy frames into the driver's buffers."""
        if self.enabled and not self.dead:
            try:
                self._receive(queue)
            finally:
                self._owner.publish(self._rx, queue)

    def _receive(self, queue: SplitQueue) -> None:
        buffer = self._in
        for _ in range(FRAMES):
            start = self._start
            have = self._end - start
            if have >= 4:
                (length,) = _LENGTH.unpack_from(buffer, start)
                if length > FRAME_MAX:
                    self._die(f"a frame of {length} bytes: the stream is out of step")
                    return
                if have >= 4 + length:
                    if not self._deliver(queue, buffer[start + 4 : start + 4 + length], length):
                        return
                    self._start += 4 + length
                    continue
            if start:
                buffer[:have] = bytes(buffer[start : self._end])
                self._start, self._end = 0, have
            try:
                count = os.readv(self._fd, [buffer[have:]])
            except BlockingIOError:
                self._hungry(queue)
                return
            except OSError as error:
                self._die(error.strerror or str(error))
                return
            if not count:
                self._die("the other end has closed it")
                return
            self._end = have + count
        # Frames may be at hand of which the descriptor does not tell any more.
        self._hungry(queue)
        self._owner.serve_later(self._rx)

    def _deliver(self, queue: SplitQueue, frame: memoryview, length: int) -> bool:
        """Give a frame to the driver, or drop it. False when it waits for buffers."""
        if length < ETHERNET:
            self.rx_dropped += 1
            return True
        if self._owner.rx_filter is not None and self._unwanted(bytes(frame[:18])):
            return True
        buffers = self._buffers
        needed = HEADER + length
        while buffers.room < needed:
            if buffers.fill(queue, needed):
                continue
            if buffers.count and (not buffers.mergeable or 2 * buffers.count >= queue.size):
                self.rx_dropped += 1  # no frame of this size will ever fit
                return True
            if self._starve(queue):
                return False
        buffers.store(0, _NO_HEADER)
        buffers.store(HEADER, frame)
        buffers.give(queue, needed)
        self.rx_frames += 1
        self.rx_bytes += length
        return True

    def transmit(self, queue: SplitQueue) -> None:
        """Send the driver's frames."""
        if self.dead or not self.enabled:
            self.drop_all(queue)
        elif not self._blocked and self._flush([]):
            try:
                self._transmit(queue)
            finally:
                self._owner.publish(self._tx, queue)
        if self.dead:
            self.drop_all(queue)

    def _transmit(self, queue: SplitQueue) -> None:
        while True:
            queue.disable_kicks()
            vector: list[bytes | memoryview] = []
            budget, frames = BYTES, FRAMES
            for head, readable, writable in queue.chains():
                if writable or not readable:
                    raise QueueError("a frame to send has to be readable, and nothing else")
                if len(vector) + len(readable) >= IOV_MAX and vector:
                    queue.put_back()
                    break
                length = sum(map(len, readable)) - HEADER
                queue.add_used(head, 0)
                if ETHERNET <= length <= FRAME_MAX and len(readable) < IOV_MAX:
                    vector.append(_LENGTH.pack(length))
                    vector += _without_header(readable)
                    self.tx_frames += 1
                    self.tx_bytes += length
                    budget -= length
                else:
                    self.tx_dropped += 1
                frames -= 1
                if budget < 0 or not frames:
                    break
            if vector and not self._flush(vector):
                return
            if not queue.enable_kicks():
                return
            if budget < 0 or not frames:
                self._owner.serve_later(self._tx)
                return

    def _flush(self, vector: list[bytes | memoryview]) -> bool:
        """Send what is left from before, or all of `vector`. False when some of it has to wait, or the stream is at its end."""
        if self._out:
            vector = [self._out]
        elif not vector:
            return True
        try:
            sent = os.writev(self._fd, vector)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._die(error.strerror or str(error))
            return False
        left = []
        for view in vector:
            if sent < len(view):
                left.append(view[sent:])
                sent = 0
            else:
                sent -= len(view)
        self._out = b"".join(left)
        if not self._out:
            return True
        self._blocked = True
        self._watch(self._mask | WRITE)
        return False


class StreamBackend(Backend):
    """A connected stream socket."""

    pairs = 1
    features = 0

    def __init__(self, name: str, stream: socket) -> None:
        """Own `stream`. `name` is for messages."""
        self.name = name
        self._stream = stream
        self._lane: Lane | None = None
        stream.setblocking(False)
        stream.setsockopt(SOL_SOCKET, SO_SNDBUF, 1 << 20)

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        """Return the lane."""
        self._lane = StreamLane(owner, pair, loop, self._stream.fileno(), self)
        return self._lane

    def alive(self) -> bool:
        """Tell whether the other end is there."""
        fd = self._stream.fileno()
        if fd < 0 or (self._lane and self._lane.dead):
            return False
        look = poll()
        look.register(fd, POLLRDHUP)
        return not look.poll(0)

    def close(self) -> None:
        """Close the socket."""
        self._stream.close()


def _without_header(views: list[memoryview]) -> list[memoryview]:
    """Return scattered bytes without the virtio header, whatever the pieces; they are more than the header."""
    skip = HEADER
    for at, view in enumerate(views):
        if len(view) > skip:
            return [view[skip:] if skip else view, *views[at + 1 :]]
        skip -= len(view)
    return []
