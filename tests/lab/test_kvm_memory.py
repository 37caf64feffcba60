"""Guest memory on huge pages, which take a kernel of one's own to reserve."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "packages" / "vmm-core" / "tests"))

from kvm_guest import CODE, LOOP, PORT, Guest
from vmm_core.errors import GuestMemoryError
from vmm_core.guestmem import GuestMemory

pytestmark = pytest.mark.lab

PAGE = 2 << 20
PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with four pages of 2 MiB."""
    before = (PAGES / "nr_hugepages").read_text()
    (PAGES / "nr_hugepages").write_text("4")
    assert (PAGES / "nr_hugepages").read_text() == "4\n"
    libc = ctypes.CDLL(None)  # mount(8) would leave a file in /run
    assert libc.mount(b"none", os.fsencode(tmp_path), b"hugetlbfs", 0, b"pagesize=2M") == 0
    yield tmp_path
    assert libc.umount2(os.fsencode(tmp_path), 0) == 0
    (PAGES / "nr_hugepages").write_text(before)


def free_pages() -> int:
    return int((PAGES / "free_hugepages").read_text())


@pytest.mark.parametrize("share", [False, True])
def test_a_guest_runs_on_huge_pages_and_gives_them_back(hugetlbfs: Path, share: bool) -> None:
    memory = GuestMemory([(0, PAGE), (1 << 32, 2 * PAGE)], path=str(hugetlbfs), share=share)
    guest = Guest(LOOP, memory=memory)
    memory.write(CODE, b"\xc6\x06\x00\x50\x77\xe6" + bytes((PORT,)) + LOOP)  # mov byte [0x5000], 0x77; out PORT, al
    guest.run()
    guest.next()
    assert memory.load(0x5000, 1) == 0x77
    assert free_pages() < 4
    guest.close()
    assert free_pages() == 4
    assert os.listdir(hugetlbfs) == []  # noqa: PTH208


def test_preallocation_takes_every_huge_page_at_once(hugetlbfs: Path) -> None:
    memory = GuestMemory([(0, PAGE), (1 << 32, 2 * PAGE)], path=str(hugetlbfs), share=True, prealloc=2)
    assert free_pages() == 1
    memory.close()
    assert free_pages() == 4


@pytest.mark.parametrize("prealloc", [0, 1])
def test_more_huge_pages_than_there_are_is_a_clear_error(hugetlbfs: Path, prealloc: int) -> None:
    with pytest.raises(GuestMemoryError, match=r"guest RAM.*: (Cannot allocate memory|No space left on device)$"):
        GuestMemory([(0, 5 * PAGE)], path=str(hugetlbfs), share=True, prealloc=prealloc)
    assert free_pages() == 4


def test_ram_that_is_no_multiple_of_the_huge_page_is_refused(hugetlbfs: Path) -> None:
    with pytest.raises(GuestMemoryError, match=r"RAM of 0x300000 bytes is not in whole huge pages of .*, 0x200000 bytes each"):
        GuestMemory([(0, 3 << 20)], path=str(hugetlbfs))
    with pytest.raises(GuestMemoryError, match="not in whole huge pages"):
        GuestMemory([(0, 1 << 20), (1 << 32, 1 << 20)], path=str(hugetlbfs))
