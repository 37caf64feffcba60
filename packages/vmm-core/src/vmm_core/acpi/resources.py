"""Resource descriptors: what a device's _CRS says it decodes and which interrupts it raises (ACPI 6.5, section 6.4)."""

from __future__ import annotations

from struct import pack

from vmm_core.acpi.aml import buffer


def resource_template(*descriptors: bytes) -> bytes:
    """Join descriptors to a resource template, an AML buffer that ends with an end tag (6.4.2.9) of checksum 0: none."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io_ports(base: int, count: int) -> bytes:
    """`count` fixed ports at `base`, all 16 address bits decoded (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def memory(base: int, size: int) -> bytes:
    """`size` bytes of read-write registers at a fixed address below 4 GiB (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt(gsi: int) -> bytes:
    """One global system interrupt that the device raises alone, on a rising edge (6.4.3.6)."""
    consumer, edge = 1 << 0, 1 << 1  # active high and exclusive are zeros
    return pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)
