"""Model-specific registers in bulk. One that KVM refuses never costs the others: it is left out and reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from errno import E2BIG

from vmm_core.hypervisor.kvm import ioctl as kvm
from vmm_core.hypervisor.kvm.x86_64.structs import GET_MSR_INDEX_LIST, GET_MSRS, MAX_MSRS, MSR_ENTRY, MSRS_HEADER, SET_MSRS

TSC, TSC_DEADLINE = 0x10, 0x6E0
_VMX = range(0x480, 0x492)  # what nested virtualization offers: read-only facts about the host, not state


def index_list(system_fd: int) -> list[int]:
    """Return the registers that hold guest state on this host (KVM_GET_MSR_INDEX_LIST), the VMX facts left out."""
    data = bytearray(4)
    try:
        kvm.call(system_fd, GET_MSR_INDEX_LIST, data)  # tells the count, and that the list does not fit
    except kvm.KvmError as error:
        if error.errno != E2BIG:
            raise
    data.extend(bytes(4 * int.from_bytes(data, "little")))
    kvm.call(system_fd, GET_MSR_INDEX_LIST, data)
    count, *indices = memoryview(data).cast("I")
    return [index for index in indices[:count] if index not in _VMX]


def get(vcpu_fd: int, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return (index, value) of every register in `indices` that can be read."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(indices):
        chunk = indices[at : at + MAX_MSRS]
        data = _pack((index, 0) for index in chunk)
        done = kvm.call(vcpu_fd, GET_MSRS, data)
        found += MSR_ENTRY.iter_unpack(memoryview(data)[MSRS_HEADER.size : MSRS_HEADER.size + done * MSR_ENTRY.size])
        at += done if done == len(chunk) else done + 1
    return found


def put(vcpu_fd: int, values: Sequence[tuple[int, int]]) -> list[int]:
    """Write every (index, value) and return the indices of those that KVM refused."""
    refused: list[int] = []
    at = 0
    while at < len(values):
        chunk = values[at : at + MAX_MSRS]
        done = kvm.call(vcpu_fd, SET_MSRS, _pack(chunk))
        if done < len(chunk):
            refused.append(chunk[done][0])
            done += 1
        at += done
    return refused


def _pack(values: Iterable[tuple[int, int]]) -> bytearray:
    entries = [MSR_ENTRY.pack(index, value) for index, value in values]
    return bytearray(MSRS_HEADER.pack(len(entries), 0) + b"".join(entries))
