"""The machine itself: `-machine`, `-accel`, `-cpu`, `-smp`, `-m`.

Not here: what is plugged into it (backends, devices).
"""

from __future__ import annotations

from vmm_core.topology import MAX_APIC_ID, CpuTopology

from .declare import Parameters, Record, key
from .errors import BadKey
from .values import ON_OFF, SWITCH, Choice, GiB, Integer, KiB, MiB, Size

MAX_CPUS = 254
PAGE = 4 * KiB
_LEVEL = Integer(1, MAX_CPUS)


class Machine(Parameters):
    """`-machine`: the kind of machine and properties of the whole."""

    type: str = key(
        Choice("microvm", later=("q35", "virt", "none"), fold=True),
        default="microvm",
        positional=True,
        doc="kind of machine",
        note="`q35`, `virt` and `none` are not supported yet",
    )
    acpi: bool = key(
        SWITCH,
        default=True,
        doc="ACPI tables, power button and sleep registers beside the MP table",
        note="not in StratoVirt; `acpi=off` is StratoVirt's machine with a clock and the keyboard controller's reset line",
    )
    mem_share: bool = key(SWITCH, default=False, doc="guest memory can be shared with other processes (vhost-user)")
    dump_guest_core: bool = key(SWITCH, default=True, doc="guest memory is part of a core dump")
    accel: str = key(
        Choice("kvm", "kvm:tcg", "tcg"),
        default="kvm",
        doc="accepted for libvirt; KVM is always used",
        note="as in StratoVirt: no effect",
    )
    usb: bool = key(SWITCH, default=False, doc="accepted for libvirt; only `off`")

    def check(self) -> None:
        if self.usb:
            raise BadKey("usb=on", "only usb=off; a USB controller is added with -device")


def ignores_acpi(command_line: str) -> bool:
    """Tell whether a kernel with this command line leaves ACPI alone: the last of Linux's words about it is `acpi=off`."""
    words = command_line.split()
    if "--" in words:  # what follows is for the guest's first program
        words = words[: words.index("--")]
    said = [word for word in words if word in ("acpi=off", "acpi=on", "acpi=force")]
    return said[-1:] == ["acpi=off"]


class Accel(Parameters):
    """`-accel`: what runs the guest."""

    name: str = key(Choice("kvm"), positional=True, doc="the hypervisor")


class Cpu(Parameters):
    """`-cpu`: what the guest sees of the host's CPU."""

    model: str = key(
        Choice("host", "max"),
        default="host",
        positional=True,
        doc="the guest sees the host's CPU",
        note="StratoVirt takes any word and gives the host's CPU; any other word is refused here",
    )
    pmu: bool = key(ON_OFF, default=False, doc="performance counters (aarch64)", note="as in StratoVirt: no effect on x86_64")
    sve: bool = key(ON_OFF, default=False, doc="scalable vectors (aarch64)", note="as in StratoVirt: no effect on x86_64")


class Smp(Parameters):
    """`-smp`: number and arrangement of the vCPUs."""

    cpus: int = key(
        Integer(1, MAX_CPUS, "vCPUs"),
        positional=True,
        doc="vCPUs at start",
        note="APIC ids are at most 254, because there is no interrupt remapping: with counts that are no powers of two, such as "
        "`252,sockets=84,cores=3`, it is fewer vCPUs",
    )
    maxcpus: int = key(Integer(0, MAX_CPUS, "vCPUs"), default=0, doc="vCPUs at most; 0: the product, or cpus")
    sockets: int | None = key(_LEVEL, default=None, doc="sockets")
    dies: int = key(_LEVEL, default=1, doc="dies in a socket")
    clusters: int = key(_LEVEL, default=1, doc="clusters in a die")
    cores: int | None = key(_LEVEL, default=None, doc="cores in a cluster")
    threads: int | None = key(_LEVEL, default=None, doc="threads in a core")

    def check(self) -> None:
        maximum, levels = self._levels()
        product = 1
        for level in levels:
            product *= level
        if maximum > MAX_CPUS:
            raise BadKey(f"{self.cpus}", f"the topology has {maximum} vCPUs; at most {MAX_CPUS} vCPUs")
        if maximum < self.cpus:
            raise BadKey(f"{self.cpus}", f"more vCPUs than the maximum of {maximum}")
        if product != maximum:
            raise BadKey(
                f"{self.cpus}",
                f"sockets*dies*clusters*cores*threads = {'*'.join(map(str, levels))} = {product} is not maxcpus={maximum}",
            )
        last = self.topology.apic_id(self.cpus - 1)
        if last > MAX_APIC_ID:
            raise BadKey(
                f"{self.cpus}",
                f"sockets*dies*clusters*cores*threads = {'*'.join(map(str, levels))} gives vCPU {self.cpus - 1} APIC id {last}, "
                f"each count in bits of its own; at most {MAX_APIC_ID}, which counts that are powers of two never exceed",
            )

    def _levels(self) -> tuple[int, tuple[int, int, int, int, int]]:
        """Return the maximum and the five counts, missing ones filled in as the reference says (section 4.4)."""
        sockets, cores, threads, fixed = self.sockets, self.cores, self.threads, self.dies * self.clusters
        if self.maxcpus:
            maximum = self.maxcpus
        elif sockets and cores and threads:
            maximum = sockets * fixed * cores * threads
        else:
            maximum = self.cpus
        if cores is None:
            sockets, threads = sockets or 1, threads or 1
            cores = maximum // (sockets * fixed * threads)
        elif sockets is None:
            threads = threads or 1
            sockets = maximum // (fixed * cores * threads)
        if threads is None:
            threads = maximum // (sockets * fixed * cores) if sockets and cores else 0
        return maximum, (sockets or 0, self.dies, self.clusters, cores, threads)

    @property
    def topology(self) -> CpuTopology:
        """The arrangement, with every count filled in."""
        maximum, levels = self._levels()
        return CpuTopology(self.cpus, maximum, *levels)


class MemorySize(Parameters):
    """`-m`: amount of guest memory."""

    size: int = key(Size(128 * MiB, 512 * GiB), positional=True, doc="guest memory", note="in whole pages of 4 KiB")

    def check(self) -> None:
        if self.size % PAGE:
            raise BadKey(f"{self.size // KiB}K", "not in whole pages of 4 KiB")


class MemoryNode(Record):
    """RAM of one node: how much, and on which nodes of the host (none: anywhere) by which policy."""

    size: int
    policy: str = "default"
    host_nodes: tuple[int, ...] = ()


class Memory(Record):
    """Guest memory as all options together describe it. `size` in bytes; `path` is a file or folder that backs it.

    `nodes` follow each other in it; there are none without `-numa`.
    """

    size: int = 256 * MiB
    path: str | None = None
    prealloc: bool = False
    share: bool = False
    dump: bool = True
    nodes: tuple[MemoryNode, ...] = ()
