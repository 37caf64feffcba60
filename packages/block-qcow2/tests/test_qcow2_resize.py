"""Resizing: what is added reads as zeroes, nobody else's data change, and what fails changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError
from block_qcow2.qcow2.bitmaps import marked
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.image import open_qcow2

from .memory_file import Below, MemoryFile
from .qemu import is_clean, qemu_img, qemu_io
from .test_qcow2_faults import Faulty

KiB = 1024


def shrunk_by_qemu(path: Path, *commands: str) -> None:
    """An image of 128 KiB of "A", made 96 KiB by somebody who leaves behind the new end what was there."""
    qemu_img("create", "-q", "-f", "qcow2", path, "128K")
    qemu_io(path, commands[0])
    for command in commands[1:]:
        qemu_img(*command.split(), path)
    qemu_img("resize", "-q", "--shrink", path, "96K")


def test_growing_leaves_a_longer_snapshot_what_it_shares_with_the_last_cluster(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    shrunk_by_qemu(path, "write -P 65 0 128K", "snapshot -c longer")
    with open_image(path, read_only=False) as image:
        image.resize(128 * KiB)
        assert image.read(0, 128 * KiB) == b"A" * 96 * KiB + bytes(32 * KiB)
        image.snapshots.apply("longer")
        assert image.read(0, 128 * KiB) == b"A" * 128 * KiB
    is_clean(path)


def test_what_a_compressed_last_cluster_has_behind_the_end_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    shrunk_by_qemu(path, "write -c -P 65 0 128K")
    with open_image(path, read_only=False) as image:
        image.resize(256 * KiB)
        assert image.read(0, 256 * KiB) == b"A" * 96 * KiB + bytes(160 * KiB)
    is_clean(path)


def test_growing_inside_the_last_cluster_marks_nothing_in_a_bitmap(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create_image(path, 96 * KiB)
    qemu_img("bitmap", "--add", "-g", "512", path, "b")
    with open_image(path, read_only=False) as image:
        image.write(0, b"A" * 96 * KiB)
    with open_image(path, read_only=False) as image:
        image.resize(160 * KiB)
        image.write(159 * KiB, b"B" * KiB)
    is_clean(path)


def test_an_overlay_can_be_made_smaller_than_it_and_its_longer_backing_file_are(img: Any) -> None:
    Path("base").write_bytes(b"B" * (12 << 20))
    assert img("create", "-f", "qcow2", "-b", "base", "-F", "raw", "a", "10M").status == 0
    said = img("resize", "--shrink", "--allow-chain", "a", "4M")
    assert (said.status, said.err) == (0, "")
    with open_image("a", read_only=False, allow=True) as image:
        assert image.read(0, image.size) == b"B" * (4 << 20)
        image.resize(6 << 20)
        assert image.read(0, image.size) == b"B" * (4 << 20) + bytes(2 << 20)
    is_clean(Path("a"))


@pytest.mark.parametrize("version", [2, 3])
def test_an_overlay_that_grows_inside_its_last_cluster_keeps_what_is_below_and_shows_no_more(
    tmp_path: Path, version: int
) -> None:
    (tmp_path / "base").write_bytes(b"B" * 256 * KiB)
    options = Options(version=version, backing_file=str(tmp_path / "base"), backing_format="raw")
    create_image(tmp_path / "a", 96 * KiB, options=options)
    for size in (112 * KiB, 320 * KiB):
        with open_image(tmp_path / "a", read_only=False, allow=True) as image:
            image.resize(size)
            assert image.read(0, size) == b"B" * 96 * KiB + bytes(size - 96 * KiB)
    is_clean(tmp_path / "a")


def test_what_hides_a_longer_backing_file_is_marked_in_a_bitmap(tmp_path: Path) -> None:
    """A copy of what is marked, over the same backing file, is a copy of the disk."""
    (tmp_path / "base").write_bytes(b"B" * 256 * KiB)
    options = Options(backing_file=str(tmp_path / "base"), backing_format="raw")
    create_image(tmp_path / "a", 64 * KiB, options=options)
    qemu_img("bitmap", "--add", "-g", "65536", tmp_path / "a", "b")
    with open_image(tmp_path / "a", read_only=False, allow=True) as image:
        image.resize(512 * KiB)
    with open_image(tmp_path / "a", read_only=False, allow=True) as image:
        bitmaps = image.bitmaps  # type: ignore[attr-defined]
        assert marked(bitmaps.bits(bitmaps.find("b"))) == [(1, 4)]


@pytest.mark.parametrize("below", [None, Below(190 * KiB)], ids=["alone", "over a longer backing file"])
@pytest.mark.parametrize("larger", [200 * KiB, 8 << 20], ids=["the same L1 table", "a larger one"])
def test_a_resize_that_fails_anywhere_can_be_done_again(larger: int, below: Below | None) -> None:
    """An error at each single call in turn: what was written stays, and no header names a table that is too short."""
    names = {"backing_file": "below", "backing_format": "raw"} if below else {}

    def opened(file: Any, *, read_only: bool = True) -> Any:
        return open_qcow2(file, read_only=read_only, open_backing=lambda name, fmt: below or Below(0))

    done = False
    call = 0
    while not done:
        call += 1
        file: Any = Faulty()
        write_empty(file, 100 * KiB + 512, Options(cluster_size=KiB, **names))
        image = opened(file, read_only=False)
        image.write(0, b"A" * image.size)
        image.flush()
        old = image.size
        file.calls, file.fail_at = 0, call
        try:
            image.resize(larger)
            done = file.calls < call
        except (OSError, BlockError):
            assert image.size == old
        file.fail_at = -1
        if image._broken:
            image = opened(MemoryFile(bytes(file.data)), read_only=False)
        image.resize(larger)
        assert image.read(old, larger - old) == bytes(larger - old)
        image.write(larger - 512, b"B" * 512)
        image.flush()
        again = opened(MemoryFile(bytes(image.file.data)))
        result = check(again)
        assert not result.corruptions, call
        assert again.size == larger
        assert again.read(0, old) == b"A" * old
        assert again.read(old, larger - old) == bytes(larger - old - 512) + b"B" * 512
    assert call > 3
