"""The configuration that a command line describes: frozen, complete, cross-checked. Knows nothing of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .declare import Record
from .machine import Cpu, Machine, Memory, Smp, ignores_acpi

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmm_core.topology import CpuTopology

    from .backends import Chardev, Drive, IoThread, Listener, RngRandom
    from .drivers.base import Device
    from .netdevs import Connected
    from .numa import MemoryBackend, NumaEntry
    from .secrets import Secret


class Config(Record):
    """A virtual machine and the process that runs it.

    Collections keep the order of the command line; mappings are by id. Every reference has been checked: a device's `drive` is an
    id in `drives`, and so on; each drive, chardev, netdev and rng has at most one user. Things without a user are allowed.
    """

    machine: Machine = Machine()
    cpu: Cpu = Cpu()
    smp: Smp = Smp(cpus=1)
    memory: Memory = Memory()

    kernel: str | None = None
    initrd: str | None = None
    append: str = ""  # as it goes to the guest: the machine adds its own words

    drives: Mapping[str, Drive] = {}  # a Mapping: nobody writes to it
    iothreads: Mapping[str, IoThread] = {}
    rngs: Mapping[str, RngRandom] = {}
    secrets: Mapping[str, Secret] = {}
    memory_backends: Mapping[str, MemoryBackend] = {}
    numa: tuple[NumaEntry, ...] = ()  # `memory` is as they say already
    chardevs: Mapping[str, Chardev] = {}
    netdevs: Mapping[str, Connected] = {}
    devices: tuple[Device, ...] = ()
    serial: Chardev | None = None  # also in chardevs when it was given by -chardev

    monitors: tuple[Listener, ...] = ()
    freeze: bool = False
    test_socket: str | None = None  # -mod-test: connect here, run no vCPU

    trace: str | None = None  # a file of patterns of trace points
    name: str = ""
    log: bool = False  # -D: steps are logged, and not only what goes wrong
    log_file: str | None = None  # None: standard error
    daemonize: bool = False
    pidfile: str | None = None
    disable_seccomp: bool = False

    @property
    def acpi_ignored(self) -> bool:
        """Whether the guest is told not to look at ACPI."""
        return ignores_acpi(self.append)

    @property
    def topology(self) -> CpuTopology:
        """The arrangement of the vCPUs."""
        return self.smp.topology
