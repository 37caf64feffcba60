"""Devices and their back ends over QMP, while the machine runs (reference qmp, sections 8.3, 8.4 and 9).

Not here: what happens (`pystratovirt.hotplug`), drives (`block`).
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pystratovirt.cmdline.backends import SocketChardev
from pystratovirt.cmdline.errors import BadKey
from pystratovirt.qmp_handlers.block import refusals_as_replies
from qmp_protocol.commands.device import ChardevAdd, ChardevRemove, DeviceAdd, DeviceDel, NetdevAdd, NetdevDel
from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_protocol.events import DeviceDeleted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pystratovirt.cmdline.netdevs import Netdev
    from pystratovirt.runtime import Runtime
    from qmp_server.descriptors import DescriptorTable
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
                mac=_mac(arguments.mac),
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

    @server.handler(NetdevAdd)
    def netdev_add(arguments: NetdevAdd, call: Call) -> None:
        with refusals_as_replies(), _lent(server.fds) as take:
            vm.hotplug.add_netdev(declared(arguments), take)

    @server.handler(NetdevDel)
    def netdev_del(arguments: NetdevDel, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.remove_netdev(arguments.id)

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


def declared(arguments: NetdevAdd) -> Netdev:
    """Return what the command line would say. Raises QmpError."""
    from pystratovirt.cmdline.netdevs import PAIRS_MAX, Tap, User, VhostUser

    kind: type[Netdev] = {"user": User, "vhost-user": VhostUser}.get(arguments.type or "", Tap)
    values: dict[str, Any] = {"id": arguments.id}
    if kind is VhostUser:
        if arguments.vhost:
            raise QmpError(GENERIC_ERROR, "vhost-user netdev does not support 'vhost' option")
        if arguments.chardev is None:
            raise QmpError(GENERIC_ERROR, "netdev_add: a vhost-user netdev needs chardev")
        values["chardev"] = arguments.chardev
        if arguments.queues is not None:
            values["queues"] = arguments.queues
    elif arguments.chardev is not None:
        raise QmpError(GENERIC_ERROR, "netdev_add: chardev is for type vhost-user")
    if kind is Tap:
        for name in ("fd", "fds", "vhostfd", "vhostfds"):
            text = getattr(arguments, name)
            if text is not None:
                values[name] = tuple(text.split(":"))  # names or numbers
        for name in ("ifname", "queues", "vhost"):
            value = getattr(arguments, name)
            if value is not None:
                values[name] = value
    try:
        for name, value in values.items():
            if isinstance(value, str):
                kind.keys[name].kind.parse(value)
            elif isinstance(value, tuple) and len(value) > PAIRS_MAX:
                raise ValueError(f"The num of fd {len(value)} is bigger than max queue num {PAIRS_MAX}")
            elif name == "queues" and not 1 <= value <= PAIRS_MAX:
                raise ValueError(f"The 'queues' {value} is bigger than max queue num {PAIRS_MAX}")
        netdev = kind(**values)
        netdev.check()
    except BadKey as error:
        raise QmpError(GENERIC_ERROR, f"{error.name}: {error.reason}".removeprefix(": ")) from None
    except ValueError as error:
        raise QmpError(GENERIC_ERROR, f"{name}: {error}") from None
    return netdev


def _mac(text: str | None) -> bytes | None:
    from pystratovirt.cmdline.drivers.net import Mac

    try:
        return Mac().parse(text) if text else None
    except ValueError as error:
        raise QmpError(GENERIC_ERROR, f"mac: {error}") from None


@contextmanager
def _lent(fds: DescriptorTable) -> Iterator[Callable[[str], int | None]]:
    """Hand out passed descriptors by name. They leave the table when all goes well, and are as before when it does not."""
    lent: dict[str, int] = {}

    def take(name: str) -> int | None:
        fd = lent.get(name, fds.take(name))
        if fd is None:
            return None
        lent[name] = fd
        return os.dup(fd)

    try:
        yield take
    except BaseException:
        for name, fd in lent.items():
            fds.put(name, fd)
        raise
    for fd in lent.values():
        os.close(fd)
