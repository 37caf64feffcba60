"""ELF kernels: entered by their PVH note or in long mode, and anything that is not an x86_64 kernel is a one-line error."""

from __future__ import annotations

from pathlib import Path
from struct import pack
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm_core.errors import BootError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.boot import LoadedKernel, load_kernel
from vmm_core.x86_64.layout import Microvm

MIB = 1 << 20
TEXT = b"\x0f\x0b" * 512
DATA = b"data" * 64
PT_LOAD, PT_NOTE = 1, 4


class Part(NamedTuple):
    """A program header and its bytes. What is not given follows from `data`."""

    data: bytes
    paddr: int = 0x100_0000
    vaddr: int = 0xFFFF_FFFF_8100_0000
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None
    kind: int = PT_LOAD
    align: int = 4


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return pack("<III", len(name), len(desc), kind) + padded(name) + padded(desc)


def pvh_note(entry: int) -> Part:
    """Return the notes of a Linux kernel: others first, then PHYS32_ENTRY."""
    notes = note(b"Xen\0", 6, b"linux\0") + note(b"Linux\0", 18, bytes(4)) + note(b"Xen\0", 18, pack("<Q", entry))
    return Part(notes, kind=PT_NOTE)


def elf(
    *parts: Part,
    entry: int = 0x100_0000,
    machine: int = 62,
    kind: int = 2,
    ident: bytes = b"\x7fELF\x02\x01\x01",
    phentsize: int = 56,
    phnum: int | None = None,
    phoff: int = 64,
) -> bytes:
    """Return an ELF file of `parts`; by default of a text segment and a data segment with a .bss."""
    parts = parts or (Part(TEXT), Part(DATA, 0x120_0000, 0xFFFF_FFFF_8120_0000, memsz=2 * MIB))
    count = len(parts) if phnum is None else phnum
    header = ident.ljust(16, b"\0") + pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, phoff, 0, 0, 64, phentsize, count, 0, 0, 0)
    table = b""
    body = b""
    start = 64 + 56 * len(parts)
    for part in parts:
        filesz = len(part.data) if part.filesz is None else part.filesz
        memsz = filesz if part.memsz is None else part.memsz
        offset = start + len(body) if part.offset is None else part.offset
        table += pack("<IIQQQQQQ", part.kind, 5, offset, part.vaddr, part.paddr, filesz, memsz, part.align)
        body += part.data
    return header + table + body


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "vmlinux"


def ram(size: int = 32 * MIB) -> GuestMemory:
    return GuestMemory(Microvm.ram(size))


def boot(kernel: Path, image: bytes, memory: GuestMemory | None = None, **arguments: object) -> LoadedKernel:
    kernel.write_bytes(image)
    return load_kernel(memory or ram(), str(kernel), **arguments)  # type: ignore[arg-type]


def boot_or_refuse(kernel: Path, image: bytes) -> LoadedKernel | None:
    """Return what was loaded, or None for a BootError of one line. Anything else fails the test."""
    try:
        return boot(kernel, image)
    except BootError as error:
        if "\n" in str(error):
            raise
        return None


def refusal(kernel: Path, image: bytes) -> str:
    with pytest.raises(BootError) as caught:
        boot(kernel, image)
    return str(caught.value).removeprefix(f"{kernel}: ")


def test_segments_are_loaded_and_their_rest_is_zero_even_over_what_a_former_guest_left(kernel: Path) -> None:
    memory = ram()
    memory.write(0x100_0000, b"\xff" * (8 * MIB))
    loaded = boot(kernel, elf(), memory)
    assert memory.read(0x100_0000, len(TEXT)) == TEXT
    assert memory.read(0x120_0000, len(DATA)) == DATA
    assert memory.read(0x120_0000 + len(DATA), 2 * MIB - len(DATA)) == bytes(2 * MIB - len(DATA))
    assert loaded.kernel == (0x100_0000, 4 * MIB)


def test_without_a_pvh_note_the_kernel_starts_in_long_mode(kernel: Path) -> None:
    memory = ram()
    loaded = boot(kernel, elf(entry=0x100_0123), memory)
    assert loaded.protocol == "ELF"
    assert loaded.vcpu_boot.registers["rip"] == 0x100_0123
    assert loaded.vcpu_boot.registers["rsi"] == Microvm.ZERO_PAGE.base
    assert memory.read(Microvm.ZERO_PAGE.base + 0x1FE, 10) == b"\x55\xaa\0\0HdrS\x0c\x02"


def test_a_virtual_entry_point_is_found_in_its_segment(kernel: Path) -> None:
    loaded = boot(kernel, elf(entry=0xFFFF_FFFF_8120_0010))
    assert loaded.vcpu_boot.registers["rip"] == 0x120_0010


def test_a_pvh_note_starts_the_kernel_in_protected_mode(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(5000))
    memory = ram()
    loaded = boot(
        kernel, elf(pvh_note(0x100_0040), Part(TEXT)), memory, initrd_path=str(initrd), command_line="quiet", rsdp=0xE_0000
    )
    assert loaded.protocol == "PVH"
    assert loaded.vcpu_boot.registers["rip"] == 0x100_0040
    assert loaded.vcpu_boot.cr0 == 1
    assert loaded.vcpu_boot.efer == loaded.vcpu_boot.cr4 == 0
    start = loaded.vcpu_boot.registers["rbx"]
    assert memory.load(start, 4) == 0x336E_C578
    assert memory.load(start + 4, 4) == 1
    assert memory.load(start + 12, 4) == 1
    module = memory.load(start + 16, 8)
    assert (memory.load(module, 8), memory.load(module + 8, 8)) == loaded.initrd
    assert memory.read(memory.load(start + 24, 8), 6) == b"quiet\0"
    assert memory.load(start + 32, 8) == 0xE_0000
    table = memory.load(start + 40, 8)
    count = memory.load(start + 48, 4)
    entries = [tuple(memory.load(table + 24 * i + at, size) for at, size in ((0, 8), (8, 8), (16, 4))) for i in range(count)]
    assert entries == loaded.memory_map


def test_a_pvh_kernel_without_a_ram_disk_gets_no_module(kernel: Path) -> None:
    memory = ram()
    start = boot(kernel, elf(pvh_note(0x100_0040), Part(TEXT)), memory).vcpu_boot.registers["rbx"]
    assert memory.load(start + 12, 4) == memory.load(start + 16, 8) == 0


@pytest.mark.parametrize("size", [4, 8])
def test_a_pvh_note_may_be_32_or_64_bits_wide(kernel: Path, size: int) -> None:
    data = note(b"Xen\0", 18, (0x100_0040).to_bytes(size, "little"))
    loaded = boot(kernel, elf(Part(data, kind=PT_NOTE), Part(TEXT)))
    assert (loaded.protocol, loaded.vcpu_boot.registers["rip"]) == ("PVH", 0x100_0040)


def test_a_note_segment_aligned_to_eight_is_read_so(kernel: Path) -> None:
    # Names of 5 bytes: the description starts at 24 with eight-byte alignment, at 20 with four.
    first = pack("<III", 5, 4, 1) + b"Test\0".ljust(12, b"\0") + bytes(8)
    data = first + pack("<III", 4, 8, 18) + b"Xen\0" + pack("<Q", 0x100_0040)
    assert boot(kernel, elf(Part(data, kind=PT_NOTE, align=8), Part(TEXT))).protocol == "PVH"


@pytest.mark.parametrize(
    "notes",
    [
        note(b"Xen\0", 18, b"\x40\0\0\1")[:-1],
        note(b"Xen\0", 18, b"\x40\0\0\1\0"),
        pack("<III", 4, 0xFFFF_FFFF, 18) + b"Xen\0",
        pack("<III", 0xFFFF_FFFF, 8, 18) + b"Xen\0",
        b"",
    ],
    ids=["cut off", "odd width", "huge description", "huge name", "nothing"],
)
def test_broken_notes_are_no_notes(kernel: Path, notes: bytes) -> None:
    assert boot(kernel, elf(Part(notes, kind=PT_NOTE), Part(TEXT))).protocol == "ELF"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (elf()[:57], "truncated: 57 bytes do not hold an ELF header"),
        (elf(ident=b"\x7fELF\x01\x01\x01"), "not a 64-bit ELF file; an x86_64 kernel is needed"),
        (elf(ident=b"\x7fELF\x02\x02\x01"), "a big-endian ELF file; an x86_64 kernel is needed"),
        (elf(machine=183), "an ELF file for aarch64; an x86_64 kernel is needed"),
        (elf(machine=9999), "an ELF file for machine 9999; an x86_64 kernel is needed"),
        (elf(kind=1), "not an executable ELF file (type 1)"),
        (elf(phentsize=32), "broken ELF file: 2 program headers of 32 bytes"),
        (elf(phnum=0), "broken ELF file: 0 program headers of 56 bytes"),
        (elf(phnum=0xFFFF), "broken ELF file: 65535 program headers of 56 bytes"),
        (elf(phoff=1 << 63), f"truncated: the program headers would end at byte {(1 << 63) + 112} of {len(elf())}"),
        (elf(Part(TEXT, filesz=4096)), "truncated: a segment would end at byte 4216 of 1144"),
        (elf(Part(TEXT, offset=1 << 63)), f"truncated: a segment would end at byte {(1 << 63) + 1024} of 1144"),
        (elf(Part(TEXT, memsz=512)), "broken ELF file: a segment of 512 bytes has 1024 in the file"),
        (elf(Part(TEXT, paddr=0x1000)), "a segment of 1024 bytes at 0x1000 is not between 0x100000 and 0xc0000000"),
        (elf(Part(TEXT, memsz=1 << 63)), f"a segment of {1 << 63} bytes at 0x1000000 is not between 0x100000 and 0xc0000000"),
        (
            elf(Part(TEXT, memsz=MIB * 17)),
            "does not fit: needs 17825792 bytes of RAM at 0x1000000, where the machine has 16777216",
        ),
        (elf(Part(TEXT), Part(TEXT)), "broken ELF file: segments at 0x1000000 and 0x1000000 overlap"),
        (elf(Part(b"", kind=PT_NOTE)), "broken ELF file: nothing to load"),
        (elf(Part(b"", offset=MIB, filesz=1, kind=PT_NOTE)), f"truncated: a note segment would end at byte {MIB + 1} of 120"),
        (elf(entry=0x1000), "broken ELF file: the entry point 0x1000 is in no segment"),
        (elf(pvh_note(0x1000), Part(TEXT)), "broken ELF file: the PVH entry point 0x1000 is in no segment"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_start_is_refused_with_the_reason(kernel: Path, image: bytes, message: str) -> None:
    assert refusal(kernel, image) == message


U64 = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 0x10_0000, 0x100_0000, 0x200_0000, 2**32 - 1, 2**63, 2**64 - 1])
)
PARTS = st.builds(
    Part, st.binary(max_size=200), U64, U64, U64, U64, st.one_of(st.none(), U64), st.sampled_from([PT_LOAD, PT_NOTE, 7]), U64
)
SANE_PARTS = st.builds(
    Part,
    st.binary(max_size=200),
    st.integers(MIB, 40 * MIB),
    U64,
    st.integers(200, 64 * MIB),
    kind=st.sampled_from([PT_LOAD, PT_NOTE]),
    filesz=st.none(),
    offset=st.none(),
    align=st.sampled_from([4, 8]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(PARTS, SANE_PARTS), min_size=1, max_size=4), entry=U64, phoff=st.one_of(st.just(64), U64))
def test_any_program_headers_are_loaded_into_ram_or_refused(kernel: Path, parts: list[Part], entry: int, phoff: int) -> None:
    loaded = boot_or_refuse(kernel, elf(*parts, entry=entry, phoff=phoff))
    if loaded is not None:
        assert loaded.kernel.base >= MIB
        assert loaded.kernel.end <= 32 * MIB
        assert loaded.kernel.base <= loaded.vcpu_boot.registers["rip"] < loaded.kernel.end


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 250), junk=st.binary(min_size=1, max_size=64), length=st.integers(0, 2000))
def test_any_damage_is_loaded_or_refused(kernel: Path, start: int, junk: bytes, length: int) -> None:
    image = bytearray(elf(pvh_note(0x100_0040), Part(TEXT)))
    image[start : start + len(junk)] = junk
    boot_or_refuse(kernel, bytes(image[:length]))
