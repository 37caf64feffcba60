"""The GSI routing table: which interrupt controller pin, or which message, each global system interrupt stands for."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from vmm_core.errors import HypervisorError
from vmm_core.hypervisor.kvm import ioctl as kvm

_LOW = 0xFFFF_FFFF


class Routing:
    """The routing table of one VM. Safe to change from any thread: guests program messages on several vCPUs at once."""

    def __init__(self, vm_fd: int, pins: Sequence[bytes], first_message: int, limit: int) -> None:
        """Install `pins`, the fixed routes of GSIs below `first_message`. `limit` is the number of GSIs in all."""
        self._vm_fd = vm_fd
        self._pins = b"".join(pins)
        self._pin_count = len(pins)
        self._messages: dict[int, bytes] = {}
        self._first_message, self.limit = first_message, limit
        self._lock = Lock()
        self._commit(self._messages)

    def set_message(self, gsi: int, address: int, data: int) -> None:
        """Make `gsi` stand for the message `data` written to `address` (PCI 3.0, section 6.8.1)."""
        if not self._first_message <= gsi < self.limit:
            raise HypervisorError(f"interrupt {gsi} cannot be a message; those are {self._first_message} to {self.limit - 1}")
        route = kvm.ROUTE_MSI.pack(gsi, kvm.ROUTING_MSI, 0, address & _LOW, address >> 32 & _LOW, data & _LOW, 0)
        with self._lock:
            if self._messages.get(gsi) != route:
                self._commit({**self._messages, gsi: route})

    def clear_message(self, gsi: int) -> None:
        """Make `gsi` stand for nothing again. Harmless when it does already."""
        with self._lock:
            if gsi in self._messages:
                self._commit({number: route for number, route in self._messages.items() if number != gsi})

    def _commit(self, messages: dict[int, bytes]) -> None:
        header = kvm.ROUTING_HEADER.pack(self._pin_count + len(messages), 0)
        kvm.call(self._vm_fd, kvm.SET_GSI_ROUTING, bytearray(header + self._pins + b"".join(messages.values())))
        self._messages = messages
