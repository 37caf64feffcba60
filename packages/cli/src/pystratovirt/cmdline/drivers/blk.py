"""Disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..declare import key
from ..values import ID, Integer, PowerOfTwo, Reference, Text
from .base import DISK, IOTHREAD, Device

if TYPE_CHECKING:
    from typing import ClassVar


class VirtioBlk(Device, selector="virtio-blk-device"):
    """A disk."""

    place: ClassVar[str] = DISK

    id: str = key(ID, doc="name of the device")
    drive: str = key(Reference("drive"), doc="the -drive that holds its data")
    serial: str | None = key(Text(20), default=None, doc="serial number that the guest reads")
    iothread: str | None = key(IOTHREAD, default=None, doc="the I/O thread that serves it")
    num_queues: int = key(Integer(1, 32, bits=16), default=1, doc="queues", note="StratoVirt's microvm always uses 1")
    queue_size: int = key(PowerOfTwo(4, 1024), default=256, doc="entries of a queue")
    bootindex: int | None = key(
        Integer(0, 255, bits=8), default=None, doc="accepted; a microvm boots its kernel", note="as in StratoVirt: no effect"
    )
