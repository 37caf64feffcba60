"""The microvm's ACPI tables: what stock kernels, which look for nothing else, find CPUs, devices and the power button by.

The machine is hardware-reduced (ACPI 6.5, section 4.1): no SCI, no fixed registers, no legacy interrupt controllers as far as the
guest is concerned. Tables depend on nothing but the arguments, so they can be made again after a reset.
Not here: the registers that they name (the machine's devices).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from struct import pack
from typing import Final

from vmm_core.acpi import aml, tables
from vmm_core.acpi.devices import empty_slot, generic_event_device, power_button, slot_register, soft_off, virtio_mmio
from vmm_core.acpi.resources import interrupt, io_ports, resource_template
from vmm_core.errors import BootError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.layout import Microvm, Slot

_ALIGNMENT: Final = 16

# 5.2.9.3 IAPC_BOOT_ARCH. Without the 8042 flag kernels do not probe for a keyboard.
_LEGACY_DEVICES = 1 << 0
_VGA_NOT_PRESENT = 1 << 2
_CMOS_RTC_NOT_PRESENT = 1 << 5
_CENTURY: Final = 0x32  # CMOS index

_PCAT_COMPAT = 1 << 0  # 5.2.12: there are two 8259 as well
_ENABLED = 1 << 0
_XAPIC_IDS = 255  # 0 to 254; 255 addresses all
_ALL_PROCESSORS_8, _ALL_PROCESSORS_32 = 0xFF, 0xFFFF_FFFF


def acpi_tables(
    apic_ids: Sequence[int], slots: Iterable[Slot], *, serial: bool, rtc: bool = True, empty: Container[int] = ()
) -> bytes:
    """Return everything that belongs at the layout's ACPI_TABLES; the root pointer comes first.

    `apic_ids` are those of vCPU 0, 1 and so on; `slots` are the virtio-mmio slots that exist, and `empty` the numbers of those
    among them that wait for a device; `serial` and `rtc` say whether COM1 and the clock exist. Raises BootError when that is
    more than there is room for.
    """
    slots = list(slots)
    waiting = [slot.number for slot in slots if slot.number in empty]
    definition = tables.dsdt(
        aml.scope(
            "\\_SB",
            *([slot_register(Microvm.SLOTS_PRESENT.base)] if waiting else []),
            *(empty_slot(slot.number, virtio_mmio(*slot)) if slot.number in waiting else virtio_mmio(*slot) for slot in slots),
            *([_com1()] if serial else []),
            *([_clock()] if rtc else []),
            generic_event_device(Microvm.GED_EVENT.base, Microvm.GED_GSI, waiting),
            power_button(),
        ),
        soft_off(),
    )
    image = bytearray(tables.RSDP_SIZE)

    def place(data: bytes) -> int:
        image.extend(bytes(-len(image) % _ALIGNMENT))
        address = Microvm.ACPI_TABLES.base + len(image)
        image.extend(data)
        return address

    fixed = tables.hardware_reduced_fadt(
        place(definition),
        sleep_control=Microvm.SLEEP_CONTROL.base,
        sleep_status=Microvm.SLEEP_STATUS.base,
        reset=Microvm.RESET.base,
        reset_value=Microvm.RESET_VALUE,
        boot_arch=_LEGACY_DEVICES * serial | _VGA_NOT_PRESENT | _CMOS_RTC_NOT_PRESENT * (not rtc),
        century=_CENTURY if rtc else 0,
    )
    second_io_apic = any(slot.gsi >= Microvm.SECOND_IO_APIC_GSI for slot in slots)
    roots = [place(fixed), place(_madt(apic_ids, second_io_apic=second_io_apic))]
    image[: tables.RSDP_SIZE] = tables.rsdp(place(tables.xsdt(roots)))
    if len(image) > Microvm.ACPI_TABLES.size:
        raise BootError(f"ACPI tables of {len(image)} bytes do not fit the {Microvm.ACPI_TABLES.size} that they have")
    return bytes(image)


def write_acpi_tables(memory: GuestMemory, image: bytes) -> int:
    """Put tables made by acpi_tables() into guest memory, and return the address of the root pointer."""
    memory.write(Microvm.ACPI_TABLES.base, image)
    return Microvm.ACPI_TABLES.base


def _com1() -> bytes:
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", resource_template(io_ports(*Microvm.COM1), interrupt(Microvm.COM1_GSI))),
    )


def _clock() -> bytes:
    # Without an interrupt here Linux takes IRQ 8 for granted, which is slot 3's.
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", resource_template(io_ports(*Microvm.RTC_PORTS), interrupt(Microvm.RTC_GSI))),
    )


def _madt(apic_ids: Sequence[int], *, second_io_apic: bool) -> bytes:
    """Return the interrupt controllers (5.2.12).

    There are no interrupt source overrides: every ISA interrupt is on the pin of its number, edge-triggered and active high,
    which is what goes without saying.
    """
    entries = [_processor(index, apic_id) for index, apic_id in enumerate(apic_ids)]
    entries.append(_io_apic(0, Microvm.IO_APIC.base, 0))
    if second_io_apic:
        entries.append(_io_apic(1, Microvm.SECOND_IO_APIC.base, Microvm.SECOND_IO_APIC_GSI))
    entries.append(pack("<BBBHB", 4, 6, _ALL_PROCESSORS_8, 0, 1))  # 5.2.12.7: NMI on LINT1
    if any(apic_id >= _XAPIC_IDS for apic_id in apic_ids):
        entries.append(pack("<BBHIB3x", 10, 12, 0, _ALL_PROCESSORS_32, 1))  # 5.2.12.13
    return tables.table("APIC", 5, pack("<II", Microvm.LOCAL_APIC.base, _PCAT_COMPAT) + b"".join(entries))


def _processor(uid: int, apic_id: int) -> bytes:
    if apic_id < _XAPIC_IDS:
        return pack("<BBBBI", 0, 8, uid, apic_id, _ENABLED)  # 5.2.12.2
    return pack("<BBHIII", 9, 16, 0, apic_id, _ENABLED, uid)  # 5.2.12.12


def _io_apic(identity: int, address: int, gsi_base: int) -> bytes:
    return pack("<BBBBII", 1, 12, identity, 0, address, gsi_base)  # 5.2.12.3
