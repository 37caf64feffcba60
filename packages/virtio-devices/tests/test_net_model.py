"""Frames in, frames out: what a device does with any buffers, frames, errors and pauses, beside what it should have done."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EAGAIN, EBADFD, EINVAL, EIO, ENOBUFS
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from net_cable import BROADCAST, MAC, OTHER, Net, frame
from virtio_devices.device import F_EVENT_IDX
from virtio_devices.net import taplane
from virtio_devices.net.backend import Backend, Lane
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import ETHERNET, HEADER, OFFLOADS
from virtio_devices.net.taplane import TapLane
from virtio_driver import DATA, new_loop
from vmm_core.guestmem import GuestMemory
from vmm_core.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtio_devices.net.backend import Owner

SIZE = 16  # of the queues
SLOT = 0x8000  # bytes of guest memory for each descriptor of a queue, so that no two buffers in use overlap
UNTOUCHED = 0xEE
VLAN, ANOTHER = 0xEEE, 5  # the driver's is what a frame would be in that ended before its tag, in a buffer that is untouched


class Tap(Backend):
    """A tap without a kernel: ready as long as there are frames, and what it answers to a write is known beforehand."""

    name, features = "tap", OFFLOADS

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.waiting: deque[bytes | int] = deque()  # frames with their headers, and an error that ends it all
        self.answers: deque[int] = deque()
        self.sent: list[bytes] = []

    def lane(self, owner: Owner, pair: int, loop: Loop) -> Lane:
        self.one = TapLane(owner, pair, loop, self.fd)
        return self.one

    def bring(self, data: bytes | int) -> None:
        if not self.waiting:
            os.eventfd_write(self.fd, 1)
        self.waiting.append(data)

    def readv(self, fd: int, views: Sequence[memoryview]) -> int:
        assert fd == self.fd
        assert 0 < len(views) <= 1024
        if not self.waiting:
            raise BlockingIOError(EAGAIN, "")
        data = self.waiting[0]
        if isinstance(data, int):
            raise OSError(data, os.strerror(data))
        self.waiting.popleft()
        if not self.waiting:
            os.eventfd_read(self.fd)
        done = 0
        for view in views:
            part = data[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return done

    def writev(self, fd: int, views: Sequence[memoryview]) -> int:
        assert fd == self.fd
        if self.answers and (number := self.answers.popleft()):
            raise OSError(number, os.strerror(number))
        self.sent.append(b"".join(views))
        return len(self.sent[-1])

    def write(self, fd: int, view: memoryview) -> int:
        return self.writev(fd, [view])

    def close(self) -> None:
        os.close(self.fd)

    @contextmanager
    def plugged_in(self, frames: int, budget: int) -> Iterator[None]:
        """Be there, with turns of so many frames and bytes."""
        with (
            patch("os.readv", self.readv),
            patch("os.writev", self.writev),
            patch("os.write", self.write),
            patch.object(taplane, "FRAMES", frames),
            patch.object(taplane, "BYTES", budget),
            patch.object(taplane, "_MANY", 2),
        ):
            yield


class Model:
    """A driver that knows where its buffers are, and what should become of every frame."""

    def __init__(self, memory: GuestMemory, tap: Tap, *, mergeable: bool, event_idx: bool, choosy: bool) -> None:
        self.memory, self.tap, self.mergeable, self.choosy = memory, tap, mergeable, choosy
        self.loop = new_loop()
        self.device = NetDevice("net0", [self.loop], memory, mac=MAC, backend=tap)
        self.driver = Net(self.device, memory, self.loop)
        self.driver.up(mergeable=mergeable, without=0 if event_idx else F_EVENT_IDX, size=SIZE)
        if choosy:
            assert self.driver.command(0, 0, b"\0") == 0  # RX, PROMISC
            assert self.driver.command(2, 0, struct.pack("<H", VLAN)) == 0  # VLAN, ADD
        self.free = [list(range(SIZE)), list(range(SIZE))]  # descriptors
        self.out: list[dict[int, list[tuple[int, int]]]] = [{}, {}]  # requests by head
        self.descriptors: dict[tuple[int, int], list[int]] = {}
        self.order: list[list[int]] = [[], []]
        self.brought: list[bytes] = []
        self.arrived: list[bytes] = []
        self.written: list[bytes] = []  # by the driver
        self.taken: list[bytes] = []  # of them by the network
        self.refused = 0
        self.answers: deque[int] = deque()  # the network's to the next writes
        self.dead = False

    def lay(self, queue: int, pieces: Sequence[int], gap: int) -> list[tuple[int, int]]:
        """Make a request of some pieces available, as far as there are descriptors for it. Return where they are."""
        free, ring = self.free[queue], self.driver.rings[queue]
        if len(free) < len(pieces):
            return []
        mine = [free.pop(0) for _ in pieces]
        places = []
        for at, (index, length) in enumerate(zip(mine, pieces, strict=True)):
            last = at == len(mine) - 1
            # Those of two descriptors touch, or there is a gap between them.
            middle = DATA + SLOT * (SIZE * queue + (index | 1))
            addr = middle + gap if index & 1 else middle - length
            ring.descriptor(index, addr, length, (2 if queue == 0 else 0) | (0 if last else 1), 0 if last else mine[at + 1])
            places.append((addr, length))
            if queue == 0:
                self.memory.write(addr if index & 1 else addr - 1, bytes([UNTOUCHED]) * (length + 1))
        self.out[queue][mine[0]] = places
        self.order[queue].append(mine[0])
        self.descriptors[queue, mine[0]] = mine
        ring.offer(mine[0])
        return places

    def back(self, queue: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """Return what came back: written lengths, and where."""
        done = []
        for head, length in self.driver.rings[queue].collect():
            assert self.order[queue].pop(0) == head, "in order, and each of them once"
            places = self.out[queue].pop(head)
            assert length <= sum(size for _, size in places)
            mine = self.descriptors.pop((queue, head))
            self.free[queue] += mine
            for index, (addr, size) in zip(mine, places, strict=True):
                assert queue or self.memory.load(addr + size if index & 1 else addr - 1, 1) == UNTOUCHED
            done.append((length, places))
        return done

    def check(self) -> None:
        """Compare what is to be seen now."""
        self.loop.poll()
        done = self.back(0)
        while done:
            first = self.content(*done[0])
            (count,) = struct.unpack_from("<H", first, 10)
            assert 1 <= count <= len(done)
            assert self.mergeable or count == 1
            data = first
            for length, places in done[1:count]:
                data += self.content(length, places)
            for length, places in done[: count - 1]:
                assert length == sum(size for _, size in places), "all but the last one are full"
            self.arrived.append(data[:10] + data[HEADER:])
            del done[:count]
        statistics = self.device.statistics()
        wanted = list(self.brought)
        missing = 0
        for data in self.arrived:
            while data != wanted[0]:
                missing += 1
                del wanted[0]
            assert self.wants(data)
            del wanted[0]
        frames = [data for data in self.tap.waiting if isinstance(data, bytes)]
        backlog = list(self.tap.one._backlog)
        waiting = backlog + frames
        assert statistics.rx_frames == len(self.arrived)
        assert statistics.rx_bytes == sum(map(len, self.arrived)) - 10 * len(self.arrived)
        lost = statistics.rx_dropped + statistics.rx_filtered
        assert len(self.brought) == len(self.arrived) + len(waiting) + lost, "no frame gets lost unsaid"
        read = self.brought[: len(self.brought) - len(frames)]
        assert statistics.rx_filtered == sum(len(data) >= 10 + ETHERNET and not self.wants(data) for data in read)
        if waiting and not self.dead:
            room = sum(size for places in self.out[0].values() for _, size in places)
            needed = len(waiting[0]) if backlog and self.mergeable else 1
            assert room < needed, "nothing waits that has its buffers"
        if self.dead and not self.driver.link & 1:
            assert not backlog
        self.back(1)
        assert not self.driver.broken

    def wants(self, data: bytes) -> bool:
        """Tell whether the driver wants a frame."""
        if not self.choosy:
            return True
        return data[10:16] in (MAC, BROADCAST) and (data[22:24] != b"\x81\x00" or data[24:26] == VLAN.to_bytes(2, "big"))

    def content(self, length: int, places: list[tuple[int, int]]) -> bytes:
        """Read what was written into a buffer."""
        return b"".join(self.memory.read(addr, size) for addr, size in places)[:length]

    def settle(self) -> None:
        """Find out what the network should have of what the driver wrote, and how many it has refused."""
        self.loop.poll()
        for data in self.written:
            number = 0
            while self.answers and (number := self.answers.popleft()) == EAGAIN:
                number = 0
            if number:
                self.refused += 1
            else:
                self.taken.append(data)
        self.written.clear()

    def close(self) -> None:
        self.driver.close()
        self.loop.close()


BUFFER = st.one_of(
    st.sampled_from(([1536], [1536], [1536], [1536], [9100], [26], [30], [100])),
    st.lists(st.integers(1, 1600), min_size=2, max_size=3).filter(lambda pieces: sum(pieces) >= HEADER + ETHERNET),
)
FRAME = st.tuples(
    st.one_of(st.sampled_from((60, 60, 60, 60, 1500, 1514, 1524, 1525, 9000)), st.integers(0, 4000), st.integers(10, 20)),
    st.sampled_from((MAC, MAC, MAC, BROADCAST, OTHER)),
    st.sampled_from((None, None, None, VLAN, ANOTHER)),
)
ACTION = st.one_of(
    st.tuples(st.just("room"), st.lists(BUFFER, max_size=12), st.booleans()),
    st.tuples(st.just("room"), st.integers(1, SIZE).map(lambda n: [[1536]] * n), st.booleans()),
    st.tuples(st.just("receive"), st.lists(FRAME, max_size=12), st.booleans()),
    st.tuples(st.just("receive"), st.integers(1, 20).map(lambda n: [(60, MAC, None)] * n), st.booleans()),
    st.tuples(st.just("send"), st.lists(st.lists(st.integers(1, 1600), min_size=1, max_size=2), max_size=12), st.booleans()),
    st.tuples(st.just("send"), st.integers(1, SIZE).map(lambda n: [[60 + n]] * n), st.booleans()),
    st.tuples(st.just("answer"), st.lists(st.sampled_from((0, 0, 0, EAGAIN, EIO, EINVAL, ENOBUFS)), max_size=6), st.booleans()),
    st.tuples(st.just("pause"), st.just([]), st.booleans()),
)


@given(
    st.lists(ACTION, max_size=20),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((2, 4, 5, 64)),
    st.sampled_from((1, 3000, 1 << 18)),
    st.sampled_from((0, 0, EIO, EBADFD)),
    st.sampled_from((0, 3)),
)
@settings(max_examples=500)
def test_every_frame_goes_where_it_should_once_and_in_order(
    actions: list[tuple[str, list[object], bool]],
    mergeable: bool,
    event_idx: bool,
    choosy: bool,
    frames: int,
    budget: int,
    end: int,
    gap: int,
) -> None:
    memory, tap = GuestMemory([(0, 1 << 22)]), Tap()
    with tap.plugged_in(frames, budget):
        model = Model(memory, tap, mergeable=mergeable, event_idx=event_idx, choosy=choosy)
        number = 0
        try:
            for what, things, look in actions:
                for thing in things:
                    if what == "room":
                        assert isinstance(thing, list)
                        if sum(thing) >= (HEADER if mergeable else HEADER + ETHERNET):
                            model.lay(0, thing, gap)
                    elif what == "receive":
                        assert isinstance(thing, tuple)
                        size, to, tag = thing
                        number += 1
                        data = frame(size, to=to, tag=tag, fill=number & 0xFF)[:size]
                        header = struct.pack("<QH", number, 0)
                        model.brought.append(header + data)
                        tap.bring(header + b"\x77\x77" + data)
                    elif what == "send":
                        assert isinstance(thing, list)
                        if places := model.lay(1, thing, gap):
                            number += 1
                            data = number.to_bytes(4, "little").ljust(sum(thing), bytes([number & 0xFF]))[: sum(thing)]
                            model.written.append(data)
                            for addr, size in places:
                                memory.write(addr, data[:size])
                                data = data[size:]
                    elif what == "answer":
                        assert isinstance(thing, int)
                        model.settle()
                        tap.answers.append(thing)
                        model.answers.append(thing)
                if what in ("room", "send"):
                    model.driver.write(0x050, 0 if what == "room" else 1)
                elif what == "pause":
                    model.driver.transport.pause()
                    for queue in model.driver.transport.save().queues[:2]:
                        assert queue.next_avail == queue.next_used, "nothing is under way"
                    model.driver.transport.resume()
                if look:
                    model.check()
            model.settle()
            if end:
                tap.bring(end)
                model.dead = True
            model.check()
            if not end:
                while tap.one._backlog or tap.waiting:  # with room enough, nothing waits
                    for _ in model.free[0][:]:
                        model.lay(0, [9100], gap)
                    model.driver.write(0x050, 0)
                    model.check()
            taken = model.taken
            assert tap.sent == taken
            assert model.order[1] == []
            assert model.device.statistics()[4:] == (len(taken), sum(map(len, taken)) - HEADER * len(taken), model.refused)
        finally:
            model.close()
            tap.close()
            memory.close()
