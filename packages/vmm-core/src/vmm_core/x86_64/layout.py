"""The microvm machine's guest-physical map, ports and interrupt numbers, each with its reason. No other file has any.

Source: reference machine-x86_64, sections 2, 3, 8 and 9. What StratoVirt's machine has keeps its place; what is new here
(ACPI, the clock, the second I/O APIC) lies where nothing of StratoVirt's does.

    0x0000_0000  RAM; what the loader leaves in its first MiB is in `Microvm` below
    0xC000_0000  nothing                                        (or the end of RAM, if that comes first)
    0xF000_0000  ACPI: events, sleep, reset, slots that were filled
    0xF010_0000  virtio-mmio slots, 512 bytes each
    0xFEC0_0000  I/O APIC, and 64 KiB on the second one
    0xFEE0_0000  local APIC
    0xFEF0_C000  pages that the hypervisor needs
    0x1_0000_0000  RAM beyond 3 GiB

Not here: what lies at these addresses, and how it gets there.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Range(NamedTuple):
    """Addresses or ports `base` to `base + size - 1`."""

    base: int
    size: int

    @property
    def end(self) -> int:
        """The first address behind."""
        return self.base + self.size


class Gsi(int):
    """A global system interrupt number (ACPI 6.5, section 5.2.13). All of this machine's are edge-triggered, active high."""


class Slot(NamedTuple):
    """The place of one virtio-mmio device."""

    number: int
    base: int
    size: int
    gsi: int


class Microvm:
    """Every address of the microvm. Its class attributes are Range, Gsi, or a number with its unit beside it."""

    # RAM. What lies above the low part is for devices; whatever does not fit below them continues at 4 GiB.
    LOW_RAM_LIMIT: Final = 0xC000_0000  # ends 1 GiB below 4 GiB
    HIGH_RAM_BASE: Final = 0x1_0000_0000
    HIGH_RAM_LIMIT: Final = HIGH_RAM_BASE + 0x80_0000_0000  # 512 GiB, the most that -m takes

    # What the boot loader leaves in RAM. The guest owns these pages again as soon as it has read them.
    GDT: Final = Range(0x500, 0x20)  # four descriptors, behind the real-mode vectors and the BIOS data area
    IDT: Final = Range(0x520, 0x8)  # empty: an exception before the guest has its own is a triple fault
    PVH_START: Final = Range(0x6000, 0x1000)  # start info, module list and memory map of the PVH protocol
    ZERO_PAGE: Final = Range(0x7000, 0x1000)  # boot_params of the Linux protocol
    BOOT_STACK: Final = Range(0x8000, 0xFF0)  # the stack pointer starts at its end
    PML4: Final = Range(0x9000, 0x1000)
    PDPT: Final = Range(0xA000, 0x1000)
    # Four page directories map 4 GiB one to one, so that a kernel can reach its RAM disk wherever below 4 GiB it lies.
    PAGE_DIRECTORIES: Final = Range(0xB000, 0x4000)
    COMMAND_LINE: Final = Range(0x2_0000, 0x1_0000)  # with its NUL; Linux takes 2 KiB
    LOW_RAM_TOP: Final = 0x9_FC00  # conventional memory ends here in the memory map given to guests, as on a PC
    # MP specification 1.4, section 4: guests look for the pointer in the last KiB of conventional memory. The table itself
    # lies in the firmware area, because behind the pointer it would run past 0xA0000 from 41 CPUs on.
    MP_POINTER: Final = Range(0x9_FC00, 0x10)
    # ACPI 6.5, section 5.2.5.1: guests look for the root pointer from 0xE0000 on, every 16 bytes. All tables follow it.
    ACPI_TABLES: Final = Range(0xE_0000, 0x1_0000)
    MP_TABLE: Final = Range(0xF_0000, 0xF000)
    RESET_VECTOR: Final = Range(0xF_FFF0, 0x10)  # where a PC's BIOS starts, and where kernels jump to for a reset
    FIRMWARE_AREA: Final = Range(0xE_0000, 0x2_0000)  # where a PC has its BIOS: reserved in the memory map, for the three above
    KERNEL_BASE: Final = 0x10_0000  # the lowest address for a kernel or a RAM disk: 1 MiB
    PLAIN_KERNEL: Final = 0x100_0000  # where Linux is linked to run, 16 MiB: for images that do not say so
    INITRD_TOP: Final = 0x37FF_FFFF  # a RAM disk ends here or, if that is lower, where low RAM ends; all kernels take that

    # ACPI registers: below the slots, where StratoVirt's standard machine has its event register.
    GED_EVENT: Final = Range(0xF000_0000, 0x4)  # pending events of the generic event device, cleared by reading
    CPU_HOTPLUG: Final = Range(0xF000_0004, 0x3)  # of StratoVirt's standard machine; nothing here, so that the two never disagree
    SLEEP_CONTROL: Final = Range(0xF000_0010, 0x1)  # ACPI 6.5, section 4.8.3.7
    SLEEP_STATUS: Final = Range(0xF000_0011, 0x1)
    RESET: Final = Range(0xF000_0012, 0x1)  # ACPI 6.5, section 4.8.3.6
    RESET_VALUE: Final = 0x42  # not a value that a stray store of zeros or ones makes
    SLOTS_PRESENT: Final = Range(0xF000_0020, 0x4)  # bit n: slot n, which was empty at power-on, has a device now

    # One slot a virtio-mmio device. Clients count slots: their order, addresses and first eleven interrupts are an interface.
    VIRTIO_MMIO: Final = Range(0xF010_0000, 41 * 0x200)
    SLOT_SIZE: Final = 0x200
    SLOTS: Final = 41  # as many as have an interrupt of their own
    LEGACY_SLOTS: Final = 11  # all that StratoVirt has, and that a guest without ACPI finds: GSI 5 to 15

    IO_APIC: Final = Range(0xFEC0_0000, 0x1000)  # where every PC has it; the MP table and the MADT both name it
    SECOND_IO_APIC: Final = Range(0xFEC1_0000, 0x1000)  # in the MiB that PCs keep for I/O APICs
    LOCAL_APIC: Final = Range(0xFEE0_0000, 0x10_0000)  # reset value of IA32_APIC_BASE; messages take the whole MiB
    # KVM wants four pages of its own below 4 GiB on Intel processors (KVM API, 4.41 and 4.36).
    KVM_IDENTITY_MAP: Final = Range(0xFEF0_C000, 0x1000)
    KVM_TSS: Final = Range(0xFEF0_D000, 0x3000)

    # Interrupts. The first I/O APIC has pins 0 to 23 and passes GSI n to pin n; 0 to 15 are also those of the two PICs.
    PIT_GSI: Final = Gsi(0)  # inside KVM, on pin 0 and not moved to 2: the tables have no override to say otherwise
    COM1_GSI: Final = Gsi(4)
    FIRST_SLOT_GSI: Final = Gsi(5)  # slot k has 5 + k, up to 15 for slot 10
    # The slots own 8 (slot 3) and 9 (slot 4), so neither the clock nor ACPI can have the number it has on a PC. Pins 16 and
    # 17 exist in the I/O APIC only, which is what a guest that is told of these two devices, by ACPI, uses.
    GED_GSI: Final = Gsi(16)
    RTC_GSI: Final = Gsi(17)
    # Pins 18 to 23 take slots 11 to 16. Beyond them a second I/O APIC gives each slot a wire of its own. Sharing lines
    # instead loses interrupts: KVM raises and lowers an edge in two steps, and an edge from another device in between is
    # no edge. Level-triggered sharing would cost an exit and a wake-up of a Python thread for every interrupt.
    EXTRA_SLOT_GSI: Final = Gsi(18)
    SECOND_IO_APIC_GSI: Final = Gsi(24)
    IO_APIC_PINS: Final = 24  # of each

    # Ports.
    I8042_DATA: Final = Range(0x60, 1)
    RTC_PORTS: Final = Range(0x70, 2)  # index and data
    I8042_COMMAND: Final = Range(0x64, 1)  # writing 0xFE resets the machine
    COM1: Final = Range(0x3F8, 8)
    # Nothing is there: this machine has no PCI. A generic kernel looks for an AGP bridge all the same, 16,600 times, unless told
    # `pci=off`; letting KVM collect its writes to this port halves the exits.
    PCI_CONFIG_ADDRESS: Final = Range(0xCF8, 4)
    # Scratch register of COM1. A write of 1 also says that the kernel has started, 2 that it has booted; both only reach the log.
    BOOT_TIME: Final = Range(0x3FF, 1)

    @classmethod
    def ram(cls, size: int) -> list[Range]:
        """Return where `size` bytes of RAM lie: below the devices first, the rest from 4 GiB on.

        Raises ValueError when `size` is not positive or more than the map holds.
        """
        if not 0 < size <= cls.LOW_RAM_LIMIT + cls.HIGH_RAM_LIMIT - cls.HIGH_RAM_BASE:
            raise ValueError(f"the machine has no room for {size} bytes of RAM")
        low = Range(0, min(size, cls.LOW_RAM_LIMIT))
        return [low] if size == low.size else [low, Range(cls.HIGH_RAM_BASE, size - low.size)]

    @classmethod
    def slot(cls, number: int) -> Slot:
        """Return the place of virtio-mmio slot `number`, 0 to SLOTS - 1. Raises ValueError for any other number."""
        if not 0 <= number < cls.SLOTS:
            raise ValueError(f"the machine has no virtio-mmio slot {number}; it has 0 to {cls.SLOTS - 1}")
        if number < cls.LEGACY_SLOTS:
            gsi = cls.FIRST_SLOT_GSI + number
        else:  # 18 to 23 on the first I/O APIC and, seamlessly, from 24 on the second one
            gsi = cls.EXTRA_SLOT_GSI + number - cls.LEGACY_SLOTS
        return Slot(number, cls.VIRTIO_MMIO.base + number * cls.SLOT_SIZE, cls.SLOT_SIZE, gsi)
