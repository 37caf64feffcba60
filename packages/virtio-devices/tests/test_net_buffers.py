"""Receive buffers at hand: frames lie in them as the driver offered them, whether they were taken many at once or one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EAGAIN, EBADFD, EINVAL, EIO
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from net_cable import MAC, Cable, Net, frame
from virtio_devices.device import F_EVENT_IDX
from virtio_devices.net import buffers as buffers_module
from virtio_devices.net.backend import BYTES, FRAMES
from virtio_devices.net.buffers import IOV_MAX, Buffers
from virtio_devices.net.device import NetDevice
from virtio_devices.net.features import ETHERNET, F_MRG_RXBUF, HEADER
from virtio_devices.queue import QueueError, SplitQueue
from virtio_driver import DATA, new_loop
from virtio_rings import Ring
from vmm_core.guestmem import GuestMemory

MEMORY = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 18)])
UPPER = (1 << 32) - 0x8000


def new_queue(start: int = 0, size: int = 64) -> tuple[Ring, SplitQueue]:
    ring = Ring(MEMORY, size)
    ring.start_at(start)
    queue = SplitQueue(MEMORY, size, ring.desc, ring.avail, ring.used)
    queue.set_indices(start, start)
    return ring, queue


def offer(ring: Ring, lengths: list[list[int]], gap: int = 0, base: int = 0x1_0000) -> list[list[tuple[int, int]]]:
    """Offer receive buffers of some pieces each, one behind the other or with gaps; return where their pieces are."""
    laid = []
    for pieces in lengths:
        places = []
        for length in pieces:
            places.append((base, length))
            base += length + gap
        ring.offer(ring.chain(*((addr, length, True) for addr, length in places)))
        laid.append(places)
    return laid


def fill_in(views: list[memoryview], data: bytes) -> None:
    """Do what readv() does."""
    for view in views:
        view[: len(data)] = data[: len(view)]
        data = data[len(view) :]


BUFFER = st.one_of(
    st.sampled_from(([1536], [1536], [1536], [100], [26], [31], [4096])),
    st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(lambda pieces: sum(pieces) >= HEADER + ETHERNET),
)


@given(
    st.lists(BUFFER, min_size=1, max_size=21),
    st.sampled_from((0, 0, 1, 16)),
    st.sampled_from((0x1_0000, 0x1_0001, UPPER + 0x8000)),
    st.sampled_from((0, 0xFFFA)),
    st.lists(st.tuples(st.integers(HEADER + ETHERNET, 9000), st.integers(1, 12_000), st.booleans()), max_size=20),
    st.booleans(),
)
@settings(max_examples=1_000)
def test_a_frame_lies_in_the_next_buffers_in_order_all_but_the_last_of_them_full(
    lengths: list[list[int]],
    gap: int,
    base: int,
    start: int,
    frames: list[tuple[int, int, bool]],
    mergeable: bool,
) -> None:
    ring, queue = new_queue(start)
    laid = offer(ring, lengths, gap, base)
    heads = [head for head, _, _ in SplitQueue.chains(queue)]
    queue.set_indices(start, start)
    buffers = Buffers()
    buffers.begin(mergeable=mergeable)
    used = 0
    for length, wanted, again in frames:
        if again:  # as after a rest
            buffers.put_back(queue)
        buffers.fill(queue, max(length, wanted))
        left = [sum(size for _, size in places) for places in laid[used:]]
        if not left:
            assert (buffers.count, buffers.room) == (0, 0)
            break
        assert buffers.count <= len(left)
        assert buffers.room >= min(length, sum(left)) if mergeable else buffers.room == left[0]
        if buffers.room < length:
            continue
        content = bytes(HEADER) + bytes(n % 251 + 1 for n in range(length - HEADER))
        views, room = buffers.offer(wanted)
        assert room == sum(map(len, views))
        assert room >= min(wanted, buffers.room) if mergeable else room == left[0]
        fill_in(views, content[:room])
        buffers.store(room, content[room:])
        buffers.give(queue, length)
        queue.publish()
        expected = []
        rest = length
        for size in left:
            expected.append((heads[used + len(expected)], min(rest, size)))
            rest -= size
            if rest <= 0:
                break
        assert ring.collect() == expected
        pieces = [place for places in laid[used : used + len(expected)] for place in places]
        arrived = b"".join(MEMORY.read(addr, size) for addr, size in pieces)[:length]
        assert arrived == content[:10] + len(expected).to_bytes(2, "little") + content[12:]
        used += len(expected)
    buffers.put_back(queue)
    assert queue.indices == ((start + used) & 0xFFFF,) * 2
    assert [head for head, _, _ in queue.chains()] == heads[used:], "nothing is lost or taken twice"


def test_for_large_frames_buffers_one_behind_the_other_are_one_view() -> None:
    ring, queue = new_queue()
    offer(ring, [[1536]] * 20)
    offer(ring, [[1536]] * 20, base=0x4_0000)
    buffers = Buffers()
    buffers.begin(mergeable=True)
    assert buffers.fill(queue, 1537)
    assert (buffers.count, buffers.room) == (40, 40 * 1536)
    assert not buffers.each_holds(1)
    assert [len(view) for view in buffers.offer(1)[0]] == [20 * 1536]
    assert [len(view) for view in buffers.offer(60_000)[0]] == [20 * 1536] * 2


@pytest.mark.parametrize("mergeable", [True, False])
def test_for_small_frames_each_buffer_is_a_view_and_given_back_for_one_frame(mergeable: bool) -> None:
    ring, queue = new_queue()
    laid = offer(ring, [[1536]] * 20)
    buffers = Buffers()
    buffers.begin(mergeable=mergeable)
    assert buffers.fill(queue, 1536)
    assert (buffers.each_holds(1536), buffers.each_holds(1537)) == (True, False)
    views = buffers.views(3)
    assert [len(view) for view in views] == [1536] * 3
    for view in views:
        view[:HEADER] = b"\xff" * HEADER
    buffers.give_each(queue, [60, 1536, 100])
    queue.publish()
    assert [length for _, length in ring.collect()] == [60, 1536, 100]
    assert [MEMORY.read(pieces[0][0], HEADER) for pieces in laid[:3]] == [b"\xff" * 10 + b"\1\0"] * 3
    assert (buffers.count, buffers.room) == (17, 17 * 1536 if mergeable else 1536)
    assert buffers.offer(1)[0][0] == buffers.views(1)[0]
    buffers.give(queue, 26)
    buffers.give_each(queue, [60] * 16)
    assert (buffers.count, buffers.room) == (0, 0)


def test_buffers_of_several_pieces_hold_no_frame_each() -> None:
    ring, queue = new_queue()
    offer(ring, [[1536], [700, 836], [1536]])
    buffers = Buffers()
    buffers.begin(mergeable=True)
    assert buffers.fill(queue, 3000)
    assert not buffers.each_holds(1)


def test_without_mergeable_buffers_each_is_offered_alone() -> None:
    ring, queue = new_queue()
    offer(ring, [[1536]] * 5)
    buffers = Buffers()
    buffers.begin(mergeable=False)
    assert buffers.fill(queue, 60_000)
    offer(ring, [[1536]] * 5)
    assert not buffers.fill(queue, 60_000), "more would not help"
    assert buffers.count == 5
    assert [len(view) for view in buffers.offer(60_000)[0]] == [1536]
    assert buffers.room == 1536


def test_a_driver_whose_buffers_are_not_to_be_taken_at_once_is_not_asked_each_time() -> None:
    ring, queue = new_queue()
    offer(ring, [[20, 20]] * 20)
    buffers = Buffers()
    buffers.begin(mergeable=True)
    with patch.object(queue, "take_singles", wraps=queue.take_singles) as take:
        for number in range(1, 21):
            assert buffers.fill(queue, 40 * number)
    assert take.call_count == 1


def test_many_are_taken_again_after_those_that_could_not_be() -> None:
    ring, queue = new_queue()
    offer(ring, [[20, 20]])
    offer(ring, [[1536]] * 20)
    buffers = Buffers()
    buffers.begin(mergeable=True)
    with patch.object(buffers_module, "_AHEAD", 3):
        for number in range(3):
            assert buffers.fill(queue, 40 + 1536 * number)
            assert buffers.count == number + 1
        assert buffers.fill(queue, buffers.room + 1)
    assert buffers.count == 6


def test_there_is_room_for_what_is_left_when_more_is_taken() -> None:
    ring, queue = new_queue()
    offer(ring, [[1536]] * 5)
    buffers = Buffers()
    buffers.begin(mergeable=True)
    assert buffers.fill(queue, 1)
    for _ in range(3):
        buffers.give(queue, 100)
    offer(ring, [[1000]] * 4, base=0x4_0000)
    assert buffers.fill(queue, 2 * 1536 + 1)
    assert (buffers.count, buffers.room) == (6, 2 * 1536 + 4 * 1000)
    buffers.give(queue, 2 * 1536 + 1001)
    queue.publish()
    assert [written for _, written in ring.collect()] == [100, 100, 100, 1536, 1536, 1000, 1]
    assert (buffers.count, buffers.room) == (2, 2000)


def test_a_buffer_of_more_pieces_than_a_system_call_takes_is_refused() -> None:
    for mergeable in (True, False):
        ring, queue = new_queue(size=4096)
        offer(ring, [[8] * (IOV_MAX - 1), [8] * IOV_MAX], base=0x2_0000)
        buffers = Buffers()
        buffers.begin(mergeable=mergeable)
        assert buffers.fill(queue, 8)
        assert len(buffers.offer(8 * (IOV_MAX - 1))[0]) == IOV_MAX - 1
        buffers.give(queue, 8 * (IOV_MAX - 1))
        with pytest.raises(QueueError, match=f"in {IOV_MAX} pieces"):
            buffers.fill(queue, 8)


@pytest.mark.parametrize("mergeable", [True, False])
def test_a_buffer_may_have_more_bytes_than_a_used_length_holds(mergeable: bool) -> None:
    memory = GuestMemory([(0, 1 << 25)])
    ring = Ring(memory, 512)
    small, huge = ring.chain((0x1_0000, 100, True)), ring.chain(*[(0x2_0000, 1 << 24, True)] * 256)
    queue = SplitQueue(memory, 512, ring.desc, ring.avail, ring.used)
    buffers = Buffers()
    buffers.begin(mergeable=mergeable)
    for head, length in ((huge, 150), (small, 100), (huge, 150)):
        ring.offer(head)  # a chain may have 2**32 bytes
        assert buffers.fill(queue, length)
        buffers.give(queue, length)
        assert (buffers.count, buffers.room) == (0, 0)
    if mergeable:
        ring.offer(small, huge)
        while buffers.room < 150:
            assert buffers.fill(queue, 150)
        buffers.give(queue, 150)
    queue.publish()
    assert ring.collect() == [(huge, 150), (small, 100), (huge, 150), *([(small, 100), (huge, 50)] if mergeable else [])]
    memory.close()


def test_a_system_call_is_never_offered_more_views_than_it_takes() -> None:
    ring, queue = new_queue(size=2048)
    for _ in range(3):
        offer(ring, [[8] * 600])
    buffers = Buffers()
    buffers.begin(mergeable=True)
    buffers.fill(queue, 3 * 4800)
    assert buffers.room == 3 * 4800
    views, room = buffers.offer(3 * 4800)
    assert len(views) < IOV_MAX
    assert room == 8 * len(views)


def test_a_buffer_that_is_none_is_found_when_its_turn_comes_and_not_before() -> None:
    ring, queue = new_queue()
    offer(ring, [[1536], [1536], [1536], [11], [1536]])
    buffers = Buffers()
    buffers.begin(mergeable=True)
    assert buffers.fill(queue, 3 * 1536)
    assert buffers.count == 3
    with pytest.raises(QueueError, match="a receive buffer of 11 bytes in 1 pieces"):
        buffers.fill(queue, 3 * 1536 + 1)
    ring, queue = new_queue()
    ring.offer(ring.chain((0x1_0000, 1536, True)), ring.chain((0x1_0000, 1536, False)))
    buffers.begin(mergeable=True)
    assert buffers.fill(queue, 1536)
    with pytest.raises(QueueError, match="writable, and nothing else"):
        buffers.fill(queue, 1537)


# Frames of one descriptor, many at once


class Network:
    """Stands for os.write(): takes frames, or answers with an error. `answers` is by number of frame."""

    def __init__(self, answers: dict[int, int]) -> None:
        self.answers = answers
        self.lengths: list[int] = []

    def __call__(self, fd: int, data: memoryview) -> int:
        self.lengths.append(len(data))
        if number := self.answers.get(len(self.lengths) - 1):
            raise OSError(number, os.strerror(number))
        return len(data)


Sent = tuple[Net, Network, list[tuple[int, int]]]


@pytest.fixture
def send(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sent]]:
    """Return what sends frames of one descriptor each, with one kick: driver, network, and what came back."""
    loop, cable = new_loop(), Cable()
    driver = Net(NetDevice("net0", [loop], memory, mac=MAC, backend=cable), memory, loop)

    def send(*sizes: int, answers: dict[int, int] | None = None, full: bool = False) -> Sent:
        network = Network(answers or {})
        with suppress(BlockingIOError):
            while full:
                cable.near[0].send(bytes(60))
        monkeypatch.setattr("os.write", network)
        driver.up(size=256)
        for number, size in enumerate(sizes):
            driver.rings[1].offer(driver.rings[1].chain((DATA + 64 * number, size, False)))
        edges = driver.line.edges
        driver.kick(1)
        driver.line.edges -= edges
        return driver, network, driver.rings[1].collect()

    yield send
    monkeypatch.undo()
    driver.close()
    cable.close()
    loop.close()


def test_many_frames_are_sent_in_order_and_come_back_in_order(send: Callable[..., Sent]) -> None:
    driver, network, done = send(*range(60, 90))
    assert network.lengths == list(range(60, 90))
    assert done == [(head, 0) for head in range(30)]
    assert driver.device.statistics()[4:] == (30, sum(range(60, 90)) - 30 * HEADER, 0)


def test_a_turn_ends_after_so_many_frames_or_bytes_and_the_rest_has_the_next_one(send: Callable[..., Sent]) -> None:
    """Each turn is one interrupt."""
    driver, _, done = send(*[60] * (2 * FRAMES + 10))
    assert (len(done), driver.line.edges) == (2 * FRAMES + 10, 3)
    driver.status = 0
    each = BYTES // 5 + 1
    driver, network, done = send(*[each] * 12)
    assert (len(done), driver.line.edges) == (12, 3)
    assert network.lengths == [each] * 5, "seven are few"


def test_of_many_frames_those_that_the_network_refuses_are_lost_and_no_other(send: Callable[..., Sent]) -> None:
    driver, network, done = send(*[60] * 20, answers={3: EIO, 19: EINVAL})
    assert (len(network.lengths), len(done)) == (20, 20)
    assert driver.device.statistics()[4:] == (18, 18 * 48, 2)


def test_many_frames_wait_in_the_ring_once_the_network_takes_none(send: Callable[..., Sent]) -> None:
    driver, network, done = send(*[60] * 20, answers={11: EAGAIN, 12: EAGAIN})
    assert len(network.lengths) == 12 + 9 + 1, "the socket is writable: the loop tries again, once, and then goes on"
    assert [head for head, _ in done] == list(range(20))
    assert driver.device.statistics()[4:] == (20, 20 * 48, 0)


def test_a_network_that_takes_none_is_not_asked_again_before_it_says_so(send: Callable[..., Sent]) -> None:
    _, network, done = send(*[60] * 20, answers=dict.fromkeys(range(11, 99), EAGAIN), full=True)
    assert len(network.lengths) == 12
    assert [head for head, _ in done] == list(range(11))


def test_many_frames_are_lost_once_the_network_has_gone(send: Callable[..., Sent]) -> None:
    driver, network, done = send(*[60] * 20, answers={11: EBADFD})
    assert len(network.lengths) == 12
    assert [head for head, _ in done] == list(range(20))
    assert driver.device.statistics()[4:] == (11, 11 * 48, 9)
    assert not driver.link & 1


# The whole device, with and without taking many at once

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("room"), st.lists(st.sampled_from((1536, 1536, 1536, 2048, 64, 100, 4096)), max_size=12)),
        st.tuples(st.just("room in pieces"), st.lists(st.integers(12, 2000), min_size=2, max_size=4)),
        st.tuples(st.just("receive"), st.lists(st.integers(10, 4000), max_size=6)),
        st.tuples(st.just("receive"), st.lists(st.integers(10_000, 60_000), max_size=2)),
        st.tuples(st.just("send"), st.lists(st.integers(1, 3000), max_size=9)),
        st.tuples(st.just("send in pieces"), st.lists(st.integers(1, 3000), min_size=2, max_size=4)),
        st.tuples(st.just("drain"), st.just([])),
        st.tuples(st.just("pause"), st.just([])),
        st.tuples(st.just("wrong"), st.integers(0, 1).map(lambda n: [n])),
    ),
    max_size=25,
)


@contextmanager
def one_by_one(wanted: bool) -> Iterator[None]:
    """Have the queue refuse to take many at once, and buffers to be read into in a row, if that is wanted."""
    if not wanted:
        yield
        return
    with patch.object(SplitQueue, "take_singles", lambda *_: None), patch.object(Buffers, "each_holds", lambda *_: False):
        yield


def first_piece(ring: Ring, head: int, length: int) -> bytes:
    """Return what was written into a buffer's first piece."""
    at = ring.desc + 16 * head
    length = min(length, ring.memory.load(at + 8, 4))
    return ring.memory.read(ring.memory.load(at, 8), length) if length else b""


def story(actions: list[tuple[str, list[int]]], event_idx: bool, mergeable: bool) -> list[object]:
    """Do it all; return everything that driver and network see."""
    memory = GuestMemory([(0, 1 << 20)])
    loop, cable = new_loop(), Cable()
    cable.near[0].setsockopt(1, 7, 20_000)  # SO_SNDBUF: some frames
    device = NetDevice("net0", [loop], memory, mac=MAC, backend=cable)
    driver = Net(device, memory, loop)
    driver.start(without=(0 if event_idx else F_EVENT_IDX) | (0 if mergeable else F_MRG_RXBUF), size=16)
    rx, tx = driver.rings[:2]
    free = [16, 16]
    seen: list[object] = []
    try:
        for what, sizes in actions:
            if driver._next > 0xD_0000:
                driver._next = DATA
            if what == "room":
                for size in sizes[: free[0]]:
                    driver.offer(size)
                free[0] -= len(sizes[: free[0]])
                driver.kick(0)
            elif what == "room in pieces" and free[0] >= len(sizes):
                driver.offer(*sizes)
                free[0] -= len(sizes)
                driver.kick(0)
            elif what == "receive":
                for number, size in enumerate(sizes):
                    try:
                        cable.send(frame(size, fill=number))
                    except BlockingIOError:
                        break
            elif what == "send":
                for size in sizes[: free[1]]:
                    driver.offer(b"x" * size, queue=1)
                free[1] -= len(sizes[: free[1]])
                driver.kick(1)
            elif what == "send in pieces" and free[1] >= len(sizes):
                driver.offer(*(b"y" * size for size in sizes), queue=1)
                free[1] -= len(sizes)
                driver.kick(1)
            elif what == "drain":
                seen.append(cable.received())
            elif what == "pause":
                driver.transport.pause()
                seen.append([(queue.next_avail, queue.next_used) for queue in driver.transport.save().queues])
                driver.transport.resume()
            elif what == "wrong" and free[sizes[0]]:
                driver.offer(b"z" * 20 if sizes[0] == 0 else 20, queue=sizes[0])
                free[sizes[0]] -= 1
                driver.kick(sizes[0])
            loop.poll()
            for index, ring in enumerate((rx, tx)):
                done = ring.collect()
                free[index] = 16 - (ring.avail_idx - ring.used_seen) % (1 << 16) * 4  # a chain has four descriptors at most
                free[index] = max(free[index], 0)
                seen.append([(head, length, first_piece(ring, head, length)) for head, length in done])
            seen.append((driver.broken, driver.reports[:], rx.avail_event, tx.avail_event, rx.kicks_unwanted, tx.kicks_unwanted))
            seen.append(device.statistics())
        seen.append(driver.line.edges)
    finally:
        driver.close()
        cable.close()
        loop.close()
        memory.close()
    return seen


@given(ACTIONS, st.booleans(), st.booleans())
@example([("room", [1536] * 12), ("receive", [60_000, 60]), ("room", [1536] * 12), ("wrong", [0])], True, True)
@example([("send", [100] * 9), ("send", [2999] * 9), ("drain", []), ("pause", []), ("wrong", [1])], True, True)
@settings(max_examples=300)
def test_a_driver_and_a_network_see_no_difference_between_many_at_once_and_one_by_one(
    actions: list[tuple[str, list[int]]], event_idx: bool, mergeable: bool
) -> None:
    stories = []
    for singly in (False, True):
        with one_by_one(singly):
            stories.append(story(actions, event_idx, mergeable))
    assert stories[0] == stories[1]
