"""`-numa` and `-object memory-backend-*`: what holds the RAM of each node, and on which nodes of the host it lies.

The guest of a microvm learns of no nodes (no table tells of them), as on StratoVirt's: all this is about the host's memory.

Not here: how RAM is made (`vmm_core.guestmem`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .declare import Parameters, key
from .errors import BadKey, CommandLineError, show
from .machine import MemoryNode
from .values import ID, ON_OFF, PATH, SWITCH, Choice, GiB, Integer, KiB, Kind, Reference, Size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .machine import Memory

MAX_NODES = 8
_NODE = Integer(0, 127)
MEMDEV = Reference("memory backend")
_ALWAYS = "StratoVirt looks at it only when a backend has host-nodes"
_NO_PATH = {"mem-path": "only memory-backend-file is in a file"}


class Numbers(Kind[tuple[int, ...]]):
    """Numbers up to `high` and ranges of them, separated by `:`. Brackets around them count for nothing."""

    def __init__(self, high: int) -> None:
        self._one = Integer(0, high)
        self.allowed = f"numbers and ranges such as 0-3, up to {high}, separated by `:`"

    def parse(self, text: str) -> tuple[int, ...]:
        found: list[int] = []
        for part in text.lstrip("[").rstrip("]").split(":"):
            first, dash, last = part.partition("-")
            low = self._one.parse(first)
            high = self._one.parse(last) if dash else low
            if dash and low >= high:
                raise ValueError(f"{show(part)} is no range: it has to go up")
            found += range(low, high + 1)
        return tuple(found)

    def render(self, value: tuple[int, ...]) -> str:
        return ":".join(map(str, value))


class MemoryBackend(Parameters):
    """RAM of one node. Of those that `-numa` uses, all have to be alike but for size and place on the host."""

    id: str = key(ID, doc="the name that -numa uses")
    size: int = key(Size(4 * KiB, 512 * GiB), doc="amount of RAM")
    host_nodes: tuple[int, ...] = key(Numbers(127), default=(), doc="nodes of the host that it lies on")
    policy: str = key(
        Choice("default", "preferred", "bind", "interleave", fold=True),
        default="default",
        doc="what the host's kernel makes of them",
    )
    share: bool = key(ON_OFF, default=False, doc="other processes can map it (vhost-user)", note=_ALWAYS)
    dump_guest_core: bool = key(SWITCH, default=True, doc="it is part of a core dump", note=_ALWAYS)
    mem_prealloc: bool = key(SWITCH, default=False, doc="all of it is touched at the start", note=_ALWAYS)

    def check(self) -> None:
        if self.policy != "default" and not self.host_nodes:
            raise BadKey(f"policy={self.policy}", "needs host-nodes=...")

    @property
    def path(self) -> str | None:
        """The file or folder that holds it."""
        return None


class MemoryBackendRam(MemoryBackend, selector="memory-backend-ram"):
    """RAM of a node."""

    unknown = _NO_PATH


class MemoryBackendMemfd(MemoryBackend, selector="memory-backend-memfd"):
    """RAM of a node, in a file without a name."""

    unknown = _NO_PATH


class MemoryBackendFile(MemoryBackend, selector="memory-backend-file"):
    """RAM of a node in a file, or in an unnamed one in a folder, such as that of huge pages."""

    mem_path: str = key(PATH, doc="the file or folder; the same for all nodes, which follow each other in it")

    @property
    def path(self) -> str | None:
        return self.mem_path


class NumaNode(Parameters, selector="node"):
    """A node: its CPUs and its RAM."""

    nodeid: int = key(_NODE, doc="its number")
    cpus: tuple[int, ...] = key(Numbers(253), doc="its CPUs")
    memdev: str = key(MEMDEV, doc="the -object memory-backend-... that is its RAM")


class NumaDistance(Parameters, selector="dist"):
    """How far a node is from another: 10 to itself, more to others."""

    src: int = key(_NODE, doc="from this node")
    dst: int = key(_NODE, doc="to this one")
    val: int = key(Integer(10, 255, bits=8), doc="the distance; 20 between nodes of which nothing is said")

    def check(self) -> None:
        if (self.val == 10) != (self.src == self.dst):
            raise BadKey(f"val={self.val}", "10 is the distance of a node to itself, and of no other")


NumaEntry = NumaNode | NumaDistance
ENTRIES: dict[str, type[NumaEntry]] = {"node": NumaNode, "dist": NumaDistance}


def arrange(entries: Sequence[NumaEntry], backends: Mapping[str, MemoryBackend], memory: Memory, cpus: int) -> Memory:
    """Return `memory` as the nodes have it. Raises CommandLineError for nodes that are not as they have to be."""
    nodes = sorted((entry for entry in entries if isinstance(entry, NumaNode)), key=lambda node: node.nodeid)
    _check_nodes(nodes, cpus)
    _check_distances([entry for entry in entries if isinstance(entry, NumaDistance)], {node.nodeid for node in nodes})
    if not nodes:
        return memory
    parts = [backends[node.memdev] for node in nodes]
    total = sum(part.size for part in parts)
    if total != memory.size:
        raise CommandLineError("-numa", "", f"the nodes have {total} bytes of memory together, -m says {memory.size}")
    first = parts[0]
    for node, part in zip(nodes, parts, strict=True):
        for name in ("share", "dump-guest-core", "mem-prealloc", "mem-path"):
            one, other = (_text(backend, name) for backend in (first, part))
            if one != other:
                raise CommandLineError(
                    "-numa",
                    f"node: nodeid={node.nodeid}: memdev={show(node.memdev)}",
                    f"{other}, and node {nodes[0].nodeid} has {one}: nodes that differ in this are not supported yet",
                )
    if memory.path is not None and first.path is not None:
        raise CommandLineError("-mem-path", show(memory.path), f"the nodes' memory is in {show(first.path)}")
    return memory.replace(
        path=memory.path if first.path is None else first.path,
        prealloc=memory.prealloc or first.mem_prealloc,
        share=memory.share or first.share,
        dump=memory.dump and first.dump_guest_core,
        nodes=tuple(MemoryNode(size=part.size, policy=part.policy, host_nodes=part.host_nodes) for part in parts),
    )


def _text(backend: MemoryBackend, name: str) -> str:
    found = backend.keys.get(name)
    return f"{name}={found.kind.render(getattr(backend, found.attribute))}" if found else f"no {name}"


def _check_nodes(nodes: Sequence[NumaNode], cpus: int) -> None:
    if len(nodes) > MAX_NODES:
        raise CommandLineError("-numa", "", f"{len(nodes)} nodes; at most {MAX_NODES}")
    numbers: set[int] = set()
    homes: dict[int, int] = {}
    for node in nodes:
        where = f"node: nodeid={node.nodeid}"
        if node.nodeid in numbers:
            raise CommandLineError("-numa", where, "given more than once")
        numbers.add(node.nodeid)
        for cpu in node.cpus:
            if cpu >= cpus:
                raise CommandLineError("-numa", f"{where}: cpus", f"there is no CPU {cpu}: the last of {cpus} is CPU {cpus - 1}")
            if cpu in homes:
                raise CommandLineError("-numa", f"{where}: cpus", f"CPU {cpu} belongs to node {homes[cpu]} already")
            homes[cpu] = node.nodeid


def _check_distances(distances: Sequence[NumaDistance], nodes: set[int]) -> None:
    seen: set[tuple[int, int]] = set()
    for distance in distances:
        where = f"dist: src={distance.src},dst={distance.dst}"
        for number in (distance.src, distance.dst):
            if number not in nodes:
                raise CommandLineError("-numa", where, f"there is no node {number}")
        if (distance.src, distance.dst) in seen:
            raise CommandLineError("-numa", where, "given more than once")
        seen.add((distance.src, distance.dst))
