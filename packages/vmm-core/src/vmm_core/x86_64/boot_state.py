"""The two processor states in which kernels are entered, the tables in guest memory that they need, and a way out.

Sources: Linux kernel, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; Xen, docs/misc/pvh.pandoc; AMD APM volume 2,
sections 4.8 (descriptors) and 5.3 (long-mode paging).
"""

from __future__ import annotations

from struct import pack
from typing import Final

from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.layout import Microvm
from vmm_core.x86_64.vcpu_boot import Segment, Table, VcpuBoot

_CODE_64: Final = 0x00AF_9B00_0000_FFFF  # descriptors: flat, present, ring 0
_CODE_32: Final = 0x00CF_9B00_0000_FFFF
_DATA: Final = 0x00CF_9300_0000_FFFF
_CODE_SELECTOR, _DATA_SELECTOR = 0x10, 0x18  # boot.rst wants these two; PVH leaves them to the loader
_FLAT: Final = 0xFFFF_FFFF

_CODE_TYPE, _DATA_TYPE, _BUSY_TSS_TYPE = 11, 3, 11
_DATA_SEGMENT: Final = Segment(_DATA_SELECTOR, 0, _FLAT, _DATA_TYPE, present=1, dpl=0, db=1, s=1, long=0, g=1)

_CR0_PE, _CR0_PG = 1 << 0, 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS: Final = 1 << 1  # reads as one

# cli; mov al, 0xFE; out 0x64, al (pulse the reset line of the keyboard controller); hlt; jmp to the hlt
_RESET_CODE: Final = bytes.fromhex("fa b0fe e664 f4 ebfd")

_PRESENT_WRITABLE: Final = 0x3
_PAGE_2M: Final = 0x80


def long_mode(memory: GuestMemory, entry: int) -> VcpuBoot:
    """Write tables that map the first 4 GiB one to one, and return the state at a 64-bit entry point: RSI has the zero page."""
    directories = [Microvm.PAGE_DIRECTORIES.base + 0x1000 * i for i in range(Microvm.PAGE_DIRECTORIES.size // 0x1000)]
    entries = [i << 21 | _PAGE_2M | _PRESENT_WRITABLE for i in range(512 * len(directories))]
    memory.write(Microvm.PML4.base, pack("<512Q", Microvm.PDPT.base | _PRESENT_WRITABLE, *[0] * 511))
    pdpt = [base | _PRESENT_WRITABLE for base in directories]
    memory.write(Microvm.PDPT.base, pack("<512Q", *pdpt, *[0] * (512 - len(pdpt))))
    memory.write(Microvm.PAGE_DIRECTORIES.base, pack(f"<{len(entries)}Q", *entries))
    _write_descriptors(memory, _CODE_64)
    return VcpuBoot(
        registers={
            "rip": entry,
            "rflags": _RFLAGS,
            "rsi": Microvm.ZERO_PAGE.base,
            "rsp": Microvm.BOOT_STACK.end,
            "rbp": Microvm.BOOT_STACK.end,
        },
        code=Segment(_CODE_SELECTOR, 0, _FLAT, _CODE_TYPE, present=1, dpl=0, db=0, s=1, long=1, g=1),
        data=_DATA_SEGMENT,
        task=Segment(0, 0, 0xFFFF, _BUSY_TSS_TYPE, present=1, dpl=0, db=0, s=0, long=0, g=0),
        gdt=Table(Microvm.GDT.base, Microvm.GDT.size - 1),
        idt=Table(Microvm.IDT.base, Microvm.IDT.size - 1),
        cr0=_CR0_PE | _CR0_PG,
        cr3=Microvm.PML4.base,
        cr4=_CR4_PAE,
        efer=_EFER_LME | _EFER_LMA,
    )


def protected_mode(memory: GuestMemory, entry: int) -> VcpuBoot:
    """Return the state at a PVH entry point: 32-bit protected mode without paging, EBX has the start info."""
    _write_descriptors(memory, _CODE_32)
    return VcpuBoot(
        registers={"rip": entry, "rflags": _RFLAGS, "rbx": Microvm.PVH_START.base},
        code=Segment(_CODE_SELECTOR, 0, _FLAT, _CODE_TYPE, present=1, dpl=0, db=1, s=1, long=0, g=1),
        data=_DATA_SEGMENT,
        task=Segment(0, 0, 0x67, _BUSY_TSS_TYPE, present=1, dpl=0, db=0, s=0, long=0, g=0),
        gdt=Table(Microvm.GDT.base, Microvm.GDT.size - 1),
        idt=Table(Microvm.IDT.base, Microvm.IDT.size - 1),
        cr0=_CR0_PE,
        cr3=0,
        cr4=0,
        efer=0,
    )


def write_reset_vector(memory: GuestMemory) -> None:
    """Put code that resets the machine where a PC's BIOS starts.

    Linux jumps there, in real mode, as its last resort; and as its first one on a hardware-reduced ACPI machine without EFI,
    where it does not even try the reset register (arch/x86/kernel/reboot.c, reboot_init).
    """
    memory.write(Microvm.RESET_VECTOR.base, _RESET_CODE.ljust(Microvm.RESET_VECTOR.size, b"\0"))


def _write_descriptors(memory: GuestMemory, code: int) -> None:
    memory.write(Microvm.GDT.base, pack("<4Q", 0, 0, code, _DATA))
    memory.write(Microvm.IDT.base, bytes(Microvm.IDT.size))
