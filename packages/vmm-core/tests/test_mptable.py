"""The MP table, read as a kernel reads it: from the pointer on, by the specification's sizes."""

from __future__ import annotations

from struct import unpack_from
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.guestmem import GuestMemory
from vmm_core.topology import CpuTopology
from vmm_core.x86_64.layout import Microvm
from vmm_core.x86_64.mp_table import add_words, command_line_words, mp_table, write_mp_table

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}  # MP specification 1.4, table 4-3


class Parsed(NamedTuple):
    processors: list[tuple[int, ...]]  # local APIC id, version, flags
    buses: list[tuple[int, bytes]]
    io_apics: list[tuple[int, ...]]  # id, version, flags, address
    io_interrupts: list[tuple[int, ...]]  # type, flags, bus, irq, APIC id, pin
    local_interrupts: list[tuple[int, ...]]


def parse(memory: GuestMemory) -> Parsed:
    """Find and read the table in guest memory, checking both checksums, both lengths and the entry count."""
    pointer = next(
        address
        for address in range(0x9_FC00, 0xA_0000, 16)
        if memory.read(address, 4) == b"_MP_" and sum(memory.read(address, 16)) % 256 == 0
    )
    assert memory.read(pointer + 8, 2) == b"\x01\x04"
    assert memory.read(pointer + 11, 5) == bytes(5)
    address = memory.load(pointer + 4, 4)
    table = memory.read(address, memory.load(address + 4, 2))
    assert sum(table) % 256 == 0
    signature, _, revision, oem, product, count, lapic = unpack_from("<4sHBx8s12s6xHI", table)
    assert (signature, revision, oem, product, lapic) == (b"PCMP", 4, b"STRATO\0\0", b"1.0".ljust(12, b"\0"), 0xFEE0_0000)
    found = Parsed([], [], [], [], [])
    at = 44
    for _ in range(count):
        match table[at]:
            case 0:
                found.processors.append(unpack_from("<xBBB", table, at))
            case 1:
                found.buses.append(unpack_from("<xB6s", table, at))
            case 2:
                found.io_apics.append(unpack_from("<xBBBI", table, at))
            case 3:
                found.io_interrupts.append(unpack_from("<xBHBBBB", table, at))
            case _:
                found.local_interrupts.append(unpack_from("<xBHBBBB", table, at))
        at += SIZES[table[at]]
    assert at == len(table)
    return found


def machine(apic_ids: list[int]) -> Parsed:
    memory = GuestMemory(Microvm.ram(2 << 20))
    write_mp_table(memory, mp_table(apic_ids))
    return parse(memory)


@pytest.mark.parametrize("cpus", [1, 2, 40, 41, 254])
def test_every_cpu_is_listed_and_the_first_one_boots(cpus: int) -> None:
    found = machine(list(range(cpus)))
    assert found.processors == [(0, 0x14, 3)] + [(n, 0x14, 1) for n in range(1, cpus)]


def test_every_isa_interrupt_is_on_the_pin_of_its_number() -> None:
    found = machine([0, 1])
    assert found.buses == [(0, b"ISA   ")]
    assert found.io_apics == [(3, 0x11, 1, 0xFEC0_0000)]
    assert found.io_interrupts == [(0, 0, 0, irq, 3, irq) for irq in range(16)]


def test_the_boot_processor_takes_the_interrupts_of_the_8259_and_all_take_nmis() -> None:
    assert machine([0, 1]).local_interrupts == [(3, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0xFF, 1)]


@pytest.mark.parametrize("cpus", [1, 254])
def test_the_table_stays_in_the_area_reserved_for_it(cpus: int) -> None:
    assert len(mp_table(list(range(cpus)))) <= Microvm.MP_TABLE.size


@given(st.integers(1, 254), st.sampled_from([1, 2, 3]))
def test_the_io_apic_has_an_id_of_its_own_on_every_topology(cpus: int, threads: int) -> None:
    topology = CpuTopology(cpus, -(-cpus // threads) * threads, sockets=-(-cpus // threads), threads=threads)
    ids = [topology.apic_id(index) for index in range(cpus)]
    found = machine(ids)
    listed = [processor[0] for processor in found.processors]
    assert listed == [apic_id for apic_id in ids if apic_id < 255]
    assert len(listed) == 255 or found.io_apics[0][0] not in listed


def test_linux_is_told_of_its_devices_in_the_words_that_clients_know() -> None:
    words = command_line_words(Microvm.slot(number) for number in range(3))
    assert words == [
        "virtio_mmio.device=512@0xf0100000:5",
        "virtio_mmio.device=512@0xf0100200:6",
        "virtio_mmio.device=512@0xf0100400:7",
    ]


def test_slots_that_such_a_kernel_cannot_use_are_not_named() -> None:
    words = command_line_words(Microvm.slot(number) for number in range(Microvm.SLOTS))
    assert [word.rpartition(":")[2] for word in words] == [str(irq) for irq in range(5, 16)]


@pytest.mark.parametrize(
    ("typed", "whole"),
    [
        ("", "a=1 b"),
        ("quiet  root=/dev/vda ", "quiet  root=/dev/vda  a=1 b"),
        ("quiet -- single user", "quiet a=1 b -- single user"),
        ("-- single", "a=1 b -- single"),
        ("quiet --", "quiet a=1 b --"),
        ('x="1 -- 2" -- 3', 'x="1 -- 2" a=1 b -- 3'),
        ("--x y--", "--x y-- a=1 b"),
    ],
)
def test_words_for_the_kernel_stand_before_those_for_its_first_program(typed: str, whole: str) -> None:
    assert add_words(typed, ["a=1", "b"]) == whole
