"""What the queue does with many descriptors at once is what it does with one after the other: chains, refusals, indices."""

from __future__ import annotations

from ctypes import addressof, c_char
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from virtio_devices import queue as queue_module
from virtio_devices.queue import MAX_INDIRECT, QueueError, SplitQueue
from virtio_rings import INDIRECT, NEXT, WRITE, Ring
from vmm_core.guestmem import GuestMemory

LOW = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 18)])  # the region that is looked at first is the lower one,
HIGH = GuestMemory([(0, 1 << 18), (1 << 32, 1 << 20)])  # and the upper one
BUF, TABLE = 0x1_0000, 0x2_0000
NOTHING_LONG = 1 << 40
Found = tuple[int, list[tuple[int, int]], list[tuple[int, int]]]

INDICES = st.sampled_from((0, 1, 7, 0x7FFF, 0xFFF9, 0xFFFE, 0xFFFF))
HOSTILE = st.sampled_from((0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 0x1000, 0xFFFF, 0x1_0000, 0xF_FFFF, 1 << 20, 1 << 32, (1 << 64) - 1))


def places(views: list[memoryview]) -> list[tuple[int, int]]:
    """Return where views lie in this process, and how long they are."""
    return [(addressof(c_char.from_buffer(view)), len(view)) for view in views]


def enable(ring: Ring, start: int = 0) -> SplitQueue:
    queue = SplitQueue(ring.memory, ring.size, ring.desc, ring.avail, ring.used, indirect=True)
    queue.set_indices(start, start)
    return queue


def walk(queue: SplitQueue) -> tuple[list[Found], str]:
    """Take everything one after the other; return it, and what was refused."""
    found: list[Found] = []
    try:
        for head, readable, writable in queue.chains():
            found.append((head, places(readable), places(writable)))
    except QueueError as error:
        return found, str(error)
    return found, ""


# Indirect tables, whole and entry by entry


def check_table(memory: GuestMemory, base: int, entries: int, readable: int, changes: list[tuple[int, int, int]]) -> str:
    """Read a table both ways: `entries` as Linux makes them, and then what is changed of them. Return the refusal."""
    ring = Ring(memory)
    table = base + TABLE
    ring.chain(*((base + BUF + 64 * n, 1 + n, n >= readable) for n in range(entries)), table=table)
    for entry, field, value in changes:
        offset, size = ((0, 8), (8, 4), (12, 2), (14, 2))[field]
        memory.store(table + 16 * (entry % entries) + offset, size, value & ((1 << 8 * size) - 1))
    ring.offer(0)
    quick = enable(ring)
    found = walk(quick)
    with patch.object(queue_module, "_LONG", NOTHING_LONG):
        slow = enable(ring)
        assert found == walk(slow)
    assert quick.indices == slow.indices
    return found[1]


@given(
    st.sampled_from((LOW, HIGH)),
    st.sampled_from((0, 8, 4, 1 << 32)),
    st.integers(18, 60),
    st.sampled_from((0, 1, 2, 1 << 20)),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), HOSTILE), max_size=3),
)
@example(LOW, 0, 34, 1, [(33, 3, 0x7777)])
@example(LOW, 0, 34, 1, [(33, 2, NEXT | WRITE)])
@example(LOW, 0, 34, 34, [(5, 3, 5)])
@example(HIGH, 1 << 32, 34, 1, [(3, 0, 16)])
@settings(max_examples=1_500)
def test_a_long_table_gives_the_same_chain_or_refusal_as_its_entries_one_by_one(
    memory: GuestMemory, base: int, entries: int, readable: int, changes: list[tuple[int, int, int]]
) -> None:
    check_table(memory, base, entries, min(readable, entries), changes)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ((5, 1, 0), "length 0"),
        ((5, 2, INDIRECT), "inside an indirect table"),
        ((5, 2, NEXT), "readable after a writable one"),
        ((5, 3, 4), "does not end within 34"),
        ((5, 3, 34), "descriptor 34 of a table of 34"),
        ((5, 0, 1 << 40), "not all RAM"),
        ((5, 1, (1 << 32) - 1), "not all RAM"),
        ((33, 2, NEXT | WRITE), "does not end within 34"),
    ],
)
def test_what_is_wrong_in_a_long_table_is_said_as_of_a_short_one(change: tuple[int, int, int], refusal: str) -> None:
    assert refusal in check_table(LOW, 0, 34, 1, [change])


def test_a_table_as_linux_makes_it_is_read_whole() -> None:
    ring = Ring(LOW)
    for count, readable in ((34, 1), (34, 33), (34, 34), (34, 0), (MAX_INDIRECT, 1)):
        ring.offer(ring.chain(*((BUF, 1, n >= readable) for n in range(count)), table=TABLE))
        queue = enable(ring, (ring.avail_idx - 1) & 0xFFFF)
        whole = queue._whole_table(TABLE, count)
        assert whole
        assert (len(whole[0]), len(whole[1]), whole[2]) == (readable, count - readable, count)
        with patch.object(queue_module, "_DESC", wraps=queue_module._DESC) as unpack:
            ((_, before, after),) = queue.chains()
        assert (len(before), len(after)) == (readable, count - readable)
        assert unpack.call_count == 1, "the one in the ring"


@pytest.mark.parametrize("offset", [0, 8, 4, 2, 1])
def test_a_long_table_may_lie_anywhere(offset: int) -> None:
    """Read 4 bytes too early, these entries would be in RAM as well."""
    memory = GuestMemory([(0, 1 << 22)])
    assert check_table(memory, offset, 34, 1, [(n, 0, 0) for n in range(34)]) == ""
    memory.close()


def test_a_long_table_after_other_descriptors_is_a_part_of_their_chain() -> None:
    ring = Ring(LOW)
    ring.chain(*((BUF, 1, False) for _ in range(20)), table=TABLE)
    ring.descriptor(0, BUF, 2, NEXT, 1)
    ring.descriptor(1, TABLE, 16 * 20, INDIRECT)
    ring.offer(0)
    assert [len(readable) for _, readable, _ in enable(ring).chains()] == [21]


def test_the_bytes_of_a_long_table_have_a_limit_too() -> None:
    memory = GuestMemory([(0, 1 << 27)])
    ring = Ring(memory)
    size = (1 << 27) - TABLE
    count = (1 << 32) // size + 1
    for entries, refused in ((count - 1, False), (count, True)):
        ring.offer(ring.chain(*((TABLE, size, True) for _ in range(entries)), table=0x3000))
        assert bool(walk(enable(ring, (ring.avail_idx - 1) & 0xFFFF))[1]) == refused
    memory.close()


# Requests of one descriptor, many at once


DESCRIPTORS = st.tuples(
    st.one_of(st.integers(BUF, BUF + 64), st.sampled_from((BUF, (1 << 18) - 1, (1 << 20) - 1, 1 << 32, (1 << 32) + 64, 1 << 40))),
    st.sampled_from((64, 64, 64, 64, 64, 1536, 12, 2, 1, 0, 1 << 20)),
    st.sampled_from((*(WRITE,) * 12, 0, 0, NEXT, WRITE | NEXT, INDIRECT, 0x8000 | WRITE)),
)


@given(
    st.sampled_from((LOW, HIGH)),
    st.integers(0, 5),
    INDICES,
    st.lists(DESCRIPTORS, min_size=1, max_size=32),
    st.lists(st.integers(0, 31), max_size=32),
    st.sampled_from((0, 0, 0, 1)),
    st.lists(st.tuples(st.integers(0, 33), st.integers(0, 8)), max_size=12),
    st.sampled_from((WRITE, WRITE, WRITE, 0)),
    st.sampled_from((1, 12)),
)
@settings(max_examples=1_500)
def test_requests_taken_many_at_once_are_those_of_the_ring_in_order_and_no_other(
    memory: GuestMemory,
    exponent: int,
    start: int,
    descriptors: list[tuple[int, int, int]],
    offers: list[int],
    beyond: int,
    turns: list[tuple[int, int]],
    flags: int,
    least: int,
) -> None:
    """Any sequence of taking many, taking one and putting back sees what chains() alone sees, and ends as it does."""
    ring = Ring(memory, 1 << exponent)
    ring.start_at(start)
    for index, (addr, length, mine) in enumerate(descriptors[: ring.size]):
        ring.descriptor(index, addr, length, mine, (index + 1) % ring.size)
    ring.offer(*(head % (ring.size + beyond) for head in offers[: ring.size]))
    wanted, refusal = walk(enable(ring, start))
    queue = enable(ring, start)
    window = addressof(c_char.from_buffer(queue.window))
    found: list[Found] = []
    late = ""
    for most, back in [*turns, (33, 0)]:
        run = queue.take_singles(most, flags, least)
        if run and run[0]:
            heads, starts, lengths, ends = run
            assert len(heads) == len(starts) == len(lengths) == len(ends) <= most
            assert min(lengths) >= least
            assert [end - begin for begin, end in zip(starts, ends, strict=True)] == list(lengths)
            for head, begin, length in zip(heads, starts, lengths, strict=True):
                views = [(window + begin, length)]
                found.append((head, [], views) if flags else (head, views, []))
        else:
            try:
                for head, readable, writable in queue.chains():
                    found.append((head, places(readable), places(writable)))
                    break
            except QueueError as error:
                late = str(error)
                break
        if back:
            back = min(back, len(found))
            queue.put_back(back)
            del found[len(found) - back :]
        assert queue.in_flight == len(found)
        assert found == wanted[: len(found)]
    if not late:
        rest, late = walk(queue)
        found += rest
    assert (found, late) == (wanted, refusal)
    assert queue.indices == ((start + len(wanted)) & 0xFFFF, start)


def test_many_are_taken_at_once_over_the_end_of_the_ring() -> None:
    ring = Ring(LOW, 8)
    ring.start_at(0xFFFD)
    queue = enable(ring, 0xFFFD)
    for n in range(8):
        ring.descriptor(n, BUF + 64 * n, 64, WRITE)
    ring.offer(*range(7, -1, -1))
    run = queue.take_singles(7, WRITE)
    assert run
    assert run[0] == [7, 6, 5, 4, 3, 2, 1]
    assert list(run[1]) == [BUF + 64 * n for n in run[0]]
    assert queue.indices == (4, 0xFFFD)
    assert [head for head, _, _ in queue.chains()] == [0]


def test_an_index_too_far_ahead_is_for_chains_to_refuse() -> None:
    ring = Ring(LOW, 8)
    queue = enable(ring)
    for n in range(8):
        ring.descriptor(n, BUF, 64, WRITE)
    ring.offer(*range(8), 0)
    assert queue.take_singles(100, WRITE) is None
    with pytest.raises(QueueError, match="too far ahead"):
        next(queue.chains())
    assert queue.indices == (0, 0)


# Many given back at once


@given(st.integers(0, 5), INDICES, st.lists(st.lists(st.integers(0, (1 << 32) - 1), max_size=32), max_size=4), st.booleans())
def test_giving_back_many_at_once_writes_what_giving_back_each_would(
    exponent: int, start: int, batches: list[list[int]], by_one: bool
) -> None:
    contents = []
    for together in (True, False):
        ring = Ring(LOW, 1 << exponent)
        queue = enable(ring, start)
        for written in batches:
            written = written[: ring.size]
            heads = [(7 * n) % ring.size for n in range(len(written))]
            if together:
                queue.add_all_used(heads, written)
            else:
                for head, length in zip(heads, written, strict=True):
                    queue.add_used(head, length)
            if by_one:
                queue.add_used(ring.size - 1, 5)
            queue.publish()
        contents.append((queue.indices, LOW.read(ring.used, ring.end - ring.used)))
    assert contents[0] == contents[1]
