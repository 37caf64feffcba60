"""The `-device` drivers that work: a module a family, a class a driver, its members are the properties.

Modules are loaded when a command line (or a client) names a driver of theirs. Drivers that are known but not supported yet are in
`notyet`. What a device does stands in virtio-devices; how it is put together in `pystratovirt.devices`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pystratovirt.lazy import Lazy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .base import Device

DRIVERS: Mapping[str, type[Device]] = cast(
    "Mapping[str, type[Device]]",
    Lazy(
        __name__,
        {
            "virtio-blk-device": ("blk", "VirtioBlk"),
            "virtio-serial-device": ("serial", "VirtioSerial"),
            "virtconsole": ("serial", "Virtconsole"),
            "virtserialport": ("serial", "Virtserialport"),
            "virtio-net-device": ("net", "VirtioNet"),
            "virtio-rng-device": ("rng", "VirtioRng"),
            "virtio-balloon-device": ("balloon", "VirtioBalloon"),
            "vhost-vsock-device": ("vsock", "VhostVsock"),
            "virtio-vsock-device": ("vsock", "VirtioVsock"),
            "vhost-user-blk-device": ("vhost_user", "VhostUserBlk"),
            "vhost-user-fs-device": ("vhost_user", "VhostUserFs"),
        },
    ),
)
