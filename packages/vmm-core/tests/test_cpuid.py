"""CPUID as a guest takes it apart, following the processor manuals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.topology import CpuTopology
from vmm_core.x86_64.cpuid import Entry, guest_cpuid

INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX of leaf 0: GenuineIntel
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # AuthenticAMD
TSC_DEADLINE, HYPERVISOR, HTT = 1 << 24, 1 << 31, 1 << 28


def supported(vendor: tuple[int, int, int] = INTEL, top: int = 0x16) -> list[Entry]:
    """Return what a KVM of that vendor could offer: every leaf that the machine's topology has a part in."""
    return [
        Entry(0, 0, 0, top, *vendor),
        Entry(1, 0, 0, 0x806F8, 0xFF_20_0800, 0x0020_0000 | TSC_DEADLINE, 0x0FAB_FBFF),
        Entry(2, 0, 0, 0x00FE_FF01, 0, 0, 0),
        *(Entry(4, i, 1, 0xFC1F_C000 | level << 5 | kind, 0x02C0_003F, 0x3F, 0) for i, (level, kind) in enumerate(CACHES)),
        Entry(4, len(CACHES), 1, 0, 0, 0, 0),
        Entry(6, 0, 0, 4, 0, 9, 0),
        Entry(0xA, 0, 0, 0x0730_0605, 0, 0, 0x8603),
        Entry(0xB, 0, 1, 1, 2, 0x100, 5),
        Entry(0x1F, 0, 1, 1, 2, 0x100, 5),
        Entry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
        Entry(0x8000_0001, 0, 0, 0, 0, 1 << 22 if vendor == AMD else 0, 0),
        Entry(0x8000_0002, 0, 0, 1, 2, 3, 4),
        Entry(0x8000_0008, 0, 0, 0x3030, 0, 0x703F if vendor == AMD else 0, 0),
        *(Entry(0x8000_001D, i, 1, 0x1C000 | level << 5 | kind, 0, 0, 0) for i, (level, kind) in enumerate(CACHES)),
        Entry(0x8000_001D, len(CACHES), 1, 0, 0, 0, 0),
        Entry(0x8000_001E, 0, 0, 0, 0, 0, 0),
    ]


CACHES = [(1, 1), (1, 2), (2, 3), (3, 3)]  # level, type: data, instruction, unified, unified


def cpuid(
    topology: CpuTopology, index: int = 0, offer: list[Entry] | None = None, *, tsc_deadline: bool = True
) -> dict[tuple[int, int], Entry]:
    table = guest_cpuid(offer or supported(), topology, index, tsc_deadline=tsc_deadline)
    found = {(entry.leaf, entry.subleaf): entry for entry in table}
    assert len(found) == len(table), "a leaf is there twice"
    return found


@st.composite
def topologies(draw: st.DrawFn) -> CpuTopology:
    counts: list[int] = []
    room = 254
    for _ in range(5):
        counts.append(draw(st.integers(1, min(room, 24))))
        room //= counts[-1]
    sockets, dies, clusters, cores, threads = draw(st.permutations(counts))
    total = sockets * dies * clusters * cores * threads
    return CpuTopology(total, total, sockets, dies, clusters, cores, threads)


@given(topologies(), st.data())
def test_two_vcpus_share_a_core_a_die_or_a_package_in_the_guest_exactly_as_configured(
    t: CpuTopology, data: st.DataObject
) -> None:
    first, second = (data.draw(st.integers(0, t.max_cpus - 1)) for _ in range(2))
    die_threads = t.threads * t.cores * t.clusters
    for leaf, spans in (
        (0xB, [t.threads, die_threads * t.dies]),
        *([(0x1F, [t.threads, die_threads, die_threads * t.dies])] if t.dies > 1 else []),
    ):
        one, other = cpuid(t, first), cpuid(t, second)
        for level, span in enumerate(spans):
            assert one[leaf, level].ebx == span
            shift = one[leaf, level].eax
            same = one[leaf, level].edx >> shift == other[leaf, level].edx >> shift
            assert same == (first // span == second // span)


@given(topologies())
def test_apic_ids_are_unique(t: CpuTopology) -> None:
    assert len({t.apic_id(index) for index in range(t.max_cpus)}) == t.max_cpus


def test_power_of_two_topologies_number_their_apics_as_their_vcpus() -> None:
    t = CpuTopology(32, 32, sockets=2, dies=2, clusters=2, cores=2, threads=2)
    assert [t.apic_id(i) for i in range(32)] == list(range(32))


def test_leaf_b_has_both_levels_even_when_the_host_offers_one() -> None:
    table = cpuid(CpuTopology(8, 8, sockets=1, cores=4, threads=2), 5)
    assert table[0xB, 0][3:] == (1, 2, 0x100, 5)
    assert table[0xB, 1][3:] == (3, 8, 0x201, 5)
    assert table[0xB, 2][3:] == (0, 0, 2, 5)
    assert all(table[0xB, i].flags == 1 for i in range(3))
    assert (0x1F, 0) not in table


def test_dies_are_in_leaf_1f_and_leaf_0_leads_there() -> None:
    table = cpuid(CpuTopology(8, 8, dies=2, cores=2, threads=2), 7)
    assert table[0, 0].eax == 0x1F
    assert [table[0x1F, i][3:] for i in range(4)] == [(1, 2, 0x100, 7), (2, 4, 0x201, 7), (3, 8, 0x502, 7), (0, 0, 3, 7)]
    assert cpuid(CpuTopology(8, 8, dies=2, cores=4), 0, supported(top=0x20))[0, 0].eax == 0x20


def test_a_processor_without_leaf_b_does_not_get_one() -> None:
    assert (0xB, 0) not in cpuid(CpuTopology.flat(4), offer=[e for e in supported(top=0xA) if e.leaf != 0xB])


def test_leaf_1_counts_the_ids_of_a_package() -> None:
    one = cpuid(CpuTopology.flat(1))[1, 0]
    assert (one.ebx, one.edx & HTT) == (0x0001_0800, 0)
    six = cpuid(CpuTopology(6, 6, cores=3, threads=2), 5)[1, 0]
    assert six.ebx == 5 << 24 | 8 << 16 | 0x0800
    assert six.edx & HTT
    assert cpuid(CpuTopology.flat(254), 253)[1, 0].ebx == 253 << 24 | 255 << 16 | 0x0800


def test_a_guest_knows_that_it_is_one() -> None:
    assert cpuid(CpuTopology.flat(1))[1, 0].ecx & HYPERVISOR


@pytest.mark.parametrize("there", [False, True])
def test_the_deadline_timer_is_offered_exactly_when_the_local_apic_has_it(there: bool) -> None:
    assert bool(cpuid(CpuTopology.flat(1), tsc_deadline=there)[1, 0].ecx & TSC_DEADLINE) is there


@given(topologies())
def test_leaf_4_shares_caches_by_core_and_by_die_and_counts_cores(t: CpuTopology) -> None:
    table = cpuid(t)
    core, die, package = table[0xB, 0].eax, t.thread_bits + t.core_bits, table[0xB, 1].eax
    for i, (level, _) in enumerate(CACHES):
        eax = table[4, i].eax
        assert (eax >> 14 & 0xFFF) + 1 == 1 << (core if level < 3 else die)
        assert (eax >> 26) + 1 == min(1 << package - core, 64)
        assert eax & 0x3FFF == supported()[3 + i].eax & 0x3FFF
    assert table[4, len(CACHES)].eax == 0


def test_what_kvm_does_not_have_is_not_shown() -> None:
    table = cpuid(CpuTopology.flat(1))
    assert table[6, 0].ecx == 1  # no energy-performance bias
    assert table[0xA, 0].eax == 0x0730_0605
    without = [e._replace(eax=0x0030_0002) if e.leaf == 0xA else e for e in supported()]
    assert cpuid(CpuTopology.flat(1), offer=without)[0xA, 0].eax == 0


def test_everything_else_is_as_the_host_offers_it() -> None:
    table = cpuid(CpuTopology.flat(2))
    untouched = {2, 0x4000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0008, 0x8000_001D, 0x8000_001E}
    for entry in supported():
        if entry.leaf in untouched:
            assert table[entry.leaf, entry.subleaf] == entry


@given(topologies(), st.data())
def test_amd_guests_find_their_package_core_and_node(t: CpuTopology, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, t.max_cpus - 1))
    table = cpuid(t, index, supported(AMD))
    die_threads = t.threads * t.cores * t.clusters
    assert table[0x8000_0008, 0].ecx & 0xFF == die_threads * t.dies - 1
    shift = table[0x8000_0008, 0].ecx >> 12 & 0xF
    assert t.apic_id(index) >> shift == index // (die_threads * t.dies)
    assert bool(table[0x8000_0001, 0].ecx & 2) is (die_threads * t.dies > 1)
    assert table[0x8000_001E, 0].eax == t.apic_id(index)
    assert table[0x8000_001E, 0].ebx >> 8 == t.threads - 1
    assert table[0x8000_001E, 0].ecx >> 8 == t.dies - 1
    for i, (level, _) in enumerate(CACHES):
        assert (table[0x8000_001D, i].eax >> 14 & 0xFFF) + 1 == (t.threads if level < 3 else die_threads)


def test_the_core_number_of_an_amd_guest_is_that_within_its_package() -> None:
    t = CpuTopology(16, 16, sockets=2, cores=4, threads=2)
    assert [cpuid(t, i, supported(AMD))[0x8000_001E, 0].ebx & 0xFF for i in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert [cpuid(t, i, supported(AMD))[0x8000_001E, 0].ecx & 0xFF for i in (0, 7, 8, 15)] == [0, 0, 1, 1]
