"""The driver's side of a split virtqueue, in words of the specification. Honest by default; every number can be made wrong."""

from __future__ import annotations

from vmm_core.guestmem import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4


class Ring:
    """Three rings in guest memory, and where the driver stands in them."""

    def __init__(self, memory: GuestMemory, size: int = 8, base: int = 0x1000) -> None:
        self.memory, self.size = memory, size
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        memory.write(base, bytes(self.end - base))
        self.avail_idx = 0
        self.used_seen = 0
        self._free = 0

    def descriptor(
        self, index: int, addr: int, length: int, flags: int = 0, following: int = 0, table: int | None = None
    ) -> None:
        at = (self.desc if table is None else table) + 16 * index
        self.memory.store(at, 8, addr)
        self.memory.store(at + 8, 4, length)
        self.memory.store(at + 12, 2, flags)
        self.memory.store(at + 14, 2, following)

    def chain(self, *buffers: tuple[int, int, bool], table: int | None = None) -> int:
        """Lay out (address, length, device may write) as a chain, in an indirect table if one is given; return its head."""
        head = self._free
        if table is None:
            indices = [(head + i) % self.size for i in range(len(buffers))]
            self._free = (head + len(buffers)) % self.size
        else:
            indices = list(range(len(buffers)))
            self._free = (head + 1) % self.size
            self.descriptor(head, table, 16 * len(buffers), INDIRECT)
        for at, (addr, length, writable) in enumerate(buffers):
            last = at == len(buffers) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.descriptor(indices[at], addr, length, flags, 0 if last else indices[at + 1], table)
        return head

    def offer(self, *heads: int) -> None:
        """Put heads into the available ring and move its index."""
        for head in heads:
            self.memory.store(self.avail + 4 + 2 * (self.avail_idx % self.size), 2, head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.store(self.avail + 2, 2, self.avail_idx)

    def start_at(self, index: int) -> None:
        """Pretend that the ring has gone round before."""
        self.avail_idx = self.used_seen = index
        self.memory.store(self.avail + 2, 2, index)
        self.memory.store(self.used + 2, 2, index)

    def suppress_interrupts(self, suppress: bool = True) -> None:
        self.memory.store(self.avail, 2, int(suppress))

    def set_used_event(self, index: int) -> None:
        self.memory.store(self.avail + 4 + 2 * self.size, 2, index)

    @property
    def avail_event(self) -> int:
        return self.memory.load(self.used + 4 + 8 * self.size, 2)

    @property
    def kicks_unwanted(self) -> bool:
        return bool(self.memory.load(self.used, 2) & 1)

    @property
    def used_idx(self) -> int:
        return self.memory.load(self.used + 2, 2)

    def collect(self) -> list[tuple[int, int]]:
        """Return what the device gave back since the last time: (head, bytes written)."""
        done = []
        while self.used_seen != self.used_idx:
            at = self.used + 4 + 8 * (self.used_seen % self.size)
            done.append((self.memory.load(at, 4), self.memory.load(at + 4, 4)))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return done
