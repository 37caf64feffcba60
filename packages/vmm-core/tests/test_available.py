"""How much memory there is to be had, by the words of the host and of cgroups; and RAM that is refused before it is touched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vmm_core import _available, guestmem
from vmm_core._available import Room, room
from vmm_core.errors import PreallocError
from vmm_core.guestmem import GuestMemory

MiB = 1 << 20
UNLIMITED_V1 = 0x7FFF_FFFF_FFFF_F000


class Host:
    """A /proc and a /sys/fs/cgroup with 4096 MiB available."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        self.meminfo()

    def meminfo(self, swap: int = 0) -> None:
        text = (
            f"MemTotal: 9000000 kB\nMemFree: 1 kB\nMemAvailable: {4096 << 10} kB\nSwapFree: {swap << 10} kB\nHugePages_Total: 0\n"
        )
        (self.proc / "meminfo").write_text(text)

    def member(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: int | None, usage: int = 0, cache: int = 0) -> None:
        """Make a cgroup; sizes in MiB."""
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text("max\n" if limit is None else f"{limit * MiB}\n")
        (folder / "memory.current").write_text(f"{usage * MiB}\n")
        (folder / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {cache * MiB}\nactive_file 0\n")

    def v1(self, path: str, limit: int, usage: int, cache: int) -> None:
        folder = self.cgroups / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{usage * MiB}\n")
        stat = f"cache 1\ninactive_file 9\ntotal_inactive_file {cache * MiB}\ntotal_active_file {MiB}\n"
        (folder / "memory.stat").write_text(stat)

    def room(self) -> Room | None:
        return room(str(self.proc), str(self.cgroups))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_cgroups_it_is_what_the_host_has_available_and_free_swap(host: Host) -> None:
    assert host.room() == (4096 * MiB, "this host")
    host.meminfo(swap=100)
    assert host.room() == (4196 * MiB, "this host")


def test_the_tightest_cgroup_on_the_way_up_counts(host: Host) -> None:
    host.member("1:name=systemd:/elsewhere", "0::/slice/service")
    host.v2("slice", 1000, usage=400, cache=50)
    host.v2("slice/service", 3000, usage=10)
    assert host.room() == (650 * MiB, "its cgroup /slice")
    host.meminfo(swap=100)
    assert host.room() == (750 * MiB, "its cgroup /slice")
    host.v2("slice/service", 300, usage=400)
    assert host.room() == (100 * MiB, "its cgroup /slice/service")


def test_a_cgroup_without_a_limit_or_without_files_says_nothing(host: Host) -> None:
    host.member("0::/a/b")
    host.v2("a", None)
    assert host.room() == (4096 * MiB, "this host")


def test_a_container_finds_its_limit_at_the_root_that_it_sees(host: Host) -> None:
    host.member("5:cpu,cpuacct:/docker/1", "4:memory:/docker/1", "0::/docker/1")
    host.v1("", 2000 * MiB, usage=500, cache=100)
    assert host.room() == (1601 * MiB, "its cgroup /")
    host.v1("", UNLIMITED_V1, usage=500, cache=100)
    assert host.room() == (4096 * MiB, "this host")


def test_a_host_that_says_nothing_is_not_asked_again(tmp_path: Path) -> None:
    assert room(str(tmp_path / "none"), str(tmp_path / "none")) is None


def test_this_host_says_something() -> None:
    found = room()
    assert found is not None
    assert found.size > 0


class TestRefusals:
    @pytest.fixture(autouse=True)
    def small_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_available, "room", lambda: Room(3 * MiB, "this host"))

    @pytest.mark.parametrize(("share", "named"), [(False, False), (True, False), (False, True)])
    def test_more_than_there_is_is_refused_before_it_is_touched(self, tmp_path: Path, share: bool, named: bool) -> None:
        path = str(tmp_path / "ram") if named else None
        GuestMemory([(0, 3 * MiB)], path=path, share=share, prealloc=1).close()
        with pytest.raises(PreallocError) as caught:
            GuestMemory([(0, 2 * MiB), (1 << 32, 2 * MiB)], path=f"{path}2" if path else None, share=share, prealloc=1)
        assert str(caught.value) == "4 MiB of guest RAM cannot be there from the start: this host has 3 MiB"
        GuestMemory([(0, 4 * MiB)], share=share).close()  # nobody asked for all of it at once

    def test_in_a_file_of_a_tmpfs_only_what_is_not_there_yet_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guestmem, "_file_system", lambda fd: "tmpfs")
        (tmp_path / "ram").write_bytes(bytes(2 * MiB).ljust(4 * MiB, b"x"))
        GuestMemory([(0, 4 * MiB)], path=str(tmp_path / "ram"), share=True, prealloc=1).close()
        with pytest.raises(PreallocError):
            GuestMemory([(0, 4 * MiB)], path=str(tmp_path), share=True, prealloc=1)

    @pytest.mark.parametrize("kind", ["ext4", "hugetlbfs"])
    def test_a_file_on_a_disk_can_be_written_back_and_huge_pages_are_a_pool(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(guestmem, "_file_system", lambda fd: kind)
        free = SimpleNamespace(f_bsize=2 * MiB, f_frsize=4096, f_blocks=4096, f_bavail=1024)
        monkeypatch.setattr(guestmem.os, "fstatvfs", lambda fd: free)
        GuestMemory([(0, 4 * MiB)], path=str(tmp_path), share=True, prealloc=1).close()
