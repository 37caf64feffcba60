"""What is saved of an x86_64 VM and its vCPUs, in the kernel's own structures (<asm/kvm.h>), which never change.

Loaded only when a state is taken or put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vmm_core.errors import StateError
from vmm_core.hypervisor.kvm.x86_64 import structs
from vmm_core.state import expect


@dataclass(frozen=True)
class KvmVmState:
    """Both PICs and the I/O APIC (kvm_irqchip), the PIT (kvm_pit_state2), the paravirtual clock in ns."""

    VERSION: ClassVar[int] = 1

    pic_master: bytes
    pic_slave: bytes
    ioapic: bytes
    pit: bytes
    clock: int


@dataclass(frozen=True)
class KvmVcpuState:
    """One vCPU. `xsave` and `xcrs` are None on hosts without XSAVE; `fpu` is None on hosts with it."""

    VERSION: ClassVar[int] = 1

    cpuid: bytes
    mp_state: int
    regs: bytes
    sregs: bytes
    fpu: bytes | None
    xsave: bytes | None
    xcrs: bytes | None
    debugregs: bytes
    lapic: bytes
    msrs: tuple[tuple[int, int], ...]
    events: bytes


def checked_vm_state(state: object) -> KvmVmState:
    """Return `state` when it can be given to KVM. Raises StateError when it cannot."""
    good = expect(state, KvmVmState, "kvm")
    for name in ("pic_master", "pic_slave", "ioapic"):
        _expect_size("kvm", name, getattr(good, name), structs.IRQCHIP_SIZE)
    _expect_size("kvm", "pit", good.pit, structs.PIT_SIZE)
    if not 0 <= good.clock < 1 << 64:
        raise StateError(f"kvm: clock {good.clock} is not a 64-bit number")
    return good


def checked_vcpu_state(state: object, component: str, xsave_size: int) -> KvmVcpuState:
    """Return `state` when it can be given to KVM on this host, whose XSAVE area has `xsave_size` bytes, 0 without one.

    Raises StateError when it cannot.
    """
    good = expect(state, KvmVcpuState, component)
    _expect_size(component, "regs", good.regs, structs.REGS.size)
    _expect_size(component, "sregs", good.sregs, structs.SREGS_SIZE)
    _expect_size(component, "debugregs", good.debugregs, structs.DEBUGREGS_SIZE)
    _expect_size(component, "lapic", good.lapic, structs.LAPIC_SIZE)
    _expect_size(component, "events", good.events, structs.EVENTS_SIZE)
    if len(good.cpuid) % structs.CPUID_ENTRY.size:
        raise StateError(f"{component}: cpuid of {len(good.cpuid)} bytes is not made of whole entries")
    if (good.xsave is None) is (xsave_size > 0):
        raise StateError(f"{component}: saved {'without' if good.xsave is None else 'with'} XSAVE, this host is different")
    if good.xsave is not None:
        _expect_size(component, "xsave", good.xsave, xsave_size)
    elif good.fpu is None:
        raise StateError(f"{component}: neither fpu nor xsave is there")
    if good.fpu is not None:
        _expect_size(component, "fpu", good.fpu, structs.FPU_SIZE)
    if good.xcrs is not None:
        _expect_size(component, "xcrs", good.xcrs, structs.XCRS_SIZE)
    if not 0 <= good.mp_state < 1 << 32:
        raise StateError(f"{component}: mp_state {good.mp_state} is not a 32-bit number")
    for index, value in good.msrs:
        if not (0 <= index < 1 << 32 and 0 <= value < 1 << 64):
            raise StateError(f"{component}: MSR {index:#x} with value {value:#x}")
    return good


def _expect_size(component: str, name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise StateError(f"{component}: {name} has {len(data)} bytes, expected {size}")
