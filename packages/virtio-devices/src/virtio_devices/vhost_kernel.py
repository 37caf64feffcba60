"""vhost in the kernel: another owner for some of a device's queues (/dev/vhost-net, /dev/vhost-vsock).

The ioctls of <linux/vhost.h>, each one under its own name, with what they need of guest memory and queues. A device that uses
this takes the queues it hands over out of its own loops (`VirtioDevice.handed_over`), so that only the kernel touches them.

Not here: requests of one kind of device alone (their module names them), dirty logging, and vhost-user, which is a protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EBUSY, EINTR, ENOTTY
from fcntl import ioctl as _ioctl
from struct import Struct

from virtio_devices.device import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, DeviceError
from virtio_devices.queue import QueueError, SplitQueue
from vmm_core.guestmem import GuestMemory

TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1
"""What of the kernel's answer to GET_FEATURES is a virtqueue's. Its other common bits are legacy ones (24, 27), one that asks for
address translation (33), and VHOST_F_LOG_ALL (26), which has the number of a feature but is for the VMM: none is a driver's."""

_WRITE, _READ = 1 << 30, 2 << 30  # asm-generic/ioctl.h, as on x86 and arm64
_VHOST_VIRTIO = 0xAF

_U64 = Struct("<Q")
_REGION = Struct("<QQQQ")
_VRING_STATE = Struct("<II")  # vhost_vring_state: index, num
_VRING_FILE = Struct("<Ii")  # vhost_vring_file: index, fd; -1 unbinds
_VRING_ADDR = Struct("<IIQQQQ")  # vhost_vring_addr: index, flags, desc, used, avail, log


class Request:
    """One ioctl: its number, and the name that error messages carry."""

    __slots__ = ("name", "number")

    def __init__(self, name: str, number: int, *, reads: int = 0, writes: int = 0) -> None:
        """`reads` and `writes` are the bytes of the argument that the kernel fills and takes."""
        direction = (_READ if reads else 0) | (_WRITE if writes else 0)
        self.name = name
        self.number = direction | max(reads, writes) << 16 | _VHOST_VIRTIO << 8 | number


GET_FEATURES = Request("VHOST_GET_FEATURES", 0x00, reads=8)
SET_FEATURES = Request("VHOST_SET_FEATURES", 0x00, writes=8)
SET_OWNER = Request("VHOST_SET_OWNER", 0x01)
SET_MEM_TABLE = Request("VHOST_SET_MEM_TABLE", 0x03, writes=8)
SET_VRING_NUM = Request("VHOST_SET_VRING_NUM", 0x10, writes=8)
SET_VRING_ADDR = Request("VHOST_SET_VRING_ADDR", 0x11, writes=40)
SET_VRING_BASE = Request("VHOST_SET_VRING_BASE", 0x12, writes=8)
GET_VRING_BASE = Request("VHOST_GET_VRING_BASE", 0x12, reads=8, writes=8)
SET_VRING_KICK = Request("VHOST_SET_VRING_KICK", 0x20, writes=8)
SET_VRING_CALL = Request("VHOST_SET_VRING_CALL", 0x21, writes=8)

Ioctl = Callable[[int, int, bytearray], int]


class VhostKernel:
    """One open vhost device, owned by this process. Its calls come from the thread that changes the device's life.

    Every method raises DeviceError with the device's name, the request's and the kernel's reason.
    """

    def __init__(self, name: str, fd: int, *, ioctl: Ioctl = _ioctl) -> None:
        """Become the owner of `fd`, which is closed by close(), and at once when it is no vhost device or has another owner.

        `name` is the virtio device's, for messages. `ioctl` is the system call.
        """
        self.name = name
        self.fd = fd
        self._ioctl_function = ioctl
        self._table: list[tuple[int, int, int]] = []
        self._memory: GuestMemory | None = None
        try:
            self.ioctl(SET_OWNER)
        except DeviceError as error:
            self.close()
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == EBUSY:
                raise DeviceError(f"{name}: the vhost descriptor is in use by another process") from None
            raise

    @classmethod
    def open(cls, name: str, path: str) -> VhostKernel:
        """Open `path`, such as /dev/vhost-net."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DeviceError(f"{name}: cannot open {path}: {error.strerror}") from None
        return cls(name, fd)

    def ioctl(self, request: Request, argument: bytearray | None = None) -> bytearray:
        """Issue `request`; the argument is read and changed in place, and returned."""
        data = bytearray() if argument is None else argument
        while True:
            try:
                self._ioctl_function(self.fd, request.number, data)
            except OSError as error:
                if error.errno == EINTR:
                    continue
                reason = "not a vhost device of that kind" if error.errno == ENOTTY else error.strerror
                raise DeviceError(f"{self.name}: {request.name}: {reason}") from error
            return data

    # Features

    def features(self) -> int:
        """Return everything that the kernel can do, its own bits included (see TRANSPORT_FEATURES)."""
        value: int = _U64.unpack(self.ioctl(GET_FEATURES, bytearray(8)))[0]
        return value

    def set_features(self, features: int) -> None:
        """Tell the kernel what was negotiated. Before a queue runs."""
        self.ioctl(SET_FEATURES, bytearray(_U64.pack(features)))

    # Memory and queues

    def set_memory(self, memory: GuestMemory) -> None:
        """Show the kernel all guest RAM. The mapping must outlive the queues."""
        table = [(region.base, region.size, memory.host_address(region)) for region in memory.regions]
        data = bytearray(_U64.pack(len(table)))
        for region in table:
            data += _REGION.pack(*region, 0)
        self.ioctl(SET_MEM_TABLE, data)
        self._memory, self._table = memory, table

    def hand_over(self, index: int, queue: SplitQueue, kick: int, call: int) -> None:
        """Give the kernel `queue` as its number `index`, where it stands, with its event descriptors. It does not run yet.

        `kick` is readable when the driver wants service; `call` is written to interrupt it. After set_memory().
        """
        self.ioctl(SET_VRING_NUM, bytearray(_VRING_STATE.pack(index, queue.size)))
        self.ioctl(SET_VRING_BASE, bytearray(_VRING_STATE.pack(index, queue.indices[0])))
        addresses = (self._host(queue.desc), self._host(queue.used), self._host(queue.avail))
        self.ioctl(SET_VRING_ADDR, bytearray(_VRING_ADDR.pack(index, 0, *addresses, 0)))
        self.ioctl(SET_VRING_CALL, bytearray(_VRING_FILE.pack(index, call)))
        self.ioctl(SET_VRING_KICK, bytearray(_VRING_FILE.pack(index, kick)))

    def take_indices(self, index: int, queue: SplitQueue) -> None:
        """Put the indices that the kernel has come to into `queue`. Only while the kernel does not work on it.

        Raises QueueError too, when the driver has overwritten the used ring's index with one that cannot be.
        """
        assert self._memory is not None
        data = self.ioctl(GET_VRING_BASE, bytearray(_VRING_STATE.pack(index, 0)))
        _, base = _VRING_STATE.unpack(data)
        if base > 0xFFFF:
            raise QueueError(f"the kernel's queue {index} is at {base}")
        queue.set_indices(base, self._memory.load(queue.used + 2, 2))

    def release(self, index: int) -> None:
        """Take the event descriptors of a queue away from the kernel. Only while it does not work on it."""
        for request in (SET_VRING_KICK, SET_VRING_CALL):
            self.ioctl(request, bytearray(_VRING_FILE.pack(index, -1)))

    def close(self) -> None:
        """Close the descriptor; the kernel lets go of everything. Twice is fine."""
        fd, self.fd = self.fd, -1
        self._memory, self._table = None, []
        if fd >= 0:
            os.close(fd)

    def _host(self, address: int) -> int:
        for base, size, host in self._table:
            if base <= address < base + size:
                return host + address - base
        raise DeviceError(f"{self.name}: {address:#x} is not guest RAM")  # a SplitQueue's rings are
