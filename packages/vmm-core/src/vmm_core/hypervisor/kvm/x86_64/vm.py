"""What belongs to the whole VM on x86_64: both PICs, the I/O APIC, the PIT and the paravirtual clock, all kept by KVM.

Source: reference machine-x86_64, section 4. Not here: memory, descriptors of lines and doorbells, routing of messages.
"""

from __future__ import annotations

from errno import E2BIG
from typing import TYPE_CHECKING, Any

from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.kvm import ioctl as kvm
from vmm_core.hypervisor.kvm.x86_64 import msrs, structs
from vmm_core.hypervisor.kvm.x86_64.vcpu import VcpuArch
from vmm_core.topology import MAX_APIC_ID
from vmm_core.x86_64.cpuid import Entry, guest_cpuid
from vmm_core.x86_64.layout import Microvm  # the hypervisor's own pages are at the same place on every machine

if TYPE_CHECKING:
    from vmm_core.hypervisor.kvm.system import Kvm
    from vmm_core.hypervisor.kvm.x86_64.state import KvmVmState
    from vmm_core.topology import CpuTopology

_PIC_PINS, _IOAPIC_PINS = 16, 24


class VmArch:
    """The x86_64 side of one VM."""

    required = structs.REQUIRED
    first_message_gsi = _IOAPIC_PINS

    def __init__(self, system: Kvm, vm_fd: int, topology: CpuTopology) -> None:
        """Make the interrupt controllers; routing comes next, then set_up()."""
        self._system, self._vm_fd, self._topology = system, vm_fd, topology
        self._paused_clock: int | None = None
        self._power_on: list[bytearray] = []
        self._supported: list[Entry] = []
        self._msr_indices: list[int] = []
        kvm.call(vm_fd, structs.CREATE_IRQCHIP)

    @staticmethod
    def pins() -> list[bytes]:
        """Return the fixed routes: GSI n is pin n of the I/O APIC, and below 16 also of the two PICs."""

        def route(gsi: int, chip: int, pin: int) -> bytes:
            return kvm.ROUTE_IRQCHIP.pack(gsi, kvm.ROUTING_IRQCHIP, 0, chip, pin)

        ioapic = [route(gsi, structs.IOAPIC, gsi) for gsi in range(_IOAPIC_PINS)]
        pics = [route(gsi, structs.PIC_SLAVE if gsi >= 8 else structs.PIC_MASTER, gsi % 8) for gsi in range(_PIC_PINS)]
        return ioapic + pics

    def set_up(self) -> None:
        """Place the pages that KVM needs for itself, make the PIT, and remember the power-on state."""
        kvm.call(self._vm_fd, structs.SET_IDENTITY_MAP_ADDR, bytearray(Microvm.KVM_IDENTITY_MAP.base.to_bytes(8, "little")))
        kvm.call_with_address(self._vm_fd, structs.SET_TSS_ADDR, Microvm.KVM_TSS.base)
        kvm.call(self._vm_fd, structs.CREATE_PIT2, bytearray(structs.PIT_SPEAKER_DUMMY.to_bytes(64, "little")))
        self._power_on = self._get_chips()
        self._supported = self._supported_cpuid()
        self._msr_indices = msrs.index_list(self._system.fd)

    def vcpu_id(self, index: int) -> int:
        """Return the number under which KVM knows vCPU `index`: its APIC id."""
        apic_id = self._topology.apic_id(index)
        if apic_id > MAX_APIC_ID:
            raise HypervisorError(
                f"vCPU {index} of this topology would have APIC id {apic_id}; at most {MAX_APIC_ID} is possible"
            )
        return apic_id

    def vcpu(self, vcpu_fd: int, index: int, boot: Any) -> VcpuArch:
        """Return the registers of a vCPU just made. `boot` is a VcpuBoot."""
        return VcpuArch(self._system, vcpu_fd, index, boot, self._cpuid(index), self._msr_indices)

    def reset(self) -> None:
        """Put interrupt controllers and timer back to what they were when the VM was made."""
        self._set_chips(self._power_on)

    def pause_clock(self) -> None:
        """Remember the guest's clock."""
        if self._paused_clock is None:
            self._paused_clock = self._get_clock()

    def resume_clock(self, vcpu_fds: list[int]) -> None:
        """Let the clock go on from where it was, and tell each vCPU, so that the guest's watchdogs do not bark."""
        if self._paused_clock is None:
            return
        self._set_clock(self._paused_clock)
        self._paused_clock = None
        if self._system.capability(structs.CAP_KVMCLOCK_CTRL):
            for fd in vcpu_fds:
                try:
                    kvm.call(fd, structs.KVMCLOCK_CTRL)
                except kvm.KvmError:
                    continue  # EINVAL: this guest does not use the clock

    def save(self) -> KvmVmState:
        """Return the state of the chips and the clock."""
        from vmm_core.hypervisor.kvm.x86_64.state import KvmVmState

        pic_master, pic_slave, ioapic, pit = (bytes(chip) for chip in self._get_chips())
        clock = self._get_clock() if self._paused_clock is None else self._paused_clock
        return KvmVmState(pic_master=pic_master, pic_slave=pic_slave, ioapic=ioapic, pit=pit, clock=clock)

    def restore(self, state: Any) -> None:
        """Put back what save() returned. Raises StateError for a state that is not one."""
        from vmm_core.hypervisor.kvm.x86_64.state import checked_vm_state

        good = checked_vm_state(state)
        chips = [bytearray(chip) for chip in (good.pic_master, good.pic_slave, good.ioapic, good.pit)]
        for number, chip in enumerate(chips[:3]):
            structs.IRQCHIP_HEADER.pack_into(chip, 0, number)
        self._set_chips(chips)
        if self._paused_clock is None:
            self._set_clock(good.clock)
        else:
            self._paused_clock = good.clock

    def _get_chips(self) -> list[bytearray]:
        chips = []
        for chip in (structs.PIC_MASTER, structs.PIC_SLAVE, structs.IOAPIC):
            data = bytearray(structs.IRQCHIP_SIZE)
            structs.IRQCHIP_HEADER.pack_into(data, 0, chip)
            kvm.call(self._vm_fd, structs.GET_IRQCHIP, data)
            chips.append(data)
        pit = bytearray(structs.PIT_SIZE)
        kvm.call(self._vm_fd, structs.GET_PIT2, pit)
        return [*chips, pit]

    def _set_chips(self, chips: list[bytearray]) -> None:
        *irqchips, pit = chips
        # A timer that runs would raise its line in controllers that were put back already: it stands still first.
        kvm.call(self._vm_fd, structs.SET_PIT2, bytearray(self._power_on[-1]))
        for chip in irqchips:
            kvm.call(self._vm_fd, structs.SET_IRQCHIP, bytearray(chip))
        kvm.call(self._vm_fd, structs.SET_PIT2, bytearray(pit))

    def _get_clock(self) -> int:
        data = bytearray(structs.CLOCK.size)
        kvm.call(self._vm_fd, structs.GET_CLOCK, data)
        clock: int = structs.CLOCK.unpack(data)[0]
        return clock

    def _set_clock(self, clock: int) -> None:
        kvm.call(self._vm_fd, structs.SET_CLOCK, bytearray(structs.CLOCK.pack(clock, 0)))

    def _supported_cpuid(self) -> list[Entry]:

        count = 256
        while True:
            data = bytearray(structs.CPUID_HEADER.size + count * structs.CPUID_ENTRY.size)
            structs.CPUID_HEADER.pack_into(data, 0, count, 0)
            try:
                kvm.call(self._system.fd, structs.GET_SUPPORTED_CPUID, data)
            except kvm.KvmError as error:
                if error.errno != E2BIG or count >= 4096:
                    raise
                count *= 2
                continue
            present = structs.CPUID_HEADER.unpack_from(data)[0]
            entries = memoryview(data)[structs.CPUID_HEADER.size : structs.CPUID_HEADER.size + present * structs.CPUID_ENTRY.size]
            return [Entry(*fields) for fields in structs.CPUID_ENTRY.iter_unpack(entries)]

    def _cpuid(self, index: int) -> bytes:
        deadline = self._system.capability(structs.CAP_TSC_DEADLINE_TIMER) > 0
        entries = guest_cpuid(self._supported, self._topology, index, tsc_deadline=deadline)
        return b"".join(structs.CPUID_ENTRY.pack(*entry) for entry in entries)
