"""What cannot be read cannot be counted: then a check reports, and neither it nor an opening frees what it could not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import BlockError
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import CheckResult, check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.format import COPIED, EXT_BITMAPS, INCOMPAT_DIRTY, OFFSET_MASK
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import is_clean

OLD, NEW = b"old!" * 4096, b"new!" * 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image with a snapshot, data that only the snapshot has, and two bitmaps."""
    path = tmp_path / "image.qcow2"
    create_image(path, 1 << 20, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, OLD)
        Snapshots(image).create("keep")
        image.write(0, NEW)
        table = Bitmaps(image)
        for name in ("one", "two"):
            bits = table.bits(table.add(name, 512))
            bits[0] = 0b101
        table.store()
    is_clean(path)
    return path


def directory(path: Path) -> int:
    with open_image(path) as image:
        return int.from_bytes(image.header.extension(EXT_BITMAPS)[16:24], "big")


def snapshot_table(path: Path) -> int:
    with open_image(path) as image:
        return int(image.header.snapshots_offset)


# What is damaged: (where the table is, offset in it, the bytes that come there).
DAMAGES: dict[str, tuple[Callable[[Path], int], int, bytes]] = {
    "snapshot: extra data of 64 KiB": (snapshot_table, 36, (65536).to_bytes(4, "big")),
    "snapshot: L1 table misaligned": (snapshot_table, 0, (12345).to_bytes(8, "big")),
    "snapshot: L1 table behind the end": (snapshot_table, 0, (1 << 40).to_bytes(8, "big")),
    "bitmap: extra data behind the directory": (directory, 20, (5000).to_bytes(4, "big")),
    "bitmap: table behind the end": (directory, 0, (1 << 50).to_bytes(8, "big")),
    "bitmap: type unknown": (directory, 16, b"\7"),
    "bitmap: directory away": (lambda path: find(path, EXT_BITMAPS) + 24, 0, (1 << 44).to_bytes(8, "big")),
}


def find(path: Path, extension: int) -> int:
    return path.read_bytes().index(extension.to_bytes(4, "big"))


@pytest.fixture(params=DAMAGES)
def undo(request: pytest.FixtureRequest, path: Path) -> tuple[Path, Callable[[], None]]:
    """The damaged image, and what mends it."""
    table, inside, value = DAMAGES[request.param]
    at = table(path) + inside
    good = put(path, at, value)
    return path, lambda: put(path, at, good) and None


def put(path: Path, at: int, value: bytes) -> bytes:
    data = bytearray(path.read_bytes())
    old = bytes(data[at : at + len(value)])
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return old


def repaired(path: Path, what: str) -> CheckResult:
    with open_image(path, read_only=False, for_repair=True) as image:
        return check(image, repair=what)


def has_everything(path: Path) -> None:
    is_clean(path)
    with open_image(path) as image:
        assert image.read(0, len(NEW)) == NEW
        table = Bitmaps(image)
        assert [b.name for b in table.list] == ["one", "two"]
        assert all(table.bits(b)[0] == 0b101 for b in table.list)
        [kept] = Snapshots(image).list
        image.show_snapshot(kept.l1_table_offset, kept.l1_size, kept.disk_size)
        assert image.read(0, len(OLD)) == OLD


@pytest.mark.parametrize("what", ["leaks", "all"])
def test_repairing_frees_nothing_that_an_unreadable_table_may_name(undo: tuple[Path, Callable[[], None]], what: str) -> None:
    path, mend = undo
    before = path.read_bytes()
    for _ in range(2):
        result = repaired(path, what)
        assert result.check_errors
        assert not result.leaks_fixed
        assert not result.corruptions_fixed
    assert path.read_bytes() == before
    mend()
    has_everything(path)


def test_the_command_says_that_the_check_is_not_complete(undo: tuple[Path, Callable[[], None]], img: Any) -> None:
    path, _ = undo
    for words in (["check"], ["check", "-r", "all"]):
        said = img(*words, path)
        assert said.status == 1
        assert "1 internal errors" in said.out
        assert "Repairing" not in said.out


@pytest.mark.parametrize("opening", ["image", "disk"])
def test_opening_a_dirty_image_for_writing_is_refused_and_changes_no_byte(
    undo: tuple[Path, Callable[[], None]], opening: str
) -> None:
    path, _ = undo
    put(path, 79, bytes([INCOMPAT_DIRTY]))
    before = path.read_bytes()
    if opening == "image":
        with pytest.raises(BlockError):
            open_image(path, read_only=False)
    else:
        disk = open_disk(path, format="qcow2")
        with pytest.raises(BlockError):
            disk.lock()
        disk.close()
    assert path.read_bytes() == before


def test_a_snapshot_table_that_cannot_be_read_hides_no_missing_count(path: Path) -> None:
    """The rest is still counted: refcounts that are too low are found."""
    with open_image(path) as image:
        block, bits = int(image.refcounts.table[0]), image.cluster_bits
        cluster = int(image.l1[0] & OFFSET_MASK) >> bits
    put(path, block + 2 * cluster, b"\0\0")
    put(path, snapshot_table(path) + 36, (65536).to_bytes(4, "big"))
    lines: list[str] = []
    with open_image(path, named=False, for_repair=True) as image:
        result = check(image, report=lines.append)
    assert any(line.startswith(f"ERROR cluster {cluster} refcount=0") for line in lines), lines
    assert result.check_errors == 1
    assert not result.leaks


def test_a_leak_is_not_freed_while_an_entry_points_to_an_impossible_place(path: Path) -> None:
    """The leaked cluster is what the entry meant: who finds the flipped bit gets the data back."""
    with open_image(path) as image:
        table = int(image.l1[0] & OFFSET_MASK)
    good = put(path, table, (1 << 40 | COPIED).to_bytes(8, "big"))
    result = repaired(path, "all")
    assert result.corruptions
    assert result.leaks == 1
    assert not result.leaks_fixed
    put(path, table, good)
    has_everything(path)


@pytest.mark.parametrize("bad", [512, 1 << 44], ids=["misaligned", "outside"])
def test_what_is_below_an_impossible_l1_entry_is_not_freed(path: Path, bad: int) -> None:
    with open_image(path) as image:
        at = image.header.l1_table_offset
        value = (int(image.l1[0]) & ~OFFSET_MASK) | bad
    good = put(path, at, value.to_bytes(8, "big"))
    before = path.read_bytes()
    assert repaired(path, "all").corruptions
    assert path.read_bytes() == before
    put(path, at, good)
    has_everything(path)
