"""Request numbers and structure sizes against those of the kernel's headers, <linux/kvm.h> and <asm/kvm.h> of x86."""

from __future__ import annotations

from struct import Struct

import pytest

from vmm_core.hypervisor.kvm import ioctl
from vmm_core.hypervisor.kvm.ioctl import Request
from vmm_core.hypervisor.kvm.x86_64 import structs

# printed by a C program that includes the headers
NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008AE48,
    "KVM_CREATE_IRQCHIP": 0xAE60,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_REGISTER_COALESCED_MMIO": 0x4010AE67,
    "KVM_SET_GSI_ROUTING": 0x4008AE6A,
    "KVM_IRQFD": 0x4020AE76,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_SET_SIGNAL_MASK": 0x4004AE8B,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_KVMCLOCK_CTRL": 0xAEAD,
    "KVM_GET_XSAVE2": 0x9000AECF,
}

REQUESTS = [value for module in (ioctl, structs) for value in vars(module).values() if isinstance(value, Request)]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_a_request_has_the_kernels_number(request_: Request) -> None:
    assert f"{request_.number:#x}" == f"{NUMBERS[request_.name]:#x}"


def test_every_number_is_used_by_one_request() -> None:
    assert sorted(request.name for request in REQUESTS) == sorted(NUMBERS)


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        (ioctl.MEMORY_REGION, 32),
        (ioctl.DIRTY_LOG, 16),
        (ioctl.IRQFD_DATA, 32),
        (ioctl.IOEVENTFD_DATA, 64),
        (ioctl.COALESCED_ZONE, 16),
        (ioctl.ROUTE_IRQCHIP, 48),
        (ioctl.ROUTE_MSI, 48),
        (structs.REGS, 144),
        (structs.SEGMENT, 24),
        (structs.TABLE, 16),
        (structs.CPUID_ENTRY, 40),
        (structs.MSR_ENTRY, 16),
        (structs.CLOCK, 48),
    ],
)
def test_a_structure_has_the_kernels_size(struct: Struct, size: int) -> None:
    assert struct.size == size


def test_the_parts_of_sregs_follow_one_another() -> None:
    assert 8 * structs.SEGMENT.size == structs.GDT
    assert structs.GDT + structs.TABLE.size == structs.IDT
    assert structs.IDT + structs.TABLE.size == structs.CONTROL_AT
    assert structs.CONTROL_AT + structs.CONTROL.size + 32 == structs.SREGS_SIZE  # 32 bytes of interrupt bitmap
