"""The state in which every vCPU of an x86_64 machine starts, as the boot loader decides it and the hypervisor loads it.

Not here: how it gets into a vCPU (`vmm_core.hypervisor.kvm`), and what it points to in guest memory (the loaders).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Segment(NamedTuple):
    """A segment register with its hidden part (Intel SDM vol. 3, section 3.4.3; AMD APM vol. 2, section 4.8)."""

    selector: int
    base: int
    limit: int  # in bytes, as loaded: 0xFFFFF with granularity 1 means 4 GiB
    type: int
    present: int
    dpl: int
    db: int
    s: int
    long: int
    g: int


class Table(NamedTuple):
    """GDTR or IDTR."""

    base: int
    limit: int


class VcpuBoot(NamedTuple):
    """Registers at the first instruction. The boot processor runs from here; the others wait for INIT and SIPI."""

    registers: Mapping[str, int]  # general registers by lower-case name, rip and rflags included; those not named are 0
    code: Segment
    data: Segment  # DS, ES, FS, GS and SS
    task: Segment
    gdt: Table
    idt: Table
    cr0: int  # bits set on top of the reset value
    cr3: int
    cr4: int  # bits set on top of the reset value
    efer: int  # bits set on top of the reset value
