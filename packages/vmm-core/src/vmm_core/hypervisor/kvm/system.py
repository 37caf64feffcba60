"""/dev/kvm: can this host run a machine, and what does it offer."""

from __future__ import annotations

import errno
import os

from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.kvm import ioctl as kvm

_ADVICE = {
    errno.ENOENT: "this host has no KVM, or its module is not loaded",
    errno.EACCES: "the user may not use it; it usually belongs to the group kvm",
    errno.EPERM: "the user may not use it; it usually belongs to the group kvm",
    errno.ENODEV: "the processor's virtualization is missing or switched off",
    errno.ENXIO: "the processor's virtualization is missing or switched off",
}


class Kvm:
    """The system descriptor. Owned by one KvmHypervisor, which closes it."""

    def __init__(self, required: dict[str, int], path: str = "/dev/kvm") -> None:
        """Open `path` and see that every capability in `required` (name to number) is there.

        Raises HypervisorError with what is missing and, where it is known, why.
        """
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
            raise HypervisorError(f"Failed to open {path}: {error.strerror}{advice}") from None
        try:
            version = kvm.call(self.fd, kvm.GET_API_VERSION)
            if version != kvm.API_VERSION:
                raise HypervisorError(
                    f"{path} speaks version {version} of the KVM interface; version {kvm.API_VERSION} is needed"
                )
            missing = [name for name, number in required.items() if self.capability(number) <= 0]
            if missing:
                raise HypervisorError(f"{path} lacks {', '.join(missing)}")
            self.vcpu_mapping_size = kvm.call(self.fd, kvm.GET_VCPU_MMAP_SIZE)
        except kvm.KvmError as error:
            self.close()
            raise HypervisorError(f"{path} is not KVM: {error}") from None
        except HypervisorError:
            self.close()
            raise

    def capability(self, number: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of a capability: 0 without it, otherwise 1 or its own measure."""
        return kvm.call(self.fd, kvm.CHECK_EXTENSION, number)

    def create_vm(self) -> int:
        """Return the descriptor of a new VM."""
        try:
            return kvm.call(self.fd, kvm.CREATE_VM)
        except kvm.KvmError as error:
            raise HypervisorError(f"Failed to create VM in KVM: {os.strerror(error.errno)}") from None

    def close(self) -> None:
        """Close the descriptor. Twice is fine."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
