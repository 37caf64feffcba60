"""Machines on Linux KVM. `KvmHypervisor` implements `vmm_core.hypervisor.Hypervisor`.

hypervisor = KvmHypervisor(CpuTopology.flat(1))
hypervisor.map_memory(memory)
vcpu = hypervisor.create_vcpu(0, pio, mmio, listener, boot)
vcpu.start()
vcpu.resume()
"""

from vmm_core.hypervisor.kvm.vm import KvmHypervisor

__all__ = ["KvmHypervisor"]
