"""ACPI's static tables: header, root pointer, XSDT, FADT of a hardware-reduced machine, DSDT (ACPI 6.5, section 5.2).

The identification fields are those of StratoVirt's standard machine. Not here: the MADT, which differs by architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack, pack_into
from typing import Final

HEADER_SIZE: Final = 36
RSDP_SIZE: Final = 36
_HEADER = Struct("<4sIBB6s8sIII")  # 5.2.6; the creator stays 0: no compiler made this
_OEM_ID: Final = b"STRATO"
_CHECKSUM: Final = 9

FADT_SIZE: Final = 276
# 5.2.9, table 5.10: fixed feature flags
_WBINVD = 1 << 0
_PWR_BUTTON = 1 << 4  # the button is not a fixed feature
_SLP_BUTTON = 1 << 5
_FIX_RTC = 1 << 6  # nor is wake-up by the clock
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20


def table(signature: str, revision: int, body: bytes) -> bytes:
    """Return a table: header, `body`, and a checksum that makes the sum of all bytes 0."""
    data = bytearray(_HEADER.size) + body
    code = signature.encode("ascii")
    _HEADER.pack_into(data, 0, code, len(data), revision, 0, _OEM_ID, b"VIRT" + code, 1, 0, 0)
    data[_CHECKSUM] = -sum(data) & 0xFF
    return bytes(data)


def rsdp(xsdt: int) -> bytes:
    """Return the root system description pointer to an XSDT at `xsdt` (5.2.5.3), revision 2 without an RSDT."""
    data = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, RSDP_SIZE, xsdt, 0))
    data[8] = -sum(data[:20]) & 0xFF
    data[32] = -sum(data) & 0xFF
    return bytes(data)


def xsdt(addresses: Sequence[int]) -> bytes:
    """Return the table of tables (5.2.8)."""
    return table("XSDT", 1, pack(f"<{len(addresses)}Q", *addresses))


def dsdt(*terms: bytes) -> bytes:
    """Return the definition block of `terms` (5.2.11.1). Revision 2 makes its integers 64 bits wide."""
    return table("DSDT", 2, b"".join(terms))


def register(address: int) -> bytes:
    """Return the generic address structure (5.2.3.2) of an 8-bit register in memory."""
    return pack("<BBBBQ", 0, 8, 0, 1, address)


def hardware_reduced_fadt(
    dsdt: int, *, sleep_control: int, sleep_status: int, reset: int, reset_value: int, boot_arch: int = 0, century: int = 0
) -> bytes:
    """Return the FADT (5.2.9) of a machine without ACPI's fixed hardware (4.1).

    All addresses are guest-physical, the registers 8 bits wide. `boot_arch` is IAPC_BOOT_ARCH (5.2.9.3), `century` the CMOS
    index of the century, 0 for none.
    """
    body = bytearray(FADT_SIZE - HEADER_SIZE)

    def put(form: str, offset: int, *values: int) -> None:
        pack_into(form, body, offset - HEADER_SIZE, *values)

    put("<B", 108, century)
    put("<H", 109, boot_arch)
    put("<I", 112, _WBINVD | _PWR_BUTTON | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP | _HW_REDUCED_ACPI)
    for offset, address in ((116, reset), (244, sleep_control), (256, sleep_status)):
        body[offset - HEADER_SIZE : offset - HEADER_SIZE + 12] = register(address)
    put("<B", 128, reset_value)
    put("<B", 131, 5)  # minor version: 6.5
    put("<Q", 140, dsdt)
    return table("FACP", 6, bytes(body))
