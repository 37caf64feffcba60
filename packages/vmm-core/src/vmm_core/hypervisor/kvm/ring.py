"""Coalesced I/O (kernel Documentation/virt/kvm/api.rst, 4.116): writes that KVM collects in a ring shared by all vCPUs."""

from __future__ import annotations

import mmap
from struct import Struct
from threading import RLock

from vmm_core.bus import Bus
from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.kvm.split import write_bytes

_HEADER = 8  # kvm_coalesced_mmio_ring: first, last
_ENTRY = Struct("<QIIQ")  # kvm_coalesced_mmio: phys_addr, len, pio, data
_SLOTS = (mmap.PAGESIZE - _HEADER) // _ENTRY.size
_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class CoalescedRing:
    """KVM appends at `last`, we take from `first`. For any thread."""

    def __init__(self, vcpu_fd: int, page_number: int, pio: Bus, mmio: Bus) -> None:
        """Map the ring, page `page_number` of any vCPU's mapping (KVM_CAP_COALESCED_MMIO)."""
        try:
            offset = page_number * mmap.PAGESIZE
            self._mapping = mmap.mmap(vcpu_fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        except OSError as error:
            raise HypervisorError(f"cannot map the ring of coalesced writes: {error.strerror}") from None
        self._page = memoryview(self._mapping)
        self.ends = self._page[:_HEADER].cast("I")  # first, last; they differ when there is something to deliver
        self._buses = (mmio, pio)
        # Reentrant, since a device may flush on its own account while it is being delivered to.
        self._lock = RLock()
        self._closed = False

    def flush(self) -> None:
        """Deliver every collected write to its bus, in order. Whoever comes second waits until the first is through."""
        with self._lock:
            if self._closed:
                return
            ends, page, buses, unpack, entry = self.ends, self._page, self._buses, _ENTRY.unpack_from, _ENTRY.size
            while (first := ends[0]) != ends[1]:
                address, length, port, data = unpack(page, _HEADER + first * entry)
                # The slot is given back before delivery: no entry is delivered twice, whatever a device does.
                ends[0] = (first + 1) % _SLOTS
                bus = buses[port & 1]
                if length == 1:
                    bus.write(address, 1, data & 0xFF)
                elif (mask := _MASK.get(length)) is None:
                    write_bytes(bus, address, length, data)
                else:
                    bus.write(address, length, data & mask)

    def close(self) -> None:
        """Unmap the ring. After the vCPUs have stopped; twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.ends.release()
                self._page.release()
                self._mapping.close()
