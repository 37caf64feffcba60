"""Devices that machines of every architecture describe in the same words."""

from __future__ import annotations

from vmm_core.acpi import aml
from vmm_core.acpi.resources import interrupt, memory, resource_template

POWER_BUTTON_EVENT = 1 << 0  # bits of the generic event device's register; StratoVirt's numbers
_STATUS_CHANGED = 0x80  # 5.6.6: the notification of a power button


def virtio_mmio(number: int, base: int, size: int, gsi: int) -> bytes:
    """A virtio-mmio window (virtio 1.2, section 4.2.1 leaves the ACPI id to vendors; LNRO0005 is what Linux binds to)."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CCA", aml.integer(1)),  # 6.2.17: it sees the processors' caches
        aml.name("_CRS", resource_template(memory(base, size), interrupt(gsi))),
    )


def power_button() -> bytes:
    """A control method power button (4.8.2.2.1.2), pressed through the generic event device."""
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0)))


def generic_event_device(register: int, gsi: int) -> bytes:
    """The device that stands in for ACPI's fixed events on hardware-reduced machines (5.6.9).

    Its interrupt says that the 32-bit register at `register`, which reading clears, has pending events.
    """
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.string("GED")),
        aml.name("_CRS", resource_template(interrupt(gsi))),
        aml.operation_region("EREG", aml.SYSTEM_MEMORY, register, 4),
        aml.field("EREG", aml.DWORD_ACCESS | aml.WRITE_AS_ZEROS, ("ESEL", 32)),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.name_string("ESEL"), aml.LOCAL0),
            aml.if_(aml.and_(aml.LOCAL0, aml.integer(POWER_BUTTON_EVENT)), aml.notify("PWRB", _STATUS_CHANGED)),
            serialized=True,
        ),
    )


def soft_off() -> bytes:
    """The name of state S5 (7.4.2): sleep type 5 in the sleep control register."""
    return aml.name("\\_S5", aml.package(*(aml.integer(value) for value in (5, 0, 0, 0))))
