"""StratoVirt's commands, each declared once. `STRATOVIRT` is the schema of all of them and of the events.

The order is the one in which StratoVirt lists them (reference section 3).
"""

from __future__ import annotations

from typing import Any

from qmp_protocol.commands import block, debug, device, lifecycle, machine, query
from qmp_protocol.events import EVENTS
from qmp_protocol.messages import Greeting
from qmp_protocol.schema import Command, Schema

COMMANDS: tuple[type[Command[Any]], ...] = (
    lifecycle.QmpCapabilities,
    lifecycle.Quit,
    lifecycle.Stop,
    lifecycle.Cont,
    lifecycle.SystemPowerdown,
    lifecycle.SystemReset,
    device.DeviceAdd,
    device.DeviceDel,
    device.ChardevAdd,
    device.ChardevRemove,
    device.NetdevAdd,
    device.NetdevDel,
    device.CameradevAdd,
    device.CameradevDel,
    machine.QueryHotpluggableCpus,
    machine.QueryCpus,
    lifecycle.QueryStatus,
    device.Getfd,
    block.BlockdevAdd,
    block.BlockdevDel,
    machine.Balloon,
    machine.QueryMem,
    machine.QueryMemGpa,
    machine.QueryBalloon,
    debug.QueryVnc,
    debug.QueryDisplayImage,
    debug.SwitchAudioRecord,
    machine.Migrate,
    machine.QueryMigrate,
    machine.MigrateCancel,
    query.QueryVersion,
    query.QueryCommands,
    query.QueryTarget,
    query.QueryKvm,
    query.QueryMachines,
    query.QueryEvents,
    query.QomListTypes,
    query.DeviceListProperties,
    block.BlockCommit,
    query.QueryTpmModels,
    query.QueryTpmTypes,
    query.QueryCommandLineOptions,
    machine.QueryMigrateCapabilities,
    query.QueryQmpSchema,
    query.QuerySevCapabilities,
    query.QueryChardev,
    query.QomList,
    query.QomGet,
    block.QueryBlock,
    block.QueryNamedBlockNodes,
    block.QueryBlockstats,
    block.QueryBlockJobs,
    query.QueryGicCapabilities,
    machine.QueryIothreads,
    debug.UpdateRegion,
    debug.InputEvent,
    debug.HumanMonitorCommand,
    block.BlockdevSnapshotInternalSync,
    block.BlockdevSnapshotDeleteInternalSync,
    machine.QueryVcpuReg,
    debug.TraceGetState,
    debug.TraceSetState,
)

STRATOVIRT = Schema(COMMANDS, EVENTS)

GREETING = Greeting(
    {
        # Clients (Kata's, libvirt's) read `qemu` and choose argument shapes by it; the manual shows `StratoVirt`.
        "qemu": {"micro": 1, "minor": 0, "major": 5},
        "StratoVirt": {"micro": 0, "minor": 4, "major": 2},
        "package": "StratoVirt-2.4.0",
    }
)
"""What StratoVirt's clients expect to be greeted with."""
