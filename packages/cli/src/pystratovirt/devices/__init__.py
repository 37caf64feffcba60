"""How each driver's device is put together: a module a family, a function a driver.

A builder has the machine's parts at hand (`VirtualMachine`: opened drives, chardevs, I/O threads, clock, memory), and returns a
virtio device, which the machine then owns. It raises VmError, and leaves nothing behind then. Not here: which properties there
are (`pystratovirt.cmdline.drivers`), and what a device does (virtio-devices).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pystratovirt.lazy import Lazy

if TYPE_CHECKING:
    from pystratovirt.vm import VirtualMachine
    from virtio_devices.device import VirtioDevice

    # (machine, declaration, name for messages and state) -> device
    Builder = Callable[[VirtualMachine, Any, str], VirtioDevice]

BUILDERS: Mapping[str, Builder] = cast(
    "Mapping[str, Builder]",
    Lazy(
        __name__,
        {
            "virtio-blk-device": ("blk", "build_blk"),
            "virtio-serial-device": ("serial", "build_serial"),
            "virtio-net-device": ("net", "build_net"),
            "virtio-rng-device": ("rng", "build_rng"),
            "virtio-balloon-device": ("balloon", "build_balloon"),
            "vhost-vsock-device": ("vsock", "build_vhost_vsock"),
            "virtio-vsock-device": ("vsock", "build_virtio_vsock"),
            "vhost-user-blk-device": ("vhost_user", "build_blk"),
            "vhost-user-fs-device": ("vhost_user", "build_fs"),
        },
    ),
)
