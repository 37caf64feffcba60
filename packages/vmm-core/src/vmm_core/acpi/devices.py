"""Devices that machines of every architecture describe in the same words."""

from __future__ import annotations

from collections.abc import Iterable

from vmm_core.acpi import aml
from vmm_core.acpi.resources import interrupt, memory, resource_template
from vmm_core.devices.acpi_pm import FIRST_SLOT, POWER_BUTTON

# 5.6.6: notifications
_DEVICE_CHECK = 1
_STATUS_CHANGED = 0x80  # of a power button
_PRESENT = 0xF  # 6.3.7: present, enabled, shown, working


def virtio_mmio(number: int, base: int, size: int, gsi: int) -> bytes:
    """A virtio-mmio window (virtio 1.2, section 4.2.1 leaves the ACPI id to vendors; LNRO0005 is what Linux binds to)."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CCA", aml.integer(1)),  # 6.2.17: it sees the processors' caches
        aml.name("_CRS", resource_template(memory(base, size), interrupt(gsi))),
    )


def empty_slot(number: int, window: bytes) -> bytes:
    """A slot that a device may come into: a container (9.11) around `window`, which is there when its bit in SPRE is set.

    Linux looks for new devices on a notification only in devices of a few kinds; a container is one of them.
    """
    return aml.device(
        slot_name(number),
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.integer(number)),
        aml.method(
            "_STA",
            0,
            aml.if_(aml.and_(aml.name_string("SPRE"), aml.integer(1 << number)), aml.return_(aml.integer(_PRESENT))),
            aml.return_(aml.integer(0)),
        ),
        window,
    )


def slot_name(number: int) -> str:
    """The name of an empty slot's container."""
    return f"SL{number:02X}"


def slot_register(address: int) -> bytes:
    """The register that says which empty slots were filled, as the 32-bit field SPRE."""
    return aml.operation_region("SREG", aml.SYSTEM_MEMORY, address, 4) + aml.field(
        "SREG", aml.DWORD_ACCESS | aml.WRITE_AS_ZEROS, ("SPRE", 32)
    )


def power_button() -> bytes:
    """A control method power button (4.8.2.2.1.2), pressed through the generic event device."""
    return aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0)))


def generic_event_device(register: int, gsi: int, slots: Iterable[int] = ()) -> bytes:
    """The device that stands in for ACPI's fixed events on hardware-reduced machines (5.6.9).

    Its interrupt says that the 32-bit register at `register`, which reading clears, has pending events. `slots` are the
    numbers of the empty ones.
    """
    targets = [(POWER_BUTTON, "PWRB", _STATUS_CHANGED)]
    targets += [(FIRST_SLOT << number, slot_name(number), _DEVICE_CHECK) for number in slots]
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
            *(aml.if_(aml.and_(aml.LOCAL0, aml.integer(event)), aml.notify(name, value)) for event, name, value in targets),
            serialized=True,
        ),
    )


def soft_off() -> bytes:
    """The name of state S5 (7.4.2): sleep type 5 in the sleep control register."""
    return aml.name("\\_S5", aml.package(*(aml.integer(value) for value in (5, 0, 0, 0))))
