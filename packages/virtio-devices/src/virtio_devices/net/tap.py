"""Taps of the host's kernel (Linux, Documentation/networking/tuntap.rst): frames with a virtio_net_hdr in front.

The header lets checksums and segmentation pass through unfinished, so a guest's 64 KiB go to the host's stack in one piece, with
one system call, straight from and to guest memory.

Not here: making or naming interfaces, addresses, bridges, which are the administrator's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EAGAIN, EBADFD, EINVAL
from fcntl import F_GETFL, F_SETFL, fcntl, ioctl
from struct import Struct

from virtio_devices.device import DeviceError
from virtio_devices.net.backend import BYTES, FRAMES, Backend, Lane
from virtio_devices.net.buffers import peek
from virtio_devices.net.features import (
    ETHERNET,
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_UFO,
    F_HOST_UFO,
    HEADER,
    OFFLOADS,
    PAIRS_MAX,
)
from virtio_devices.queue import QueueError, Singles, SplitQueue
from vmm_core.loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner

# <linux/if_tun.h>
_TUNSETIFF, _TUNSETOFFLOAD, _TUNGETIFF = 0x4004_54CA, 0x4004_54D0, 0x8004_54D2
_TUNSETVNETHDRSZ, _TUNSETQUEUE = 0x4004_54D8, 0x4004_54D9
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = (
    0x0002,
    0x0100,
    0x0200,
    0x0400,
    0x1000,
    0x4000,
)
_TUN_F = (  # what a reader takes unfinished
    (F_GUEST_CSUM, 0x01),
    (F_GUEST_TSO4, 0x02),
    (F_GUEST_TSO6, 0x04),
    (F_GUEST_ECN, 0x08),
    (F_GUEST_UFO, 0x10),
)
_IFREQ = Struct("<16sH22x")  # ifreq: ifr_name, ifr_flags
_INT = Struct("<i")
_NAME_MAX = 15

# What a tap answers that takes no more frames now, or none any more. Anything else (an interface that is down, nonsense in the
# header) is about one frame, which is lost.
_STOP = (EAGAIN, EBADFD)
_MANY = 8  # frames to be sent that are taken at once sooner than one by one
_SPILL = 0x1_2000  # bytes: more than a frame of 64 KiB with every header


class TapLane(Lane):
    """One queue of a tap. A frame is one readv() or writev(), and its header is the virtio one."""

    def __init__(self, owner: Owner, pair: int, loop: Loop, fd: int) -> None:
        """Make a lane at rest."""
        super().__init__(owner, pair, loop, fd)
        # Frames come in all sizes, and the next one's is not known: as much room is offered as the last ones needed, and what is
        # too much for that lands here and is copied.
        self._spill = memoryview(bytearray(_SPILL))
        self._expected = 1
        # A frame that was read and waits for more buffers: its length, and how much of it is in the buffers that there were.
        self._held: tuple[int, int] | None = None

    def begin(self, mergeable: bool) -> None:
        """Get ready for a new driver."""
        super().begin(mergeable)
        self._expected, self._held = 1, None

    def rest(self, rx: SplitQueue | None) -> None:
        """Stop watching, and put receive buffers back. A frame that had not enough of them is lost."""
        if self._held:
            self._held = None
            self.rx_dropped += 1
        super().rest(rx)

    def receive(self, queue: SplitQueue) -> None:
        """Read frames into the driver's buffers."""
        if self.enabled and not self.dead:
            try:
                self._receive(queue)
            finally:
                self._owner.publish(self._rx, queue)

    def _receive(self, queue: SplitQueue) -> None:
        """Flat, and nothing in it that a frame does not need: this is the hot path."""
        buffers, spill, fd, readv = self._buffers, self._spill, self._fd, os.readv
        filtering = self._owner.rx_filter is not None
        budget = BYTES
        for _ in range(FRAMES):
            if self._held:
                if not self._finish(queue):
                    return
                continue
            expected = self._expected
            if buffers.room < expected and not buffers.fill(queue, expected) and not buffers.count:
                if self._starve(queue):
                    return
                continue
            vector, room = buffers.offer(expected)
            vector.append(spill)
            try:
                length = readv(fd, vector)
            except BlockingIOError:
                self._hungry(queue)
                return
            except OSError as error:
                self._die(error.strerror or str(error))
                return
            if length < HEADER + ETHERNET:
                if not length:
                    self._die("end of file")
                    return
                self.rx_dropped += 1
            elif filtering and self._unwanted(peek(vector, HEADER, 18)):
                pass
            elif length <= room:
                buffers.give(queue, length)
                if length != expected:
                    self._expected = max(length, expected - (expected >> 4))
                self.rx_frames += 1
                self.rx_bytes += length - HEADER
                budget -= length
                if budget < 0:
                    break
            elif buffers.mergeable and length < room + _SPILL:
                self._held = length, room
            else:
                self.rx_dropped += 1
        self._hungry(queue)

    def _finish(self, queue: SplitQueue) -> bool:
        """Complete the frame that is held with buffers behind those that it lies in. False while they are missing."""
        assert self._held
        length, room = self._held
        buffers = self._buffers
        while buffers.room < length:
            if buffers.fill(queue, length):
                continue
            if 2 * buffers.count >= queue.size:
                # Drivers make new buffers available when they have taken back some: waiting for more would be for ever.
                self._held = None
                self.rx_dropped += 1
                return True
            if self._starve(queue):
                return False
        buffers.store(room, self._spill[: length - room])
        buffers.give(queue, length)
        self._expected = max(self._expected, length)
        self._held = None
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
                budget = self._write_singles(queue, run, budget)
                if self._blocked or self.dead:
                    return
                frames -= len(run[0])
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

    def _write_singles(self, queue: SplitQueue, run: Singles, budget: int) -> int:
        """Write frames of one piece each, as far as the budget and the network allow. Return what is left of the budget."""
        heads, starts, _, ends = run
        window, fd, write = queue.window, self._fd, os.write
        done = 0
        stop: OSError | None = None
        for start, end in zip(starts, ends, strict=True):
            try:
                length = write(fd, window[start:end])
            except OSError as error:
                if error.errno in _STOP:
                    stop = error
                    break
                self.tx_dropped += 1
            else:
                self.tx_frames += 1
                self.tx_bytes += length - HEADER
                budget -= length
            done += 1
            if budget < 0:
                break
        queue.put_back(len(heads) - done)
        queue.add_all_used(heads[:done], [0] * done)
        if stop:
            self._stop_sending(queue, stop)
        return budget

    def _stop_sending(self, queue: SplitQueue, error: OSError) -> None:
        """Wait until the network takes frames again, or for nothing when it has gone. What was not sent is in the ring."""
        if error.errno == EAGAIN:
            self._blocked = True
            self._watch(self._mask | WRITE)
        else:
            self._die("the other side has gone")
            self.drop_all(queue)


class TapBackend(Backend):
    """A tap, opened once a pair of queues."""

    def __init__(self, name: str, fds: Sequence[int]) -> None:
        """Own the descriptors `fds` of one interface, a queue each; they do not block. `name` is for messages.

        Raises DeviceError when one of them is no tap with virtio headers; all stay open then.
        """
        self.name = name
        self.pairs = len(fds)
        flags = [_flags(name, fd) for fd in fds]
        if len(fds) > 1 and not all(flag & _IFF_MULTI_QUEUE for flag in flags):
            raise DeviceError(f"{name}: Tap device doesn't support mq, but command set queue pairs {len(fds)}.")
        self._multi = bool(flags[0] & _IFF_MULTI_QUEUE)
        self._attached = [True] * len(fds)
        self.features = OFFLOADS
        try:
            for fd in fds:
                ioctl(fd, _TUNSETVNETHDRSZ, _INT.pack(HEADER))
            try:
                ioctl(fds[0], _TUNSETOFFLOAD, 0x11)
            except OSError:
                self.features &= ~(F_GUEST_UFO | F_HOST_UFO)
            ioctl(fds[0], _TUNSETOFFLOAD, 0)
        except OSError as error:
            raise DeviceError(f"{name}: the tap cannot have virtio headers: {error.strerror}") from None
        self.fds = list(fds)

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        """Return a lane on one queue of the tap."""
        return TapLane(owner, pair, loop, self.fds[pair])

    def alive(self) -> bool:
        """Tell whether the interface is still there."""
        try:
            ioctl(self.fds[0], _TUNGETIFF, bytearray(_IFREQ.size))
        except OSError:
            return False
        return True

    def set_offloads(self, features: int) -> None:
        """Have the kernel hand over frames with as much unfinished as the driver takes."""
        ioctl(self.fds[0], _TUNSETOFFLOAD, sum(bit for feature, bit in _TUN_F if features & feature))

    def set_pairs(self, count: int) -> None:
        """Attach the first `count` queues to the interface, and no other."""
        if not self._multi or self.pairs == 1:
            return
        for pair, fd in enumerate(self.fds):
            if self._attached[pair] != (pair < count):
                flag = _IFF_ATTACH_QUEUE if pair < count else _IFF_DETACH_QUEUE
                ioctl(fd, _TUNSETQUEUE, _IFREQ.pack(b"", flag))
                self._attached[pair] = pair < count

    def close(self) -> None:
        """Close the descriptors; an interface that is not persistent goes with the last one."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)


def open_tap(name: str, ifname: str, pairs: int = 1) -> TapBackend:
    """Open the interface `ifname`, or make it, with `pairs` queues. Raises DeviceError."""
    encoded = os.fsencode(ifname)
    if not 0 < len(encoded) <= _NAME_MAX or b"/" in encoded or b"%" in encoded or b"\0" in encoded:
        raise DeviceError(f"{name}: {ifname!r} is no name of an interface (1 to {_NAME_MAX} bytes)")
    if not 1 <= pairs <= PAIRS_MAX:
        raise DeviceError(f"{name}: number queues of net device must >= 1 and <= {PAIRS_MAX}.")
    multi = _IFF_MULTI_QUEUE if pairs > 1 else 0
    fds: list[int] = []
    try:
        for _ in range(pairs):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            try:
                _set_interface(fds[-1], encoded, multi)
            except OSError as error:
                if error.errno != EINVAL or pairs > 1:
                    raise
                _set_interface(fds[-1], encoded, _IFF_MULTI_QUEUE)  # one queue of a tap that can have several
        return TapBackend(name, fds)
    except OSError as error:
        _close(fds)
        if error.errno == EINVAL and multi:
            raise DeviceError(f"{name}: Tap device doesn't support mq, but command set queue pairs {pairs}.") from None
        raise DeviceError(f"{name}: cannot open tap {ifname}: {error.strerror}") from None
    except DeviceError:
        _close(fds)
        raise


def _set_interface(fd: int, name: bytes, multi: int) -> None:
    ioctl(fd, _TUNSETIFF, _IFREQ.pack(name, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | multi))


def adopt_tap(name: str, fds: Sequence[int]) -> TapBackend:
    """Take over open descriptors of a tap, one a pair of queues. They stay the caller's when DeviceError is raised."""
    if not 1 <= len(fds) <= PAIRS_MAX:
        raise DeviceError(f"{name}: The num of fd {len(fds)} is bigger than max queue num {PAIRS_MAX}")
    backend = TapBackend(name, fds)
    for fd in fds:
        os.set_inheritable(fd, False)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | os.O_NONBLOCK)
    return backend


def _flags(name: str, fd: int) -> int:
    request = bytearray(_IFREQ.size)
    try:
        ioctl(fd, _TUNGETIFF, request)
    except OSError as error:
        raise DeviceError(f"{name}: descriptor {fd} is no tap: {error.strerror}") from None
    flags: int = _IFREQ.unpack(request)[1]
    for flag, word in ((_IFF_TAP, "IFF_TAP"), (_IFF_NO_PI, "IFF_NO_PI"), (_IFF_VNET_HDR, "IFF_VNET_HDR")):
        if not flags & flag:
            raise DeviceError(f"{name}: descriptor {fd} is a tap that was made without {word}")
    return flags


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
