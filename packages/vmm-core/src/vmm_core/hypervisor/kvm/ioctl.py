"""KVM's ioctl interface: request numbers, capabilities and structures that are the same on every architecture.

Numbers and layouts are those of <linux/kvm.h>, declared once here; what differs by architecture is beside this module. The
reference is the kernel's Documentation/virt/kvm/api.rst, whose section headings are the names used here.

Not here: what to call when (`vm`, `vcpu`).
"""

from __future__ import annotations

import os
from errno import EINTR
from fcntl import ioctl as _ioctl
from struct import Struct

from vmm_core.errors import HypervisorError

# ioctl request numbers as on every architecture that uses asm-generic/ioctl.h (x86, arm64): direction, size, type, number.
_WRITE, _READ = 1 << 30, 2 << 30
_KVMIO = 0xAE


class Request:
    """One ioctl: its number, and the name that error messages carry."""

    __slots__ = ("name", "number")

    def __init__(self, name: str, number: int, *, reads: int = 0, writes: int = 0) -> None:
        """`reads` and `writes` are the bytes of the argument that the kernel fills and takes."""
        direction = (_READ if reads else 0) | (_WRITE if writes else 0)
        self.name = name
        self.number = direction | (reads or writes) << 16 | _KVMIO << 8 | number


class KvmError(HypervisorError):
    """An ioctl that failed. `errno` is the kernel's reason."""

    def __init__(self, name: str, errno: int) -> None:
        super().__init__(f"{name}: {os.strerror(errno)}")
        self.errno = errno


def call(fd: int, request: Request, argument: int | bytearray = 0) -> int:
    """Issue `request` on `fd` and return its result; a bytearray is read and changed in place.

    Raises KvmError with the request's name. An interrupted call is repeated: none that goes through here waits for a guest.
    """
    while True:
        try:
            return _ioctl(fd, request.number, argument)
        except OSError as error:
            number = error.errno or 0
            if number != EINTR:
                raise KvmError(request.name, number) from None


def call_with_address(fd: int, request: Request, address: int) -> None:
    """Issue a `request` whose argument is not a pointer but a number of pointer width; fcntl.ioctl takes only a C int."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(request.number), ctypes.c_ulong(address)) < 0:
        raise KvmError(request.name, ctypes.get_errno())


# 4.1 to 4.5, 4.10: the system descriptor, /dev/kvm
API_VERSION = 12
GET_API_VERSION = Request("KVM_GET_API_VERSION", 0x00)
CREATE_VM = Request("KVM_CREATE_VM", 0x01)
CHECK_EXTENSION = Request("KVM_CHECK_EXTENSION", 0x03)
GET_VCPU_MMAP_SIZE = Request("KVM_GET_VCPU_MMAP_SIZE", 0x04)

# The VM descriptor
CREATE_VCPU = Request("KVM_CREATE_VCPU", 0x41)
GET_DIRTY_LOG = Request("KVM_GET_DIRTY_LOG", 0x42, writes=16)
SET_USER_MEMORY_REGION = Request("KVM_SET_USER_MEMORY_REGION", 0x46, writes=32)
REGISTER_COALESCED_MMIO = Request("KVM_REGISTER_COALESCED_MMIO", 0x67, writes=16)
SET_GSI_ROUTING = Request("KVM_SET_GSI_ROUTING", 0x6A, writes=8)
IRQFD = Request("KVM_IRQFD", 0x76, writes=32)
IOEVENTFD = Request("KVM_IOEVENTFD", 0x79, writes=64)

# A vCPU descriptor
RUN = Request("KVM_RUN", 0x80)
SET_SIGNAL_MASK = Request("KVM_SET_SIGNAL_MASK", 0x8B, writes=4)
GET_MP_STATE = Request("KVM_GET_MP_STATE", 0x98, reads=4)
SET_MP_STATE = Request("KVM_SET_MP_STATE", 0x99, writes=4)

CAP_USER_MEMORY = 3
CAP_NR_MEMSLOTS = 10
CAP_MP_STATE = 14
CAP_COALESCED_MMIO = 15  # answers with the ring's page within a vCPU's mapping
CAP_IRQ_ROUTING = 25  # answers with the number of GSIs
CAP_IRQFD = 32
CAP_IOEVENTFD = 36
CAP_MAX_VCPUS = 66
CAP_READONLY_MEM = 81
CAP_IMMEDIATE_EXIT = 136
CAP_COALESCED_PIO = 162

# Capabilities without which no machine of ours runs, by the name that the error message gives.
REQUIRED = {
    "KVM_CAP_USER_MEMORY": CAP_USER_MEMORY,
    "KVM_CAP_MP_STATE": CAP_MP_STATE,
    "KVM_CAP_IRQ_ROUTING": CAP_IRQ_ROUTING,
    "KVM_CAP_IRQFD": CAP_IRQFD,
    "KVM_CAP_IOEVENTFD": CAP_IOEVENTFD,
    "KVM_CAP_IMMEDIATE_EXIT": CAP_IMMEDIATE_EXIT,
}

MEMORY_REGION = Struct("<IIQQQ")  # kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr
MEM_LOG_DIRTY_PAGES = 1
MEM_READONLY = 2  # what the guest writes there is an access of a device
DIRTY_LOG = Struct("<IxxxxQ")  # kvm_dirty_log: slot, address of the bitmap
IRQFD_DATA = Struct("<IIII16x")  # kvm_irqfd: fd, gsi, flags, resamplefd
IOEVENTFD_DATA = Struct("<QQIiI36x")  # kvm_ioeventfd: datamatch, addr, len, fd, flags
IOEVENTFD_DATAMATCH, IOEVENTFD_PIO, IOEVENTFD_DEASSIGN = 1, 2, 4
COALESCED_ZONE = Struct("<QII")  # kvm_coalesced_mmio_zone: addr, size, pio
ROUTING_HEADER = Struct("<II")  # kvm_irq_routing: nr, flags
ROUTE_IRQCHIP = Struct("<IIIxxxxII24x")  # kvm_irq_routing_entry: gsi, type, flags; irqchip, pin
ROUTE_MSI = Struct("<IIIxxxxIIII16x")  # the same: gsi, type, flags; address_lo, address_hi, data, devid
ROUTING_IRQCHIP, ROUTING_MSI = 1, 2
SIGNAL_MASK = Struct("<IQ")  # kvm_signal_mask: len, one bit a signal, signal 1 lowest

# kvm_run, shared with the kernel; the exit's own structure is at 32
RUN_IMMEDIATE_EXIT, RUN_EXIT_REASON, RUN_EXIT = 1, 8, 32
EXIT_IO_DATA = Struct("<BBHIQ")  # direction, size, port, count, data_offset
EXIT_MMIO_DATA = Struct("<QQIB")  # phys_addr, data, len, is_write
EXIT_MMIO_VALUE = 40
EXIT_IO_OUT = 1
EXIT_IO, EXIT_MMIO, EXIT_INTR = 2, 6, 10
