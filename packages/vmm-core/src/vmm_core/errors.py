"""The exception tree of vmm-core. Every message is one line that a person can act on."""

from __future__ import annotations


class VmmError(Exception):
    """Anything that vmm-core reports. The base class of every other error in this package."""


class HypervisorError(VmmError):
    """The hypervisor refused or failed; the message names the call and the system's reason."""


class GuestMemoryError(VmmError):
    """An address range that is not wholly guest RAM, or RAM that could not be made."""


class PreallocError(GuestMemoryError):
    """RAM that was to be there from the start, and is not to be had."""


class BusError(VmmError):
    """Two devices claim the same addresses, or a device asks for addresses outside the bus."""


class BootError(VmmError):
    """The kernel cannot be loaded; the message names the file and the reason."""


class InitrdError(BootError):
    """The initial RAM disk cannot be loaded; the message names the file and the reason."""


class KernelCommandLineError(BootError):
    """The kernel's command line is not one that it takes."""


class StateError(VmmError):
    """A saved state that is malformed, of an unknown version, or of another component; the message names the component."""


class LifecycleError(VmmError):
    """A virtual machine was asked for a transition that its present state does not allow."""


class ChardevError(VmmError):
    """A character device that cannot be opened; the message names the path or address and the system's reason."""
