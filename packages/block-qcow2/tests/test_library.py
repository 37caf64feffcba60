"""The interface of the library: what the package exports, images of every format by one interface, images as files."""

from __future__ import annotations

import errno
import io
import shutil
import tarfile
from pathlib import Path

import pytest

import block_qcow2
from block_qcow2 import Image, ImageFile, Options, create_image, open_disk, open_image
from block_qcow2.errors import BlockError, ImageReadOnlyError, OpenError, UnsupportedFeatureError
from block_qcow2.qcow2.snapshots import SnapshotError

from .conftest import Driver
from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20


def test_everything_that_is_exported_is_there() -> None:
    for name in block_qcow2.__all__:
        assert getattr(block_qcow2, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        block_qcow2.nothing  # noqa: B018


def test_snapshots_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create_image(path, MiB, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, b"one")
        assert image.snapshots.create("first").name == "first"
        image.write(0, b"two")
        image.snapshots.create("second")
        assert [s.name for s in image.snapshots.list()] == ["first", "second"]
        image.snapshots.apply("first")
        assert image.read(0, 3) == b"one"
        assert image.snapshots.delete("first").name == "first"
        assert [s.name for s in image.snapshots.list()] == ["second"]
        with pytest.raises(SnapshotError):
            image.snapshots.apply("first")
        assert image.check().clean
    assert "second" in qemu_img("snapshot", "-l", path)
    with open_image(path) as image, pytest.raises(ImageReadOnlyError):
        image.snapshots.create("third")


def test_checking_and_repairing_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create_image(path, MiB)
    data = bytearray(path.read_bytes())
    data[131072 + 8 : 131072 + 10] = b"\0\1"  # cluster 4 counts a reference
    path.write_bytes(data + bytes(65536))
    lines: list[str] = []
    with open_image(path) as image:
        found = image.check(report=lines.append)
    assert (found.leaks, found.clean, lines) == (1, False, ["Leaked cluster 4 refcount=1 reference=0"])
    with open_image(path, read_only=False) as image:
        assert image.check(repair="leaks").leaks_fixed == 1
    is_clean(path)


def test_a_check_repairs_nothing_leaks_or_all(tmp_path: Path) -> None:
    create_image(tmp_path / "a", MiB)
    before = (tmp_path / "a").read_bytes()
    with open_image(tmp_path / "a", read_only=False) as image:
        with pytest.raises(ValueError, match="repair='foo': expected one of none, leaks, all"):
            image.check(repair="foo")
        assert image.check(repair="all").clean
    assert (tmp_path / "a").read_bytes() == before


@pytest.mark.parametrize("fmt", ["raw", "vdi", "vmdk"])
def test_formats_without_snapshots_say_so(tmp_path: Path, fmt: str) -> None:
    qemu_img("create", "-f", fmt, tmp_path / "a", "10M")
    with open_image(tmp_path / "a", format=fmt) as image:
        for use in (lambda i: i.snapshots, lambda i: i.check()):
            with pytest.raises(UnsupportedFeatureError, match=f"a {fmt} image has no"):
                use(image)
        for change in (
            lambda i: i.write(0, b"x"),
            lambda i: i.write_from(0, [memoryview(b"x")]),
            lambda i: i.write_zeroes(0, 512),
            lambda i: i.discard(0, 512),
            lambda i: i.resize(MiB, shrink=True),
        ):
            with pytest.raises(ImageReadOnlyError):
                change(image)
        image.flush()
        assert image.read(0, 512) == bytes(512)


# --- a disk in use ---


def test_a_disk_is_snapshotted_resized_and_checked_while_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create_image(path, MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    guest = Driver(disk)
    guest.write(0, b"1" * 65536)
    disk.snapshot_create("one")
    guest.write(0, b"2" * 65536)
    disk.resize(2 * MiB)
    assert disk.size == 2 * MiB
    guest.write(MiB, b"3" * 512)
    assert disk.check().clean
    assert [(e.offset, e.length) for e in disk.block_status() if e.present] == [(0, 65536), (MiB, 65536)]
    assert [(e.offset, e.length) for e in disk.block_status(4096, 512)] == [(4096, 512)]
    assert disk.snapshot_apply("one").name == "one"
    assert disk.size == MiB
    assert guest.read(0, 65536) == b"1" * 65536
    assert guest.wait(guest.channel.readv(MiB, [memoryview(bytearray(512))], None)) == -errno.EINVAL
    with pytest.raises(SnapshotError):
        disk.snapshot_apply("two")
    disk.snapshot_delete("one")
    disk.close()
    is_clean(path)
    qemu_io(path, "read -P 0x31 0 64k")


# --- images as files ---


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    create_image(tmp_path / "a", MiB, format=request.param)
    return open_image(tmp_path / "a", format=request.param, read_only=False)


def test_a_file_is_read_written_and_sought_like_any_other(image: Image) -> None:
    with ImageFile(image) as file:
        assert (file.readable(), file.writable(), file.seekable()) == (True, True, True)
        assert file.write(b"hello") == 5
        assert file.tell() == 5
        assert file.seek(-4, io.SEEK_CUR) == 1
        assert file.read(4) == b"ello"
        assert file.seek(0, io.SEEK_END) == MiB
        assert file.read() == b""
        assert file.seek(-3, io.SEEK_END) == MiB - 3
        assert file.read(100) == bytes(3)
        assert file.seek(2 * MiB) == 2 * MiB  # as in a file; there is nothing to read
        assert file.read(1) == b""
        for offset, whence in ((-1, io.SEEK_SET), (0, 7)):
            with pytest.raises(ValueError, match="expected a place"):
                file.seek(offset, whence)
        file.seek(0)
        assert file.readall() == b"hello".ljust(MiB, b"\0")
        assert file.readinto(bytearray()) == 0


def test_a_file_does_not_grow(image: Image) -> None:
    with ImageFile(image) as file:
        file.seek(MiB - 2)
        assert file.write(b"abcd") == 2
        with pytest.raises(OSError, match="the image ends here") as raised:
            file.write(b"cd")
        assert raised.value.errno == errno.ENOSPC
        assert file.write(b"") == 0
        with pytest.raises(io.UnsupportedOperation):
            file.truncate(5)


def test_a_file_closes_its_image_and_is_closed_then(image: Image) -> None:
    file = ImageFile(image)
    file.write(b"kept")
    file.close()
    file.close()
    for use in (
        file.tell,
        file.readable,
        file.writable,
        file.seekable,
        lambda: file.read(1),
        lambda: file.write(b"x"),
        lambda: file.seek(0),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    with open_image(image.path, format=image.format) as again:
        assert again.read(0, 4) == b"kept"


def test_a_file_of_an_image_open_for_reading_refuses_writes(tmp_path: Path) -> None:
    create_image(tmp_path / "a", MiB)
    with ImageFile(open_image(tmp_path / "a")) as file:
        assert not file.writable()
        with pytest.raises(io.UnsupportedOperation, match="open for reading"):
            file.write(b"x")


def test_what_reads_and_writes_files_works_with_images(image: Image, tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"content")
    raw = ImageFile(image)
    with tarfile.open(fileobj=io.BufferedRandom(raw), mode="w") as archive:
        archive.add(tmp_path / "content", "name")
    raw.seek(0)
    with tarfile.open(fileobj=io.BufferedReader(raw)) as archive:
        member = archive.extractfile("name")
        assert member is not None
        assert member.read() == b"content"


def test_copying_a_file_into_an_image(image: Image) -> None:
    with ImageFile(image) as file:
        shutil.copyfileobj(io.BytesIO(b"\7" * 300_000), file)
        file.seek(0)
        target = io.BytesIO()
        shutil.copyfileobj(file, target)
    assert target.getvalue() == (b"\7" * 300_000).ljust(MiB, b"\0")


@pytest.mark.parametrize("size", [-1, -511, -(1 << 40), 1 << 63])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_no_image_has_an_impossible_size(tmp_path: Path, fmt: str, size: int) -> None:
    with pytest.raises(BlockError, match=f"size={size}: expected 0 to"):
        create_image(tmp_path / "a", size, format=fmt)
    assert not (tmp_path / "a").exists()
    create_image(tmp_path / "a", MiB, format=fmt)
    with open_image(tmp_path / "a", format=fmt, read_only=False) as image, pytest.raises(ValueError, match="expected 0 to"):
        image.resize(size, shrink=True)


def test_a_path_that_is_none_is_refused_as_any_other() -> None:
    for act in (open_image, lambda path: create_image(path, MiB)):
        with pytest.raises(OpenError, match=r"null (byte|character)"):
            act("a\0b")


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vdi", "vmdk"])
def test_block_status_is_of_the_image_only(tmp_path: Path, fmt: str) -> None:
    qemu_img("create", "-f", fmt, tmp_path / "a", "4M")
    with open_image(tmp_path / "a", format=fmt) as image:
        with pytest.raises(ValueError, match="of an image of"):
            list(image.block_status(-5, 10))
        assert list(image.block_status(8 * MiB)) == []
        assert sum(e.length for e in image.block_status(3 * MiB, 8 * MiB)) == MiB
