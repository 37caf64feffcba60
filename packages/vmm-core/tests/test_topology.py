"""The order of vCPU numbers through threads, cores, clusters, dies and sockets."""

from __future__ import annotations

from vmm_core.topology import CpuTopology


def test_a_flat_topology_is_one_socket_of_single_threaded_cores() -> None:
    t = CpuTopology.flat(3)
    assert (t.cpus, t.max_cpus, t.sockets, t.cores, t.threads) == (3, 3, 1, 3, 1)
    assert [t.apic_id(i) for i in range(3)] == [0, 1, 2]


def test_each_level_has_a_field_as_wide_as_it_needs() -> None:
    t = CpuTopology(90, 90, sockets=2, dies=3, clusters=1, cores=5, threads=3)
    assert (t.thread_bits, t.core_bits, t.die_bits) == (2, 3, 2)
    ids = [t.apic_id(i) for i in range(90)]
    assert ids[:4] == [0, 1, 2, 4]  # the fourth thread is on the second core
    assert ids[15] == 1 << 5  # the second die
    assert ids[45] == 1 << 7  # the second socket
    assert ids == sorted(ids)


def test_clusters_count_as_cores() -> None:
    split = CpuTopology(8, 8, clusters=2, cores=2, threads=2)
    joined = CpuTopology(8, 8, cores=4, threads=2)
    assert [split.apic_id(i) for i in range(8)] == [joined.apic_id(i) for i in range(8)]
