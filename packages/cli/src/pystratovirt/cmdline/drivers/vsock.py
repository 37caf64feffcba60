"""Sockets between host and guest, with the kernel's help and without."""

from __future__ import annotations

from ..declare import key
from ..values import ID, Integer, Text
from .base import IOTHREAD, NO_LOOP, Device

CID = Integer(3, 0xFFFF_FFFE, bits=64)  # the others are the hypervisor's, the host's, and nobody's (virtio 1.2, section 5.10.4)
_UNKNOWN = {**Device.unknown, "iothread": NO_LOOP}
_PATH = Text(96)  # a socket address has 107 bytes, and `_` and a port of ten digits go behind


class VhostVsock(Device, selector="vhost-vsock-device"):
    """AF_VSOCK sockets between host and guest, by the host's kernel (vhost-vsock)."""

    unknown = _UNKNOWN

    id: str = key(ID, doc="name of the device")
    guest_cid: int = key(CID, doc="the guest's address, one of its own on the whole host")
    vhostfd: int | None = key(
        Integer(0, 0x7FFF_FFFF, bits=32), default=None, doc="an open descriptor of /dev/vhost-vsock; none: it is opened"
    )


class VirtioVsock(Device, selector="virtio-vsock-device"):
    """AF_VSOCK sockets in the guest, unix sockets on the host; needs no kernel module and no privileges. Not in StratoVirt."""

    id: str = key(ID, doc="name of the device")
    guest_cid: int = key(CID, doc="the guest's address; others may have the same")
    path: str = key(_PATH, doc="listens there for connections to the guest; those of the guest to port P go to PATH_P")
    iothread: str | None = key(IOTHREAD, default=None, doc="the I/O thread that serves it")
