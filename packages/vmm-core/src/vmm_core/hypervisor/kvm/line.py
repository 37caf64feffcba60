"""An interrupt line through an irqfd: a write to an event descriptor is an edge, and no system call into KVM is needed."""

from __future__ import annotations

import os

from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.kvm import ioctl as kvm


class IrqfdLine:
    """The wire of one global system interrupt (vmm_core.interrupt.InterruptLine). Closed by the hypervisor that made it."""

    def __init__(self, vm_fd: int, gsi: int) -> None:
        self.gsi = gsi
        try:
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise HypervisorError(f"cannot make an event descriptor for interrupt {gsi}: {error.strerror}") from None
        try:
            kvm.call(vm_fd, kvm.IRQFD, bytearray(kvm.IRQFD_DATA.pack(self._fd, gsi, 0, 0)))
        except HypervisorError:
            self.close()
            raise

    def trigger(self) -> None:
        """Send one edge. Nothing after close()."""
        fd = self._fd
        if fd < 0:
            return
        try:
            os.eventfd_write(fd, 1)
        except OSError:
            # EAGAIN: KVM has not taken 2^64 - 2 edges yet, and they merge. EBADF: closed this moment. Neither is an error.
            return

    def fileno(self) -> int:
        """Return the event descriptor; -1 after close()."""
        return self._fd

    def close(self) -> None:
        """Take the wire away. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
