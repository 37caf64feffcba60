"""The microvm's map: nothing overlaps, and what clients and guests count on is where it always was."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.layout import Gsi, Microvm, Range

PORTS = {"I8042_DATA", "I8042_COMMAND", "RTC_PORTS", "COM1", "BOOT_TIME", "PCI_CONFIG_ADDRESS"}
INSIDE_ANOTHER = {"FIRMWARE_AREA": ("ACPI_TABLES", "MP_TABLE", "RESET_VECTOR"), "COM1": ("BOOT_TIME",)}
GIB = 1 << 30


RANGES = {name: value for name, value in vars(Microvm).items() if isinstance(value, Range)}
GSIS = {name: value for name, value in vars(Microvm).items() if isinstance(value, Gsi)}


def ranges(*, ports: bool) -> dict[str, Range]:
    return {name: value for name, value in RANGES.items() if (name in PORTS) == ports}


def overlaps(table: dict[str, Range]) -> list[tuple[str, str]]:
    return [
        (a, b)
        for a, b in itertools.combinations(sorted(table, key=lambda name: table[name]), 2)
        if table[a].base < table[b].end
        and table[b].base < table[a].end
        and b not in INSIDE_ANOTHER.get(a, ())
        and a not in INSIDE_ANOTHER.get(b, ())
    ]


@pytest.mark.parametrize("ports", [False, True], ids=["memory", "ports"])
def test_no_two_ranges_overlap(ports: bool) -> None:
    table = ranges(ports=ports)
    for name, value in sorted(table.items(), key=lambda item: item[1]):
        print(f"{value.base:#012x} to {value.end - 1:#012x}  {name}")
    assert overlaps(table) == []


def test_what_lies_inside_another_range_lies_wholly_inside() -> None:
    for outer, inner in INSIDE_ANOTHER.items():
        assert all(RANGES[outer].base <= RANGES[name].base and RANGES[name].end <= RANGES[outer].end for name in inner)


def test_devices_lie_between_the_two_parts_of_ram() -> None:
    loaded = {name for name, value in ranges(ports=False).items() if value.end <= Microvm.KERNEL_BASE}
    for name, value in ranges(ports=False).items():
        if name not in loaded:
            assert value.base >= Microvm.LOW_RAM_LIMIT
            assert value.end <= Microvm.HIGH_RAM_BASE


def test_no_two_devices_have_the_same_interrupt() -> None:
    fixed = [gsi for name, gsi in GSIS.items() if "SLOT" not in name and name != "SECOND_IO_APIC_GSI"]
    used = fixed + [Microvm.slot(number).gsi for number in range(Microvm.SLOTS)]
    print(sorted(used))
    assert len(set(used)) == len(used)
    assert max(used) < 2 * Microvm.IO_APIC_PINS


def test_slots_are_where_clients_count_them() -> None:
    assert Microvm.slot(0) == (0, 0xF010_0000, 0x200, 5)
    assert Microvm.slot(10) == (10, 0xF010_1400, 0x200, 15)
    assert [Microvm.slot(k).gsi for k in range(11)] == list(range(5, 16))


def test_slots_beyond_stratovirts_have_wires_that_no_pc_device_has() -> None:
    assert [Microvm.slot(k).gsi for k in range(11, Microvm.SLOTS)] == list(range(18, 48))


def test_slots_fill_their_window_and_end_there() -> None:
    last = Microvm.slot(Microvm.SLOTS - 1)
    assert last.base + last.size == Microvm.VIRTIO_MMIO.end
    for number in (-1, Microvm.SLOTS):
        with pytest.raises(ValueError, match=f"no virtio-mmio slot {number}"):
            Microvm.slot(number)


def test_there_is_room_for_24_devices_beside_the_six_replaceable_ones() -> None:
    assert Microvm.SLOTS >= 24 + 6


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [(0, 1)]),
        (3 * GIB, [(0, 3 * GIB)]),
        (3 * GIB + 4096, [(0, 3 * GIB), (4 * GIB, 4096)]),
        (4 * GIB, [(0, 3 * GIB), (4 * GIB, GIB)]),
        (512 * GIB, [(0, 3 * GIB), (4 * GIB, 509 * GIB)]),
    ],
)
def test_ram_splits_around_the_devices(size: int, expected: list[tuple[int, int]]) -> None:
    assert Microvm.ram(size) == expected


@given(st.integers(1, 515 * GIB))
def test_ram_is_never_lost_nor_laid_over_a_device(size: int) -> None:
    regions = Microvm.ram(size)
    assert sum(region.size for region in regions) == size
    assert all(region.end <= Microvm.LOW_RAM_LIMIT or region.base >= Microvm.HIGH_RAM_BASE for region in regions)


@pytest.mark.parametrize("size", [0, -1, 515 * GIB + 1])
def test_impossible_ram_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        Microvm.ram(size)


def test_guest_memory_takes_the_map_as_it_is() -> None:
    memory = GuestMemory(Microvm.ram(8 << 20))
    assert [(region.base, region.size) for region in memory.regions] == [(0, 8 << 20)]
