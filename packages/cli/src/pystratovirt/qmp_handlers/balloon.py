"""The memory balloon over QMP, in bytes that the guest has (reference qmp, section 11).

Not here: what a guest does with its target (`virtio_devices.balloon`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from pystratovirt.qmp_handlers.lifecycle import expect_alive
from qmp_protocol.commands.machine import Balloon, BalloonInfo, BalloonStatistics, QueryBalloon
from qmp_protocol.errors import DEVICE_NOT_ACTIVE, QmpError
from qmp_protocol.events import BalloonChanged

if TYPE_CHECKING:
    from pystratovirt.runtime import Runtime
    from pystratovirt.vm import VirtualMachine
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from virtio_devices.balloon.device import BalloonDevice

NO_BALLOON: Final = "No balloon device has been activated"
PAGE: Final = 4096
# A stock kernel needs this much for itself. A guest that is asked for more gives it, and then ends its processes one by one.
FLOOR: Final = 32 << 20


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the balloon's commands, and send its event from here on."""
    if (device := find(runtime.vm)) is not None:
        # From the loop of the balloon; emit() may be called on any thread.
        device.on_change = lambda: server.emit(BalloonChanged(actual=actual(device)))

    @server.handler(Balloon)
    def balloon(arguments: Balloon, call: Call) -> None:
        device = find(runtime.vm)
        if device is None:
            raise QmpError(DEVICE_NOT_ACTIVE, NO_BALLOON)
        expect_alive(runtime)
        device.set_target(device.ram_pages - pages_for(arguments.value, device.ram_pages))
        if not device.ready:  # a driver that comes later finds the target nevertheless
            raise QmpError(DEVICE_NOT_ACTIVE, NO_BALLOON)
        call.emit(BalloonChanged(actual=actual(device)))

    @server.handler(QueryBalloon)
    def query_balloon(_: QueryBalloon, call: Call) -> BalloonInfo:
        device = find(runtime.vm)
        if device is None:
            raise QmpError(DEVICE_NOT_ACTIVE, NO_BALLOON)
        if not device.statistics_time:
            return BalloonInfo(actual=actual(device))
        values = {name.replace("-", "_"): value for name, value in device.statistics.items()}
        return BalloonInfo(actual=actual(device), stats=BalloonStatistics(**values), last_update=device.statistics_time)


def find(vm: VirtualMachine) -> BalloonDevice | None:
    """Return the machine's balloon."""
    for plugged in vm.slots.values():
        if plugged.declaration is not None and plugged.declaration.selector == "virtio-balloon-device":
            return cast("BalloonDevice", plugged.device)
    return None


def actual(device: BalloonDevice) -> int:
    """Return how many bytes the guest has."""
    return (device.ram_pages - device.held) * PAGE


def pages_for(value: int, ram_pages: int) -> int:
    """Return how many pages a guest is to have that was given `ram_pages`, when a client asks for `value` bytes."""
    floor = min(FLOOR // PAGE, ram_pages // 2)
    return max(floor, min(value // PAGE, ram_pages))
