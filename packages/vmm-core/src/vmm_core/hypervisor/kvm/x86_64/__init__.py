"""What KVM has on x86_64 only: the PC interrupt controllers and timer, registers, MSRs, CPUID.

`KvmHypervisor` reaches it through two classes: `VmArch` for the whole VM, and the `VcpuArch` that it makes for each vCPU.
"""

from vmm_core.hypervisor.kvm.x86_64.vcpu import VcpuArch
from vmm_core.hypervisor.kvm.x86_64.vm import VmArch

__all__ = ["VcpuArch", "VmArch"]
