"""The MP table: how a kernel without ACPI finds its CPUs and interrupts (Intel MultiProcessor Specification 1.4, section 4).

Entries and their order are StratoVirt's. What it gets wrong is right here: the entry count, who takes the 8259's interrupts, the
padding of the bus name, and a table that runs past conventional memory (see the layout's MP_POINTER).
Not here: virtio-mmio devices, which such a kernel finds by words on its command line (`command_line_words`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import Struct, pack
from typing import Final

from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.layout import Microvm, Slot

_SPEC_REVISION: Final = 4  # 1.4
_POINTER = Struct("<4sIBBB5x")  # 4.1: signature, table, length in paragraphs, revision, checksum; default configuration: none
# 4.2: signature, length, revision, checksum, OEM, product, OEM table and size: none, entries, local APIC, extended table: none
_HEADER = Struct("<4sHBB8s12s6xHI4x")
_PROCESSOR, _BUS, _IO_APIC, _IO_INTERRUPT, _LOCAL_INTERRUPT = range(5)  # 4.3: entry types
_ISA_BUS: Final = 0
_LAPIC_VERSION: Final = 0x14
_IO_APIC_VERSION: Final = 0x11  # what KVM's says of itself
_ENABLED, _BOOT_PROCESSOR = 1 << 0, 1 << 1
_SIGNATURE: Final = 0x600  # family 6; kernels ask CPUID
_FEATURES: Final = 0x201  # FPU and APIC
_INT, _NMI, _EXT_INT = 0, 1, 3  # 4.3.4, table 4-11; flags 0: as usual on the bus, that is, edge and active high on ISA
_ISA_INTERRUPTS: Final = 16
_ALL_LOCAL_APICS: Final = 0xFF


def mp_table(apic_ids: Sequence[int]) -> bytes:
    """Return the configuration table for CPUs with these APIC ids, the boot processor's first.

    CPUs with ids above 254 are left out: an MP table cannot name them, nor can a kernel that needs one start them.
    """
    ids = [apic_id for apic_id in apic_ids if apic_id < _ALL_LOCAL_APICS]
    # StratoVirt's number unless a CPU has it. No such number is left only where 255 CPUs would be: then any will do.
    io_apic = next((number for number in range(len(apic_ids) + 1, 0x100) if number not in ids), 0)
    entries = [
        *(
            pack(
                "<BBBBII8x", _PROCESSOR, apic_id, _LAPIC_VERSION, _ENABLED | _BOOT_PROCESSOR * (index == 0), _SIGNATURE, _FEATURES
            )
            for index, apic_id in enumerate(ids)
        ),
        pack("<BB6s", _BUS, _ISA_BUS, b"ISA   "),
        pack("<BBBBI", _IO_APIC, io_apic, _IO_APIC_VERSION, _ENABLED, Microvm.IO_APIC.base),
        *(pack("<BBHBBBB", _IO_INTERRUPT, _INT, 0, _ISA_BUS, irq, io_apic, irq) for irq in range(_ISA_INTERRUPTS)),
        pack("<BBHBBBB", _LOCAL_INTERRUPT, _EXT_INT, 0, _ISA_BUS, 0, ids[0], 0),
        pack("<BBHBBBB", _LOCAL_INTERRUPT, _NMI, 0, _ISA_BUS, 0, _ALL_LOCAL_APICS, 1),
    ]
    body = b"".join(entries)
    length = _HEADER.size + len(body)
    header = bytearray(_HEADER.size)
    _HEADER.pack_into(header, 0, b"PCMP", length, _SPEC_REVISION, 0, b"STRATO", b"1.0", len(entries), Microvm.LOCAL_APIC.base)
    header[7] = -sum(header + body) & 0xFF
    return bytes(header) + body


def write_mp_table(memory: GuestMemory, table: bytes) -> None:
    """Put a table made by mp_table(), and the pointer to it, into guest memory."""
    pointer = bytearray(_POINTER.pack(b"_MP_", Microvm.MP_TABLE.base, 1, _SPEC_REVISION, 0))
    pointer[10] = -sum(pointer) & 0xFF
    memory.write(Microvm.MP_POINTER.base, pointer)
    memory.write(Microvm.MP_TABLE.base, table)


def command_line_words(slots: Iterable[Slot]) -> list[str]:
    """Return the words that tell Linux of virtio-mmio devices (Linux kernel, drivers/virtio/virtio_mmio.c), in the order given.

    Slots beyond StratoVirt's have no ISA interrupt; a kernel that needs these words could not use them, so they get none.
    """
    return [f"virtio_mmio.device={size}@{base:#010x}:{gsi}" for number, base, size, gsi in slots if number < Microvm.LEGACY_SLOTS]


def add_words(command_line: str, words: Sequence[str]) -> str:
    """Return a kernel's command line with `words` behind its own.

    What follows the word `--` is for the guest's first program (Linux kernel, init/main.c), which has no use for them.
    """
    at, quoted = 0, False
    for word in command_line.split(" "):
        if word == "--" and not quoted:
            return " ".join([*([command_line[: at - 1]] if at else []), *words, command_line[at:]])
        at += len(word) + 1
        quoted ^= word.count('"') % 2 == 1
    return " ".join([*([command_line] if command_line else []), *words])
