"""The microvm machine of x86_64: virtio-mmio slots, a serial port, and just enough of a PC for a stock kernel.

Two forms. With ACPI (the default) stock distribution kernels find CPUs, devices, the power button and the reset register; the
MP table is there as well. Without (`acpi=off`) it is StratoVirt's machine: an MP table and `virtio_mmio.device=` words on the
kernel's command line, and what ends the guest is a triple fault.

Construction is: the constructor, `plug` for each device, `finish`. Not here: virtio devices themselves, which the composition
makes, and addresses (`vmm_core.x86_64.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmm_core.bus import BusDevice
from vmm_core.clock import Clock
from vmm_core.devices.acpi_pm import AcpiPm
from vmm_core.devices.acpi_slots import AcpiSlots
from vmm_core.devices.i8042 import I8042
from vmm_core.devices.rtc import Rtc
from vmm_core.guestmem import PAGE_SIZE, GuestMemory
from vmm_core.hypervisor import Hypervisor
from vmm_core.interrupt import InterruptLine
from vmm_core.loop import Loop
from vmm_core.machine.core import Closable, Component, Machine, MachineEvent, Pausable, VmStatus
from vmm_core.topology import CpuTopology
from vmm_core.x86_64.acpi_tables import acpi_tables, write_acpi_tables
from vmm_core.x86_64.boot import KernelFiles
from vmm_core.x86_64.layout import Microvm as Layout
from vmm_core.x86_64.layout import Slot
from vmm_core.x86_64.mp_table import add_words, command_line_words, mp_table, write_mp_table
from vmm_core.x86_64.vcpu_boot import VcpuBoot

if TYPE_CHECKING:
    from vmm_core.x86_64.io_apic import IoApic


class MmioDevice(BusDevice, Component, Pausable, Closable, Protocol):
    """What a slot takes: a virtio-mmio window."""

    @property
    def doorbells(self) -> tuple[tuple[int, int, int], ...]:
        """(offset in the window, value, event descriptor) of each guest write of 4 bytes that is to be an event."""
        ...

    def mirror(self, memory: memoryview | None) -> None:
        """Keep what the window reads as in `memory`, which guests look at instead of asking, until told None."""
        ...


class SerialPort(BusDevice, Component, Pausable, Closable, Protocol):
    """What goes to COM1."""


class Kernel(NamedTuple):
    """What the machine boots: paths of a kernel and a RAM disk, and the command line before the machine adds its words.

    The files are opened once, by finish(), and stay open: every later reset boots from the same ones.
    """

    path: str
    initrd: str | None = None
    command_line: str = ""


class Microvm(Machine):
    """A microvm. The owner plugs devices into slots, calls finish(), and then start()."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        memory: GuestMemory,
        post: Callable[[MachineEvent], None],
        *,
        topology: CpuTopology,
        clock: Clock,
        loop: Loop,
        kernel: Kernel | None = None,
        acpi: bool = True,
        acpi_ignored: bool = False,
    ) -> None:
        """Make the machine without its serial port and virtio devices. `loop` runs the timers of its legacy devices.

        Without a `kernel` the vCPUs have nothing to run; only test mode has a use for that. `acpi_ignored`: the guest is told
        not to look at ACPI, so that clock, power button and what a reset is are those of a machine without.
        """
        super().__init__(hypervisor, memory, post)
        # Registers that read as what was last put there: a guest reads one for every interrupt, and reading RAM is no exit.
        whole = -(-Layout.VIRTIO_MMIO.size // PAGE_SIZE) * PAGE_SIZE
        self._registers = hypervisor.show(Layout.VIRTIO_MMIO.base, whole)
        if self._registers:
            self._registers[:] = b"\xff" * whole  # as the bus answers where nothing is
        self.topology = topology
        self.acpi = acpi
        self.acpi_in_use = acpi and not acpi_ignored
        self._kernel = kernel
        self._files: KernelFiles | None = None
        self._has_serial = False
        self._windows: dict[int, _Window] = {}
        self.i8042 = I8042(self)
        self.pio.add(*Layout.I8042_DATA, self.i8042.data_port, "keyboard controller data")
        self.pio.add(*Layout.I8042_COMMAND, self.i8042, "keyboard controller command")
        # A clock that does not answer costs a stock kernel 4 s of its boot, so it is there even without ACPI. Only ACPI tells
        # of its interrupt: a driver that finds it by itself would take IRQ 8, which is slot 3's, so it is kept away.
        line = hypervisor.interrupt_line(Layout.RTC_GSI) if self.acpi_in_use else None
        self.rtc = Rtc(clock, loop, line, memory_size=memory.size, hours_24=self.acpi_in_use)
        self.pio.add(*Layout.RTC_PORTS, self.rtc, "clock")
        self.add_component("rtc", self.rtc)
        self.add_closable(self.rtc)
        # Kernels with PCI look for it with thousands of writes to a port that nothing has (`pci=off` keeps them from it).
        hypervisor.coalesce(*Layout.PCI_CONFIG_ADDRESS, port=True)
        self.io_apic: IoApic | None = None  # the second one; the first is the hypervisor's
        self.power: AcpiPm | None = None
        self._appearing: AcpiSlots | None = None
        if acpi:
            self.power = AcpiPm(self, hypervisor.interrupt_line(Layout.GED_GSI), loop, reset_value=Layout.RESET_VALUE)
            self.mmio.add(*Layout.GED_EVENT, self.power.events, "ACPI events")
            self.mmio.add(Layout.SLEEP_CONTROL.base, 3, self.power.registers, "ACPI sleep and reset")
            self.add_component("acpi", self.power)
            self.add_closable(self.power)
            self._appearing = AcpiSlots(self.power.raise_event)
            self.mmio.add(*Layout.SLOTS_PRESENT, self._appearing, "ACPI slots")
            self.add_component("acpi-slots", self._appearing)

    @property
    def slots(self) -> Mapping[int, MmioDevice]:
        """The devices in the slots."""
        return {number: window.device for number, window in self._windows.items()}

    def interrupt_line(self, gsi: int) -> InterruptLine:
        """Return the wire of an interrupt of the layout."""
        return self.hypervisor.interrupt_line(gsi)

    def show_registers(self, shown: bool) -> None:
        """Have guests read virtio-mmio registers from memory, where the hypervisor can (so it begins), or ask the bus for each.

        Not from two threads at once. Raises HypervisorError.
        """
        if self._registers:
            self.hypervisor.set_shown(Layout.VIRTIO_MMIO.base, shown)

    def add_serial(self, port: SerialPort) -> None:
        """Put a serial port at COM1. The machine owns it from here on."""
        self.pio.add(*Layout.COM1, port, "COM1")
        # Linux writes its console byte by byte: collecting the bytes in the kernel saves an exit each.
        self.hypervisor.coalesce(Layout.COM1.base, 1, port=True)
        self.add_component("serial", port)
        self.add_pausable(port)
        self.add_closable(port)
        self._has_serial = True

    def plug(self, number: int, device: MmioDevice, name: str) -> None:
        """Put a virtio-mmio window into slot `number`, at any time before the end. `name` is its component name.

        The machine owns the device from here on. Raises ValueError for a slot that this machine does not have or that is taken,
        HypervisorError when the hypervisor refuses; the device is the caller's then.
        """
        slot = Layout.slot(number)
        if number in self._windows:
            raise ValueError(f"slot {number} is taken")
        if not self.acpi and number >= Layout.LEGACY_SLOTS:
            raise ValueError(f"a machine without ACPI has no slot {number}; it has 0 to {Layout.LEGACY_SLOTS - 1}")
        if slot.gsi >= Layout.SECOND_IO_APIC_GSI and self.io_apic is None:
            self._add_io_apic()
        place = slot.base - Layout.VIRTIO_MMIO.base
        registers = self._registers and self._registers[place : place + slot.size]
        window = _Window(self.hypervisor, slot, device, name, registers)
        self.add_component(name, device)
        try:
            self.add_pausable(device)
            try:
                window.open()
                self.mmio.add(slot.base, slot.size, device, name)
            except BaseException:
                window.hang_up()
                self.remove_pausable(device)
                raise
        except BaseException:
            self.remove_component(name)
            raise
        self._windows[number] = window
        self.add_closable(window)

    def unplug(self, number: int) -> None:
        """Take the window out of slot `number` and close its device. From then on nothing answers there.

        Of a running machine, vCPUs stand still meanwhile, so that none is inside the device. A driver that still uses it reads
        ones and is not told (see `AcpiSlots`). Raises ValueError when the slot is empty.
        """
        window = self._windows.get(number)
        if window is None:
            raise ValueError(f"slot {number} is empty")
        with self._no_vcpu_inside():
            self.mmio.remove(window.slot.base)
            del self._windows[number]
            self.remove_component(window.name)
            self.remove_pausable(window.device)
            self.remove_closable(window)
            window.close()

    def fill(self, number: int) -> None:
        """Say that the device of a slot is of use, which a guest with ACPI finds out at once."""
        if self._appearing:
            self._appearing.fill(number)

    def clear(self, number: int) -> None:
        """Say that the device of a slot is of no use for now. From the next power-on, ACPI says that the slot is empty."""
        if self._appearing:
            self._appearing.clear(number)

    def finish(self) -> None:
        """Load kernel and tables, and make the vCPUs. Once. Raises BootError, or HypervisorError for the vCPUs."""
        if self._kernel:
            self._files = KernelFiles(self._kernel.path, self._kernel.initrd)
            self.add_closable(self._files)
        if self._appearing:
            self._appearing.reset()
        boot = self._load()
        for index in range(self.topology.cpus):
            self.vcpus.append(self.hypervisor.create_vcpu(index, self.pio, self.mmio, self, boot))

    def press_power_button(self) -> bool:
        """Press the power button. False when the machine has none (`acpi=off`), or its guest does not look at it."""
        if self.power is None or not self.acpi_in_use:
            return False
        self.power.press_power_button()
        return True

    def load_firmware(self) -> None:
        """Put tables and kernel into RAM again, as a power-on finds them."""
        self._load()

    def _add_io_apic(self) -> None:
        """Plug in the second I/O APIC, for the wires that the first has no pin for. The tables tell of it."""
        if self.status is not VmStatus.CREATED:
            raise ValueError("this machine has started without a second I/O APIC")
        from vmm_core.x86_64.io_apic import IoApic  # for machines of more than 17 slots

        self.io_apic = IoApic(self.hypervisor, 1, Layout.SECOND_IO_APIC_GSI, Layout.IO_APIC_PINS)
        self.mmio.add(*Layout.SECOND_IO_APIC, self.io_apic, "second I/O APIC")
        self.add_component("io-apic", self.io_apic)

    def _load(self) -> VcpuBoot | None:
        memory, slots = self.memory, [Layout.slot(number) for number in sorted(self._windows)]
        apic_ids = [self.topology.apic_id(index) for index in range(self.topology.cpus)]
        write_mp_table(memory, mp_table(apic_ids))
        rsdp = None
        if self._appearing:
            empty = self._appearing.empty
            rsdp = write_acpi_tables(memory, acpi_tables(apic_ids, slots, serial=self._has_serial, empty=empty))
        if self._kernel is None or self._files is None:
            return None
        # Also with ACPI: a kernel built for StratoVirt's microvm has no ACPI, and one that has both takes each device once.
        command_line = add_words(self._kernel.command_line, command_line_words(slots))
        return self._files.load(memory, command_line, rsdp=rsdp).vcpu_boot


class _Window:
    """A device in a slot, what guests read of it, and its doorbells, taken from the hypervisor before the device closes them."""

    def __init__(self, hypervisor: Hypervisor, slot: Slot, device: MmioDevice, name: str, registers: memoryview | None) -> None:
        self.slot, self.device, self.name = slot, device, name
        self._hypervisor = hypervisor
        self._registers = registers
        self._doorbells: list[tuple[int, int, int]] = []  # as the device has them; those that are registered

    def open(self) -> None:
        for offset, value, fd in self.device.doorbells:
            self._hypervisor.add_ioeventfd(self.slot.base + offset, 4, fd, match=value)
            self._doorbells.append((offset, value, fd))
        if self._registers:
            self.device.mirror(self._registers)

    def hang_up(self) -> None:
        if self._registers:
            self.device.mirror(None)
            self._registers[:] = b"\xff" * len(self._registers)
        while self._doorbells:
            offset, value, fd = self._doorbells.pop()
            self._hypervisor.remove_ioeventfd(self.slot.base + offset, 4, fd, match=value)

    def close(self) -> None:
        try:
            self.hang_up()
        finally:
            self.device.close()
