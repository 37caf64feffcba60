"""Devices and their back ends over QMP, while the machine runs (reference qmp, sections 8.3, 8.4 and 9).

Not here: what happens (`pystratovirt.hotplug`), drives (`block`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.cmdline.backends import SocketChardev
from pystratovirt.qmp_handlers.block import refusals_as_replies
from qmp_protocol.commands.device import ChardevAdd, ChardevRemove, DeviceAdd, DeviceDel
from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_protocol.events import DeviceDeleted

if TYPE_CHECKING:
    from pystratovirt.runtime import Runtime
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the commands about devices and what stands behind them."""
    vm = runtime.vm

    @server.handler(DeviceAdd)
    def device_add(arguments: DeviceAdd, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.plug(
                arguments.id,
                arguments.driver,
                arguments.addr,
                arguments.lun,
                backend=arguments.drive or arguments.netdev,
                serial=arguments.serial or "",
            )

    @server.handler(DeviceDel)
    def device_del(arguments: DeviceDel, call: Call) -> None:
        from pystratovirt.hotplug import CloseError

        with refusals_as_replies():
            deleted = DeviceDeleted(device=arguments.id, path=arguments.id)
            try:
                vm.hotplug.unplug(arguments.id)
            except CloseError:
                call.emit(deleted)
                raise
            call.emit(deleted)

    @server.handler(ChardevAdd)
    def chardev_add(arguments: ChardevAdd, call: Call) -> None:
        if arguments.backend.data.server:
            raise QmpError(GENERIC_ERROR, "Invalid parameter 'backend' for 'server'")
        path = arguments.backend.data.addr.data.path
        try:
            SocketChardev.keys["path"].kind.parse(path)
        except ValueError as error:
            raise QmpError(GENERIC_ERROR, f"path: {error}") from None
        with refusals_as_replies():
            vm.hotplug.add_chardev(SocketChardev(id=arguments.id, path=path))

    @server.handler(ChardevRemove)
    def chardev_remove(arguments: ChardevRemove, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.remove_chardev(arguments.id)
