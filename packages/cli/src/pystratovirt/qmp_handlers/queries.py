"""What a client asks about the machine and this program (reference qmp, sections 5, 6 and 11).

Several answers are fixed: they are there so that capability probes (libvirt's) go through, which rely on them as they are.

Not here: debugging and tracing (`debug`), life cycle (`lifecycle`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pystratovirt.cmdline.backends import PtyChardev, SocketChardev
from qmp_protocol.commands import block, machine, query
from qmp_protocol.commands.machine import CpuInfo, CpuProperties, HotpluggableCpu, IothreadInfo, MigrationInfo
from qmp_protocol.commands.query import ChardevInfo, DeviceProperty, KvmInfo, MachineInfo, ObjectType, TargetInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from pystratovirt.cmdline.backends import Chardev
    from pystratovirt.cmdline.values import Kind
    from pystratovirt.runtime import Runtime
    from qmp_protocol.schema import Command
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from vmm_core.devices.chardev import CharBackend
    from vmm_core.topology import CpuTopology

# Reference section 6: the types that a libvirt probe looks for, whether or not this program has the device.
OBJECT_TYPES: Final = {
    "ioh3420": "pcie-root-port-base",
    "pcie-root-port": "pcie-root-port-base",
    "pcie-pci-bridge": "base-pci-bridge",
    "pci-bridge": "base-pci-bridge",
    "virtio-blk-pci-transitional": "virtio-blk-pci-base",
    "memory-backend-file": "memory-backend",
    "virtio-rng-device": "virtio-device",
    "rng-random": "rng-backend",
    "vfio-pci": "pci-device",
    "vhost-vsock-device": "virtio-device",
    "iothread": "object",
    "nec-usb-xhci": "base-xhci",
    "usb-tablet": "usb-hid",
    "usb-kbd": "usb-hid",
    "usb-storage": "usb-storage-dev",
    "virtio-gpu-pci": "virtio-gpu",
}
MACHINES: Final = ("none", "microvm", "q35")

_EMPTY_LISTS: Final[tuple[type[Command[Any]], ...]] = (
    block.QueryBlockJobs,
    machine.QueryMigrateCapabilities,
    query.QomList,
    query.QomGet,
    query.QueryTpmModels,
    query.QueryTpmTypes,
    query.QueryGicCapabilities,
)
# On a microvm they succeed and do nothing, in StratoVirt too.
_NOTHING: Final[tuple[type[Command[Any]], ...]] = (block.BlockCommit, query.QuerySevCapabilities)


def register(server: QmpServer, runtime: Runtime) -> None:
    """Register the queries."""
    for command in _EMPTY_LISTS:
        server.register(command, lambda _, call: [], concurrent=True)
    for command in _NOTHING:
        server.register(command, lambda _, call: {}, concurrent=True)
    for declared, answer in _about_the_machine(runtime).items():
        server.register(declared, answer, concurrent=True)
    server.register(query.QueryTarget, lambda _, call: TargetInfo(arch="x86_64"), concurrent=True)
    server.register(query.QueryMachines, _query_machines, concurrent=True)
    server.register(query.QomListTypes, _qom_list_types, concurrent=True)
    server.register(query.DeviceListProperties, _device_list_properties, concurrent=True)
    server.register(query.QueryCommandLineOptions, _query_command_line_options, concurrent=True)


def _about_the_machine(runtime: Runtime) -> dict[type[Command[Any]], Callable[[Any, Call], Any]]:
    vm = runtime.vm

    def query_cpus(_: machine.QueryCpus, call: Call) -> list[CpuInfo]:
        topology = vm.config.topology
        return [
            CpuInfo(
                CPU=cpu.index,
                arch="x86",
                props=cpu_properties(topology, cpu.index),
                qom_path=_qom_path(cpu.index),
                thread_id=cpu.thread_id,
            )
            for cpu in vm.machine.vcpus
        ]

    def query_hotpluggable_cpus(_: machine.QueryHotpluggableCpus, call: Call) -> list[HotpluggableCpu]:
        topology = vm.config.topology
        online = {cpu.index for cpu in vm.machine.vcpus}
        return [
            HotpluggableCpu(
                props=cpu_properties(topology, index),
                qom_path=_qom_path(index) if index in online else None,
                type="host-x86-cpu",
            )
            for index in range(topology.max_cpus)
        ]

    def query_iothreads(_: machine.QueryIothreads, call: Call) -> list[IothreadInfo]:
        return [IothreadInfo(id=name, thread_id=thread.thread_id) for name, thread in vm.io_threads.items()]

    def query_chardev(_: query.QueryChardev, call: Call) -> list[ChardevInfo]:
        monitors = {monitor.chardev for monitor in vm.config.monitors}
        return [
            ChardevInfo(
                label=name,
                filename=_chardev_name(declared, vm.chardevs.get(name)),
                frontend_open=vm.uses_chardev(name) or name in monitors,
            )
            for name, declared in vm.declared_chardevs.items()
        ]

    def query_kvm(_: query.QueryKvm, call: Call) -> KvmInfo:
        return KvmInfo(enabled=not vm.config.test_socket, present=Path("/dev/kvm").exists())

    def query_migrate(_: machine.QueryMigrate, call: Call) -> MigrationInfo:
        return MigrationInfo(status="setup")  # ready to: no migration has been asked for, because none can be yet

    return {
        machine.QueryCpus: query_cpus,
        machine.QueryHotpluggableCpus: query_hotpluggable_cpus,
        machine.QueryIothreads: query_iothreads,
        machine.QueryMigrate: query_migrate,
        query.QueryChardev: query_chardev,
        query.QueryKvm: query_kvm,
    }


def cpu_properties(topology: CpuTopology, index: int) -> CpuProperties:
    """Say where vCPU `index` sits: numbers run through threads first, then cores, clusters, dies and sockets."""
    rest, thread = divmod(index, topology.threads)
    rest, core = divmod(rest, topology.cores)
    rest //= topology.clusters  # x86 does not tell of clusters
    socket, die = divmod(rest, topology.dies)
    return CpuProperties(core_id=core, die_id=die, socket_id=socket, thread_id=thread)


def _qom_path(index: int) -> str:
    return f"/machine/unattached/device[{index}]"


def _chardev_name(declared: Chardev, backend: CharBackend | None) -> str:
    """Say what a character device is, in QEMU's words. Clients look for those of pseudo-terminals."""
    if isinstance(declared, PtyChardev):
        return f"pty:{backend.path}" if backend is not None and hasattr(backend, "path") else "pty"
    if isinstance(declared, SocketChardev):
        place = f"unix:{declared.path}" if declared.path is not None else f"tcp:{declared.host}:{declared.port}"
        return f"{place},server=on" if declared.server else place
    return declared.selector


def _query_machines(_: query.QueryMachines, call: Call) -> list[MachineInfo]:
    return [
        MachineInfo(name=name, cpu_max=255, hotpluggable_cpus=False, numa_mem_supported=False, deprecated=False)
        for name in MACHINES
    ]


def _qom_list_types(_: query.QomListTypes, call: Call) -> list[ObjectType]:
    return [ObjectType(name=name, parent=parent) for name, parent in OBJECT_TYPES.items()]


def _device_list_properties(arguments: query.DeviceListProperties, call: Call) -> list[DeviceProperty]:
    found = [DeviceProperty(name="disable-legacy", type="OnOffAuto")]
    if "virtio-balloon" in arguments.typename:
        found.append(DeviceProperty(name="deflate-on-oom", type="bool"))
    if "virtio-blk" in arguments.typename:
        found.append(DeviceProperty(name="num-queues", type="uint16"))
    return found


def _query_command_line_options(arguments: query.QueryCommandLineOptions, call: Call) -> list[dict[str, Any]]:
    from pystratovirt.cmdline.options import OPTIONS

    found = []
    for option in OPTIONS.values():
        if arguments.option not in (None, option.name) or option.schema is None:
            continue
        schemas = [option.schema] if isinstance(option.schema, type) else option.schema.values()
        # What all drivers, types or back ends have together: QEMU's format knows one list for an option.
        keys = {key.name: key for schema in schemas for key in schema.keys.values()}
        parameters = [{"name": key.name, "type": _parameter_type(key.kind), "help": key.doc} for key in keys.values()]
        found.append({"option": option.name, "parameters": parameters})
    return found


def _parameter_type(kind: Kind[Any]) -> str:
    """Return QEMU's word for a type of value. Its boolean is `on` or `off`."""
    from pystratovirt.cmdline.values import Bool, Integer, Size

    if isinstance(kind, Bool) and kind.render(True) == "on":
        return "boolean"
    return "size" if isinstance(kind, Size) else "number" if isinstance(kind, Integer) else "string"
