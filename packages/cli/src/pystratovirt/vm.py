"""From a Config to a machine: opens what it names, builds the machine around it, and gives everything back at the end.

This is the only place where devices meet their back ends. Not here: what a Config may say (`cmdline`), the main loop and QMP
(`runtime`), and how the parts work (their packages).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Self

from pystratovirt import log
from pystratovirt.cmdline.backends import FileChardev, PtyChardev, SocketChardev, StdioChardev
from pystratovirt.cmdline.devices import Virtconsole, VirtioBlk, VirtioRng, VirtioSerial
from pystratovirt.errors import StartError
from virtio_devices.mmio import MmioTransport
from vmm_core.clock import MonotonicClock, VirtualClock
from vmm_core.errors import VmmError
from vmm_core.guestmem import GuestMemory
from vmm_core.machine.microvm import Kernel, Microvm
from vmm_core.threads import IoThread
from vmm_core.x86_64.layout import Microvm as Layout

if TYPE_CHECKING:
    from block_qcow2.disk import Disk
    from pystratovirt.cmdline.backends import Chardev, Drive
    from pystratovirt.cmdline.config import Config
    from virtio_devices.device import VirtioDevice
    from vmm_core.devices.chardev import CharBackend
    from vmm_core.hypervisor import Hypervisor
    from vmm_core.hypervisor.testmode import MachineAccess
    from vmm_core.machine.core import MachineEvent

IO_THREAD = "vmm-io"  # serves what no -object iothread is named for
FLUSH_INTERVAL = 100_000_000  # ns; a guest that writes to its serial port and never again leaves the guest waits this long

BLK_SLOTS = range(4)  # replaceable disks (reference machine-x86_64, section 8.1)
NET_SLOTS = range(4, 6)  # replaceable network devices
OTHER_SLOTS = range(6, Layout.LEGACY_SLOTS)
PREALLOC_THREADS = 16


class VmError(StartError):
    """A virtual machine that cannot be built as asked; one line that names the option and the reason."""


class VirtualMachine:
    """The machine that a Config describes, with its disks, character devices and I/O threads.

    Belongs to one thread (the main thread of the command); `post` is called from others. Usable as a context manager.
    """

    def __init__(self, config: Config, post: Callable[[MachineEvent], None]) -> None:
        """Build everything, start nothing but I/O threads. Raises VmError, and leaves nothing behind then."""
        self.config = config
        self.disks: dict[str, Disk] = {}
        self.io_threads: dict[str, IoThread] = {}
        self.chardevs: dict[str, CharBackend] = {}
        self.clock = VirtualClock() if config.test_socket else MonotonicClock()
        self.transports: dict[int, MmioTransport] = {}
        self._stack = contextlib.ExitStack()
        self._post = post
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Let the guest run, or stand ready with `-S`. Raises VmError."""
        try:
            self.machine.start(paused=self.config.freeze)
        except VmmError as error:
            raise VmError(str(error)) from None

    def test_access(self) -> MachineAccess:
        """Return what a test in test mode does to the machine. Raises VmError in any other mode."""
        from vmm_core.hypervisor.testmode import MachineAccess, RecordingHypervisor

        machine, clock = self.machine, self.clock
        if not isinstance(machine.hypervisor, RecordingHypervisor) or not isinstance(clock, VirtualClock):
            raise VmError("-mod-test: the machine is not in test mode")
        return MachineAccess(machine.hypervisor, machine.memory, machine.mmio, machine.pio, clock)

    def close(self) -> None:
        """End the machine and give everything back, the last thing first. Twice is fine."""
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
        for drive in config.drives.values():
            self._open_drive(drive)
        with _blame(""):
            hypervisor = self._hypervisor()
        try:
            with _blame("-m"):
                memory = self._memory()
        except BaseException:
            hypervisor.close()
            raise
        kernel = Kernel(config.kernel, config.initrd, config.append) if config.kernel else None
        self.machine = Microvm(
            hypervisor,
            memory,
            self._post,
            topology=config.topology,
            clock=self.clock,
            loop=self.main_loop,
            kernel=kernel,
            acpi=config.machine.acpi,
        )
        self._stack.callback(self.machine.close)
        if config.serial:
            self._add_serial(config.serial)
        self._add_devices()
        for thread in (self.main_loop, *self.io_threads.values()):
            self.machine.add_pausable(thread)
        if isinstance(self.clock, MonotonicClock):
            self.machine.add_pausable(self.clock)
        with _blame("-kernel"):
            self.machine.finish()

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
        return GuestMemory(Layout.ram(wanted.size), path=wanted.path, share=wanted.share, prealloc=threads, dump=wanted.dump)

    def _open_drive(self, drive: Drive) -> None:
        from block_qcow2 import open_disk
        from block_qcow2.errors import BlockError

        try:
            disk = open_disk(
                drive.file,
                format=drive.format,
                read_only=drive.readonly,
                direct=drive.direct,
                aio=drive.engine,
                discard=drive.discard,
                detect_zeroes=drive.detect_zeroes,
            )
            self._stack.callback(disk.close)
            # From here to the end, pauses included: StratoVirt lets go of a paused machine's images, and whoever opens one
            # then has it changed under him by the resumed guest.
            disk.lock()
        except BlockError as error:
            raise VmError(f"-drive id={drive.id}: {error}") from None
        self.disks[drive.id] = disk

    def _chardev(self, chardev: Chardev, option: str) -> CharBackend:
        """Open a character device. Its user closes it."""
        from vmm_core.devices import chardev as backends

        report = log.info
        with _blame(option):
            backend: CharBackend
            if isinstance(chardev, StdioChardev):
                backend = backends.StdioBackend(report)
            elif isinstance(chardev, FileChardev):
                backend = backends.FileBackend(chardev.path, report)
            elif isinstance(chardev, PtyChardev):
                backend = backends.PtyBackend(report)
            else:
                backend = _socket_backend(chardev, report)
        self.chardevs[chardev.id] = backend
        return backend

    def _add_serial(self, chardev: Chardev) -> None:
        from vmm_core.devices.debugport import boot_time_hook
        from vmm_core.devices.serial import Serial

        serial = Serial(self.machine.interrupt_line(Layout.COM1_GSI), self.main_loop, log.warn)
        serial.on_scratch(boot_time_hook(log.info))
        self.machine.add_serial(serial)
        with _blame("-serial"):
            serial.connect(self._chardev(chardev, "-serial"))
        if not self.config.test_socket:  # nothing is collected there
            self._flush_serial()

    def _flush_serial(self) -> None:
        self.machine.hypervisor.flush_coalesced()
        self.main_loop.call_later(FLUSH_INTERVAL, self._flush_serial, host=True)

    def _add_devices(self) -> None:
        """Fill the slots in StratoVirt's order: disks, network devices, then everything else as the command line has it."""
        disks = iter(BLK_SLOTS)
        others = iter(OTHER_SLOTS)
        devices: dict[int, VirtioDevice] = {}
        for number, device in enumerate(self.config.devices):
            if isinstance(device, VirtioBlk):
                devices[next(disks)] = self._blk(device)
            elif isinstance(device, VirtioRng):
                devices[next(others)] = self._rng(device, device.id or f"rng{number}")
            elif isinstance(device, VirtioSerial):
                devices[next(others)] = self._console(device.id or f"serial{number}")
        for slot in disks:
            from virtio_devices.blk.device import BlkDevice

            # A disk that is not there yet: clients may fill the slot later, guests see a capacity of 0 until then.
            devices[slot] = BlkDevice(f"blk-slot{slot}", [self.main_loop], self.clock)
        for slot in sorted({*devices, *NET_SLOTS}):
            self._plug(slot, devices.get(slot))

    def _plug(self, slot: int, device: VirtioDevice | None) -> None:
        transport = MmioTransport(
            device, self.machine.memory, self.machine.interrupt_line(Layout.slot(slot).gsi), report=log.warn
        )
        self.transports[slot] = transport
        self.machine.plug(slot, transport, f"virtio-mmio{slot}")
        if device:
            self.machine.add_component(f"virtio{slot}", device)

    def _loops(self, iothread: str | None) -> list[IoThread]:
        return [self.io_threads[iothread] if iothread else self.main_loop]

    def _blk(self, device: VirtioBlk) -> VirtioDevice:
        from virtio_devices.blk.device import BlkDevice

        drive = self.config.drives[device.drive]
        return BlkDevice(
            device.id,
            self._loops(device.iothread),
            self.clock,
            disk=self.disks[device.drive],
            serial=device.serial or "",
            num_queues=device.num_queues,
            queue_size=device.queue_size,
            read_only=drive.readonly,
            discard=drive.discard,
            # StratoVirt offers it only with detect-zeroes; every disk can do it, and guests fall back to writing zeroes.
            write_zeroes=not drive.readonly,
            iops=drive.iops_total or 0,
        )

    def _rng(self, device: VirtioRng, name: str) -> VirtioDevice:
        from virtio_devices.rng import RngDevice, open_source

        with _blame(f"-object rng-random,id={device.rng}"):
            source = open_source(self.config.rngs[device.rng].filename)
        return RngDevice(name, self.main_loop, self.clock, source, rate=device.rate or 0, report=log.warn)

    def _console(self, name: str) -> VirtioDevice:
        from virtio_devices.console import ConsoleDevice

        console = ConsoleDevice(name, self.main_loop)
        for device in self.config.devices:
            if isinstance(device, Virtconsole):
                option = f"-device virtconsole,id={device.id}"
                with _blame(option):
                    console.port.connect(self._chardev(self.config.chardevs[device.chardev], option))
        return console


def _socket_backend(chardev: SocketChardev, report: Callable[[str], None]) -> CharBackend:
    from vmm_core.devices.chardev_socket import listen_tcp, listen_unix

    if chardev.path is not None:
        return listen_unix(chardev.path, report)
    assert chardev.port is not None  # the command line has either
    return listen_tcp(chardev.host, chardev.port, report)


@contextlib.contextmanager
def _blame(option: str) -> Iterator[None]:
    """Say which option a failure of the parts comes from."""
    try:
        yield
    except (VmmError, OSError) as error:
        raise VmError(f"{option}: {error}" if option else str(error)) from None
