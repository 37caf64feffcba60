"""Drives over QMP: adding and removing them, and what there is (reference qmp, sections 6, 8.1 and 8.2).

StratoVirt's queries about drives answer empty lists whatever there is; here they say what there is, with QEMU's members.

Not here: devices (`hotplug`), snapshots.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pystratovirt.cmdline.backends import Drive
from pystratovirt.cmdline.drivers.base import DISK
from pystratovirt.cmdline.errors import BadKey
from qmp_protocol.commands.block import BlockdevAdd, BlockdevDel, QueryBlock, QueryBlockstats, QueryNamedBlockNodes
from qmp_protocol.errors import GENERIC_ERROR, QmpError
from virtio_devices.blk.device import BlkDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from block_qcow2.disk import Disk
    from pystratovirt.runtime import Runtime
    from pystratovirt.vm import VirtualMachine
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from virtio_devices.blk.statistics import Statistics

# Members that are a key of -drive under another name; the others are called as there.
_KEYS: Final = {"node-name": "id", "driver": "format", "read-only": "readonly"}
_MEMBERS: Final = {"file": "filename", **{key: name for name, key in _KEYS.items()}}
_CACHES: Final = ("l2-cache-size", "refcount-cache-size")


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the commands about drives."""
    vm = runtime.vm

    @server.handler(BlockdevAdd)
    def blockdev_add(arguments: BlockdevAdd, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.add_drive(declared(arguments))

    @server.handler(BlockdevDel)
    def blockdev_del(arguments: BlockdevDel, call: Call) -> None:
        with refusals_as_replies():
            vm.hotplug.remove_drive(arguments.node_name)

    @server.handler(QueryBlock)
    def query_block(_: QueryBlock, call: Call) -> list[dict[str, Any]]:
        return [_block(vm, backend.device or "", backend.name) for backend in vm.hotplug.backends(DISK)]

    @server.handler(QueryNamedBlockNodes)
    def query_named_block_nodes(_: QueryNamedBlockNodes, call: Call) -> list[dict[str, Any]]:
        return [_node(vm, backend.name) for backend in vm.hotplug.backends(DISK)]

    @server.handler(QueryBlockstats)
    def query_blockstats(_: QueryBlockstats, call: Call) -> list[dict[str, Any]]:
        counted = ((backend, vm.slots[backend.slot].device) for backend in vm.hotplug.backends(DISK) if backend.slot is not None)
        return [
            {
                "device": backend.name,
                "node-name": backend.name,
                "qdev": backend.device or "",
                "stats": _statistics(device.statistics),
            }
            for backend, device in counted
            if isinstance(device, BlkDevice)  # a disk of another process is counted there
        ]


def declared(arguments: BlockdevAdd) -> Drive:
    """Return what the command line would say. Raises QmpError."""
    direct = arguments.cache.direct if arguments.cache else True
    aio = "io_uring" if arguments.file.aio == "iouring" else arguments.file.aio
    if direct and aio == "off":
        raise _wrong("aio", 'low performance expected when use sync io with "direct" on')
    if not direct and aio == "native":
        raise _wrong("aio", 'native aio type should be used with "direct" on')
    values: dict[str, Any] = {"direct": direct, "aio": aio, "file": arguments.file.filename}
    for field in arguments.fields():
        key, value = _KEYS.get(field.name, field.name), getattr(arguments, field.attribute)
        # Cache sizes say something about qcow2 only, and StratoVirt reads them for nothing else.
        if key in Drive.keys and value is not None and (key not in _CACHES or arguments.driver == "qcow2"):
            values.setdefault(key, value)
    try:
        return Drive.of(values)
    except BadKey as error:
        if error.name in _CACHES:
            raise QmpError(
                GENERIC_ERROR, f"Invalid {error.name.replace('-', ' ')}: {values[error.name]}: {error.reason}"
            ) from None
        raise QmpError(GENERIC_ERROR, f"{_MEMBERS.get(error.name, error.name)}: {error.reason}") from None


@contextmanager
def refusals_as_replies() -> Iterator[None]:
    """What cannot be plugged or unplugged is an error reply."""
    from pystratovirt.hotplug import HotPlugError

    try:
        yield
    except HotPlugError as error:
        raise QmpError(GENERIC_ERROR, str(error)) from None


def _wrong(name: str, why: str) -> QmpError:
    return QmpError(GENERIC_ERROR, f"Invalid parameter '{name}' for '{why}'")


def _block(vm: VirtualMachine, device: str, name: str) -> dict[str, Any]:
    return {
        "device": name,
        "inserted": _node(vm, name),
        "locked": False,
        "qdev": device,
        "removable": False,
        "type": "unknown",
    }


def _statistics(counted: Statistics) -> dict[str, int]:
    return {
        "rd_bytes": counted.read_bytes,
        "wr_bytes": counted.written_bytes,
        "rd_operations": counted.reads,
        "wr_operations": counted.writes,
        "flush_operations": counted.flushes,
        "unmap_operations": counted.discards,
    }


def _node(vm: VirtualMachine, name: str) -> dict[str, Any]:
    drive: Drive = vm.drives[name]
    disk: Disk = vm.disks[name]
    return {
        "backing_file_depth": 0,
        "bps": drive.bps_total or 0,
        "bps_rd": 0,
        "bps_wr": 0,
        "cache": {"direct": drive.direct, "no-flush": False, "writeback": True},
        "detect_zeroes": drive.detect_zeroes,
        "drv": drive.format,
        "encrypted": drive.key_secret is not None,
        "file": drive.file,
        "image": {"filename": drive.file, "format": drive.format, "virtual-size": disk.size},
        "iops": drive.iops_total or 0,
        "iops_rd": 0,
        "iops_wr": 0,
        "node-name": name,
        "ro": drive.readonly,
        "write_threshold": 0,
    }
