"""One virtual machine in KVM: its memory slots, interrupt lines, doorbells, vCPUs and clock.

Not here: what only one architecture has (`x86_64`), the run loop (`vcpu`).
"""

from __future__ import annotations

import mmap
import os
from functools import cached_property
from typing import TYPE_CHECKING

from vmm_core.bus import Bus
from vmm_core.errors import HypervisorError, LifecycleError
from vmm_core.guestmem import PAGE_SIZE, GuestMemory, Region
from vmm_core.hypervisor import VcpuListener
from vmm_core.hypervisor.kvm import ioctl as kvm
from vmm_core.hypervisor.kvm.line import IrqfdLine
from vmm_core.hypervisor.kvm.ring import CoalescedRing
from vmm_core.hypervisor.kvm.routing import Routing
from vmm_core.hypervisor.kvm.system import Kvm
from vmm_core.hypervisor.kvm.vcpu import KvmVcpu

if TYPE_CHECKING:
    from vmm_core.hypervisor.kvm.x86_64 import VmArch
    from vmm_core.state import Stateful
    from vmm_core.topology import CpuTopology

_BITMAP_UNIT = 64  # KVM writes the dirty bitmap in whole 64-bit words


class KvmHypervisor:
    """A VM in KVM (vmm_core.hypervisor.Hypervisor). For the machine's thread, but for messages and flush_coalesced()."""

    def __init__(self, topology: CpuTopology, path: str = "/dev/kvm") -> None:
        """Create the VM. Raises HypervisorError when this host cannot.

        `topology` arranges the vCPUs that create_vcpu() makes.
        """
        self._arch_type = _architecture()
        self._topology = topology
        self._vm_fd = -1
        self._vcpus: list[KvmVcpu] = []
        self._lines: dict[int, IrqfdLine] = {}
        self._slots: list[tuple[Region, int]] = []  # with the address in this process
        self._memory: GuestMemory | None = None
        self._shown: dict[int, tuple[int, memoryview]] = {}  # by address: slot, and what is there
        self._hidden: set[int] = set()  # of those
        self._ring: CoalescedRing | None = None
        self._coalesced = False
        self._system = Kvm({**kvm.REQUIRED, **self._arch_type.required}, path)
        try:
            self._vm_fd = self._system.create_vm()
        except BaseException:
            self.close()
            raise

    @cached_property
    def _chips(self) -> tuple[VmArch, Routing]:
        """Interrupt controllers and timers, and what is connected to them: made when the first one asks.

        So they come behind the memory. A slot that comes behind them waits for KVM's readers of its bus, on Linux 6.18 for 7 ms.
        """
        kind = self._arch_type
        arch = kind(self._system, self._vm_fd, self._topology)
        routing = Routing(self._vm_fd, kind.pins(), kind.first_message_gsi, self._system.capability(kvm.CAP_IRQ_ROUTING))
        arch.set_up()
        return arch, routing

    @property
    def _arch(self) -> VmArch:
        return self._chips[0]

    @property
    def _routing(self) -> Routing:
        return self._chips[1]

    @property
    def vm_state(self) -> Stateful:
        """Interrupt controllers, timers, clock."""
        return self._arch

    # Memory

    def map_memory(self, memory: GuestMemory) -> None:
        """Make RAM visible to the guest, one slot a region. Once a VM."""
        if self._memory is not None:
            raise LifecycleError("this virtual machine has its memory already")
        limit = self._system.capability(kvm.CAP_NR_MEMSLOTS)
        if len(memory.regions) > limit:
            raise HypervisorError(f"{len(memory.regions)} memory slots are needed, KVM has {limit}")
        self._memory = memory
        for region in memory.regions:
            self._slots.append((region, memory.host_address(region)))
            self._set_slot(len(self._slots) - 1, 0)

    def start_dirty_log(self) -> None:
        """Record from now on which pages the guest writes."""
        for slot in range(len(self._slots)):
            self._set_slot(slot, kvm.MEM_LOG_DIRTY_PAGES)

    def dirty_pages(self) -> list[tuple[int, bytes]]:
        """Return (first guest address, bitmap of pages, bit 0 of byte 0 first) for each region, and start anew."""
        from ctypes import addressof, c_char

        result = []
        for slot, (region, _) in enumerate(self._slots):
            pages = region.size // PAGE_SIZE
            bitmap = bytearray(-(-pages // _BITMAP_UNIT) * _BITMAP_UNIT // 8)
            request = bytearray(kvm.DIRTY_LOG.pack(slot, addressof(c_char.from_buffer(bitmap))))
            kvm.call(self._vm_fd, kvm.GET_DIRTY_LOG, request)
            result.append((region.base, bytes(memoryview(bitmap)[: -(-pages // 8)])))
        return result

    def stop_dirty_log(self) -> None:
        """Stop recording."""
        for slot in range(len(self._slots)):
            self._set_slot(slot, 0)

    def show(self, address: int, size: int) -> memoryview | None:
        """Make memory at `address` that the guest reads without an exit and cannot write. None where KVM cannot."""
        if self._memory is None:
            raise LifecycleError("this virtual machine has no memory yet")
        slot = len(self._slots) + len(self._shown)
        if not self._system.capability(kvm.CAP_READONLY_MEM) or slot >= self._system.capability(kvm.CAP_NR_MEMSLOTS):
            return None
        try:
            memory = memoryview(mmap.mmap(-1, size))
        except OSError as error:
            raise HypervisorError(f"{size:#x} bytes for registers at {address:#x}: {error.strerror}") from None
        self._map_shown(slot, address, memory, size)
        self._shown[address] = slot, memory  # stays mapped as long as the VM may look at it
        return memory

    def set_shown(self, address: int, shown: bool) -> None:
        """Have reads of what show() made at `address` reach the bus too, or no longer. Nothing once it is closed."""
        if self._vm_fd < 0 or shown != (address in self._hidden):
            return
        slot, memory = self._shown[address]
        self._map_shown(slot, address, memory, len(memory) if shown else 0)
        (self._hidden.discard if shown else self._hidden.add)(address)

    def _map_shown(self, slot: int, address: int, memory: memoryview, size: int) -> None:
        """Show `size` bytes, all of them or none."""
        from ctypes import addressof, c_char

        self._map_slot(slot, kvm.MEM_READONLY, address, size, addressof(c_char.from_buffer(memory)))

    def _set_slot(self, slot: int, flags: int) -> None:
        region, address = self._slots[slot]
        self._map_slot(slot, flags, region.base, region.size, address)

    def _map_slot(self, slot: int, flags: int, base: int, size: int, address: int) -> None:
        data = kvm.MEMORY_REGION.pack(slot, flags, base, size, address)
        try:
            kvm.call(self._vm_fd, kvm.SET_USER_MEMORY_REGION, bytearray(data))
        except kvm.KvmError as error:
            raise HypervisorError(f"{size:#x} bytes of RAM at {base:#x}: {error}") from None

    # Interrupts and doorbells

    def interrupt_line(self, gsi: int) -> IrqfdLine:
        """Return the wire of `gsi`, the same object for the same number."""
        line = self._lines.get(gsi)
        if line is None:
            if not 0 <= gsi < self._routing.limit:
                raise HypervisorError(f"interrupt {gsi} does not exist; KVM has {self._routing.limit}")
            line = self._lines[gsi] = IrqfdLine(self._vm_fd, gsi)
        return line

    def route_message(self, gsi: int, address: int, data: int) -> None:
        """Make an edge on `gsi` send the message `data` to `address`."""
        self._routing.set_message(gsi, address, data)

    def unroute_message(self, gsi: int) -> None:
        """Make an edge on `gsi` do nothing again."""
        self._routing.clear_message(gsi)

    def add_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
        """Turn guest writes of `size` bytes (0: any) at `address` into events on `fd`, only those equal to `match` if given."""
        self._ioeventfd(address, size, fd, match, port, 0)

    def remove_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
        """Undo add_ioeventfd() of the same arguments."""
        self._ioeventfd(address, size, fd, match, port, kvm.IOEVENTFD_DEASSIGN)

    def _ioeventfd(self, address: int, size: int, fd: int, match: int | None, port: bool, flags: int) -> None:
        flags |= (kvm.IOEVENTFD_DATAMATCH if match is not None else 0) | (kvm.IOEVENTFD_PIO if port else 0)
        kvm.call(self._vm_fd, kvm.IOEVENTFD, bytearray(kvm.IOEVENTFD_DATA.pack(match or 0, address, size, fd, flags)))

    def coalesce(self, address: int, size: int, *, port: bool = False) -> None:
        """Let KVM collect writes in this range, where it can, and deliver them before the next exit is handled.

        Only before the first vCPU starts.
        """
        if any(vcpu.thread_id for vcpu in self._vcpus):
            raise LifecycleError("writes can be coalesced only before the vCPUs start")
        if self._system.capability(kvm.CAP_COALESCED_PIO if port else kvm.CAP_COALESCED_MMIO):
            kvm.call(self._vm_fd, kvm.REGISTER_COALESCED_MMIO, bytearray(kvm.COALESCED_ZONE.pack(address, size, port)))
            self._coalesced = True

    def flush_coalesced(self) -> None:
        """Deliver the writes collected so far. From any thread, until close()."""
        ring = self._ring
        if ring is not None:
            ring.flush()

    # vCPUs

    def create_vcpu(self, index: int, pio: Bus, mmio: Bus, listener: VcpuListener, boot: object) -> KvmVcpu:
        """Make a vCPU. `boot` is the architecture's boot state, loaded at start and at reset."""
        limit = self._system.capability(kvm.CAP_MAX_VCPUS)
        if index >= limit:
            raise HypervisorError(f"vCPU {index} is one too many: KVM has at most {limit} a machine")
        fd = kvm.call(self._vm_fd, kvm.CREATE_VCPU, self._arch.vcpu_id(index))
        try:
            arch = self._arch.vcpu(fd, index, boot)
            size = self._system.vcpu_mapping_size
            vcpu = KvmVcpu(fd, index, size, (pio, mmio), listener, arch, lambda: self._shared_ring(fd, pio, mmio))
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def _shared_ring(self, vcpu_fd: int, pio: Bus, mmio: Bus) -> CoalescedRing | None:
        """Return the ring of collected writes, which any vCPU can map; None when nothing is collected."""
        if self._coalesced and self._ring is None:
            self._ring = CoalescedRing(vcpu_fd, self._system.capability(kvm.CAP_COALESCED_MMIO), pio, mmio)
        return self._ring

    # Life cycle

    def reset(self) -> None:
        """Bring interrupt controllers and timers to their power-on state."""
        self._arch.reset()

    def pause_clock(self) -> None:
        """Stop the guest's paravirtual clock."""
        self._arch.pause_clock()

    def resume_clock(self) -> None:
        """Let it go on from where it stopped. Before the vCPUs are resumed."""
        self._arch.resume_clock([vcpu.fd for vcpu in self._vcpus if vcpu.parked and vcpu.fd >= 0])

    def close(self) -> None:
        """Stop the vCPUs and give everything back. Twice is fine.

        Raises HypervisorError when a vCPU does not stop; what it may still use is then left to the end of the process.
        """
        for vcpu in self._vcpus:
            vcpu.request_pause()  # all at once, so that waiting for each in turn takes no longer than for the slowest
        stuck: list[HypervisorError] = []
        for vcpu in self._vcpus:
            try:
                vcpu.stop()
            except HypervisorError as error:
                stuck.append(error)
        if stuck:
            raise stuck[0]
        self._vcpus.clear()
        if self._ring is not None:
            self._ring.close()
        for line in self._lines.values():
            line.close()
        vm_fd, self._vm_fd = self._vm_fd, -1
        if vm_fd >= 0:
            os.close(vm_fd)
        self._shown.clear()
        self._system.close()


def _architecture() -> type[VmArch]:
    machine = os.uname().machine
    if machine != "x86_64":
        raise HypervisorError(f"machines of {machine} hosts are not supported yet")
    from vmm_core.hypervisor.kvm.x86_64 import VmArch

    return VmArch
