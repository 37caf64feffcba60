"""ioctls, capabilities and structures of <asm/kvm.h> on x86. Sizes are checked against the kernel's in the tests."""

from __future__ import annotations

from struct import Struct

from vmm_core.hypervisor.kvm.ioctl import Request

# The system descriptor
GET_MSR_INDEX_LIST = Request("KVM_GET_MSR_INDEX_LIST", 0x02, reads=4, writes=4)
GET_SUPPORTED_CPUID = Request("KVM_GET_SUPPORTED_CPUID", 0x05, reads=8, writes=8)

# The VM descriptor
SET_TSS_ADDR = Request("KVM_SET_TSS_ADDR", 0x47)
SET_IDENTITY_MAP_ADDR = Request("KVM_SET_IDENTITY_MAP_ADDR", 0x48, writes=8)
CREATE_IRQCHIP = Request("KVM_CREATE_IRQCHIP", 0x60)
GET_IRQCHIP = Request("KVM_GET_IRQCHIP", 0x62, reads=520, writes=520)
# Declared the wrong way round in the kernel, as a read, and kept for compatibility.
SET_IRQCHIP = Request("KVM_SET_IRQCHIP", 0x63, reads=520)
CREATE_PIT2 = Request("KVM_CREATE_PIT2", 0x77, writes=64)
SET_CLOCK = Request("KVM_SET_CLOCK", 0x7B, writes=48)
GET_CLOCK = Request("KVM_GET_CLOCK", 0x7C, reads=48)
GET_PIT2 = Request("KVM_GET_PIT2", 0x9F, reads=112)
SET_PIT2 = Request("KVM_SET_PIT2", 0xA0, writes=112)

# A vCPU descriptor
GET_REGS = Request("KVM_GET_REGS", 0x81, reads=144)
SET_REGS = Request("KVM_SET_REGS", 0x82, writes=144)
GET_SREGS = Request("KVM_GET_SREGS", 0x83, reads=312)
SET_SREGS = Request("KVM_SET_SREGS", 0x84, writes=312)
GET_MSRS = Request("KVM_GET_MSRS", 0x88, reads=8, writes=8)
SET_MSRS = Request("KVM_SET_MSRS", 0x89, writes=8)
GET_FPU = Request("KVM_GET_FPU", 0x8C, reads=416)
SET_FPU = Request("KVM_SET_FPU", 0x8D, writes=416)
GET_LAPIC = Request("KVM_GET_LAPIC", 0x8E, reads=1024)
SET_LAPIC = Request("KVM_SET_LAPIC", 0x8F, writes=1024)
SET_CPUID2 = Request("KVM_SET_CPUID2", 0x90, writes=8)
GET_VCPU_EVENTS = Request("KVM_GET_VCPU_EVENTS", 0x9F, reads=64)
SET_VCPU_EVENTS = Request("KVM_SET_VCPU_EVENTS", 0xA0, writes=64)
GET_DEBUGREGS = Request("KVM_GET_DEBUGREGS", 0xA1, reads=128)
SET_DEBUGREGS = Request("KVM_SET_DEBUGREGS", 0xA2, writes=128)
GET_XSAVE = Request("KVM_GET_XSAVE", 0xA4, reads=4096)
SET_XSAVE = Request("KVM_SET_XSAVE", 0xA5, writes=4096)
GET_XCRS = Request("KVM_GET_XCRS", 0xA6, reads=392)
SET_XCRS = Request("KVM_SET_XCRS", 0xA7, writes=392)
KVMCLOCK_CTRL = Request("KVM_KVMCLOCK_CTRL", 0xAD)
GET_XSAVE2 = Request("KVM_GET_XSAVE2", 0xCF, reads=4096)

CAP_IRQCHIP = 0
CAP_SET_TSS_ADDR = 4
CAP_EXT_CPUID = 7
CAP_PIT2 = 33
CAP_PIT_STATE2 = 35
CAP_SET_IDENTITY_MAP_ADDR = 37
CAP_ADJUST_CLOCK = 39
CAP_VCPU_EVENTS = 41
CAP_DEBUGREGS = 50
CAP_XSAVE = 55
CAP_XCRS = 56
CAP_TSC_DEADLINE_TIMER = 72
CAP_KVMCLOCK_CTRL = 76
CAP_XSAVE2 = 208  # answers with the size of the structure

REQUIRED = {
    "KVM_CAP_IRQCHIP": CAP_IRQCHIP,
    "KVM_CAP_SET_TSS_ADDR": CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": CAP_EXT_CPUID,
    "KVM_CAP_PIT2": CAP_PIT2,
    "KVM_CAP_PIT_STATE2": CAP_PIT_STATE2,
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": CAP_SET_IDENTITY_MAP_ADDR,
    "KVM_CAP_ADJUST_CLOCK": CAP_ADJUST_CLOCK,
    "KVM_CAP_VCPU_EVENTS": CAP_VCPU_EVENTS,
    "KVM_CAP_DEBUGREGS": CAP_DEBUGREGS,
}

REGS = Struct("<18Q")  # kvm_regs
REG_NAMES = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
SEGMENT = Struct("<QIH9Bx")  # kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
TABLE = Struct("<QH6x")  # kvm_dtable: base, limit
# kvm_sregs: offsets of cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt; then cr0, cr2, cr3, cr4, cr8, efer, apic_base
CS, DS, ES, FS, GS, SS, TR, LDT, GDT, IDT = *range(0, 192, 24), 192, 208
CONTROL = Struct("<7Q")
CONTROL_AT = 224
SREGS_SIZE = 312

CPUID_HEADER = Struct("<II")  # kvm_cpuid2: nent, padding
CPUID_ENTRY = Struct("<7I12x")  # kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx
MSRS_HEADER = Struct("<II")  # kvm_msrs: nmsrs, pad
MSR_ENTRY = Struct("<IxxxxQ")  # kvm_msr_entry: index, data
MAX_MSRS = 255  # per call; KVM refuses 256 (MAX_IO_MSRS)

FPU_SIZE, LAPIC_SIZE, EVENTS_SIZE, DEBUGREGS_SIZE, XSAVE_SIZE, XCRS_SIZE = 416, 1024, 64, 128, 4096, 392
FPU_FCW, FPU_MXCSR = 128, 408  # kvm_fpu: fcw (u16), mxcsr (u32)

MP_STATE = Struct("<I")
MP_RUNNABLE, MP_UNINITIALIZED = 0, 1

IRQCHIP_SIZE, PIT_SIZE = 520, 112
IRQCHIP_HEADER = Struct("<I")  # kvm_irqchip: chip_id
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
PIT_SPEAKER_DUMMY = 1  # kvm_pit_config.flags: port 0x61 is answered by KVM
CLOCK = Struct("<QI36x")  # kvm_clock_data: clock in ns, flags
