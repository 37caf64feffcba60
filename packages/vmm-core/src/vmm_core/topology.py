"""How the vCPUs of a machine are arranged: sockets, dies, clusters, cores, threads."""

from __future__ import annotations

from typing import NamedTuple

# An APIC id that a guest can use. 255 is all of them; from 256 on a vCPU gets no interrupt of a device unless the machine has
# interrupt remapping: I/O APICs and messages have eight bits for who is meant (Intel SDM vol. 3, section 12.11.1).
MAX_APIC_ID = 254


def _bits(count: int) -> int:
    """Return how many bits number `count` things: 0 for one."""
    return (count - 1).bit_length()


class CpuTopology(NamedTuple):
    """vCPU numbers run through threads first, then cores, dies and sockets.

    `cpus` start with the machine; the product of the five counts is `max_cpus` (1 to 254).
    """

    cpus: int
    max_cpus: int
    sockets: int = 1
    dies: int = 1
    clusters: int = 1
    cores: int = 1
    threads: int = 1

    @classmethod
    def flat(cls, cpus: int) -> CpuTopology:
        """Return one socket with `cpus` cores of one thread."""
        return cls(cpus, cpus, cores=cpus)

    @property
    def thread_bits(self) -> int:
        """Width of the thread number in an APIC id (Intel SDM vol. 3, section 9.9.1)."""
        return _bits(self.threads)

    @property
    def core_bits(self) -> int:
        """Width of the core number in an APIC id. Clusters have no level of their own there and count as cores."""
        return _bits(self.cores * self.clusters)

    @property
    def die_bits(self) -> int:
        """Width of the die number in an APIC id."""
        return _bits(self.dies)

    def apic_id(self, index: int) -> int:
        """Return the APIC id of vCPU `index`: each level in a field of its own width, so that guests can take it apart.

        Equal to `index` when every count is a power of two. May be more than MAX_APIC_ID otherwise: a machine is refused then.
        """
        thread, rest = index % self.threads, index // self.threads
        core, rest = rest % (self.cores * self.clusters), rest // (self.cores * self.clusters)
        die, socket = rest % self.dies, rest // self.dies
        value = socket << self.die_bits | die
        return (value << self.core_bits | core) << self.thread_bits | thread
