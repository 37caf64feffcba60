"""A VM that does nothing, for as long as others come and go.

The first VM of a host and the end of its last one patch the running kernel's code (a static key of KVM). QEMU 7.2, which emulates
the lab, can go on executing the old instruction on another CPU for ever, and the whole lab hangs. Whoever starts VMs in turn
holds one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_CREATE_VM, _CREATE_IRQCHIP, _CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41  # <linux/kvm.h>, KVM_*


@contextmanager
def idle_machine() -> Iterator[None]:
    """Hold a VM with a vCPU that never runs. Raises OSError where there is no usable /dev/kvm."""
    fds: list[int] = []
    try:
        fds.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        fds.append(fcntl.ioctl(fds[0], _CREATE_VM, 0))
        fcntl.ioctl(fds[1], _CREATE_IRQCHIP, 0)
        fds.append(fcntl.ioctl(fds[1], _CREATE_VCPU, 0))
        yield
    finally:
        for fd in reversed(fds):
            os.close(fd)
