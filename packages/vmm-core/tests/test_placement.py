"""Guest RAM on chosen nodes of the host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vmm_core import _placement
from vmm_core.errors import GuestMemoryError
from vmm_core.guestmem import PAGE_SIZE, GuestMemory, Placement

MiB = 1 << 20
LOW, HIGH = (0, 6 * MiB), (1 << 32, 2 * MiB)
FORBIDDEN = re.compile("Operation not permitted|Function not implemented")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the system is asked for, in its stead."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_placement, "mbind", lambda *call: made.append(call) or 0)
    return made


def test_pieces_follow_each_other_through_low_and_high_ram(calls: list[tuple[Any, ...]]) -> None:
    pieces = [Placement(4 * MiB, "bind", (0,)), Placement(3 * MiB, "interleave", (1, 3)), Placement(1 * MiB, "preferred", (2,))]
    memory = GuestMemory([LOW, HIGH], placement=pieces)
    low, high = (memory.host_address(region) for region in memory.regions)
    assert calls == [
        (low, 4 * MiB, 2, (0,)),
        (low + 4 * MiB, 2 * MiB, 3, (1, 3)),
        (high, 1 * MiB, 3, (1, 3)),
        (high + MiB, 1 * MiB, 1, (2,)),
    ]


def test_a_piece_without_nodes_or_policy_lies_anywhere(calls: list[tuple[Any, ...]]) -> None:
    GuestMemory([LOW], placement=[Placement(2 * MiB), Placement(4 * MiB, "default", (1,))])
    assert calls == []


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((6 * MiB - 1, 1), "5fffff bytes of RAM for one node are not in whole pages"),
        ((6 * MiB, 0), "0x0 bytes of RAM for one node are not in whole pages"),
        ((5 * MiB,), "the nodes have 0x500000 bytes of RAM together, the machine has another amount"),
        ((7 * MiB,), "the nodes have 0x700000 bytes"),
    ],
)
def test_pieces_that_are_not_all_of_ram_are_refused(calls: list[tuple[Any, ...]], sizes: tuple[int, ...], text: str) -> None:
    with pytest.raises(GuestMemoryError, match=text):
        GuestMemory([LOW], placement=[Placement(size, "bind", (0,)) for size in sizes])


def test_a_set_of_nodes_is_one_bit_each() -> None:
    value, bits = _placement.mask((0, 3, 127))
    assert (list(value), bits) == ([0b1001, 1 << 63], 129)  # type: ignore[call-overload]


def test_the_kernel_knows_where_ram_is_to_lie() -> None:
    try:
        memory = GuestMemory([LOW], placement=[Placement(6 * MiB, "bind", (0,))], prealloc=1)
    except GuestMemoryError as error:
        if FORBIDDEN.search(str(error)):
            pytest.skip(str(error))
        raise
    start = memory.host_address(memory.regions[0])
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    (found,) = (line for line in lines if int(line.split()[0], 16) == start)
    assert found.split()[1] == "bind:0"
    assert f"N0={6 * MiB // PAGE_SIZE}" in found or "huge" in found


def test_a_node_that_the_host_does_not_have_is_named() -> None:
    with pytest.raises(GuestMemoryError) as caught:
        GuestMemory([LOW], placement=[Placement(6 * MiB, "bind", (127,))])
    text = str(caught.value)
    assert text.startswith("cannot have 0x600000 bytes of guest RAM on node 127 of the host (policy bind): ")
