"""CPUID: what a guest is told about its processor. The host's answers, with the topology of the machine put in.

Sources: reference machine-x86_64, section 6 (its quirks mended); Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.
Not here: asking the hypervisor and telling it (`vmm_core.hypervisor.kvm.x86_64`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmm_core.topology import CpuTopology

SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf's answer depends on ECX

_ECX_HYPERVISOR, _ECX_TSC_DEADLINE = 1 << 31, 1 << 24  # leaf 1
_EDX_HTT = 1 << 28  # leaf 1: EBX[23:16] is valid
_ECX_EPB = 1 << 3  # leaf 6: energy-performance bias, an MSR that KVM does not have
_ECX_CMP_LEGACY, _ECX_TOPOEXT = 1 << 1, 1 << 22  # leaf 0x8000_0001 on AMD
_SMT, _CORE, _DIE = 1, 2, 5  # level types of leaves 0xB and 0x1F
_CLFLUSH_QUADWORDS = 8  # 64 bytes
_AMD_LIKE = frozenset({b"AuthenticAMD", b"HygonGenuine"})


class Entry(NamedTuple):
    """The answer of one leaf, or of one sub-leaf of it. Field order is kvm_cpuid_entry2's."""

    leaf: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def guest_cpuid(supported: Sequence[Entry], topology: CpuTopology, index: int, *, tsc_deadline: bool) -> list[Entry]:
    """Return the CPUID table of vCPU `index`.

    `supported` is what the hypervisor can offer (KVM_GET_SUPPORTED_CPUID). `tsc_deadline` says that its local APIC has that
    timer mode, which KVM reports apart from CPUID.
    """
    leaves = {entry.leaf: entry for entry in reversed(supported)}
    top = leaves.get(0, Entry(0, 0, 0, 0, 0, 0, 0))
    amd = b"".join(n.to_bytes(4, "little") for n in (top.ebx, top.edx, top.ecx)) in _AMD_LIKE
    editor = _Editor(topology, topology.apic_id(index), tsc_deadline=tsc_deadline)
    table = [editor.edit(entry, amd=amd) for entry in supported if entry.leaf not in (0xB, 0x1F)]
    if top.eax >= 0xB:
        table += editor.levels(0xB, editor.two_levels())
    if topology.dies > 1:
        table += editor.levels(0x1F, editor.three_levels())
    return table


class _Editor:
    """Puts one vCPU's place in the topology into the leaves that tell it."""

    def __init__(self, topology: CpuTopology, apic_id: int, *, tsc_deadline: bool) -> None:
        t = topology
        self._apic_id, self._tsc_deadline = apic_id, tsc_deadline
        self._topology = t
        self._cores = t.cores * t.clusters  # of a die
        self._die_threads = self._cores * t.threads
        self._package_threads = self._die_threads * t.dies
        # How far to shift an APIC id right to be left with the core, the die, the package
        self._core_shift = t.thread_bits
        self._die_shift = self._core_shift + t.core_bits
        self._package_shift = self._die_shift + t.die_bits
        self._everywhere = {0x0: self._leaf_0, 0x1: self._leaf_1, 0x4: self._leaf_4, 0x6: self._leaf_6, 0xA: self._leaf_a}
        self._on_amd = {
            0x8000_0001: self._leaf_8000_0001,
            0x8000_0008: self._leaf_8000_0008,
            0x8000_001D: self._cache,
            0x8000_001E: self._leaf_8000_001e,
        }

    def edit(self, entry: Entry, *, amd: bool) -> Entry:
        """Return `entry` as this vCPU shows it."""
        change = self._everywhere.get(entry.leaf)
        if change is None and amd:
            change = self._on_amd.get(entry.leaf)
        return change(entry) if change else entry

    def two_levels(self) -> list[tuple[int, int, int]]:
        """Return shift, logical processors and type of each level of leaf 0xB, which knows threads and cores only."""
        return [(self._core_shift, self._topology.threads, _SMT), (self._package_shift, self._package_threads, _CORE)]

    def three_levels(self) -> list[tuple[int, int, int]]:
        """Return the same for leaf 0x1F."""
        return [
            (self._core_shift, self._topology.threads, _SMT),
            (self._die_shift, self._die_threads, _CORE),
            (self._package_shift, self._package_threads, _DIE),
        ]

    def levels(self, leaf: int, levels: list[tuple[int, int, int]]) -> list[Entry]:
        """Return the sub-leaves of an extended topology leaf, with the empty one that ends it."""
        table = [
            Entry(leaf, i, SIGNIFICANT_INDEX, shift, count, i | kind << 8, self._apic_id)
            for i, (shift, count, kind) in enumerate(levels)
        ]
        return [*table, Entry(leaf, len(levels), SIGNIFICANT_INDEX, 0, 0, len(levels), self._apic_id)]

    def _leaf_0(self, entry: Entry) -> Entry:
        return entry._replace(eax=max(entry.eax, 0x1F)) if self._topology.dies > 1 else entry

    def _leaf_1(self, entry: Entry) -> Entry:
        ecx = (entry.ecx | _ECX_HYPERVISOR) & ~_ECX_TSC_DEADLINE
        if self._tsc_deadline:
            ecx |= _ECX_TSC_DEADLINE
        # APIC ids that a package can hold, which is a power of two: Intel SDM vol. 3, section 9.9.3.1. 8 bits wide.
        ids = min(1 << self._package_shift, 0xFF)
        edx = entry.edx | _EDX_HTT if self._package_threads > 1 else entry.edx & ~_EDX_HTT
        return entry._replace(ebx=self._apic_id << 24 | ids << 16 | _CLFLUSH_QUADWORDS << 8, ecx=ecx, edx=edx)

    def _leaf_4(self, entry: Entry) -> Entry:
        if not entry.eax & 0x1F:  # the end of the list
            return entry
        core_ids = min((1 << self._package_shift - self._core_shift) - 1, 0x3F)  # EAX[31:26], in a package, less one
        entry = self._cache(entry)
        return entry._replace(eax=entry.eax & ~(0x3F << 26) | core_ids << 26)

    def _cache(self, entry: Entry) -> Entry:
        """Set EAX[25:14], how many share the cache less one: the threads of a core share levels 1 and 2, a die the rest.

        Intel counts APIC ids (leaf 4), AMD logical processors (leaf 0x8000_001D).
        """
        if not entry.eax & 0x1F:
            return entry
        inner = (entry.eax >> 5 & 7) <= 2
        if entry.leaf == 4:
            sharing = 1 << (self._core_shift if inner else self._die_shift)
        else:
            sharing = self._topology.threads if inner else self._die_threads
        return entry._replace(eax=entry.eax & ~(0xFFF << 14) | (sharing - 1) << 14)

    def _leaf_6(self, entry: Entry) -> Entry:
        return entry._replace(ecx=entry.ecx & ~_ECX_EPB)

    def _leaf_a(self, entry: Entry) -> Entry:
        return entry if entry.eax >> 8 & 0xFF else entry._replace(eax=0)  # a PMU without counters is none

    def _leaf_8000_0001(self, entry: Entry) -> Entry:
        several = self._package_threads > 1
        return entry._replace(ecx=entry.ecx | _ECX_CMP_LEGACY if several else entry.ecx & ~_ECX_CMP_LEGACY)

    def _leaf_8000_0008(self, entry: Entry) -> Entry:
        # ECX[7:0]: logical processors of a package less one; ECX[15:12]: width of their numbers in an APIC id
        ecx = entry.ecx & ~0xF0FF | self._package_threads - 1 | self._package_shift << 12
        return entry._replace(ecx=ecx)

    def _leaf_8000_001e(self, entry: Entry) -> Entry:
        core = self._apic_id >> self._core_shift & (1 << self._package_shift - self._core_shift) - 1
        node = self._apic_id >> self._die_shift
        return entry._replace(
            eax=self._apic_id,
            ebx=self._topology.threads - 1 << 8 | core & 0xFF,
            ecx=self._topology.dies - 1 << 8 | node & 0xFF,
        )
