"""Guests of a few bytes for the tests of vmm_core.hypervisor.kvm, and whether this host can run them."""

from __future__ import annotations

import fcntl
import os
from queue import Queue
from typing import Any

from vmm_core.bus import Bus
from vmm_core.guestmem import GuestMemory
from vmm_core.hypervisor import ExitReason
from vmm_core.hypervisor.kvm import KvmHypervisor
from vmm_core.topology import CpuTopology
from vmm_core.x86_64.vcpu_boot import Segment, Table, VcpuBoot

PATIENCE = 60.0  # seconds until something that must happen counts as not happening
CODE = 0x1000
PORT = 0x10  # 16 ports of the test device
MMIO = 0xF000_0000  # 8 KiB of it
LOOP = b"\xeb\xfe"  # jmp $

_CREATE_VM = 0xAE01


def kvm_trouble() -> str:
    """Return why no KVM guest can run on this host; empty when one can. Asks the kernel, not the code under test."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        os.close(fcntl.ioctl(fd, _CREATE_VM, 0))
    except OSError as error:
        return f"KVM_CREATE_VM: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def real_mode(**registers: int) -> VcpuBoot:
    """Start at CODE in 16-bit real mode."""
    code = Segment(0, 0, 0xFFFF, 11, present=1, dpl=0, db=0, s=1, long=0, g=0)
    data = Segment(0, 0, 0xFFFF, 3, present=1, dpl=0, db=0, s=1, long=0, g=0)
    task = Segment(0, 0, 0xFFFF, 11, present=1, dpl=0, db=0, s=0, long=0, g=0)
    registers = {"rip": CODE, "rflags": 2, "rsp": 0x8000, **registers}
    return VcpuBoot(registers, code, data, task, Table(0, 0), Table(0, 0x3FF), 0, 0, 0, 0)


def flat_mode(**registers: int) -> VcpuBoot:
    """Start at CODE in 32-bit protected mode without paging. The IDT is at 0x5000; gate() fills it."""
    code = Segment(0x08, 0, 0xFFFF_FFFF, 11, present=1, dpl=0, db=1, s=1, long=0, g=1)
    data = Segment(0x10, 0, 0xFFFF_FFFF, 3, present=1, dpl=0, db=1, s=1, long=0, g=1)
    task = Segment(0, 0, 0xFFFF, 11, present=1, dpl=0, db=0, s=0, long=0, g=0)
    registers = {"rip": CODE, "rflags": 2, "rsp": 0x8000, **registers}
    return VcpuBoot(registers, code, data, task, Table(0x4000, 0x17), Table(0x5000, 0x7FF), 1, 0, 0, 0)


class Device:
    """Takes every access as an event, and answers reads with bytes that tell where they come from: 0x11, 0x22, …"""

    def __init__(self, name: str) -> None:
        self.name = name
        self.events: Queue[tuple[Any, ...]] = Queue()

    def read(self, offset: int, size: int) -> int:
        self.events.put((self.name, "read", offset, size))
        return 0x8877665544332211 & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.events.put((self.name, "write", offset, size, value))


class Guest:
    """A machine of RAM (1 MiB), the test device, and `cpus` vCPUs that start with `code`."""

    def __init__(
        self,
        code: bytes,
        boot: VcpuBoot | None = None,
        cpus: int = 1,
        topology: CpuTopology | None = None,
        memory: GuestMemory | None = None,
    ) -> None:
        self.hypervisor = KvmHypervisor(topology or CpuTopology.flat(cpus))
        self.memory = memory or GuestMemory([(0, 1 << 20)])
        self.memory.write(CODE, code)
        self.memory.write(0x4000, bytes(8) + b"\xff\xff\0\0\0\x9b\xcf\0" + b"\xff\xff\0\0\0\x93\xcf\0")  # flat GDT
        self.device = Device("port")
        self.mmio_device = Device("mmio")
        self.mmio_device.events = self.device.events
        self.exits: Queue[tuple[int, ExitReason, str]] = Queue()
        pio, mmio = Bus("ports", 1 << 16), Bus("memory", 1 << 52)
        pio.add(PORT, 16, self.device, "test")
        mmio.add(MMIO, 0x2000, self.mmio_device, "test")
        try:
            self.hypervisor.map_memory(self.memory)
            self.vcpus = [self.hypervisor.create_vcpu(i, pio, mmio, self, boot or real_mode()) for i in range(cpus)]
        except BaseException:
            self.close()
            raise

    def vcpu_exited(self, index: int, reason: ExitReason, report: str) -> None:
        self.exits.put((index, reason, report))

    def gate(self, vector: int, code: bytes, at: int) -> None:
        """Put an interrupt handler at `at` and into the IDT of flat_mode() and the vector table of real_mode()."""
        self.memory.write(at, code)
        self.memory.write(0x5000 + 8 * vector, at.to_bytes(2, "little") + b"\x08\0\0\x8e\0\0")
        self.memory.write(4 * vector, at.to_bytes(2, "little") + bytes(2))

    def run(self) -> Guest:
        for vcpu in self.vcpus:
            vcpu.start()
        self.resume()
        return self

    def resume(self) -> None:
        for vcpu in self.vcpus:
            vcpu.resume()

    def pause(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request_pause()
        for vcpu in self.vcpus:
            assert vcpu.wait_paused(PATIENCE), f"CPU {vcpu.index} does not pause"

    def next(self) -> tuple[Any, ...]:
        """Wait for the next access to the device."""
        return self.device.events.get(timeout=PATIENCE)

    def close(self) -> None:
        self.hypervisor.close()
        self.memory.close()
