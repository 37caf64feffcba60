"""Archives are what the kernel's unpacker expects, and modules come in an order in which they load."""

from __future__ import annotations

import lzma
import stat
from pathlib import Path

import pytest

from lab.debian import Kernel, SetupError
from lab.initrd import Archive, module_bytes, module_files


def entries(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Read a newc archive as the kernel does: name to (mode, content, device number)."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        assert data[at + 110 + name_size - 1] == 0
        start = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[start : start + size], (fields[9], fields[10]))
        at = (start + size + 3) & ~3


def test_an_archive_holds_what_was_put_in_with_the_folders_above_it() -> None:
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("a/b/c", b"hello", 0o755)
    archive.link("a/l", "b/c")
    data = archive.finish()
    found = entries(data)
    assert list(found) == ["dev", "dev/console", "a", "a/b", "a/b/c", "a/l"]
    assert found["a/b/c"] == (stat.S_IFREG | 0o755, b"hello", (0, 0))
    assert found["a/l"][:2] == (stat.S_IFLNK | 0o777, b"b/c")
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert stat.S_ISDIR(found["a/b"][0])
    assert len(data) % 512 == 0


def test_one_name_twice_is_refused() -> None:
    archive = Archive()
    archive.file("x", b"1")
    with pytest.raises(ValueError, match="x: twice"):
        archive.file("/x", b"2")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (modules / "modules.dep").write_text(
        "kernel/a/virtio-blk.ko: kernel/v/virtio_ring.ko kernel/v/virtio.ko\n"
        "kernel/v/virtio.ko: kernel/v/virtio_ring.ko\n"
        "kernel/v/virtio_ring.ko:\n"
        "kernel/p/packed.ko.xz: kernel/v/virtio.ko kernel/v/virtio_ring.ko\n"
    )
    return Kernel("1.0", tmp_path / "vmlinuz", modules)


def test_modules_come_after_what_they_need_and_once(kernel: Kernel) -> None:
    names = [path.name for path in module_files(kernel, ["virtio_blk", "packed"])]
    assert names == ["virtio_ring.ko", "virtio.ko", "virtio-blk.ko", "packed.ko.xz"]


def test_what_is_built_in_is_left_out(kernel: Kernel) -> None:
    assert module_files(kernel, ["ext4"]) == []


def test_an_unknown_module_is_named(kernel: Kernel) -> None:
    with pytest.raises(SetupError, match=r"kernel 1\.0: no module nosuch"):
        module_files(kernel, ["nosuch"])


def test_packed_modules_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "m.ko.xz"
    path.write_bytes(lzma.compress(b"\x7fELF"))
    assert module_bytes(path) == b"\x7fELF"
