"""The split virtqueue against honest and hostile drivers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_devices import queue as queue_module
from virtio_devices.queue import MAX_INDIRECT, QueueError, SplitQueue
from virtio_rings import INDIRECT, NEXT, WRITE, Ring
from vmm_core.guestmem import GuestMemory

BUF = 0x8000
TABLE = 0x2_0000


def enable(ring: Ring, **options: bool) -> SplitQueue:
    return SplitQueue(ring.memory, ring.size, ring.desc, ring.avail, ring.used, **options)


def shape(queue: SplitQueue) -> list[tuple[int, list[int], list[int]]]:
    return [(head, [len(v) for v in readable], [len(v) for v in writable]) for head, readable, writable in queue.chains()]


# Honest drivers


def test_a_chain_is_handed_out_as_views_of_guest_memory_in_ring_order(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    memory.write(BUF, b"header")
    ring.offer(ring.chain((BUF, 6, False), (BUF + 0x100, 4, True), (BUF + 0x200, 1, True)))
    ((head, readable, writable),) = queue.chains()
    assert [bytes(v) for v in readable] == [b"header"]
    writable[0][:] = b"data"
    writable[1][:] = b"!"
    queue.add_used(head, 5)
    queue.publish()
    assert (memory.read(BUF + 0x100, 4), memory.read(BUF + 0x200, 1)) == (b"data", b"!")
    assert ring.collect() == [(head, 5)]


def test_buffers_above_4_gib_are_found(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    memory.write(1 << 32, b"high")
    ring.offer(ring.chain((1 << 32, 4, False)))
    assert [bytes(readable[0]) for _, readable, _ in queue.chains()] == [b"high"]


def test_buffers_and_tables_are_found_in_every_region_whichever_is_the_larger() -> None:
    for low, high in ((1 << 20, 1 << 16), (1 << 16, 1 << 20)):
        memory = GuestMemory([(0, low), (1 << 32, high)])
        ring = Ring(memory)
        queue = enable(ring, indirect=True)
        for table in (0xA000, (1 << 32) + 0xA000):
            ring.offer(ring.chain((BUF, 1, False), ((1 << 32) + BUF, 2, True), table=table))
        assert shape(queue) == [(0, [1], [2]), (1, [1], [2])]


def test_an_indirect_table_reads_like_its_chain(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, indirect=True)
    ring.offer(ring.chain((BUF, 16, False), (BUF, 512, True), (BUF, 1, True), table=TABLE))
    assert shape(queue) == [(0, [16], [512, 1])]


def test_an_indirect_table_may_follow_direct_descriptors_and_its_write_flag_means_nothing(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, indirect=True)
    ring.descriptor(0, BUF, 16, NEXT, 1)
    ring.descriptor(1, TABLE, 32, INDIRECT | WRITE)
    ring.descriptor(0, BUF, 8, NEXT, 1, table=TABLE)
    ring.descriptor(1, BUF, 4, WRITE, table=TABLE)
    ring.offer(0)
    assert shape(queue) == [(0, [16, 8], [4])]


def test_indices_wrap_at_65536(memory: GuestMemory) -> None:
    ring = Ring(memory, size=4)
    ring.start_at(0xFFFE)
    queue = enable(ring)
    queue.set_indices(0xFFFE, 0xFFFE)
    for turn in range(6):
        ring.offer(ring.chain((BUF, 10 + turn, False)))
        for head, _, _ in queue.chains():
            queue.add_used(head, turn)
        queue.publish()
        assert [written for _, written in ring.collect()] == [turn]
    assert queue.indices == (4, 4)


def test_requests_that_are_not_taken_stay_in_the_ring(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    ring.offer(*(ring.chain((BUF, n, False)) for n in (1, 2, 3)))
    for _head, readable, _ in queue.chains():
        assert len(readable[0]) == 1
        break
    assert queue.pending
    assert queue.in_flight == 1
    assert [r for _, r, _ in shape(queue)] == [[2], [3]]
    assert not queue.pending


def test_a_request_that_is_put_back_is_yielded_again(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.start_at(0xFFFF)
    queue = enable(ring)
    queue.set_indices(0xFFFF, 0xFFFF)
    ring.offer(*(ring.chain((BUF, n, False)) for n in (1, 2)))
    for _head, _, _ in queue.chains():
        queue.put_back()
        break
    assert queue.in_flight == 0
    assert [r for _, r, _ in shape(queue)] == [[1], [2]]


def test_nothing_given_back_is_visible_before_publish(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    ring.offer(ring.chain((BUF, 1, True)))
    for head, _, _ in queue.chains():
        queue.add_used(head, 1)
    assert ring.collect() == []
    assert queue.publish()
    assert ring.collect() == [(0, 1)]


def test_a_used_length_saturates_where_32_bits_end(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    ring.offer(ring.chain((BUF, 1, True)))
    for head, _, _ in queue.chains():
        queue.add_used(head, 1 << 32)
    queue.publish()
    assert ring.collect() == [(0, 0xFFFF_FFFF)]


# Notifications, device to driver


def give_back(queue: SplitQueue, ring: Ring, count: int = 1) -> bool:
    ring.offer(*(ring.chain((BUF, 1, True)) for _ in range(count)))
    for head, _, _ in queue.chains():
        queue.add_used(head, 1)
    return queue.publish()


def test_publishing_nothing_wants_no_interrupt(memory: GuestMemory) -> None:
    assert not enable(Ring(memory)).publish()


def test_the_no_interrupt_flag_is_honoured_without_event_index(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    assert give_back(queue, ring)
    ring.suppress_interrupts()
    assert not give_back(queue, ring)
    ring.suppress_interrupts(False)
    assert give_back(queue, ring)


def test_the_used_event_decides_with_event_index(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, event_idx=True)
    ring.suppress_interrupts()  # means nothing now
    ring.set_used_event(100)
    assert give_back(queue, ring), "the first notification after enabling is never suppressed"
    ring.set_used_event(3)
    assert not give_back(queue, ring, 2)
    assert give_back(queue, ring, 2), "index 3 was passed"
    assert not give_back(queue, ring)


@given(old=st.integers(0, 0xFFFF), count=st.integers(1, 8), event=st.integers(0, 0xFFFF))
@settings(max_examples=500)
def test_an_interrupt_is_wanted_exactly_when_the_used_event_lies_in_what_was_published(old: int, count: int, event: int) -> None:
    memory = GuestMemory([(0, 1 << 16)])
    ring = Ring(memory)
    ring.start_at((old - 1) & 0xFFFF)
    queue = enable(ring, event_idx=True)
    queue.set_indices((old - 1) & 0xFFFF, (old - 1) & 0xFFFF)
    give_back(queue, ring)
    ring.set_used_event(event)
    assert give_back(queue, ring, count) == (event in {(old + i) & 0xFFFF for i in range(count)})


# Notifications, driver to device


def test_kicks_are_suppressed_by_the_flag_without_event_index(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    queue.disable_kicks()
    assert ring.kicks_unwanted
    assert not queue.enable_kicks()
    assert not ring.kicks_unwanted


def test_kicks_are_asked_for_by_the_avail_event_with_event_index(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, event_idx=True)
    give_back(queue, ring, 3)
    queue.disable_kicks()
    assert not ring.kicks_unwanted
    assert not queue.enable_kicks()
    assert ring.avail_event == 3


def test_a_request_that_came_in_before_kicks_were_on_is_reported(memory: GuestMemory) -> None:
    for event_idx in (False, True):
        ring = Ring(memory)
        queue = enable(ring, event_idx=event_idx)
        queue.disable_kicks()
        ring.offer(ring.chain((BUF, 1, False)))
        assert queue.enable_kicks()


# State


def test_a_restored_queue_goes_on_where_the_saved_one_stopped(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, event_idx=True)
    give_back(queue, ring, 3)
    again = enable(ring, event_idx=True)
    again.set_indices(*queue.indices)
    ring.set_used_event(1000)
    assert give_back(again, ring), "the first notification after restoring is never suppressed"
    assert again.indices == (4, 4)
    assert len(ring.collect()) == 4


@pytest.mark.parametrize("indices", [(-1, 0), (0, 65536), (0x1_0000, 0), (9, 0), (0, 1)])
def test_indices_that_cannot_be_are_refused(memory: GuestMemory, indices: tuple[int, int]) -> None:
    with pytest.raises(QueueError, match="do not belong"):
        enable(Ring(memory)).set_indices(*indices)


# Hostile drivers


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used", "complaint"),
    [
        (0, 0x1000, 0x2000, 0x3000, "power of two"),
        (12, 0x1000, 0x2000, 0x3000, "power of two"),
        (512, 0x1000, 0x2000, 0x3000, "power of two up to 256"),
        (0x1_0000, 0x1000, 0x2000, 0x3000, "power of two"),
        (8, 0x1008, 0x2000, 0x3000, "aligned to 16"),
        (8, 0x1000, 0x2001, 0x3000, "aligned to 2"),
        (8, 0x1000, 0x2000, 0x3002, "aligned to 4"),
        (8, 0x1000, 0x1010, 0x3000, "available ring .* overlaps the descriptor table"),
        (8, 0x1000, 0x2000, 0x2014, "used ring .* overlaps the available ring"),
        (8, 0x1000, 0x2000, 0x1000, "used ring .* overlaps the descriptor table"),
        (8, 0xF_FFF0, 0x2000, 0x3000, "not all RAM"),
        (8, 0x1000, 0xF_FFF0, 0x3000, "not all RAM"),
        (8, 0x1000, 0x2000, 0xF_FFC0, "not all RAM"),
        (8, 0x1000, 0x2000, 0x8000_0000, "not all RAM"),
        (8, (1 << 64) - 16, 0x2000, 0x3000, "not all RAM"),
    ],
)
def test_bad_rings_are_refused_when_the_queue_is_enabled(
    memory: GuestMemory, size: int, desc: int, avail: int, used: int, complaint: str
) -> None:
    with pytest.raises(QueueError, match=complaint):
        SplitQueue(memory, size, desc, avail, used, max_size=256)


def test_a_head_outside_the_table_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.offer(8)
    with pytest.raises(QueueError, match="descriptor 8 of a table of 8"):
        list(enable(ring).chains())


def test_a_next_outside_the_table_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.descriptor(0, BUF, 1, NEXT, 0xFFFF)
    ring.offer(0)
    with pytest.raises(QueueError, match="descriptor 65535"):
        list(enable(ring).chains())


def test_a_chain_that_points_to_itself_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.descriptor(0, BUF, 1, NEXT, 0)
    ring.offer(0)
    with pytest.raises(QueueError, match="does not end"):
        list(enable(ring).chains())


def test_a_chain_may_use_the_whole_table(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.offer(ring.chain(*((BUF, 1, False),) * 8))
    assert shape(enable(ring)) == [(0, [1] * 8, [])]


def test_an_indirect_chain_that_points_to_itself_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.descriptor(0, TABLE, 32, INDIRECT)
    ring.descriptor(1, BUF, 1, NEXT, 1, table=TABLE)
    ring.descriptor(0, BUF, 1, NEXT, 1, table=TABLE)
    ring.offer(0)
    with pytest.raises(QueueError, match="does not end within 2"):
        list(enable(ring, indirect=True).chains())


def test_an_indirect_chain_ends_where_the_limit_is(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring, indirect=True)
    ring.offer(ring.chain(*((BUF, 1, False),) * MAX_INDIRECT, table=TABLE))
    assert shape(queue) == [(0, [1] * MAX_INDIRECT, [])]
    ring.offer(ring.chain(*((BUF, 1, False),) * (MAX_INDIRECT + 1), table=TABLE))
    with pytest.raises(QueueError, match=f"within {MAX_INDIRECT}"):
        list(queue.chains())


def test_a_zero_length_descriptor_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.offer(ring.chain((BUF, 0, False)))
    with pytest.raises(QueueError, match="length 0"):
        list(enable(ring).chains())


def test_a_readable_descriptor_after_a_writable_one_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.offer(ring.chain((BUF, 1, True), (BUF, 1, False)))
    with pytest.raises(QueueError, match=r"2\.7\.4\.2"):
        list(enable(ring).chains())


@pytest.mark.parametrize("addr", [0xF_FFFF, 0x10_0000, 0x8000_0000, (1 << 32) - 1, (1 << 32) + 0xFFFF, (1 << 64) - 1])
def test_a_buffer_outside_ram_is_refused(memory: GuestMemory, addr: int) -> None:
    ring = Ring(memory)
    ring.offer(ring.chain((addr, 2, True)))
    with pytest.raises(QueueError, match="not all RAM"):
        list(enable(ring).chains())


def test_more_than_4_gib_in_one_chain_is_refused(memory: GuestMemory) -> None:
    # 5 views of 1 GiB each need RAM behind them; it is never touched.
    big = GuestMemory([(0, 1 << 30)])
    ring = Ring(big)
    ring.offer(ring.chain(*((0, 1 << 30, True),) * 4))
    queue = enable(ring)
    assert len(list(queue.chains())) == 1, "exactly 4 GiB is allowed"
    ring.offer(ring.chain(*((0, 1 << 30, True),) * 4, (0, 1, True)))
    with pytest.raises(QueueError, match="more than 2"):
        list(queue.chains())


@pytest.mark.parametrize(
    ("length", "flags", "complaint"),
    [
        (0, INDIRECT, "table of 0 bytes"),
        (17, INDIRECT, "table of 17 bytes"),
        (16 * 65536, INDIRECT, "table of 1048576 bytes"),
        (16, INDIRECT | NEXT, "with a next one"),
    ],
)
def test_a_bad_indirect_descriptor_is_refused(memory: GuestMemory, length: int, flags: int, complaint: str) -> None:
    ring = Ring(memory)
    ring.descriptor(0, TABLE, length, flags)
    ring.offer(0)
    with pytest.raises(QueueError, match=complaint):
        list(enable(ring, indirect=True).chains())


def test_an_indirect_table_outside_ram_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.descriptor(0, 0xF_FFF0, 32, INDIRECT)
    ring.offer(0)
    with pytest.raises(QueueError, match="not all RAM"):
        list(enable(ring, indirect=True).chains())


def test_an_indirect_table_inside_another_is_refused(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.descriptor(0, TABLE, 16, INDIRECT)
    ring.descriptor(0, TABLE, 16, INDIRECT, table=TABLE)
    ring.offer(0)
    with pytest.raises(QueueError, match="inside an indirect table"):
        list(enable(ring, indirect=True).chains())


def test_an_indirect_descriptor_is_refused_when_it_was_not_negotiated(memory: GuestMemory) -> None:
    ring = Ring(memory)
    ring.offer(ring.chain((BUF, 1, False), table=TABLE))
    with pytest.raises(QueueError, match="not negotiated"):
        list(enable(ring).chains())


@pytest.mark.parametrize("idx", [9, 0x7FFF, 0xFFFF])
def test_an_available_index_ahead_of_the_ring_is_refused(memory: GuestMemory, idx: int) -> None:
    ring = Ring(memory)
    memory.store(ring.avail + 2, 2, idx)
    with pytest.raises(QueueError, match="too far ahead"):
        list(enable(ring).chains())


def test_an_available_index_that_goes_back_is_refused_while_requests_are_in_flight(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    ring.offer(*(ring.chain((BUF, 1, False)) for _ in range(4)))
    assert len(shape(queue)) == 4
    memory.store(ring.avail + 2, 2, 3)
    with pytest.raises(QueueError, match="too far ahead"):
        list(queue.chains())


def test_no_more_than_the_ring_can_be_in_flight(memory: GuestMemory) -> None:
    ring = Ring(memory)
    queue = enable(ring)
    head = ring.chain((BUF, 1, False))
    ring.offer(*[head] * 8)
    assert len(shape(queue)) == 8
    ring.offer(head)
    with pytest.raises(QueueError, match="8 in flight"):
        list(queue.chains())


def test_the_barriers_of_weakly_ordered_machines_change_nothing_else(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "_WEAKLY_ORDERED", True)
    ring = Ring(memory)
    queue = enable(ring)
    assert give_back(queue, ring, 2)
    assert len(ring.collect()) == 2
