"""Every command of StratoVirt as a method with typed arguments and a typed result, for clients to inherit.

Generated from the declarations in `qmp_protocol.commands` by `python -m qmp_protocol.schema.methods`: change those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from qmp_protocol.commands.block import BlockdevCache, BlockdevFile, SnapshotInfo
    from qmp_protocol.commands.debug import DisplayImage, TraceState, VncInfo
    from qmp_protocol.commands.device import ChardevBackend
    from qmp_protocol.commands.lifecycle import StatusInfo
    from qmp_protocol.commands.machine import BalloonInfo, CpuInfo, HotpluggableCpu, IothreadInfo, MigrationInfo
    from qmp_protocol.commands.query import (
        ChardevInfo,
        CommandLineOption,
        CommandName,
        DeviceProperty,
        EventName,
        KvmInfo,
        MachineInfo,
        ObjectType,
        TargetInfo,
        VersionInfo,
    )
    from qmp_protocol.schema import Command


R = TypeVar("R")


class Methods:
    """The commands, for a client whose `call` blocks."""

    def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. A client says how."""
        raise NotImplementedError

    def qmp_capabilities(self, *, enable: list[str] | None = None) -> None:
        """Choose capabilities."""
        from qmp_protocol.commands.lifecycle import QmpCapabilities

        self.call(QmpCapabilities(enable=enable))

    def quit(self) -> None:
        """End the process with status 0."""
        from qmp_protocol.commands.lifecycle import Quit

        self.call(Quit())

    def stop(self) -> None:
        """Stop all vCPUs."""
        from qmp_protocol.commands.lifecycle import Stop

        self.call(Stop())

    def cont(self) -> None:
        """Let all vCPUs run on."""
        from qmp_protocol.commands.lifecycle import Cont

        self.call(Cont())

    def system_powerdown(self) -> None:
        """Press the power button."""
        from qmp_protocol.commands.lifecycle import SystemPowerdown

        self.call(SystemPowerdown())

    def system_reset(self) -> None:
        """Reset the machine."""
        from qmp_protocol.commands.lifecycle import SystemReset

        self.call(SystemReset())

    def device_add(
        self,
        *,
        id: str,
        driver: str,
        addr: str | None = None,
        lun: int | None = None,
        drive: str | None = None,
        romfile: str | None = None,
        share_rw: str | None = None,
        bus: str | None = None,
        mac: str | None = None,
        netdev: str | None = None,
        chardev: str | None = None,
        disable_modern: str | None = None,
        mq: str | None = None,
        vectors: str | None = None,
        serial: str | None = None,
        iothread: str | None = None,
        host: str | None = None,
        boot_index: int | None = None,
        sysfsdev: str | None = None,
        queue_size: int | None = None,
        port: str | None = None,
        backend: str | None = None,
        path: str | None = None,
        cameradev: str | None = None,
        hostbus: str | None = None,
        hostaddr: str | None = None,
        hostport: str | None = None,
        vendorid: str | None = None,
        productid: str | None = None,
        isobufs: str | None = None,
        isobsize: str | None = None,
        cpu_id: int | None = None,
        multifunction: bool | None = None,
        num_queues: int | None = None,
    ) -> None:
        """Add a device."""
        from qmp_protocol.commands.device import DeviceAdd

        command = DeviceAdd(
            id=id,
            driver=driver,
            addr=addr,
            lun=lun,
            drive=drive,
            romfile=romfile,
            share_rw=share_rw,
            bus=bus,
            mac=mac,
            netdev=netdev,
            chardev=chardev,
            disable_modern=disable_modern,
            mq=mq,
            vectors=vectors,
            serial=serial,
            iothread=iothread,
            host=host,
            boot_index=boot_index,
            sysfsdev=sysfsdev,
            queue_size=queue_size,
            port=port,
            backend=backend,
            path=path,
            cameradev=cameradev,
            hostbus=hostbus,
            hostaddr=hostaddr,
            hostport=hostport,
            vendorid=vendorid,
            productid=productid,
            isobufs=isobufs,
            isobsize=isobsize,
            cpu_id=cpu_id,
            multifunction=multifunction,
            num_queues=num_queues,
        )
        self.call(command)

    def device_del(self, *, id: str) -> None:
        """Remove a device."""
        from qmp_protocol.commands.device import DeviceDel

        self.call(DeviceDel(id=id))

    def chardev_add(self, *, id: str, backend: ChardevBackend) -> None:
        """Add a character device: a client's unix socket, for `netdev_add` with vhost-user."""
        from qmp_protocol.commands.device import ChardevAdd

        self.call(ChardevAdd(id=id, backend=backend))

    def chardev_remove(self, *, id: str) -> None:
        """Remove a character device."""
        from qmp_protocol.commands.device import ChardevRemove

        self.call(ChardevRemove(id=id))

    def netdev_add(
        self,
        *,
        id: str,
        ifname: str | None = None,
        fd: str | None = None,
        fds: str | None = None,
        vhost: bool | None = None,
        vhostfd: str | None = None,
        vhostfds: str | None = None,
        type: str | None = None,
        queues: int | None = None,
        chardev: str | None = None,
        tcp_ports: str | None = None,
        udp_ports: str | None = None,
        script: str | None = None,
        downscript: str | None = None,
        dnssearch: str | None = None,
    ) -> None:
        """Add a network back end."""
        from qmp_protocol.commands.device import NetdevAdd

        command = NetdevAdd(
            id=id,
            ifname=ifname,
            fd=fd,
            fds=fds,
            vhost=vhost,
            vhostfd=vhostfd,
            vhostfds=vhostfds,
            type=type,
            queues=queues,
            chardev=chardev,
            tcp_ports=tcp_ports,
            udp_ports=udp_ports,
            script=script,
            downscript=downscript,
            dnssearch=dnssearch,
        )
        self.call(command)

    def netdev_del(self, *, id: str) -> None:
        """Remove a network back end."""
        from qmp_protocol.commands.device import NetdevDel

        self.call(NetdevDel(id=id))

    def cameradev_add(self, *, id: str, driver: Literal["v4l2", "demo"], path: str | None = None) -> None:
        """Add a camera back end."""
        from qmp_protocol.commands.device import CameradevAdd

        self.call(CameradevAdd(id=id, driver=driver, path=path))

    def cameradev_del(self, *, id: str) -> None:
        """Remove a camera back end."""
        from qmp_protocol.commands.device import CameradevDel

        self.call(CameradevDel(id=id))

    def query_hotpluggable_cpus(self) -> list[HotpluggableCpu]:
        """List the places for CPUs, from index 0 to maxcpus - 1."""
        from qmp_protocol.commands.machine import QueryHotpluggableCpus

        return self.call(QueryHotpluggableCpus())

    def query_cpus(self) -> list[CpuInfo]:
        """List the CPUs with their host threads."""
        from qmp_protocol.commands.machine import QueryCpus

        return self.call(QueryCpus())

    def query_status(self) -> StatusInfo:
        """Say whether the machine runs."""
        from qmp_protocol.commands.lifecycle import QueryStatus

        return self.call(QueryStatus())

    def getfd(self, *, fdname: str, fds: Sequence[int]) -> None:
        """Receive a file descriptor that was passed with this command over a unix socket, and give it a name."""
        from qmp_protocol.commands.device import Getfd

        self.call(Getfd(fdname=fdname), fds)

    def blockdev_add(
        self,
        *,
        node_name: str,
        file: BlockdevFile,
        cache: BlockdevCache | None = None,
        read_only: bool = False,
        driver: Literal["raw", "qcow2"] = "raw",
        media: Literal["disk", "cdrom"] = "disk",
        discard: Literal["unmap", "ignore"] = "ignore",
        detect_zeroes: Literal["off", "on", "unmap"] = "off",
        throttling_iops_total: int | None = None,
        throttling_bps_total: int | None = None,
        external_files: Literal["deny", "allow"] = "deny",
        l2_cache_size: str | None = None,
        refcount_cache_size: str | None = None,
        encrypt_key_secret: str | None = None,
        backing: str | None = None,
        id: str | None = None,
        options: str | None = None,
    ) -> None:
        """Add a drive that a device can use."""
        from qmp_protocol.commands.block import BlockdevAdd

        command = BlockdevAdd(
            node_name=node_name,
            file=file,
            cache=cache,
            read_only=read_only,
            driver=driver,
            media=media,
            discard=discard,
            detect_zeroes=detect_zeroes,
            throttling_iops_total=throttling_iops_total,
            throttling_bps_total=throttling_bps_total,
            external_files=external_files,
            l2_cache_size=l2_cache_size,
            refcount_cache_size=refcount_cache_size,
            encrypt_key_secret=encrypt_key_secret,
            backing=backing,
            id=id,
            options=options,
        )
        self.call(command)

    def blockdev_del(self, *, node_name: str) -> None:
        """Remove a drive."""
        from qmp_protocol.commands.block import BlockdevDel

        self.call(BlockdevDel(node_name=node_name))

    def balloon(self, *, value: int) -> None:
        """Set how much memory the guest should have."""
        from qmp_protocol.commands.machine import Balloon

        self.call(Balloon(value=value))

    def query_mem(self) -> None:
        """Print the memory map to the monitor's own standard output, for debugging."""
        from qmp_protocol.commands.machine import QueryMem

        self.call(QueryMem())

    def query_mem_gpa(self, *, gpa: str = "") -> str:
        """Read four bytes of guest memory, as a little-endian number in upper-case hexadecimal."""
        from qmp_protocol.commands.machine import QueryMemGpa

        return self.call(QueryMemGpa(gpa=gpa))

    def query_balloon(self) -> BalloonInfo:
        """Say how much memory the guest has."""
        from qmp_protocol.commands.machine import QueryBalloon

        return self.call(QueryBalloon())

    def query_vnc(self) -> VncInfo:
        """Describe the VNC server and its clients."""
        from qmp_protocol.commands.debug import QueryVnc

        return self.call(QueryVnc())

    def query_display_image(self) -> DisplayImage:
        """Write a PNG of each active console into `stratovirt-images` under the directory for temporary files."""
        from qmp_protocol.commands.debug import QueryDisplayImage

        return self.call(QueryDisplayImage())

    def switch_audio_record(self, *, authorized: Literal["on", "off"]) -> None:
        """Allow or forbid the scream device to record with the host's microphone."""
        from qmp_protocol.commands.debug import SwitchAudioRecord

        self.call(SwitchAudioRecord(authorized=authorized))

    def migrate(self, *, uri: str) -> None:
        """Save the machine to a directory (`file:DIR`; the reply comes when it is done), or move it to another process…"""
        from qmp_protocol.commands.machine import Migrate

        self.call(Migrate(uri=uri))

    def query_migrate(self) -> MigrationInfo:
        """Say how far the migration is."""
        from qmp_protocol.commands.machine import QueryMigrate

        return self.call(QueryMigrate())

    def migrate_cancel(self) -> None:
        """Stop a migration under way; the machine runs on here."""
        from qmp_protocol.commands.machine import MigrateCancel

        self.call(MigrateCancel())

    def query_version(self) -> VersionInfo:
        """Say what the server is."""
        from qmp_protocol.commands.query import QueryVersion

        return self.call(QueryVersion())

    def query_commands(self) -> list[CommandName]:
        """List every command by its name on the wire."""
        from qmp_protocol.commands.query import QueryCommands

        return self.call(QueryCommands())

    def query_target(self) -> TargetInfo:
        """Say what the guest's CPU is."""
        from qmp_protocol.commands.query import QueryTarget

        return self.call(QueryTarget())

    def query_kvm(self) -> KvmInfo:
        """Say whether KVM is there and used."""
        from qmp_protocol.commands.query import QueryKvm

        return self.call(QueryKvm())

    def query_machines(self) -> list[MachineInfo]:
        """List the machine types."""
        from qmp_protocol.commands.query import QueryMachines

        return self.call(QueryMachines())

    def query_events(self) -> list[EventName]:
        """List every event."""
        from qmp_protocol.commands.query import QueryEvents

        return self.call(QueryEvents())

    def qom_list_types(self) -> list[ObjectType]:
        """List the types of devices and objects."""
        from qmp_protocol.commands.query import QomListTypes

        return self.call(QomListTypes())

    def device_list_properties(self, *, typename: str = "") -> list[DeviceProperty]:
        """List properties of a device type."""
        from qmp_protocol.commands.query import DeviceListProperties

        return self.call(DeviceListProperties(typename=typename))

    def block_commit(self) -> None:
        """Answer a capability probe."""
        from qmp_protocol.commands.block import BlockCommit

        self.call(BlockCommit())

    def query_tpm_models(self) -> list[str]:
        """List TPM models."""
        from qmp_protocol.commands.query import QueryTpmModels

        return self.call(QueryTpmModels())

    def query_tpm_types(self) -> list[str]:
        """List TPM back ends."""
        from qmp_protocol.commands.query import QueryTpmTypes

        return self.call(QueryTpmTypes())

    def query_command_line_options(self, *, option: str | None = None) -> list[CommandLineOption]:
        """List command-line options with their parameters."""
        from qmp_protocol.commands.query import QueryCommandLineOptions

        return self.call(QueryCommandLineOptions(option=option))

    def query_migrate_capabilities(self) -> list[Any]:
        """List migration capabilities."""
        from qmp_protocol.commands.machine import QueryMigrateCapabilities

        return self.call(QueryMigrateCapabilities())

    def query_qmp_schema(self) -> list[Any]:
        """Describe every command, event and type, in the format of QEMU's introspection (`SchemaInfo`)."""
        from qmp_protocol.commands.query import QueryQmpSchema

        return self.call(QueryQmpSchema())

    def query_sev_capabilities(self) -> Any:
        """Say what AMD SEV can do."""
        from qmp_protocol.commands.query import QuerySevCapabilities

        return self.call(QuerySevCapabilities())

    def query_chardev(self) -> list[ChardevInfo]:
        """List the character devices."""
        from qmp_protocol.commands.query import QueryChardev

        return self.call(QueryChardev())

    def qom_list(self, *, path: str = "") -> list[Any]:
        """List an object's properties."""
        from qmp_protocol.commands.query import QomList

        return self.call(QomList(path=path))

    def qom_get(self, *, path: str = "", property: str = "") -> list[Any]:
        """Read an object's property."""
        from qmp_protocol.commands.query import QomGet

        return self.call(QomGet(path=path, property=property))

    def query_block(self) -> list[Any]:
        """List the drives, with what QEMU's command of this name tells of each."""
        from qmp_protocol.commands.block import QueryBlock

        return self.call(QueryBlock())

    def query_named_block_nodes(self) -> list[Any]:
        """List the drives' images, with what QEMU's command of this name tells of each."""
        from qmp_protocol.commands.block import QueryNamedBlockNodes

        return self.call(QueryNamedBlockNodes())

    def query_blockstats(self) -> list[Any]:
        """List what devices asked of their drives, with the members of QEMU's command that are counted here."""
        from qmp_protocol.commands.block import QueryBlockstats

        return self.call(QueryBlockstats())

    def query_block_jobs(self) -> list[Any]:
        """List block jobs."""
        from qmp_protocol.commands.block import QueryBlockJobs

        return self.call(QueryBlockJobs())

    def query_gic_capabilities(self) -> list[Any]:
        """List interrupt controller versions."""
        from qmp_protocol.commands.query import QueryGicCapabilities

        return self.call(QueryGicCapabilities())

    def query_iothreads(self) -> list[IothreadInfo]:
        """List the I/O threads in the order in which they started."""
        from qmp_protocol.commands.machine import QueryIothreads

        return self.call(QueryIothreads())

    def update_region(
        self,
        *,
        update_type: Literal["add", "delete"],
        region_type: Literal["io_region", "rom_device_region", "ram_device_region"],
        offset: int,
        size: int,
        priority: int,
        read_only_mode: bool | None = None,
        ioeventfd: bool | None = None,
        ioeventfd_data: int | None = None,
        ioeventfd_size: int | None = None,
        device_fd_path: str | None = None,
    ) -> None:
        """Add or delete a region of guest memory, to test the memory topology."""
        from qmp_protocol.commands.debug import UpdateRegion

        command = UpdateRegion(
            update_type=update_type,
            region_type=region_type,
            offset=offset,
            size=size,
            priority=priority,
            read_only_mode=read_only_mode,
            ioeventfd=ioeventfd,
            ioeventfd_data=ioeventfd_data,
            ioeventfd_size=ioeventfd_size,
            device_fd_path=device_fd_path,
        )
        self.call(command)

    def input_event(self, *, key: str, value: str) -> None:
        """Press or release a key, or move and click the pointer, as a user would."""
        from qmp_protocol.commands.debug import InputEvent

        self.call(InputEvent(key=key, value=value))

    def human_monitor_command(self, *, command_line: str) -> Any:
        """Run a line of the human monitor: `drive_add`, `drive_del`, `info block|network|snapshots|stats`."""
        from qmp_protocol.commands.debug import HumanMonitorCommand

        return self.call(HumanMonitorCommand(command_line=command_line))

    def blockdev_snapshot_internal_sync(self, *, device: str, name: str) -> None:
        """Make a snapshot inside a qcow2 image that a device uses."""
        from qmp_protocol.commands.block import BlockdevSnapshotInternalSync

        self.call(BlockdevSnapshotInternalSync(device=device, name_=name))

    def blockdev_snapshot_delete_internal_sync(self, *, device: str, name: str) -> SnapshotInfo:
        """Delete a snapshot inside a qcow2 image that a device uses, and say what it was."""
        from qmp_protocol.commands.block import BlockdevSnapshotDeleteInternalSync

        return self.call(BlockdevSnapshotDeleteInternalSync(device=device, name_=name))

    def query_vcpu_reg(self, *, addr: str, vcpu: int) -> str:
        """Read a CPU register, as a number in upper-case hexadecimal."""
        from qmp_protocol.commands.machine import QueryVcpuReg

        return self.call(QueryVcpuReg(addr=addr, vcpu=vcpu))

    def trace_get_state(self, *, name: str) -> list[TraceState]:
        """List the trace points whose names match, and whether they are on."""
        from qmp_protocol.commands.debug import TraceGetState

        return self.call(TraceGetState(name_=name))

    def trace_set_state(self, *, name: str, enable: bool) -> None:
        """Switch the trace points whose names match, all of them or none."""
        from qmp_protocol.commands.debug import TraceSetState

        self.call(TraceSetState(name_=name, enable=enable))


class AsyncMethods:
    """The commands, for a client whose `call` is awaited."""

    async def call(self, command: Command[R], fds: Sequence[int] = ()) -> R:
        """Run a typed command and return its typed result. A client says how."""
        raise NotImplementedError

    async def qmp_capabilities(self, *, enable: list[str] | None = None) -> None:
        """Choose capabilities."""
        from qmp_protocol.commands.lifecycle import QmpCapabilities

        await self.call(QmpCapabilities(enable=enable))

    async def quit(self) -> None:
        """End the process with status 0."""
        from qmp_protocol.commands.lifecycle import Quit

        await self.call(Quit())

    async def stop(self) -> None:
        """Stop all vCPUs."""
        from qmp_protocol.commands.lifecycle import Stop

        await self.call(Stop())

    async def cont(self) -> None:
        """Let all vCPUs run on."""
        from qmp_protocol.commands.lifecycle import Cont

        await self.call(Cont())

    async def system_powerdown(self) -> None:
        """Press the power button."""
        from qmp_protocol.commands.lifecycle import SystemPowerdown

        await self.call(SystemPowerdown())

    async def system_reset(self) -> None:
        """Reset the machine."""
        from qmp_protocol.commands.lifecycle import SystemReset

        await self.call(SystemReset())

    async def device_add(
        self,
        *,
        id: str,
        driver: str,
        addr: str | None = None,
        lun: int | None = None,
        drive: str | None = None,
        romfile: str | None = None,
        share_rw: str | None = None,
        bus: str | None = None,
        mac: str | None = None,
        netdev: str | None = None,
        chardev: str | None = None,
        disable_modern: str | None = None,
        mq: str | None = None,
        vectors: str | None = None,
        serial: str | None = None,
        iothread: str | None = None,
        host: str | None = None,
        boot_index: int | None = None,
        sysfsdev: str | None = None,
        queue_size: int | None = None,
        port: str | None = None,
        backend: str | None = None,
        path: str | None = None,
        cameradev: str | None = None,
        hostbus: str | None = None,
        hostaddr: str | None = None,
        hostport: str | None = None,
        vendorid: str | None = None,
        productid: str | None = None,
        isobufs: str | None = None,
        isobsize: str | None = None,
        cpu_id: int | None = None,
        multifunction: bool | None = None,
        num_queues: int | None = None,
    ) -> None:
        """Add a device."""
        from qmp_protocol.commands.device import DeviceAdd

        command = DeviceAdd(
            id=id,
            driver=driver,
            addr=addr,
            lun=lun,
            drive=drive,
            romfile=romfile,
            share_rw=share_rw,
            bus=bus,
            mac=mac,
            netdev=netdev,
            chardev=chardev,
            disable_modern=disable_modern,
            mq=mq,
            vectors=vectors,
            serial=serial,
            iothread=iothread,
            host=host,
            boot_index=boot_index,
            sysfsdev=sysfsdev,
            queue_size=queue_size,
            port=port,
            backend=backend,
            path=path,
            cameradev=cameradev,
            hostbus=hostbus,
            hostaddr=hostaddr,
            hostport=hostport,
            vendorid=vendorid,
            productid=productid,
            isobufs=isobufs,
            isobsize=isobsize,
            cpu_id=cpu_id,
            multifunction=multifunction,
            num_queues=num_queues,
        )
        await self.call(command)

    async def device_del(self, *, id: str) -> None:
        """Remove a device."""
        from qmp_protocol.commands.device import DeviceDel

        await self.call(DeviceDel(id=id))

    async def chardev_add(self, *, id: str, backend: ChardevBackend) -> None:
        """Add a character device: a client's unix socket, for `netdev_add` with vhost-user."""
        from qmp_protocol.commands.device import ChardevAdd

        await self.call(ChardevAdd(id=id, backend=backend))

    async def chardev_remove(self, *, id: str) -> None:
        """Remove a character device."""
        from qmp_protocol.commands.device import ChardevRemove

        await self.call(ChardevRemove(id=id))

    async def netdev_add(
        self,
        *,
        id: str,
        ifname: str | None = None,
        fd: str | None = None,
        fds: str | None = None,
        vhost: bool | None = None,
        vhostfd: str | None = None,
        vhostfds: str | None = None,
        type: str | None = None,
        queues: int | None = None,
        chardev: str | None = None,
        tcp_ports: str | None = None,
        udp_ports: str | None = None,
        script: str | None = None,
        downscript: str | None = None,
        dnssearch: str | None = None,
    ) -> None:
        """Add a network back end."""
        from qmp_protocol.commands.device import NetdevAdd

        command = NetdevAdd(
            id=id,
            ifname=ifname,
            fd=fd,
            fds=fds,
            vhost=vhost,
            vhostfd=vhostfd,
            vhostfds=vhostfds,
            type=type,
            queues=queues,
            chardev=chardev,
            tcp_ports=tcp_ports,
            udp_ports=udp_ports,
            script=script,
            downscript=downscript,
            dnssearch=dnssearch,
        )
        await self.call(command)

    async def netdev_del(self, *, id: str) -> None:
        """Remove a network back end."""
        from qmp_protocol.commands.device import NetdevDel

        await self.call(NetdevDel(id=id))

    async def cameradev_add(self, *, id: str, driver: Literal["v4l2", "demo"], path: str | None = None) -> None:
        """Add a camera back end."""
        from qmp_protocol.commands.device import CameradevAdd

        await self.call(CameradevAdd(id=id, driver=driver, path=path))

    async def cameradev_del(self, *, id: str) -> None:
        """Remove a camera back end."""
        from qmp_protocol.commands.device import CameradevDel

        await self.call(CameradevDel(id=id))

    async def query_hotpluggable_cpus(self) -> list[HotpluggableCpu]:
        """List the places for CPUs, from index 0 to maxcpus - 1."""
        from qmp_protocol.commands.machine import QueryHotpluggableCpus

        return await self.call(QueryHotpluggableCpus())

    async def query_cpus(self) -> list[CpuInfo]:
        """List the CPUs with their host threads."""
        from qmp_protocol.commands.machine import QueryCpus

        return await self.call(QueryCpus())

    async def query_status(self) -> StatusInfo:
        """Say whether the machine runs."""
        from qmp_protocol.commands.lifecycle import QueryStatus

        return await self.call(QueryStatus())

    async def getfd(self, *, fdname: str, fds: Sequence[int]) -> None:
        """Receive a file descriptor that was passed with this command over a unix socket, and give it a name."""
        from qmp_protocol.commands.device import Getfd

        await self.call(Getfd(fdname=fdname), fds)

    async def blockdev_add(
        self,
        *,
        node_name: str,
        file: BlockdevFile,
        cache: BlockdevCache | None = None,
        read_only: bool = False,
        driver: Literal["raw", "qcow2"] = "raw",
        media: Literal["disk", "cdrom"] = "disk",
        discard: Literal["unmap", "ignore"] = "ignore",
        detect_zeroes: Literal["off", "on", "unmap"] = "off",
        throttling_iops_total: int | None = None,
        throttling_bps_total: int | None = None,
        external_files: Literal["deny", "allow"] = "deny",
        l2_cache_size: str | None = None,
        refcount_cache_size: str | None = None,
        encrypt_key_secret: str | None = None,
        backing: str | None = None,
        id: str | None = None,
        options: str | None = None,
    ) -> None:
        """Add a drive that a device can use."""
        from qmp_protocol.commands.block import BlockdevAdd

        command = BlockdevAdd(
            node_name=node_name,
            file=file,
            cache=cache,
            read_only=read_only,
            driver=driver,
            media=media,
            discard=discard,
            detect_zeroes=detect_zeroes,
            throttling_iops_total=throttling_iops_total,
            throttling_bps_total=throttling_bps_total,
            external_files=external_files,
            l2_cache_size=l2_cache_size,
            refcount_cache_size=refcount_cache_size,
            encrypt_key_secret=encrypt_key_secret,
            backing=backing,
            id=id,
            options=options,
        )
        await self.call(command)

    async def blockdev_del(self, *, node_name: str) -> None:
        """Remove a drive."""
        from qmp_protocol.commands.block import BlockdevDel

        await self.call(BlockdevDel(node_name=node_name))

    async def balloon(self, *, value: int) -> None:
        """Set how much memory the guest should have."""
        from qmp_protocol.commands.machine import Balloon

        await self.call(Balloon(value=value))

    async def query_mem(self) -> None:
        """Print the memory map to the monitor's own standard output, for debugging."""
        from qmp_protocol.commands.machine import QueryMem

        await self.call(QueryMem())

    async def query_mem_gpa(self, *, gpa: str = "") -> str:
        """Read four bytes of guest memory, as a little-endian number in upper-case hexadecimal."""
        from qmp_protocol.commands.machine import QueryMemGpa

        return await self.call(QueryMemGpa(gpa=gpa))

    async def query_balloon(self) -> BalloonInfo:
        """Say how much memory the guest has."""
        from qmp_protocol.commands.machine import QueryBalloon

        return await self.call(QueryBalloon())

    async def query_vnc(self) -> VncInfo:
        """Describe the VNC server and its clients."""
        from qmp_protocol.commands.debug import QueryVnc

        return await self.call(QueryVnc())

    async def query_display_image(self) -> DisplayImage:
        """Write a PNG of each active console into `stratovirt-images` under the directory for temporary files."""
        from qmp_protocol.commands.debug import QueryDisplayImage

        return await self.call(QueryDisplayImage())

    async def switch_audio_record(self, *, authorized: Literal["on", "off"]) -> None:
        """Allow or forbid the scream device to record with the host's microphone."""
        from qmp_protocol.commands.debug import SwitchAudioRecord

        await self.call(SwitchAudioRecord(authorized=authorized))

    async def migrate(self, *, uri: str) -> None:
        """Save the machine to a directory (`file:DIR`; the reply comes when it is done), or move it to another process…"""
        from qmp_protocol.commands.machine import Migrate

        await self.call(Migrate(uri=uri))

    async def query_migrate(self) -> MigrationInfo:
        """Say how far the migration is."""
        from qmp_protocol.commands.machine import QueryMigrate

        return await self.call(QueryMigrate())

    async def migrate_cancel(self) -> None:
        """Stop a migration under way; the machine runs on here."""
        from qmp_protocol.commands.machine import MigrateCancel

        await self.call(MigrateCancel())

    async def query_version(self) -> VersionInfo:
        """Say what the server is."""
        from qmp_protocol.commands.query import QueryVersion

        return await self.call(QueryVersion())

    async def query_commands(self) -> list[CommandName]:
        """List every command by its name on the wire."""
        from qmp_protocol.commands.query import QueryCommands

        return await self.call(QueryCommands())

    async def query_target(self) -> TargetInfo:
        """Say what the guest's CPU is."""
        from qmp_protocol.commands.query import QueryTarget

        return await self.call(QueryTarget())

    async def query_kvm(self) -> KvmInfo:
        """Say whether KVM is there and used."""
        from qmp_protocol.commands.query import QueryKvm

        return await self.call(QueryKvm())

    async def query_machines(self) -> list[MachineInfo]:
        """List the machine types."""
        from qmp_protocol.commands.query import QueryMachines

        return await self.call(QueryMachines())

    async def query_events(self) -> list[EventName]:
        """List every event."""
        from qmp_protocol.commands.query import QueryEvents

        return await self.call(QueryEvents())

    async def qom_list_types(self) -> list[ObjectType]:
        """List the types of devices and objects."""
        from qmp_protocol.commands.query import QomListTypes

        return await self.call(QomListTypes())

    async def device_list_properties(self, *, typename: str = "") -> list[DeviceProperty]:
        """List properties of a device type."""
        from qmp_protocol.commands.query import DeviceListProperties

        return await self.call(DeviceListProperties(typename=typename))

    async def block_commit(self) -> None:
        """Answer a capability probe."""
        from qmp_protocol.commands.block import BlockCommit

        await self.call(BlockCommit())

    async def query_tpm_models(self) -> list[str]:
        """List TPM models."""
        from qmp_protocol.commands.query import QueryTpmModels

        return await self.call(QueryTpmModels())

    async def query_tpm_types(self) -> list[str]:
        """List TPM back ends."""
        from qmp_protocol.commands.query import QueryTpmTypes

        return await self.call(QueryTpmTypes())

    async def query_command_line_options(self, *, option: str | None = None) -> list[CommandLineOption]:
        """List command-line options with their parameters."""
        from qmp_protocol.commands.query import QueryCommandLineOptions

        return await self.call(QueryCommandLineOptions(option=option))

    async def query_migrate_capabilities(self) -> list[Any]:
        """List migration capabilities."""
        from qmp_protocol.commands.machine import QueryMigrateCapabilities

        return await self.call(QueryMigrateCapabilities())

    async def query_qmp_schema(self) -> list[Any]:
        """Describe every command, event and type, in the format of QEMU's introspection (`SchemaInfo`)."""
        from qmp_protocol.commands.query import QueryQmpSchema

        return await self.call(QueryQmpSchema())

    async def query_sev_capabilities(self) -> Any:
        """Say what AMD SEV can do."""
        from qmp_protocol.commands.query import QuerySevCapabilities

        return await self.call(QuerySevCapabilities())

    async def query_chardev(self) -> list[ChardevInfo]:
        """List the character devices."""
        from qmp_protocol.commands.query import QueryChardev

        return await self.call(QueryChardev())

    async def qom_list(self, *, path: str = "") -> list[Any]:
        """List an object's properties."""
        from qmp_protocol.commands.query import QomList

        return await self.call(QomList(path=path))

    async def qom_get(self, *, path: str = "", property: str = "") -> list[Any]:
        """Read an object's property."""
        from qmp_protocol.commands.query import QomGet

        return await self.call(QomGet(path=path, property=property))

    async def query_block(self) -> list[Any]:
        """List the drives, with what QEMU's command of this name tells of each."""
        from qmp_protocol.commands.block import QueryBlock

        return await self.call(QueryBlock())

    async def query_named_block_nodes(self) -> list[Any]:
        """List the drives' images, with what QEMU's command of this name tells of each."""
        from qmp_protocol.commands.block import QueryNamedBlockNodes

        return await self.call(QueryNamedBlockNodes())

    async def query_blockstats(self) -> list[Any]:
        """List what devices asked of their drives, with the members of QEMU's command that are counted here."""
        from qmp_protocol.commands.block import QueryBlockstats

        return await self.call(QueryBlockstats())

    async def query_block_jobs(self) -> list[Any]:
        """List block jobs."""
        from qmp_protocol.commands.block import QueryBlockJobs

        return await self.call(QueryBlockJobs())

    async def query_gic_capabilities(self) -> list[Any]:
        """List interrupt controller versions."""
        from qmp_protocol.commands.query import QueryGicCapabilities

        return await self.call(QueryGicCapabilities())

    async def query_iothreads(self) -> list[IothreadInfo]:
        """List the I/O threads in the order in which they started."""
        from qmp_protocol.commands.machine import QueryIothreads

        return await self.call(QueryIothreads())

    async def update_region(
        self,
        *,
        update_type: Literal["add", "delete"],
        region_type: Literal["io_region", "rom_device_region", "ram_device_region"],
        offset: int,
        size: int,
        priority: int,
        read_only_mode: bool | None = None,
        ioeventfd: bool | None = None,
        ioeventfd_data: int | None = None,
        ioeventfd_size: int | None = None,
        device_fd_path: str | None = None,
    ) -> None:
        """Add or delete a region of guest memory, to test the memory topology."""
        from qmp_protocol.commands.debug import UpdateRegion

        command = UpdateRegion(
            update_type=update_type,
            region_type=region_type,
            offset=offset,
            size=size,
            priority=priority,
            read_only_mode=read_only_mode,
            ioeventfd=ioeventfd,
            ioeventfd_data=ioeventfd_data,
            ioeventfd_size=ioeventfd_size,
            device_fd_path=device_fd_path,
        )
        await self.call(command)

    async def input_event(self, *, key: str, value: str) -> None:
        """Press or release a key, or move and click the pointer, as a user would."""
        from qmp_protocol.commands.debug import InputEvent

        await self.call(InputEvent(key=key, value=value))

    async def human_monitor_command(self, *, command_line: str) -> Any:
        """Run a line of the human monitor: `drive_add`, `drive_del`, `info block|network|snapshots|stats`."""
        from qmp_protocol.commands.debug import HumanMonitorCommand

        return await self.call(HumanMonitorCommand(command_line=command_line))

    async def blockdev_snapshot_internal_sync(self, *, device: str, name: str) -> None:
        """Make a snapshot inside a qcow2 image that a device uses."""
        from qmp_protocol.commands.block import BlockdevSnapshotInternalSync

        await self.call(BlockdevSnapshotInternalSync(device=device, name_=name))

    async def blockdev_snapshot_delete_internal_sync(self, *, device: str, name: str) -> SnapshotInfo:
        """Delete a snapshot inside a qcow2 image that a device uses, and say what it was."""
        from qmp_protocol.commands.block import BlockdevSnapshotDeleteInternalSync

        return await self.call(BlockdevSnapshotDeleteInternalSync(device=device, name_=name))

    async def query_vcpu_reg(self, *, addr: str, vcpu: int) -> str:
        """Read a CPU register, as a number in upper-case hexadecimal."""
        from qmp_protocol.commands.machine import QueryVcpuReg

        return await self.call(QueryVcpuReg(addr=addr, vcpu=vcpu))

    async def trace_get_state(self, *, name: str) -> list[TraceState]:
        """List the trace points whose names match, and whether they are on."""
        from qmp_protocol.commands.debug import TraceGetState

        return await self.call(TraceGetState(name_=name))

    async def trace_set_state(self, *, name: str, enable: bool) -> None:
        """Switch the trace points whose names match, all of them or none."""
        from qmp_protocol.commands.debug import TraceSetState

        await self.call(TraceSetState(name_=name, enable=enable))
