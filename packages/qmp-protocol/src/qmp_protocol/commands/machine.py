"""CPUs, memory, balloon, migration (reference sections 5, 11, 12 and 14)."""

from __future__ import annotations

from typing import Any, Literal

from qmp_protocol.schema import Command, Empty, Machines, Struct, member, u32, u64


class CpuProperties(Struct):
    """Where a CPU sits in the topology. x86 has `die_id`, arm has `cluster_id`."""

    core_id: u32 = member("core-id")
    die_id: u32 | None = member(default=None)
    cluster_id: u32 | None = member(default=None)
    socket_id: u32 = member("socket-id")
    thread_id: u32 = member("thread-id")


class CpuInfo(Struct):
    """One CPU."""

    CPU: u32 = member(doc="its index")
    arch: Literal["x86", "arm"]
    current: bool = member(default=True, doc="always true")
    halted: bool = member(default=False, doc="always false")
    props: CpuProperties
    qom_path: str = member(doc="`/machine/unattached/device[index]`")
    thread_id: u32 = member(doc="the host's thread id")


class QueryCpus(Command[list[CpuInfo]], name="query-cpus"):
    """List the CPUs with their host threads."""


class HotpluggableCpu(Struct):
    """One place for a CPU."""

    props: CpuProperties
    qom_path: str | None = member("qom-path", default=None, doc="absent when no CPU is in the place")
    type: str = member(doc="`host-x86-cpu` or `host-aarch64-cpu`")
    vcpus_count: u32 = member("vcpus-count", default=1)


class QueryHotpluggableCpus(Command[list[HotpluggableCpu]], name="query-hotpluggable-cpus"):
    """List the places for CPUs, from index 0 to maxcpus - 1."""


class IothreadInfo(Struct):
    """One I/O thread."""

    id: str
    thread_id: u32 = member("thread-id", doc="the host's thread id")
    poll_max_ns: u64 = member("poll-max-ns", default=0)
    poll_grow: u64 = member("poll-grow", default=0)
    poll_shrink: u64 = member("poll-shrink", default=0)


class QueryIothreads(Command[list[IothreadInfo]], name="query-iothreads", strict=False):
    """List the I/O threads in the order in which they started."""


class Balloon(Command[Empty], name="balloon", strict=False):
    """Set how much memory the guest should have. The event BALLOON_CHANGED comes before the reply, with what it has now.

    Errors: DeviceNotActive when there is no balloon or the guest has no driver for it.
    """

    value: u64 = member(doc="bytes; rounded down to 4 KiB, at most the guest's memory")


class BalloonStatistics(Struct):
    """What the guest told about its memory; QEMU's names. What it did not tell is absent."""

    stat_swap_in: u64 | None = member("stat-swap-in", default=None, doc="bytes")
    stat_swap_out: u64 | None = member("stat-swap-out", default=None, doc="bytes")
    stat_major_faults: u64 | None = member("stat-major-faults", default=None)
    stat_minor_faults: u64 | None = member("stat-minor-faults", default=None)
    stat_free_memory: u64 | None = member("stat-free-memory", default=None, doc="bytes")
    stat_total_memory: u64 | None = member("stat-total-memory", default=None, doc="bytes")
    stat_available_memory: u64 | None = member("stat-available-memory", default=None, doc="bytes, without swapping")
    stat_disk_caches: u64 | None = member("stat-disk-caches", default=None, doc="bytes")
    stat_htlb_pgalloc: u64 | None = member("stat-htlb-pgalloc", default=None, doc="huge pages that were got")
    stat_htlb_pgfail: u64 | None = member("stat-htlb-pgfail", default=None, doc="huge pages that were not got")
    stat_oom_kills: u64 | None = member("stat-oom-kills", default=None)
    stat_alloc_stalls: u64 | None = member("stat-alloc-stalls", default=None)
    stat_async_scans: u64 | None = member("stat-async-scans", default=None, doc="pages")
    stat_direct_scans: u64 | None = member("stat-direct-scans", default=None, doc="pages")
    stat_async_reclaims: u64 | None = member("stat-async-reclaims", default=None, doc="pages")
    stat_direct_reclaims: u64 | None = member("stat-direct-reclaims", default=None, doc="pages")


class BalloonInfo(Struct):
    """How much memory the guest has."""

    actual: u64 = member(doc="bytes")
    stats: BalloonStatistics | None = member(default=None, doc="when the balloon polls the guest, and it has answered")
    last_update: u64 | None = member("last-update", default=None, doc="when the guest told `stats`, in seconds since 1970")


class QueryBalloon(Command[BalloonInfo], name="query-balloon", strict=False):
    """Say how much memory the guest has.

    Errors: DeviceNotActive when there is no balloon.
    """


class QueryMem(Command[Empty], name="query-mem"):
    """Print the memory map to the monitor's own standard output, for debugging."""


class QueryMemGpa(
    Command[str],
    name="query-mem-gpa",
    machines=Machines.MICROVM | Machines.STANDARD,
    refusal="query_mem_gpa is not supported yet",
):
    """Read four bytes of guest memory, as a little-endian number in upper-case hexadecimal.

    Errors: GenericError when the address is no number or no memory.
    """

    gpa: str = member(default="", doc="guest physical address, hexadecimal without 0x")


class QueryVcpuReg(
    Command[str],
    name="query-vcpu-reg",
    machines=Machines.MICROVM | Machines.STANDARD,
    refusal="query_vcpu_reg is not supported yet",
):
    """Read a CPU register, as a number in upper-case hexadecimal.

    On x86_64 by name: `rip`, `rsp`, `cr3`, `efer`, `cs`, `fs_base`, `msr:` and the number of an MSR in hexadecimal, or `apic:`
    and the offset of a local APIC register, as in `apic:390`; CPUs stand still meanwhile. On aarch64 by its KVM number; a
    running machine is paused meanwhile, with the events STOP and RESUME.

    Errors: GenericError when there is no such CPU or register.
    """

    addr: str = member(doc="x86_64: the register's name; aarch64: its KVM_GET_ONE_REG id, hexadecimal without 0x")
    vcpu: u32 = member(doc="the CPU's index")


class Migrate(Command[Empty], name="migrate", strict=False):
    """Save the machine to a directory (`file:DIR`; the reply comes when it is done), or move it to another process
    (`unix:PATH`, `tcp:ADDRESS:PORT`; the reply comes when it is connected).

    microvm knows only `file:`.

    Errors: GenericError when the URI is none of these, or saving or connecting fails.
    """

    uri: str


class MigrationInfo(Struct):
    """How far a migration is."""

    status: Literal["none", "setup", "active", "completed", "failed", "canceled"] = member(
        default="none", doc="QEMU leaves it out when there was no migration"
    )


class QueryMigrate(Command[MigrationInfo], name="query-migrate", strict=False):
    """Say how far the migration is. After start-up: `setup`; after `-incoming`: `completed`."""


class MigrateCancel(Command[Empty], name="migrate_cancel", strict=False):
    """Stop a migration under way; the machine runs on here.

    Errors: GenericError when the migration is over.
    """


class QueryMigrateCapabilities(Command[list[Any]], name="query-migrate-capabilities", strict=False):
    """List migration capabilities. Always empty."""
