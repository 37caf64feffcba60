"""Taps of the host's kernel (Linux, Documentation/networking/tuntap.rst): frames with a virtio_net_hdr in front.

The header lets checksums and segmentation pass through unfinished, so a guest's 64 KiB go to the host's stack in one piece, with
one system call, straight from and to guest memory (`taplane`).

Not here: making or naming interfaces, addresses, bridges, which are the administrator's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EINVAL
from fcntl import F_GETFL, F_SETFL, fcntl, ioctl
from struct import Struct

from virtio_devices.device import DeviceError
from virtio_devices.net.backend import Backend, Lane
from virtio_devices.net.features import (
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
from virtio_devices.net.taplane import TapLane
from vmm_core.loop import Loop

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
