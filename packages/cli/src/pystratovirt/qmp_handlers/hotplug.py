"""Devices and their back ends over QMP, while the machine runs (reference qmp, sections 8.3, 8.4 and 9).

Not here: what happens (`pystratovirt.hotplug`), drives (`block`).
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

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

_TAP: Final = ("ifname", "fd", "fds", "vhost", "vhostfd", "vhostfds")  # what names a tap, or how it is served
# Members of one type, which no other ignores
_ONLY: Final = {"chardev": "vhost-user", "tcp-ports": "user", "udp-ports": "user", **dict.fromkeys(_TAP, "tap")}


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
                drive=arguments.drive,
                netdev=arguments.netdev,
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
        for name, value in (("id", arguments.id), ("path", path)):
            try:
                SocketChardev.keys[name].kind.parse(value)
            except ValueError as error:
                raise QmpError(GENERIC_ERROR, f"{name}: {error}") from None
        with refusals_as_replies():
            vm.hotplug.add_chardev(SocketChardev(id=arguments.id, path=path))

    @server.handler(ChardevRemove)
    def chardev_remove(arguments: ChardevRemove, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.remove_chardev(arguments.id)


def declared(arguments: NetdevAdd) -> Netdev:
    """Return what the command line would say. Raises QmpError."""
    from pystratovirt.cmdline.netdevs import PAIRS_MAX, Descriptors, Tap, Unconnected, User, VhostUser

    kind: type[Netdev] = {"user": User, "vhost-user": VhostUser}.get(arguments.type or "", Tap)
    # vhost=false says as much as nothing
    if kind is Tap and not arguments.vhost and all(getattr(arguments, name) is None for name in _TAP if name != "vhost"):
        kind = Unconnected  # as on StratoVirt's microvm
    if kind is VhostUser and arguments.vhost:
        raise QmpError(GENERIC_ERROR, "vhost-user netdev does not support 'vhost' option")
    if kind is VhostUser and arguments.chardev is None:
        raise QmpError(GENERIC_ERROR, "netdev_add: a vhost-user netdev needs chardev")
    for name, number in (("queues", arguments.queues), ("fds", len((arguments.fds or "").split(":")))):
        if number is not None and not 1 <= number <= PAIRS_MAX:
            what = f"The num of fd {number}" if name == "fds" else f"The 'queues' {number}"
            raise QmpError(GENERIC_ERROR, f"{name}: {what} is bigger than max queue num {PAIRS_MAX}")
    if kind is User and arguments.queues not in (None, 1):
        raise QmpError(GENERIC_ERROR, f"queues: {arguments.queues}: a user netdev has one pair of queues, which needs no saying")
    values: dict[str, Any] = {}
    for field in arguments.fields():
        key, value = kind.keys.get(field.name), getattr(arguments, field.attribute)
        if value is not None and key is not None:
            values[field.name] = value
        elif value not in (None, False) and field.name in _ONLY:
            raise QmpError(GENERIC_ERROR, f"netdev_add: {field.name} is for type {_ONLY[field.name]}")
    try:
        for name, value in values.items():
            found = kind.keys[name].kind
            if isinstance(found, Descriptors):  # of which there are names too
                try:
                    values[name] = found.split(value)
                except ValueError as error:
                    raise BadKey(name, str(error)) from None
        return kind.of(values)
    except BadKey as error:
        raise QmpError(GENERIC_ERROR, f"{error.name}: {error.reason}".removeprefix(": ")) from None


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
            fds.put_back(name, fd)
        raise
    for fd in lent.values():
        os.close(fd)
