"""A hypervisor without a guest, and without KVM: vCPUs that stand idle, interrupts that are recorded, doorbells that still ring.

`-mod-test` runs a whole machine on it, driven over a socket (`vmm_core.testprotocol`); device tests drive one in their own
process. Time is a `vmm_core.clock.VirtualClock`. Source: reference migration-and-test-mode, sections 9, 11 and 13.

Not here: the devices, which are the real ones on the real buses.
"""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Lock, get_native_id
from typing import TYPE_CHECKING, Any, NamedTuple

from vmm_core.errors import HypervisorError
from vmm_core.state import expect, expect_range, versioned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm_core.bus import Bus
    from vmm_core.clock import VirtualClock
    from vmm_core.guestmem import GuestMemory
    from vmm_core.hypervisor import Hypervisor, Vcpu, VcpuListener

    def _is_a_hypervisor(hypervisor: RecordingHypervisor) -> Hypervisor:
        return hypervisor


class RecordedLine:
    """An interrupt line that counts its edges, or records a message for each once it is routed to one. Any thread."""

    def __init__(self, gsi: int, records: MessageRecords | None = None) -> None:
        """A device test needs no more than a number; a hypervisor adds where its messages go."""
        self._gsi = gsi
        self._records = records
        self._message: tuple[int, int] | None = None
        self._edges = 0
        self._lock = Lock()
        self._fd = -1

    @property
    def gsi(self) -> int:
        """The line's number."""
        return self._gsi

    def trigger(self) -> None:
        """Record one edge."""
        with self._lock:
            self._record(1)

    def fileno(self) -> int:
        """An event descriptor whose count is recorded as edges; it lives as long as the line."""
        with self._lock:
            if self._fd < 0:
                self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return self._fd

    @property
    def edges(self) -> int:
        """Edges recorded and not yet taken."""
        with self._lock:
            self._drain()
            return self._edges

    def take(self, count: int | None = None) -> int:
        """Take away `count` edges, or all; return how many there were to take."""
        with self._lock:
            self._drain()
            taken = self._edges if count is None else min(count, self._edges)
            self._edges -= taken
            return taken

    def put(self, edges: int) -> None:
        """Make `edges` the number recorded: a restored state."""
        with self._lock:
            self._drain()
            self._edges = edges

    def route(self, message: tuple[int, int] | None) -> None:
        """Record (address, data) for every edge from here on, or edges again for None."""
        with self._lock:
            self._drain()
            self._message = message

    def close(self) -> None:
        """Close the descriptor, if anyone asked for it. Twice is fine."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _drain(self) -> None:
        if self._fd >= 0:
            with suppress(BlockingIOError):
                self._record(os.eventfd_read(self._fd))

    def _record(self, count: int) -> None:
        if self._message is not None and self._records is not None:
            self._records.add(*self._message)
        else:
            self._edges += count


class MessageRecords:
    """Message-signalled interrupts that were sent: pairs of address and data, each once (section 13)."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, int], None] = {}

    def add(self, address: int, data: int) -> None:
        """Record one message. Any thread."""
        self._sent[address, data] = None

    def take(self, address: int, data: int) -> bool:
        """Whether it was sent since this was last asked."""
        return self._sent.pop((address, data), False) is None

    def pending(self) -> tuple[tuple[int, int], ...]:
        """Everything sent and not asked for, oldest first."""
        return tuple(self._sent)


@versioned(1)
class RecordsState(NamedTuple):
    """Interrupts sent and not yet looked at: (GSI, edges) and (address, data)."""

    edges: tuple[tuple[int, int], ...]
    messages: tuple[tuple[int, int], ...]


@versioned(1)
class IdleVcpuState(NamedTuple):
    """A vCPU that never ran has only its number."""

    number: int


class IdleVcpu:
    """A vCPU that is said to run and does nothing (`vmm_core.hypervisor.Vcpu`). It has no thread of its own."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.thread_id = 0
        self.running = False

    @property
    def index(self) -> int:
        """Its number, from 0."""
        return self._index

    def start(self) -> None:
        """Stand ready; the thread that clients are told of is the caller's."""
        self.thread_id = get_native_id()

    def request_pause(self) -> None:
        """Stop at once."""
        self.running = False

    def wait_paused(self, timeout: float) -> bool:
        """There is nothing to wait for."""
        return not self.running

    def resume(self) -> None:
        """Run, idly."""
        self.running = True

    def reset(self) -> None:
        """There are no registers to load."""

    def stop(self) -> None:
        """End. Twice is fine."""
        self.running = False
        self.thread_id = 0

    def save(self) -> IdleVcpuState:
        """Return the number: nothing else can have changed."""
        return IdleVcpuState(self._index)

    def restore(self, state: Any) -> None:
        """Take back what save() returned. Raises StateError for another state, such as that of a vCPU which ran."""
        new = expect(state, IdleVcpuState, f"CPU {self._index}")
        expect_range(new.number, self._index, self._index, f"CPU {self._index}: number")


class RecordingHypervisor:
    """The test mode's hypervisor (`vmm_core.hypervisor.Hypervisor`)."""

    def __init__(self) -> None:
        self.memory: GuestMemory | None = None
        self.lines: dict[int, RecordedLine] = {}
        self.messages = MessageRecords()
        self._doorbells: dict[tuple[bool, int], list[tuple[int, int | None, int]]] = {}
        self._lock = Lock()

    def map_memory(self, memory: GuestMemory) -> None:
        """Remember the RAM: nobody but devices and the test socket looks at it."""
        self.memory = memory

    def show(self, address: int, size: int) -> memoryview | None:
        """None: who reads here asks the bus."""
        return None

    def set_shown(self, address: int, shown: bool) -> None:
        """Do nothing, as nothing is shown."""

    def interrupt_line(self, gsi: int) -> RecordedLine:
        """Return the recording line of `gsi`; the same object for the same number."""
        with self._lock:
            line = self.lines.get(gsi)
            if line is None:
                line = self.lines[gsi] = RecordedLine(gsi, self.messages)
            return line

    def route_message(self, gsi: int, address: int, data: int) -> None:
        """Record edges of `gsi` as this message."""
        self.interrupt_line(gsi).route((address, data))

    def unroute_message(self, gsi: int) -> None:
        """Record edges of `gsi` as edges."""
        self.interrupt_line(gsi).route(None)

    def take_message(self, address: int, data: int) -> bool:
        """Whether the message was sent since this was last asked."""
        for line in list(self.lines.values()):
            _ = line.edges  # an event descriptor may hold some that are not recorded yet
        return self.messages.take(address, data)

    def add_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
        """Ring `fd` for writes of `size` bytes (0: any) at `address`, only those of `match` if given.

        Raises HypervisorError when the same doorbell is there already.
        """
        with self._lock:
            bells = self._doorbells.get((port, address), [])
            if any((size, match) == (other_size, other_match) for other_size, other_match, _ in bells):
                raise HypervisorError(f"there is an ioeventfd at {address:#x} of {size} bytes already")
            self._doorbells[port, address] = [*bells, (size, match, fd)]

    def remove_ioeventfd(self, address: int, size: int, fd: int, *, match: int | None = None, port: bool = False) -> None:
        """Take a doorbell away. Raises HypervisorError when it is not there."""
        with self._lock:
            bells = self._doorbells.get((port, address), [])
            if (size, match, fd) not in bells:
                raise HypervisorError(f"there is no ioeventfd at {address:#x} of {size} bytes")
            left = [bell for bell in bells if bell != (size, match, fd)]
            if left:
                self._doorbells[port, address] = left
            else:
                del self._doorbells[port, address]

    def ring(self, address: int, size: int, value: int, *, port: bool = False) -> bool:
        """Do for a write what KVM would: signal the doorbell that it matches. False: the write is the device's."""
        for bell_size, match, fd in self._doorbells.get((port, address), ()):
            if bell_size in (0, size) and match in (None, value):
                with suppress(BlockingIOError):  # a full counter is as loud as it gets
                    os.eventfd_write(fd, 1)
                return True
        return False

    def coalesce(self, address: int, size: int, *, port: bool = False) -> None:
        """Nothing: every write is delivered at once."""

    def flush_coalesced(self) -> None:
        """Nothing was collected."""

    def create_vcpu(self, index: int, pio: Bus, mmio: Bus, listener: VcpuListener, boot: object) -> Vcpu:
        """Make an idle vCPU."""
        return IdleVcpu(index)

    @property
    def vm_state(self) -> RecordingHypervisor:
        """This object: the interrupts that are recorded."""
        return self

    def save(self) -> RecordsState:
        """Return the interrupts that nobody has asked for yet."""
        edges = tuple((gsi, count) for gsi, line in sorted(self.lines.items()) if (count := line.edges))
        return RecordsState(edges, self.messages.pending())

    def restore(self, state: Any) -> None:
        """Put records back. Raises StateError."""
        new = expect(state, RecordsState, "test mode")
        for line in self.lines.values():
            line.put(0)
        for gsi, edges in new.edges:
            self.interrupt_line(gsi).put(edges)
        for address, data in self.messages.pending():
            self.messages.take(address, data)
        for address, data in new.messages:
            self.messages.add(address, data)

    def reset(self) -> None:
        """Nothing: records are what was sent, and asking is the only way to clear them (section 13)."""

    def start_dirty_log(self) -> None:
        """Raises HypervisorError: only KVM sees who writes to RAM."""
        raise HypervisorError("test mode keeps no dirty log: it does not see writes to guest memory")

    def dirty_pages(self) -> list[tuple[int, bytes]]:
        """Raises HypervisorError, as start_dirty_log() does."""
        raise HypervisorError("test mode keeps no dirty log: it does not see writes to guest memory")

    def stop_dirty_log(self) -> None:
        """Nothing was started."""

    def pause_clock(self) -> None:
        """There is no paravirtual clock."""

    def resume_clock(self) -> None:
        """There is no paravirtual clock."""

    def close(self) -> None:
        """Close every line's descriptor. Twice is fine."""
        for line in self.lines.values():
            line.close()


class MachineAccess:
    """What a test does to a machine: memory and ports as a vCPU sees them, time, and a look at the interrupts.

    The target of `vmm_core.testprotocol`, and the in-process way to the same. Reads and writes that hit nothing read as zeros
    and do nothing, as existing test harnesses expect (section 11).
    """

    def __init__(self, hypervisor: RecordingHypervisor, memory: GuestMemory, mmio: Bus, pio: Bus, clock: VirtualClock) -> None:
        self._hypervisor = hypervisor
        self._memory = memory
        self._mmio = mmio
        self._pio = pio
        self._clock = clock

    # Memory: RAM and memory-mapped devices

    def read(self, address: int, length: int) -> bytes:
        """Read bytes in ascending order; what is a device is read in accesses of 1, 2, 4 or 8 bytes."""
        data = bytearray(length)
        for start, end, ram in self._pieces(address, length):
            at = start - address
            if ram:
                data[at : at + end - start] = self._memory.view(start, end - start)
            else:
                for piece, size in self._accesses(start, end):
                    found = self._mmio.find(piece)
                    if found is not None and piece + size <= found.base + found.length:
                        value = self._mmio.read(piece, size)
                        data[piece - address : piece - address + size] = value.to_bytes(size, "little")
        return bytes(data)

    def write(self, address: int, data: bytes) -> None:
        """Write bytes in ascending order; what is a device is written in accesses of 1, 2, 4 or 8 bytes."""
        for start, end, ram in self._pieces(address, len(data)):
            at = start - address
            if ram:
                self._memory.view(start, end - start)[:] = data[at : at + end - start]
            else:
                for piece, size in self._accesses(start, end):
                    value = int.from_bytes(data[piece - address : piece - address + size], "little")
                    if not self._hypervisor.ring(piece, size, value):
                        self._mmio.write(piece, size, value)

    def fill(self, address: int, length: int, pattern: bytes) -> None:
        """Write `pattern` again and again over `length` bytes."""
        chunk = pattern * max(1, 65536 // len(pattern))
        for start in range(0, length, len(chunk)):
            self.write(address + start, chunk[: length - start])

    def _pieces(self, address: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Cut a range where RAM begins and ends: (first address, address after the last, whether it is RAM)."""
        end = address + length
        for region in self._memory.regions:
            if address >= end or end <= region.base:
                break
            if address < region.base:
                yield address, region.base, False
                address = region.base
            if address < region.base + region.size:
                last = min(end, region.base + region.size)
                yield address, last, True
                address = last
        if address < end:
            yield address, end, False

    def _accesses(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a range outside RAM into (address, size).

        One of 1, 2, 4 or 8 bytes is one access, aligned or not; longer ones are cut into the largest that are aligned.
        """
        if end - start in (1, 2, 4, 8):
            yield start, end - start
            return
        while start < end:
            size = 8
            while start % size or start + size > end:
                size //= 2
            yield start, size
            start += size

    # Ports

    def read_port(self, port: int, size: int) -> int:
        """Read `size` bytes of a port; 0 where there is nothing that answers them all."""
        found = self._pio.find(port)
        return self._pio.read(port, size) if found is not None and port + size <= found.base + found.length else 0

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write `size` bytes to a port."""
        if not self._hypervisor.ring(port, size, value, port=True):
            self._pio.write(port, size, value)

    # Time

    def clock_step(self, delta: int | None) -> int:
        """Move virtual time by `delta` nanoseconds, or to the nearest deadline for None; return the new time."""
        return self._clock.step() if delta is None else self._clock.advance(delta)

    def clock_set(self, time: int) -> int:
        """Move virtual time to `time`; return the new time."""
        return self._clock.set(time)

    # Interrupts

    def take_message(self, address: int, data: int) -> bool:
        """Whether a message-signalled interrupt was sent since this was last asked."""
        return self._hypervisor.take_message(address, data)

    def take_edges(self, gsi: int) -> bool:
        """Whether a line had an edge since this was last asked."""
        line = self._hypervisor.lines.get(gsi)
        return line is not None and line.take() > 0

    def is_pending(self, gsi: int) -> bool:
        """Whether a line has edges that nobody took."""
        line = self._hypervisor.lines.get(gsi)
        return line is not None and line.edges > 0

    def take_edge(self, gsi: int) -> bool:
        """Take one edge; whether there was one."""
        line = self._hypervisor.lines.get(gsi)
        return line is not None and line.take(1) == 1
