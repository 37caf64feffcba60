"""Devices that another process serves, over a unix socket (vhost-user)."""

from __future__ import annotations

from ..declare import key
from ..values import ID, Integer, PowerOfTwo, Reference, Text
from .base import NO_LOOP, Device

_CHARDEV = Reference("chardev")
_UNKNOWN = {**Device.unknown, "iothread": NO_LOOP}


class VhostUserBlk(Device, selector="vhost-user-blk-device"):
    """A disk that another process serves. The guest's memory has to be shared (`-machine mem-share=on`)."""

    unknown = _UNKNOWN

    id: str = key(ID, doc="name of the device")
    chardev: str = key(_CHARDEV, doc="the socket of that process: `-chardev socket,path=…`, without server")
    num_queues: int = key(Integer(1, 32, bits=16), default=1, doc="queues")
    queue_size: int = key(PowerOfTwo(4, 1024), default=256, doc="entries of a queue")
    bootindex: int | None = key(
        Integer(0, 255, bits=8), default=None, doc="accepted; a microvm boots its kernel", note="as in StratoVirt: no effect"
    )


class VhostUserFs(Device, selector="vhost-user-fs-device"):
    """A folder of the host, served by virtiofsd. The guest's memory has to be shared (`-machine mem-share=on`)."""

    unknown = _UNKNOWN

    id: str = key(ID, doc="name of the device")
    chardev: str = key(
        _CHARDEV,
        doc="the socket of virtiofsd: `-chardev socket,path=…`; server and nowait are accepted, and have no effect",
    )
    tag: str = key(Text(35), doc="what the guest mounts it by")
