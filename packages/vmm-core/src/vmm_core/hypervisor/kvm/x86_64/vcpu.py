"""The registers of an x86_64 vCPU: boot state, reset, saving, and a page of them for the log.

Source: reference machine-x86_64, section 5; order of restoring: Documentation/virt/kvm/api.rst.
Called only while the vCPU is not in the guest. Not here: running it (`vmm_core.hypervisor.kvm.vcpu`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm_core.errors import HypervisorError, StateError
from vmm_core.hypervisor.kvm import ioctl as kvm
from vmm_core.hypervisor.kvm.x86_64 import msrs, structs

if TYPE_CHECKING:
    from vmm_core.hypervisor.kvm.ioctl import Request
    from vmm_core.hypervisor.kvm.system import Kvm
    from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState
    from vmm_core.x86_64.vcpu_boot import Segment, VcpuBoot

_APIC_LVT_LINT0, _APIC_LVT_LINT1 = 0x350, 0x360  # Intel SDM vol. 3, table 11-1
_APIC_DELIVERY_MODE, _APIC_EXTINT, _APIC_NMI = 0x700, 0x700, 0x400  # figure 11-8

_CR0_WP = 1 << 16  # valid in every mode

# Reference, section 6: SYSENTER_CS/ESP/EIP, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, TSC, MTRRdefType; MISC_ENABLE
_BOOT_MSRS = (
    *((index, 0) for index in (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102)),
    (msrs.TSC, 0),
    (0x2FF, 0),
    (0x1A0, 1),
)


class VcpuArch:
    """The x86_64 side of one vCPU."""

    def __init__(self, system: Kvm, fd: int, index: int, boot: VcpuBoot, cpuid: bytes, msr_indices: list[int]) -> None:
        """Take the vCPU `fd` as KVM made it, and remember its power-on state."""
        self._fd, self._index, self._boot = fd, index, boot
        self._cpuid = cpuid
        self._msr_indices = msr_indices
        self._xsave_size = 0
        if system.capability(structs.CAP_XSAVE):
            self._xsave_size = max(structs.XSAVE_SIZE, system.capability(structs.CAP_XSAVE2))
        self._has_xcrs = system.capability(structs.CAP_XCRS) > 0
        self._power_on_sregs = self._get(structs.GET_SREGS, structs.SREGS_SIZE)
        self._power_on_lapic = self._get(structs.GET_LAPIC, structs.LAPIC_SIZE)
        self._set_cpuid(cpuid)  # before the registers: what a guest cannot see, it cannot have
        self._power_on_xcrs = self._get(structs.GET_XCRS, structs.XCRS_SIZE) if self._has_xcrs else None
        self._power_on_msrs = msrs.get(fd, msr_indices)
        self._fresh = True  # still in the power-on state

    def load_boot(self) -> None:
        """Load the boot state, at the start and at every reset.

        At a reset all MSRs return to their power-on values, not only those of the reference: a paravirtual clock left armed
        would have KVM write into the middle of the next kernel's memory.
        """
        mp_state = structs.MP_RUNNABLE if self._index == 0 else structs.MP_UNINITIALIZED
        self._set(kvm.SET_MP_STATE, structs.MP_STATE.pack(mp_state))
        sregs = self._boot_sregs()
        if not self._fresh:
            # After a triple fault without paging, kvm-amd (seen on Linux 6.1) has forgotten where its nested page table is, and
            # enters the guest without one for ever. A change of CR0 makes it look again.
            self._set(structs.SET_SREGS, _with_other_cr0(sregs))
        self._set(structs.SET_SREGS, sregs)
        registers = self._boot.registers
        self._set(structs.SET_REGS, structs.REGS.pack(*(registers.get(name, 0) for name in structs.REG_NAMES)))
        if self._xsave_size:
            self._set(structs.SET_XSAVE, bytes(self._xsave_size))
        else:
            fpu = bytearray(structs.FPU_SIZE)
            fpu[structs.FPU_FCW : structs.FPU_FCW + 2] = (0x37F).to_bytes(2, "little")
            fpu[structs.FPU_MXCSR : structs.FPU_MXCSR + 4] = (0x1F80).to_bytes(4, "little")
            self._set(structs.SET_FPU, fpu)
        if self._power_on_xcrs is not None:
            self._set(structs.SET_XCRS, self._power_on_xcrs)
        self._set(structs.SET_DEBUGREGS, bytes(structs.DEBUGREGS_SIZE))
        self._set(structs.SET_LAPIC, self._boot_lapic())
        if not self._fresh:
            msrs.put(self._fd, self._power_on_msrs)
        self._fresh = False
        msrs.put(self._fd, _BOOT_MSRS)
        self._set(structs.SET_VCPU_EVENTS, bytes(structs.EVENTS_SIZE))

    def save(self) -> KvmVcpuState:
        """Return every register of the vCPU."""
        from vmm_core.hypervisor.kvm.x86_64.state import KvmVcpuState

        # First, because it lets a pending INIT or SIPI take effect; the events last, because reading others can change them.
        mp_state = structs.MP_STATE.unpack(self._get(kvm.GET_MP_STATE, structs.MP_STATE.size))[0]
        xsave = fpu = None
        if self._xsave_size > structs.XSAVE_SIZE:
            xsave = bytes(self._get(structs.GET_XSAVE2, self._xsave_size))
        elif self._xsave_size:
            xsave = bytes(self._get(structs.GET_XSAVE, structs.XSAVE_SIZE))
        else:
            fpu = bytes(self._get(structs.GET_FPU, structs.FPU_SIZE))
        return KvmVcpuState(
            cpuid=self._cpuid,
            mp_state=mp_state,
            regs=bytes(self._get(structs.GET_REGS, structs.REGS.size)),
            sregs=bytes(self._get(structs.GET_SREGS, structs.SREGS_SIZE)),
            fpu=fpu,
            xsave=xsave,
            xcrs=bytes(self._get(structs.GET_XCRS, structs.XCRS_SIZE)) if self._has_xcrs else None,
            debugregs=bytes(self._get(structs.GET_DEBUGREGS, structs.DEBUGREGS_SIZE)),
            lapic=bytes(self._get(structs.GET_LAPIC, structs.LAPIC_SIZE)),
            msrs=tuple(msrs.get(self._fd, self._msr_indices)),
            events=bytes(self._get(structs.GET_VCPU_EVENTS, structs.EVENTS_SIZE)),
        )

    def restore(self, state: Any) -> None:
        """Put back what save() returned.

        Raises StateError for a state that is not one, or that this host cannot take whole; HypervisorError when KVM refuses.
        """
        from vmm_core.hypervisor.kvm.x86_64.state import checked_vcpu_state

        name = f"CPU {self._index}"
        good = checked_vcpu_state(state, name, self._xsave_size)
        if good.cpuid != self._cpuid:
            self._set_cpuid(good.cpuid)
            self._cpuid = good.cpuid
        self._set(kvm.SET_MP_STATE, structs.MP_STATE.pack(good.mp_state))
        self._set(structs.SET_SREGS, good.sregs)
        self._set(structs.SET_REGS, good.regs)
        if good.xsave is not None:
            self._set(structs.SET_XSAVE, good.xsave)
        elif good.fpu is not None:
            self._set(structs.SET_FPU, good.fpu)
        if good.xcrs is not None:
            self._set(structs.SET_XCRS, good.xcrs)
        self._set(structs.SET_DEBUGREGS, good.debugregs)
        self._set(structs.SET_LAPIC, good.lapic)
        # The deadline is compared with the TSC and dropped unless the local APIC's timer is in deadline mode: after both.
        refused = msrs.put(self._fd, sorted(good.msrs, key=lambda msr: msr[0] == msrs.TSC_DEADLINE))
        self._set(structs.SET_VCPU_EVENTS, good.events)
        wanted = dict(good.msrs)
        present = dict(msrs.get(self._fd, refused))
        lost = [index for index in refused if present.get(index) != wanted[index]]
        if lost:
            raise StateError(f"{name}: this host cannot hold MSR {', '.join(f'{i:#x}={wanted[i]:#x}' for i in lost)}")

    def describe(self) -> str:
        """Return the registers for the log, a few to a line."""
        values = structs.REGS.unpack(self._get(structs.GET_REGS, structs.REGS.size))
        sregs = self._get(structs.GET_SREGS, structs.SREGS_SIZE)
        cells = [f"{name.upper()}={value:016x}" for name, value in zip(structs.REG_NAMES, values, strict=True)]
        lines = [" ".join(cells[at : at + 4]) for at in range(0, len(cells), 4)]
        for name, at in (("CS", structs.CS), ("DS", structs.DS), ("SS", structs.SS), ("TR", structs.TR)):
            base, limit, selector, *_ = structs.SEGMENT.unpack_from(sregs, at)
            lines.append(f"{name}={selector:04x} base={base:016x} limit={limit:08x}")
        for name, at in (("GDT", structs.GDT), ("IDT", structs.IDT)):
            base, limit = structs.TABLE.unpack_from(sregs, at)
            lines.append(f"{name} base={base:016x} limit={limit:04x}")
        cr0, cr2, cr3, cr4, _, efer, _ = structs.CONTROL.unpack_from(sregs, structs.CONTROL_AT)
        lines.append(f"CR0={cr0:08x} CR2={cr2:016x} CR3={cr3:016x} CR4={cr4:08x} EFER={efer:x}")
        return "\n".join(lines)

    def _boot_sregs(self) -> bytearray:
        boot, sregs = self._boot, bytearray(self._power_on_sregs)
        _put_segment(sregs, structs.CS, boot.code)
        for at in (structs.DS, structs.ES, structs.FS, structs.GS, structs.SS):
            _put_segment(sregs, at, boot.data)
        _put_segment(sregs, structs.TR, boot.task)
        structs.TABLE.pack_into(sregs, structs.GDT, *boot.gdt)
        structs.TABLE.pack_into(sregs, structs.IDT, *boot.idt)
        cr0, cr2, _, cr4, cr8, efer, apic_base = structs.CONTROL.unpack_from(sregs, structs.CONTROL_AT)
        control = (cr0 | boot.cr0, cr2, boot.cr3, cr4 | boot.cr4, cr8, efer | boot.efer, apic_base)
        structs.CONTROL.pack_into(sregs, structs.CONTROL_AT, *control)
        return sregs

    def _boot_lapic(self) -> bytearray:
        lapic = bytearray(self._power_on_lapic)
        for at, mode in ((_APIC_LVT_LINT0, _APIC_EXTINT), (_APIC_LVT_LINT1, _APIC_NMI)):
            value = int.from_bytes(lapic[at : at + 4], "little")
            lapic[at : at + 4] = (value & ~_APIC_DELIVERY_MODE | mode).to_bytes(4, "little")
        return lapic

    def _set_cpuid(self, cpuid: bytes) -> None:
        header = structs.CPUID_HEADER.pack(len(cpuid) // structs.CPUID_ENTRY.size, 0)
        self._set(structs.SET_CPUID2, header + cpuid)

    def _get(self, request: Request, size: int) -> bytearray:
        data = bytearray(size)
        kvm.call(self._fd, request, data)
        return data

    def _set(self, request: Request, data: bytes | bytearray) -> None:
        try:
            kvm.call(self._fd, request, bytearray(data))
        except kvm.KvmError as error:
            raise HypervisorError(f"CPU {self._index}: {error}") from None


def _with_other_cr0(sregs: bytearray) -> bytearray:
    other = bytearray(sregs)
    cr0, *rest = structs.CONTROL.unpack_from(sregs, structs.CONTROL_AT)
    structs.CONTROL.pack_into(other, structs.CONTROL_AT, cr0 ^ _CR0_WP, *rest)
    return other


def _put_segment(sregs: bytearray, at: int, s: Segment) -> None:
    structs.SEGMENT.pack_into(
        sregs, at, s.base, s.limit, s.selector, s.type, s.present, s.dpl, s.db, s.s, s.long, s.g, 0, int(not s.present)
    )
