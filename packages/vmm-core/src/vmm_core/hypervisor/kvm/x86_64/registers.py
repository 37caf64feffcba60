"""The registers in a saved vCPU state by name, for people who look into a machine.

Names are the processor manuals'; of segments and descriptor tables also `cs.base`, `cs.limit` and so on. A model-specific
register is `msr:` and its number in hexadecimal, one of the local APIC `apic:` and its offset, as in `apic:390`.

Not here: how states are taken (`vcpu`), and vector registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm_core.hypervisor.kvm.x86_64 import structs

if TYPE_CHECKING:
    from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState

_SEGMENTS: Final = {
    name: getattr(structs, name.upper()) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
}  # offsets in kvm_sregs
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_DEBUG: Final = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")  # kvm_debugregs
# Names of MSRs (Intel SDM vol. 4, table 2-2) that people ask for
_MSRS: Final = {
    "tsc": 0x10,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "pat": 0x277,
    "star": 0xC000_0081,
    "lstar": 0xC000_0082,
    "cstar": 0xC000_0083,
    "sfmask": 0xC000_0084,
    "kernel_gs_base": 0xC000_0102,
    "tsc_aux": 0xC000_0103,
    "tsc_deadline": 0x6E0,
}
_APIC_ALIGNMENT: Final = 16  # registers of the local APIC are that far apart (Intel SDM vol. 3, table 11-1), 32 bits each


def register(state: KvmVcpuState, name: str) -> int | None:
    """Return the value of the register called `name`, in either case; None when there is none of that name."""
    name = name.lower()
    if name.startswith("msr:"):
        try:
            return dict(state.msrs).get(int(name[4:], 16))
        except ValueError:
            return None
    if name.startswith("apic:"):
        try:
            at = int(name[5:], 16)
        except ValueError:
            return None
        there = 0 <= at < len(state.lapic) and at % _APIC_ALIGNMENT == 0
        return int.from_bytes(state.lapic[at : at + 4], "little") if there else None
    if name in _MSRS:
        return dict(state.msrs).get(_MSRS[name])
    return _named(state).get(name)


def names(state: KvmVcpuState) -> list[str]:
    """Return the names of all registers that there are; of model-specific ones those that have a name."""
    there = dict(state.msrs)
    return [*_named(state), *(name for name, index in _MSRS.items() if index in there)]


def _named(state: KvmVcpuState) -> dict[str, int]:
    found = dict(zip(structs.REG_NAMES, structs.REGS.unpack(state.regs), strict=True))
    for segment, at in _SEGMENTS.items():
        base, limit, selector, *_ = structs.SEGMENT.unpack_from(state.sregs, at)
        found |= {segment: selector, f"{segment}.base": base, f"{segment}.limit": limit}
    for table, at in (("gdt", structs.GDT), ("idt", structs.IDT)):
        base, limit = structs.TABLE.unpack_from(state.sregs, at)
        found |= {f"{table}.base": base, f"{table}.limit": limit}
    found |= dict(zip(_CONTROL, structs.CONTROL.unpack_from(state.sregs, structs.CONTROL_AT), strict=True))
    found |= {name: int.from_bytes(state.debugregs[8 * n : 8 * n + 8], "little") for n, name in enumerate(_DEBUG)}
    found |= {"fs_base": found["fs.base"], "gs_base": found["gs.base"]}
    return found
