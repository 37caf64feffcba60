"""Loading a kernel: what every kind of kernel file has in common, and what is no kernel at all."""

from __future__ import annotations

import gc
import os
from itertools import pairwise
from pathlib import Path
from struct import unpack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm_core.errors import BootError, InitrdError, KernelCommandLineError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64.boot import KernelFiles, LoadedKernel, load_kernel
from vmm_core.x86_64.layout import Microvm, Range
from vmm_core.x86_64.memory_map import RAM, RESERVED, memory_map

MIB = 1 << 20
GIB = 1 << 30
BANNER = b"Linux version 5.10.0 (root@host) (gcc 10.2.1, GNU ld 2.35) #1 SMP Thu Jan 1 00:00:00 UTC 1970\n"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "kernel"


def ram(size: int = 32 * MIB) -> GuestMemory:
    return GuestMemory(Microvm.ram(size))


def plain(size: int = MIB) -> bytes:
    """Return what `objcopy -O binary vmlinux` makes: code from the first byte, the banner somewhere."""
    return (b"\xfa\xf4" * 8192 + BANNER).ljust(size, b"\0")


def boot(kernel: Path, image: bytes, memory: GuestMemory | None = None, **arguments: object) -> LoadedKernel:
    kernel.write_bytes(image)
    return load_kernel(memory or ram(), str(kernel), **arguments)  # type: ignore[arg-type]


def refusal(kernel: Path, image: bytes) -> str:
    with pytest.raises(BootError) as caught:
        boot(kernel, image)
    return str(caught.value).removeprefix(f"{kernel}: ")


def test_a_plain_linux_image_runs_from_where_linux_is_linked_to(kernel: Path) -> None:
    memory = ram()
    loaded = boot(kernel, plain(), memory)
    assert loaded.protocol == "raw"
    assert loaded.vcpu_boot.registers["rip"] == 0x100_0000
    assert memory.read(0x100_0000, MIB) == plain()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not a kernel image (no bzImage header, no ELF magic at offset 0)"),
        (b"#!/bin/sh\n", "not a kernel image (no bzImage header, no ELF magic at offset 0)"),
        (bytes(2 * MIB), "not a kernel image (no bzImage header, no ELF magic at offset 0)"),
        (bytes(1024) + plain(), "not a kernel image (no bzImage header, no ELF magic at offset 0)"),
        (plain().replace(b"(gcc", b"\x04\x01"), "not a kernel image (no bzImage header, no ELF magic at offset 0)"),
        (plain(20 * MIB), "does not fit: needs 20971520 bytes of RAM at 0x1000000, where the machine has 16777216"),
        (bytes(56) + b"ARM\x64" + bytes(MIB), "an arm64 kernel; a bzImage or ELF kernel for x86_64 is needed"),
        (bytes(56) + b"RSC\x05" + bytes(MIB), "a riscv kernel; a bzImage or ELF kernel for x86_64 is needed"),
        (b"\x1f\x8b\x08", "a gzip file, which must be unpacked first; a bzImage or ELF kernel for x86_64 is needed"),
        (b"QFI\xfb", "a qcow2 disk image; a bzImage or ELF kernel for x86_64 is needed"),
    ],
    ids=["empty", "script", "zeros", "a disk with a log", "compressed by LZ4", "large", "arm64", "riscv", "gzip", "qcow2"],
)
def test_what_is_no_kernel_is_refused_by_name(kernel: Path, image: bytes, message: str) -> None:
    assert refusal(kernel, image) == message


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, reason in [
        (tmp_path / "none", "cannot open: No such file or directory"),
        (tmp_path, "not a regular file"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "a\0b", "cannot open: .*embedded null"),
    ]:
        with pytest.raises(BootError, match=reason):
            load_kernel(ram(), str(path))


def descriptors(*, settle: bool = False) -> list[str]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_no_descriptor_stays_open(kernel: Path) -> None:
    before = descriptors(settle=True)
    boot(kernel, plain(), initrd_path=str(kernel))
    refusal(kernel, b"junk")
    with pytest.raises(BootError):
        load_kernel(ram(), "/dev/zero")
    assert descriptors() == before


def test_files_that_are_open_load_again_without_their_names_and_with_their_new_size(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"first")
    kernel.write_bytes(plain())
    before = descriptors(settle=True)
    with KernelFiles(str(kernel), str(initrd)) as files:
        files.load(ram())
        kernel.unlink()
        initrd.write_bytes(b"the second one is longer")  # in place: the same file
        initrd.unlink()
        memory = ram()
        loaded = files.load(memory)
        assert memory.read(0x100_0000, MIB) == plain()
        assert loaded.initrd is not None
        assert memory.read(*loaded.initrd) == b"the second one is longer"
    files.close()
    assert descriptors() == before


def test_an_error_says_by_its_kind_what_it_is_about(kernel: Path, tmp_path: Path) -> None:
    kernel.write_bytes(plain())
    before = descriptors(settle=True)
    with pytest.raises(InitrdError, match="none: cannot open"):
        load_kernel(ram(), str(kernel), str(tmp_path / "none"))
    with pytest.raises(InitrdError, match="does not fit"):
        boot(kernel, plain(16 * MIB), initrd_path=str(kernel))
    with pytest.raises(KernelCommandLineError):
        boot(kernel, plain(), command_line="x" * 5000)
    with pytest.raises(BootError) as caught:
        load_kernel(ram(), str(tmp_path / "none"), str(kernel))
    assert type(caught.value) is BootError
    assert descriptors() == before


def test_the_command_line_ends_with_a_nul_even_over_a_longer_one(kernel: Path) -> None:
    memory = ram()
    boot(kernel, plain(), memory, command_line="console=ttyS0 quiet")
    boot(kernel, plain(), memory, command_line="root=/dev/vda")
    assert memory.read(0x2_0000, 14) == b"root=/dev/vda\0"


def test_a_command_line_takes_any_bytes_but_nul(kernel: Path) -> None:
    memory = ram()
    boot(kernel, plain(), memory, command_line="host=\u00e4 \udcff")
    assert memory.read(0x2_0000, 9) == b"host=\xc3\xa4 \xff"
    for line, reason in [("a\0b", "NUL at byte 1"), ("\ud800", "surrogates not allowed")]:
        with pytest.raises(BootError, match=f"kernel command line: .*{reason}"):
            boot(kernel, plain(), command_line=line)


def test_the_command_line_is_limited_to_what_linux_takes(kernel: Path) -> None:
    boot(kernel, plain(), command_line="x" * 2047)
    with pytest.raises(BootError, match="kernel command line: 2048 bytes; this kernel takes at most 2047"):
        boot(kernel, plain(), command_line="x" * 2048)


@pytest.mark.parametrize(
    ("memory_size", "size", "base"),
    [(32 * MIB, 1, 0x1FF_F000), (32 * MIB, 4096, 0x1FF_F000), (32 * MIB, 4097, 0x1FF_E000), (GIB, 100_000, 0x37FE_7000)],
)
def test_the_ram_disk_lies_where_stratovirt_puts_it(kernel: Path, tmp_path: Path, memory_size: int, size: int, base: int) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"\x5a" * size)
    memory = ram(memory_size)
    loaded = boot(kernel, plain(), memory, initrd_path=str(initrd))
    assert loaded.initrd == (base, size)
    assert memory.read(base, size) == b"\x5a" * size


def test_an_unusable_ram_disk_is_refused_by_name(kernel: Path, tmp_path: Path) -> None:
    for name, size, reason in [("empty", 0, "empty"), ("large", 32 * MIB, "does not fit: 33554432 bytes")]:
        initrd = tmp_path / name
        with initrd.open("wb") as file:
            file.truncate(size)
        with pytest.raises(BootError, match=f"{name}: {reason}"):
            boot(kernel, plain(), initrd_path=str(initrd))
    with pytest.raises(BootError, match="missing: cannot open"):
        boot(kernel, plain(), initrd_path=str(tmp_path / "missing"))


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_hang(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = os.preadv

    def shrinking(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(kernel, 5000)
        return reading(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    kernel.write_bytes(plain())
    with pytest.raises(BootError, match="truncated: ends at byte 5000"):
        load_kernel(ram(), str(kernel))


def test_a_large_kernel_is_read_into_huge_pages_where_there_are_any(kernel: Path) -> None:
    memory = ram()
    boot(kernel, plain(4 * MIB), memory)
    flags = flags_of_mapping(memory.host_address(memory.regions[0]) + 0x100_0000)
    assert ("hg" in flags) == Path("/sys/kernel/mm/transparent_hugepage").exists()


def flags_of_mapping(address: int) -> list[str]:
    """Return the kernel's flags of the mapping at `address` of this process (proc(5), VmFlags)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        start, dash, end = name.partition("-")
        if dash:
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and name == "VmFlags:":
            return rest.split()
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_short_reads_are_continued(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: reading(fd, [buffers[0][:70_001]], offset))
    memory = ram()
    boot(kernel, plain(), memory)
    assert memory.read(0x100_0000, MIB) == plain()


def test_a_read_error_is_an_error_of_the_kernel_file(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    assert refusal(kernel, plain()) == "cannot read: Input/output error"


def test_long_mode_starts_with_the_first_four_gib_mapped_one_to_one(kernel: Path) -> None:
    memory = ram()
    state = boot(kernel, plain(), memory).vcpu_boot
    assert state.cr0 == 0x8000_0001
    assert (state.cr4, state.efer) == (0x20, 0x500)
    for address in (0, 0x7000, 0x100_0200, 0x3FFF_FFFF, 0x4000_0000, 0xBFFF_FFFF, 0xFFFF_FFFF):
        assert translate(memory, state.cr3, address) == address
    assert translate(memory, state.cr3, 0x1_0000_0000) is None


def translate(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """Walk the page tables as a processor does (AMD APM vol. 2, section 5.3)."""
    table = cr3
    for shift in (39, 30, 21, 12):
        entry = memory.load(table + 8 * (address >> shift & 511), 8)
        if not entry & 1:
            return None
        if entry & 0x80 or shift == 12:
            return (entry & 0xF_FFFF_FFFF_F000) + (address & (1 << shift) - 1)
        table = entry & 0xF_FFFF_FFFF_F000
    return None


def test_segments_agree_with_the_descriptors_in_memory(kernel: Path) -> None:
    memory = ram()
    state = boot(kernel, plain(), memory).vcpu_boot
    assert state.gdt == (0x500, 31)
    assert state.idt == (0x520, 7)
    for segment in (state.code, state.data):
        (value,) = unpack("<Q", memory.read(state.gdt.base + segment.selector, 8))
        access, flags = value >> 40 & 0xFF, value >> 52 & 0xF
        assert access == segment.present << 7 | segment.dpl << 5 | segment.s << 4 | segment.type
        assert flags == segment.g << 3 | segment.db << 2 | segment.long << 1
        assert segment.limit == ((value >> 32 & 0xF_0000 | value & 0xFFFF) << 12 | 0xFFF)


def test_a_kernel_that_jumps_to_the_bios_for_a_reset_gets_one(kernel: Path) -> None:
    memory = ram()
    boot(kernel, plain(), memory)
    code = memory.read(0xF_FFF0, 8)
    assert code == b"\xfa\xb0\xfe\xe6\x64\xf4\xeb\xfd"  # cli; mov al, 0xFE; out 0x64, al; hlt; jmp to the hlt


def test_loading_again_gives_the_same(kernel: Path) -> None:
    memory = ram()
    first = boot(kernel, plain(), memory, command_line="quiet")
    boot_area = memory.read(0, MIB)
    memory.write(0, b"\xcc" * MIB)
    assert boot(kernel, plain(), memory, command_line="quiet") == first
    changed = memory.read(0, MIB)
    for place in (
        Microvm.GDT,
        Microvm.IDT,
        Microvm.ZERO_PAGE,
        Microvm.PML4,
        Microvm.PDPT,
        Microvm.PAGE_DIRECTORIES,
        Microvm.RESET_VECTOR,
    ):
        assert changed[place.base : place.end] == boot_area[place.base : place.end]


@pytest.mark.parametrize("regions", [[(0, MIB)], [(4096, 64 * MIB)]])
def test_a_machine_that_cannot_hold_what_a_kernel_needs_is_refused(kernel: Path, regions: list[tuple[int, int]]) -> None:
    kernel.write_bytes(plain())
    with pytest.raises(BootError, match="at least 2 MiB at 0 are needed"):
        load_kernel(GuestMemory(regions), str(kernel))


@given(st.integers(2 * MIB, 512 * GIB))
def test_the_memory_map_lists_ram_and_nothing_but_ram_as_ram(size: int) -> None:
    ram_regions = Microvm.ram(size)
    entries = memory_map(ram_regions)
    assert entries == sorted(entries)
    assert all(entry.size > 0 for entry in entries)
    assert all(below.base + below.size <= above.base for below, above in pairwise(entries))
    listed = [Range(entry.base, entry.size) for entry in entries if entry.type == RAM]
    assert all(any(r.base <= entry.base and entry.end <= r.end for r in ram_regions) for entry in listed)
    hole = 0x6_0400  # from the end of conventional memory to 1 MiB
    assert sum(entry.size for entry in listed) == size - hole


@given(st.integers(2 * MIB, 512 * GIB))
def test_the_memory_map_keeps_guests_away_from_tables_and_hypervisor_pages(size: int) -> None:
    reserved = [Range(entry.base, entry.size) for entry in memory_map(Microvm.ram(size)) if entry.type == RESERVED]
    for place in (
        Microvm.MP_POINTER,
        Microvm.MP_TABLE,
        Microvm.ACPI_TABLES,
        Microvm.RESET_VECTOR,
        Microvm.KVM_IDENTITY_MAP,
        Microvm.KVM_TSS,
    ):
        assert any(entry.base <= place.base and place.end <= entry.end for entry in reserved)


def test_the_memory_map_begins_as_stratovirts_does() -> None:
    entries = memory_map(Microvm.ram(4 * GIB))
    assert entries[:2] == [(0, 0x9_FC00, RAM), (0x9_FC00, 0x400, RESERVED)]
    assert (0x10_0000, 0xBFF0_0000, RAM) in entries
    assert entries[-1] == (4 * GIB, GIB, RAM)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(image=st.binary(max_size=2000))
def test_any_bytes_are_refused_in_one_line(kernel: Path, image: bytes) -> None:
    assert "\n" not in refusal(kernel, image)
