"""Address buses: every access reaches the one device that owns it whole, and nothing else does anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.bus import Bus
from vmm_core.errors import BusError

SIZE = 0x200
sizes = st.sampled_from([1, 2, 4, 8])
ranges = st.lists(st.tuples(st.integers(-4, SIZE + 4), st.integers(-2, 40)), max_size=12)


class Recorder:
    """Answers with its number and remembers what it was asked."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.seen: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size))
        return self.number

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


@given(ranges, st.integers(0, SIZE + 8), sizes)
def test_an_access_reaches_exactly_the_device_that_owns_all_of_it(wanted: list[tuple[int, int]], address: int, size: int) -> None:
    bus = Bus("test bus", SIZE)
    owner: dict[int, int] = {}  # the model: one entry per address
    devices: list[Recorder] = []
    for base, length in wanted:
        cells = range(base, base + length)
        fits = length > 0 and base >= 0 and base + length <= SIZE
        if fits and not any(cell in owner for cell in cells):
            bus.add(base, length, device := Recorder(len(devices)), f"device {len(devices)}")
            owner |= dict.fromkeys(cells, len(devices))
            devices.append(device)
        else:
            with pytest.raises(BusError):
                bus.add(base, length, Recorder(), "intruder")

    owners = {owner.get(cell) for cell in range(address, address + size)}
    target = owners.pop() if len(owners) == 1 else None
    found = bus.find(address)
    assert (found and found.device) == (devices[owner[address]] if address in owner else None)
    answer = bus.read(address, size)
    bus.write(address, size, 5)

    for number, device in enumerate(devices):
        if number == target:
            offset = address - bus.mappings[[m.device for m in bus.mappings].index(device)].base
            assert device.seen == [("read", offset, size), ("write", offset, size, 5)]
        else:
            assert device.seen == []
    assert answer == (target if target is not None else (1 << 8 * size) - 1)


def test_nothing_there_reads_as_ones_and_swallows_writes() -> None:
    bus = Bus("port bus", 0x1_0000)
    bus.write(0x80, 1, 0)
    assert [bus.read(0x80, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF]


def test_an_access_that_hangs_over_the_edge_of_a_device_is_nobodys() -> None:
    bus = Bus("port bus", 0x1_0000)
    device = Recorder()
    bus.add(0x60, 2, device, "keyboard controller")
    assert bus.read(0x61, 2) == 0xFFFF
    bus.write(0x5F, 2, 0)
    assert device.seen == []


def test_an_overlap_names_both_devices_and_their_addresses() -> None:
    bus = Bus("port bus", 0x1_0000)
    bus.add(0x3F8, 8, Recorder(), "serial")
    with pytest.raises(BusError, match=r"^port bus: debug at 0x3ff\+0x1 overlaps serial at 0x3f8\+0x8$"):
        bus.add(0x3FF, 1, Recorder(), "debug")


def test_a_device_beyond_the_bus_is_refused() -> None:
    bus = Bus("port bus", 0x1_0000)
    with pytest.raises(BusError, match="does not fit"):
        bus.add(0xFFFF, 2, Recorder(), "late")
    assert bus.mappings == []


def test_a_removed_device_is_asked_no_more_and_its_place_is_free() -> None:
    bus = Bus("memory bus", 1 << 52)
    bus.add(0x1000, 0x1000, Recorder(1), "first")
    bus.add(0x2000, 0x1000, Recorder(2), "second")
    bus.remove(0x1000)
    assert (bus.read(0x1000, 1), bus.read(0x2000, 1)) == (0xFF, 2)
    bus.add(0x1800, 0x800, Recorder(3), "third")
    assert bus.read(0x1FF8, 8) == 3


def test_removing_what_is_not_there_is_an_error() -> None:
    bus = Bus("memory bus", 1 << 52)
    bus.add(0x1000, 0x1000, Recorder(), "only")
    with pytest.raises(BusError, match=r"^memory bus: no device starts at 0x1800$"):
        bus.remove(0x1800)


def test_a_lookup_under_way_sees_the_old_table_or_the_new_never_a_mixture() -> None:
    bus = Bus("memory bus", 1 << 52)
    bus.add(0x1000, 8, Recorder(1), "first")
    before = bus._table
    bus.add(0x0, 8, Recorder(0), "second")
    bus.remove(0x1000)
    assert (before[0], [m.name for m in before[1]]) == ([0x1000], ["first"])
