"""From a Config to a machine: opens what it names, builds the machine around it, and gives everything back at the end.

This is the only place where devices meet their back ends. Not here: what a Config may say (`cmdline`), the main loop and QMP
(`runtime`), and how the parts work (their packages).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

from pystratovirt import log
from pystratovirt.devices import BUILDERS
from pystratovirt.errors import VmError, blame
from pystratovirt.slots import DISK_SLOTS, NET_SLOTS, place
from virtio_devices.mmio import MmioTransport
from vmm_core.clock import MonotonicClock, VirtualClock
from vmm_core.errors import BootError, GuestMemoryError, InitrdError, KernelCommandLineError, PreallocError, VmmError
from vmm_core.guestmem import GuestMemory, Placement
from vmm_core.machine.microvm import Kernel, Microvm
from vmm_core.threads import IoThread
from vmm_core.x86_64.layout import Microvm as Layout

if TYPE_CHECKING:
    from block_qcow2.disk import Disk
    from pystratovirt.cmdline.backends import Chardev, Drive
    from pystratovirt.cmdline.config import Config
    from pystratovirt.cmdline.drivers.base import Device
    from pystratovirt.cmdline.netdevs import Connected, Netdev
    from pystratovirt.hotplug import HotPlug
    from virtio_devices.device import VirtioDevice
    from virtio_devices.net.backend import Backend as NetBackend
    from vmm_core.devices.chardev import CharBackend
    from vmm_core.hypervisor import Hypervisor
    from vmm_core.hypervisor.testmode import MachineAccess
    from vmm_core.machine.core import MachineEvent

IO_THREAD = "vmm-io"  # serves what no -object iothread is named for
PREALLOC_THREADS = 16


class Plugged(NamedTuple):
    """What is in a slot: the declaration it was made from (None: a placeholder for one that may come), and the device."""

    declaration: Device | None
    device: VirtioDevice | None


class VirtualMachine:
    """The machine that a Config describes, with its disks, character devices and I/O threads.

    Belongs to one thread (the main thread of the command); `post` is called from others. Usable as a context manager.
    """

    def __init__(self, config: Config, post: Callable[[MachineEvent], None]) -> None:
        """Build everything, start nothing but I/O threads. Raises VmError, and leaves nothing behind then."""
        self.config = config
        self.drives: dict[str, Drive] = {}  # declarations of the disks below
        self.disks: dict[str, Disk] = {}
        self.netdevs: dict[str, Netdev] = {}  # declarations of the networks below
        self.networks: dict[str, NetBackend] = {}  # of those that lead anywhere
        self.io_threads: dict[str, IoThread] = {}
        self.chardevs: dict[str, CharBackend] = {}
        self.declared_chardevs: dict[str, Chardev] = dict(config.chardevs)
        self.clock = VirtualClock() if config.test_socket else MonotonicClock()
        self.transports: dict[int, MmioTransport] = {}
        self.slots: dict[int, Plugged] = {}
        self._stack = contextlib.ExitStack()
        self._post = post
        try:
            self._build()
        except VmmError as error:  # of a part that no option is to blame for: a memory slot, a wire
            self.close()
            raise VmError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Let the guest run, or stand ready with `-S`. Raises VmError."""
        try:
            self.machine.start(paused=self.config.freeze)
        except VmmError as error:
            raise VmError(str(error)) from None

    @cached_property
    def hotplug(self) -> HotPlug:
        """What is plugged in, and could be."""
        from pystratovirt.hotplug import HotPlug  # most machines never need it

        return HotPlug(self)

    def test_access(self) -> MachineAccess:
        """Return what a test in test mode does to the machine. Raises VmError in any other mode."""
        from vmm_core.hypervisor.testmode import MachineAccess, RecordingHypervisor

        machine, clock = self.machine, self.clock
        if not isinstance(machine.hypervisor, RecordingHypervisor) or not isinstance(clock, VirtualClock):
            raise VmError("-mod-test: the machine is not in test mode")
        return MachineAccess(machine.hypervisor, machine.memory, machine.mmio, machine.pio, clock)

    def close(self) -> None:
        """End the machine and give everything back, the last thing first. Twice is fine.

        Raises VmError when a disk may lack what was written last.
        """
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Building, in the order in which things depend on each other

    def _build(self) -> None:
        config = self.config
        self.main_loop = self._io_thread(IO_THREAD)
        for name in config.iothreads:
            self.io_threads[name] = self._io_thread(name)
        self._stack.callback(self._close_drives)
        for drive in config.drives.values():
            self.open_drive(drive)
        self._stack.callback(self._close_netdevs)
        with blame(""):
            hypervisor = self._hypervisor()
        with contextlib.ExitStack() as undo:
            undo.callback(hypervisor.close)
            memory = self._memory()
            undo.callback(memory.close)
            self.machine = Microvm(
                hypervisor,
                memory,
                self._post,
                topology=config.topology,
                clock=self.clock,
                loop=self.main_loop,
                kernel=Kernel(config.kernel, config.initrd, config.append) if config.kernel else None,
                acpi=config.machine.acpi,
                acpi_ignored=config.acpi_ignored,
            )
            undo.pop_all()
        self._stack.callback(self.machine.close)
        if config.trace:
            from pystratovirt.trace import REGISTER_READS, registry

            with blame(f"-trace file={config.trace}"):
                self.machine.show_registers(not registry.is_on(REGISTER_READS))
        for netdev in config.netdevs.values():
            self.open_netdev(netdev)
        if config.serial:
            self._add_serial(config.serial)
        self._add_devices()
        for thread in (self.main_loop, *self.io_threads.values()):
            self.machine.add_pausable(thread)
        if isinstance(self.clock, MonotonicClock):
            self.machine.add_pausable(self.clock)
        try:
            self.machine.finish()
        except BootError as error:
            option = {InitrdError: "-initrd", KernelCommandLineError: "-append"}.get(type(error), "-kernel")
            raise VmError(f"{option}: {error}") from None
        except VmmError as error:
            raise VmError(f"-smp {config.smp.cpus}: {error}") from None

    def _io_thread(self, name: str) -> IoThread:
        thread = IoThread(name, self.clock, self._failed)
        self._stack.callback(thread.close)
        try:
            thread.start()
        except VmmError as error:
            raise VmError(f"-object iothread,id={name}: {error}") from None
        return thread

    def _failed(self, where: str, error: Exception) -> None:
        """An I/O callback raised: a bug of ours, which must not go unseen."""
        import traceback

        log.error(f"I/O thread {where}: {''.join(traceback.format_exception(error))}")

    def _hypervisor(self) -> Hypervisor:
        if self.config.test_socket:
            from vmm_core.hypervisor.testmode import RecordingHypervisor

            return RecordingHypervisor()
        from vmm_core.hypervisor.kvm import KvmHypervisor

        return KvmHypervisor(self.config.topology)

    def _memory(self) -> GuestMemory:
        wanted = self.config.memory
        threads = min(PREALLOC_THREADS, self.config.smp.cpus) if wanted.prealloc else 0
        try:
            return GuestMemory(
                Layout.ram(wanted.size),
                path=wanted.path,
                share=wanted.share,
                prealloc=threads,
                dump=wanted.dump,
                placement=[Placement(node.size, node.policy, node.host_nodes) for node in wanted.nodes],
            )
        except GuestMemoryError as error:
            if wanted.nodes:
                option = "-numa"
            elif isinstance(error, PreallocError):
                option = "-mem-prealloc"
            else:
                option = f"-mem-path {wanted.path}" if wanted.path else "-m"
            raise VmError(f"{option}: {error}") from None

    def open_drive(self, drive: Drive) -> None:
        """Open and lock an image, until close_drive() or close(). Raises VmError."""
        from block_qcow2.errors import BlockError
        from pystratovirt.drives import open_image

        try:
            disk = open_image(drive, self.config.secrets)
        except BlockError as error:
            raise VmError(f"-drive id={drive.id}: {error}") from None
        self.drives[drive.id], self.disks[drive.id] = drive, disk

    def close_drive(self, name: str) -> None:
        """Close an image that no device uses any more."""
        disk = self.disks.pop(name)
        del self.drives[name]
        disk.close()

    def _close_drives(self) -> None:
        if not self.disks:
            return
        from block_qcow2.errors import BlockError

        failures: list[str] = []
        for name in list(self.disks):  # each of them, also when one fails
            try:
                self.close_drive(name)
            except (BlockError, OSError) as error:
                failures.append(f"-drive id={name}: closed, but may lack what was written last: {error}")
        if failures:
            raise VmError("; ".join(failures))

    def open_netdev(self, netdev: Connected, take: Callable[[str], int | None] = lambda _name: None) -> None:
        """Open a network, until close_netdev() or close(). `take` hands over descriptors by name. Raises VmError."""
        from pystratovirt.devices.net import open_network

        with blame("-netdev"):
            self.networks[netdev.id] = open_network(self, netdev, take)
        self.netdevs[netdev.id] = netdev

    def close_netdev(self, name: str) -> None:
        """Close a network that no device uses any more."""
        del self.netdevs[name]
        if network := self.networks.pop(name, None):
            network.close()

    def _close_netdevs(self) -> None:
        for name in list(self.netdevs):
            self.close_netdev(name)

    def open_chardev(self, chardev: Chardev, option: str) -> CharBackend:
        """Open a character device for the user that `option` names, who closes it. Raises VmError."""
        from pystratovirt.chardevs import open_chardev

        with blame(option):
            backend = open_chardev(chardev, log.info, log.warn)
        self.chardevs[chardev.id] = backend
        return backend

    def uses_chardev(self, name: str) -> bool:
        """Tell whether a port, a device that another process serves, or a network has the character device `name`."""
        users = [*(plugged.declaration for plugged in self.slots.values()), *self.netdevs.values()]
        return name in self.chardevs or any(getattr(user, "chardev", None) == name for user in users)

    def loops(self, iothread: str | None) -> list[IoThread]:
        """Return the threads that serve a device which names `iothread`."""
        return [self.io_threads[iothread] if iothread else self.main_loop]

    def _add_serial(self, chardev: Chardev) -> None:
        from vmm_core.devices.debugport import boot_time_hook
        from vmm_core.devices.serial import Serial

        serial = Serial(self.machine.interrupt_line(Layout.COM1_GSI), self.main_loop, log.warn)
        serial.on_scratch(boot_time_hook(log.info))
        self.machine.add_serial(serial)
        with blame("-serial"):
            serial.connect(self.open_chardev(chardev, "-serial"))
        if not self.config.test_socket:  # nothing is collected there
            from vmm_core.devices.serial_flush import SerialFlush

            SerialFlush(self.main_loop, self.machine.hypervisor.flush_coalesced, serial)

    def _add_devices(self) -> None:
        """Fill the slots (see `slots`)."""
        config = self.config
        slots = place(config.devices, config.netdevs, acpi=config.machine.acpi, ignored=config.acpi_ignored)
        for number, (device, slot) in enumerate(zip(config.devices, slots, strict=True)):
            if slot is not None:
                name = device.id or f"{device.selector}.{number}"
                self._plug(slot, device, BUILDERS[device.selector](self, device, name))
        for slot in DISK_SLOTS:
            if slot not in self.slots:
                from pystratovirt.devices.blk import empty_blk

                self._plug(slot, None, empty_blk(self, slot))
        for slot in NET_SLOTS:
            if slot not in self.slots:
                from pystratovirt.devices.net import empty_net

                self._plug(slot, None, empty_net(self, slot))
                self.machine.clear(slot)

    def _plug(self, slot: int, declaration: Device | None, device: VirtioDevice | None) -> None:
        try:
            line = self.machine.interrupt_line(Layout.slot(slot).gsi)
            transport = MmioTransport(device, self.machine.memory, line, report=log.warn)
        except BaseException:
            if device:  # nobody else knows of it yet
                device.close()
            raise
        self.slots[slot] = Plugged(declaration, device)
        self.transports[slot] = transport
        self.machine.plug(slot, transport, f"virtio-mmio{slot}")
        if device:
            self.machine.add_component(f"virtio{slot}", device)
