"""Guest memory: what is RAM can be touched, nothing else can, and nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core import guestmem
from vmm_core.errors import GuestMemoryError, PreallocError
from vmm_core.guestmem import PAGE_SIZE, GuestMemory, Region

LOW = 16 * PAGE_SIZE
HIGH_BASE = 1 << 32
HIGH = 4 * PAGE_SIZE
MiB = 1 << 20


@pytest.fixture(scope="module")
def memory() -> GuestMemory:
    return GuestMemory([(0, LOW), (HIGH_BASE, HIGH)])


def mappings_of(name: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]


def descriptors(*, settle: bool = False) -> list[str]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def link(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def test_ram_reads_back_what_was_written_in_every_region(memory: GuestMemory) -> None:
    for base in (0x123, HIGH_BASE + 0x123):
        memory.write(base, b"guest")
        assert memory.read(base, 5) == b"guest"


def test_fresh_ram_is_zero() -> None:
    assert GuestMemory([(0, PAGE_SIZE)]).read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_views_are_the_ram_itself(memory: GuestMemory) -> None:
    view = memory.view(PAGE_SIZE, 8)
    view[:] = b"12345678"
    memory.store(PAGE_SIZE, 1, ord("9"))
    assert view.tobytes() == b"92345678"


@pytest.mark.parametrize("base", [0x40, HIGH_BASE + 0x40, LOW - 8, HIGH_BASE + HIGH - 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_numbers_are_little_endian_and_may_end_where_ram_ends(memory: GuestMemory, base: int, size: int) -> None:
    value = 0xF1E2D3C4B5A69788 & ((1 << 8 * size) - 1)
    memory.store(base + 8 - size, size, value)
    assert memory.load(base + 8 - size, size) == value
    assert memory.read(base + 8 - size, size) == value.to_bytes(size, "little")


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (0, 0),
        (0, -1),
        (16, -8),
        (-1, 1),
        (-8, 16),
        (LOW - 1, 2),
        (LOW, 1),
        (HIGH_BASE - 1, 1),
        (HIGH_BASE - 1, 2),
        (HIGH_BASE + HIGH - 1, 2),
        (HIGH_BASE + HIGH, 0),
        (0, HIGH_BASE + HIGH),
        ((1 << 64) - 1, 2),
        ((1 << 64) - 4096, 8192),
        (1 << 64, 1),
        (8, (1 << 64) - 4),
    ],
)
def test_what_is_not_wholly_ram_is_refused(memory: GuestMemory, addr: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.view(addr, length)
    with pytest.raises(GuestMemoryError):
        memory.read(addr, length)


@pytest.mark.parametrize("addr", [-1, LOW - 1, LOW, HIGH_BASE - 1, HIGH_BASE + HIGH - 1, (1 << 64) - 1])
def test_numbers_outside_ram_are_refused_and_change_nothing(memory: GuestMemory, addr: int) -> None:
    before = memory.read(LOW - 8, 8), memory.read(HIGH_BASE, 8), memory.read(HIGH_BASE + HIGH - 8, 8)
    with pytest.raises(GuestMemoryError):
        memory.load(addr, 2)
    with pytest.raises(GuestMemoryError):
        memory.store(addr, 2, 0xFFFF)
    with pytest.raises(GuestMemoryError):
        memory.write(addr, b"\xff\xff")
    assert before == (memory.read(LOW - 8, 8), memory.read(HIGH_BASE, 8), memory.read(HIGH_BASE + HIGH - 8, 8))


@given(st.integers(-(1 << 65), 1 << 65) | st.integers(-16, LOW + 16), st.integers(-(1 << 65), 1 << 65) | st.integers(-4, 64))
def test_a_view_is_given_exactly_when_every_byte_is_ram_of_one_region(memory: GuestMemory, addr: int, length: int) -> None:
    inside = any(r.base <= addr < addr + length <= r.base + r.size for r in memory.regions)
    try:
        assert len(memory.view(addr, length)) == length
        assert inside
    except GuestMemoryError:
        assert not inside


def test_the_refusal_names_the_address_and_the_ram(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError, match=r"0x10 bytes at 0xc0000000 are not all RAM; RAM is 0x0 to 0xffff, 0x100000000"):
        memory.view(0xC000_0000, 16)


def test_regions_follow_one_another_in_the_backing(memory: GuestMemory) -> None:
    assert memory.regions == (Region(0, LOW, 0), Region(HIGH_BASE, HIGH, LOW))
    assert memory.size == LOW + HIGH
    assert memory.fd == -1


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "at least one region"),
        ([(0, 0)], "whole pages"),
        ([(0, -PAGE_SIZE)], "whole pages"),
        ([(1, PAGE_SIZE)], "whole pages"),
        ([(0, PAGE_SIZE + 1)], "whole pages"),
        ([(-PAGE_SIZE, PAGE_SIZE)], "begins before"),
        ([(0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)], "begins before"),
        ([(PAGE_SIZE, PAGE_SIZE), (0, PAGE_SIZE)], "begins before"),
        ([(0, 1 << 60)], "physical address space"),
        ([(1 << 60, PAGE_SIZE)], "physical address space"),
    ],
)
def test_malformed_regions_are_refused(regions: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(GuestMemoryError, match=message):
        GuestMemory(regions)


def test_more_memory_than_can_be_mapped_is_a_clear_error() -> None:
    with pytest.raises(GuestMemoryError, match=r"cannot map 0x[0-9a-f]+ bytes of guest RAM at 0x0: Cannot allocate memory"):
        GuestMemory([(0, 1 << 51)])


def test_a_guest_may_have_more_memory_than_the_host_has_free() -> None:
    regions = [(0, 3 << 30), (1 << 32, 509 << 30)]
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":  # the administrator says otherwise
        with pytest.raises(GuestMemoryError, match="Cannot allocate memory"):
            GuestMemory(regions)
    else:
        assert GuestMemory(regions).load((1 << 32) + (509 << 30) - 8, 8) == 0


def test_private_ram_is_aligned_for_huge_pages(memory: GuestMemory) -> None:
    for region in memory.regions:
        assert (memory.host_address(region) - region.base) % (2 << 20) == 0


def test_the_host_address_is_where_the_ram_is(memory: GuestMemory) -> None:
    import ctypes

    memory.write(HIGH_BASE, b"here")
    assert ctypes.string_at(memory.host_address(memory.regions[1]), 4) == b"here"


def test_shared_ram_is_a_sealed_memory_file_that_others_can_map() -> None:
    memory = GuestMemory([(0, LOW), (HIGH_BASE, HIGH)], share=True)
    assert memory.shared
    assert link(memory.fd) == "/memfd:stratovirt_anon_mem (deleted)"
    memory.write(HIGH_BASE, b"seen")
    with mmap.mmap(memory.fd, HIGH, offset=LOW) as other:
        assert other[:4] == b"seen"
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE_SIZE)
    memory.close()


def test_a_folder_as_path_holds_a_file_without_a_name(tmp_path: Path) -> None:
    memory = GuestMemory([(0, LOW)], path=str(tmp_path), share=True)
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}/stratovirt_backmem_" in link(memory.fd)
    memory.write(5, b"x")
    assert os.pread(memory.fd, 1, 5) == b"x"
    memory.close()


def test_a_new_or_empty_file_grows_to_the_size_of_ram(tmp_path: Path) -> None:
    backing = tmp_path / "ram"
    for _ in range(2):
        GuestMemory([(0, LOW)], path=str(backing)).close()
        assert backing.stat().st_size == LOW
        backing.write_bytes(b"")


def test_a_file_that_is_too_short_is_left_alone(tmp_path: Path) -> None:
    backing = tmp_path / "ram"
    backing.write_bytes(b"precious")
    with pytest.raises(GuestMemoryError) as caught:
        GuestMemory([(0, LOW)], path=str(backing))
    assert str(caught.value) == (f"Backing file {backing} does not has sufficient resource for allocating RAM (size is {LOW:#x})")
    assert backing.read_bytes() == b"precious"


def test_a_private_file_gives_its_content_and_takes_none(tmp_path: Path) -> None:
    backing = tmp_path / "ram"
    backing.write_bytes(b"image".ljust(LOW, b"\0"))
    memory = GuestMemory([(0, LOW)], path=str(backing))
    assert memory.read(0, 5) == b"image"
    memory.write(0, b"wrote")
    assert backing.read_bytes()[:5] == b"image"
    memory.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [("/nonexistent/ram", "cannot open /nonexistent/ram.*No such file"), ("/dev/null", "cannot make /dev/null")],
)
def test_a_path_that_cannot_hold_ram_is_a_clear_error(path: str, message: str) -> None:
    with pytest.raises(GuestMemoryError, match=message):
        GuestMemory([(0, LOW)], path=path)


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"short")
    before = descriptors(settle=True)
    GuestMemory([(0, LOW)], share=True).close()
    GuestMemory([(0, LOW)], path=str(tmp_path)).close()
    with pytest.raises(GuestMemoryError):
        GuestMemory([(0, LOW)], path=str(tmp_path / "short"))
    with pytest.raises(GuestMemoryError):
        GuestMemory([(0, 1 << 51)], share=True)
    assert descriptors() == before


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("on_file", [False, True])
def test_preallocated_ram_is_resident_and_keeps_its_content(tmp_path: Path, share: bool, on_file: bool) -> None:
    backing = tmp_path / "ram"
    size = 8 << 20
    with backing.open("wb") as file:
        file.write(b"kept")
        file.truncate(size)
    memory = GuestMemory([(0, size)], path=str(backing) if on_file else None, share=share, prealloc=3)
    assert resident(memory) >= size
    assert memory.read(0, 4) == (b"kept" if on_file else bytes(4))
    memory.close()


def test_preallocation_works_on_a_kernel_without_populate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmm_core import _prealloc

    monkeypatch.setattr(_prealloc, "_MADV_POPULATE_WRITE", 0x7FFF)  # what such a kernel answers: EINVAL
    (tmp_path / "ram").write_bytes(b"kept".ljust(1 << 20, b"\0"))
    memory = GuestMemory([(0, 1 << 20)], path=str(tmp_path / "ram"), prealloc=2)
    assert resident(memory) >= 1 << 20
    assert memory.read(0, 4) == b"kept"


def test_preallocation_that_cannot_succeed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = descriptors(settle=True)
    with pytest.raises(GuestMemoryError, match="cannot allocate 0x10000 bytes of guest RAM in advance: No space left"):
        GuestMemory([(0, LOW)], share=True, prealloc=1)
    assert descriptors() == before


def test_a_file_that_its_disk_has_no_room_for_takes_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = os.statvfs(tmp_path)
    fields = [*system[:3], 100, 10, *system[5:]]  # f_bfree, f_bavail
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: os.statvfs_result(fields))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("allocated"))
    with pytest.raises(PreallocError, match=r"64 MiB of guest RAM cannot be there .* the file system has 0 MiB"):
        GuestMemory([(0, 64 << 20)], path=str(tmp_path / "ram"), share=True, prealloc=1)
    assert (tmp_path / "ram").stat().st_size == 0


def test_a_file_that_was_empty_is_empty_again_when_its_blocks_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def half(fd: int, offset: int, size: int) -> None:
        allocate(fd, offset, size // 2)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(PreallocError, match="No space left"):
        GuestMemory([(0, LOW)], path=str(tmp_path / "ram"), share=True, prealloc=1)
    assert (tmp_path / "ram").stat().st_blocks == 0


@pytest.mark.parametrize("share", [False, True])
def test_a_system_without_room_for_shared_ram_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    def refuse(*_: object) -> int:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(os, "ftruncate" if share else "memfd_create", refuse)
    before = descriptors(settle=True)
    with pytest.raises(GuestMemoryError, match=r"guest RAM: Too many open files$"):
        GuestMemory([(0, LOW)], share=True)
    assert descriptors() == before


def test_expected_writes_are_ram_and_change_nothing(memory: GuestMemory) -> None:
    memory.write(0x1234, b"kept")
    memory.expect_writes(0x1234, LOW - 0x1234)
    memory.expect_writes(HIGH_BASE + 1, 1)
    assert memory.read(0x1234, 4) == b"kept"
    with pytest.raises(GuestMemoryError):
        memory.expect_writes(LOW - 1, 2)


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "shared file", "private file"])
def test_whole_pages_of_discarded_ram_go_back_to_the_host(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "ram") if "file" in kind else None
    ram = GuestMemory([(HIGH_BASE, 4 * MiB)], path=path, share=kind in ("memfd", "shared file"))
    ram.view(HIGH_BASE, 4 * MiB)[:] = b"\xaa" * (4 * MiB)
    before = resident(ram)
    assert ram.discard(ram.view(HIGH_BASE + 100, MiB)) == MiB - PAGE_SIZE
    assert resident(ram) == before - (MiB - PAGE_SIZE)
    assert not any(ram.view(HIGH_BASE + PAGE_SIZE, MiB - PAGE_SIZE))
    assert set(ram.read(HIGH_BASE, PAGE_SIZE) + ram.read(HIGH_BASE + MiB, 3 * MiB)) == {0xAA}
    assert ram.discard(ram.view(HIGH_BASE + 1, PAGE_SIZE)) == 0
    if ram.shared:
        assert not any(os.pread(ram.fd, MiB - PAGE_SIZE, PAGE_SIZE)), "the page itself is gone, not only our mapping of it"
    ram.write(HIGH_BASE + PAGE_SIZE, b"again")
    assert ram.read(HIGH_BASE + PAGE_SIZE, 6) == b"again\0"
    ram.close()


def test_huge_pages_are_kept_because_the_pool_may_not_give_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestmem, "_file_system", lambda fd: "hugetlbfs")
    monkeypatch.setattr(guestmem.os, "fstatvfs", lambda fd: SimpleNamespace(f_bsize=2 * MiB))
    ram = GuestMemory([(0, 4 * MiB)], path=str(tmp_path))
    ram.view(0, 4 * MiB)[:] = b"\xaa" * (4 * MiB)
    assert ram.discard(ram.view(0, 4 * MiB)) == 0
    assert set(ram.read(0, 4 * MiB)) == {0xAA}
    ram.close()


def test_a_refusal_to_take_ram_back_is_an_os_error() -> None:
    ram = GuestMemory([(0, MiB)])
    address = ram.host_address(ram.regions[0])
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(PAGE_SIZE)) == 0
    with pytest.raises(OSError, match="Invalid argument"):
        ram.discard(ram.view(0, MiB))
    ram.close()


def test_ram_can_be_left_out_of_core_dumps() -> None:
    for dump in (True, False):
        memory = GuestMemory([(0, 1 << 22)], dump=dump)
        assert ("dd" in flags(memory)) is not dump


def test_closed_memory_refuses_every_access() -> None:
    memory = GuestMemory([(0, LOW), (HIGH_BASE, HIGH)])
    memory.close()
    memory.close()
    for access in (
        lambda: memory.view(0, 1),
        lambda: memory.view(HIGH_BASE, 1),
        lambda: memory.load(0, 4),
        lambda: memory.store(0, 4, 0),
        lambda: memory.write(0, b"x"),
    ):
        with pytest.raises(GuestMemoryError, match="closed"):
            access()


def test_a_view_outlives_close_and_the_mapping_goes_with_the_last_view(tmp_path: Path) -> None:
    memory = GuestMemory([(0, LOW), (HIGH_BASE, HIGH)], path=str(tmp_path), share=True)
    view = memory.view(0, 16)
    memory.close()
    view[:] = b"still safe to do"
    assert len(mappings_of(str(tmp_path))) == 1
    del view
    assert mappings_of(str(tmp_path)) == []


def smaps(memory: GuestMemory) -> dict[str, str]:
    """Return the fields of the kernel's description of the mapping behind the first region (proc(5), smaps)."""
    wanted = memory.host_address(memory.regions[0])
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(":")
        if "-" in head.split(" ")[0]:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= wanted < end
        elif inside:
            fields[head] = rest.strip()
    return fields


def resident(memory: GuestMemory) -> int:
    return int(smaps(memory)["Rss"].split()[0]) * 1024


def flags(memory: GuestMemory) -> list[str]:
    return smaps(memory)["VmFlags"].split()
