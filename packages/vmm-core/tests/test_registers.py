"""Registers of a saved vCPU state by name."""

from __future__ import annotations

import pytest

from vmm_core.hypervisor.kvm.x86_64 import structs
from vmm_core.hypervisor.kvm.x86_64.registers import names, register
from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState


@pytest.fixture
def state() -> KvmVcpuState:
    """A vCPU whose registers all differ."""
    sregs = bytearray(structs.SREGS_SIZE)
    for number, at in enumerate(range(0, 192, structs.SEGMENT.size)):
        structs.SEGMENT.pack_into(sregs, at, 0x1000 * (number + 1), 0xFFFF + number, 8 * (number + 1), *[0] * 9)
    structs.TABLE.pack_into(sregs, structs.GDT, 0xA000, 0x7F)
    structs.TABLE.pack_into(sregs, structs.IDT, 0xB000, 0xFFF)
    structs.CONTROL.pack_into(sregs, structs.CONTROL_AT, *range(0x80000000, 0x80000007))
    return KvmVcpuState(
        cpuid=b"",
        mp_state=0,
        regs=structs.REGS.pack(*range(0x100, 0x112)),
        sregs=bytes(sregs),
        fpu=None,
        xsave=bytes(structs.XSAVE_SIZE),
        xcrs=None,
        debugregs=b"".join((0x200 + n).to_bytes(8, "little") for n in range(6)) + bytes(structs.DEBUGREGS_SIZE - 48),
        lapic=bytes(0x390) + b"\x77" + bytes(structs.LAPIC_SIZE - 0x391),
        msrs=((0x10, 0x1234), (0xC000_0082, 0xFFFF_FFFF_8100_0000), (0x1A0, 7)),
        events=bytes(structs.EVENTS_SIZE),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rax", 0x100),
        ("RIP", 0x110),
        ("rflags", 0x111),
        ("cs", 8),
        ("cs.base", 0x1000),
        ("ss.limit", 0x10004),
        ("fs_base", 0x4000),
        ("gs.base", 0x5000),
        ("ldt", 0x40),
        ("gdt.base", 0xA000),
        ("idt.limit", 0xFFF),
        ("cr0", 0x80000000),
        ("cr8", 0x80000004),
        ("efer", 0x80000005),
        ("apic_base", 0x80000006),
        ("dr0", 0x200),
        ("dr7", 0x205),
        ("tsc", 0x1234),
        ("lstar", 0xFFFF_FFFF_8100_0000),
        ("msr:1a0", 7),
        ("MSR:0x10", 0x1234),
        ("apic:0", 0),
        ("apic:390", 0x77),
    ],
)
def test_a_register_is_found_by_its_name_in_either_case(state: KvmVcpuState, name: str, value: int) -> None:
    assert register(state, name) == value


@pytest.mark.parametrize(
    "name",
    [
        "",
        "r16",
        "cr1",
        "cs.",
        "msr:",
        "msr:x",
        "msr:174",
        "sysenter_cs",
        "603000000013df1a",
        "apic:",
        "apic:4",
        "apic:400",
        "apic:-10",
    ],
)
def test_what_is_no_register_or_was_not_saved_is_none(state: KvmVcpuState, name: str) -> None:
    assert register(state, name) is None


def test_every_name_that_is_listed_is_a_register_and_listed_once(state: KvmVcpuState) -> None:
    listed = names(state)
    assert len(set(listed)) == len(listed)
    assert {"rax", "r15", "rip", "cs", "tr.base", "cr4", "efer", "dr6", "lstar", "tsc"} <= set(listed)
    assert "star" not in listed  # this vCPU has not saved it
    assert all(register(state, name) is not None for name in listed)
