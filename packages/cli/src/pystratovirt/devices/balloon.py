"""Puts the memory balloon together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt import log
from virtio_devices.balloon.device import AutoBalloon, BalloonDevice

if TYPE_CHECKING:
    from pystratovirt.cmdline.drivers.balloon import VirtioBalloon
    from pystratovirt.vm import VirtualMachine


def build_balloon(vm: VirtualMachine, device: VirtioBalloon, name: str) -> BalloonDevice:
    """Return a balloon for the machine's memory. Who wants to hear of changes sets `on_change`."""
    (loop,) = vm.loops(device.iothread)
    return BalloonDevice(
        name,
        loop,
        vm.machine.memory,
        deflate_on_oom=device.deflate_on_oom,
        reporting=device.free_page_reporting,
        statistics_interval=device.guest_stats_polling_interval,
        auto=AutoBalloon(device.membuf_percent, device.monitor_interval) if device.auto_balloon else None,
        report=log.warn,
    )
