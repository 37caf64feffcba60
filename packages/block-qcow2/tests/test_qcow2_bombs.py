"""Small files that ask for much: what they cost is bounded by the file, not by what it says."""

from __future__ import annotations

import struct
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError, ImageFormatError
from block_qcow2.qcow2 import bitmaps, counts, snapshots
from block_qcow2.qcow2.bitmaps import BitmapError, Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.format import COPIED, EXT_BITMAPS, OFFSET_MASK
from block_qcow2.qcow2.image import open_qcow2
from block_qcow2.qcow2.snapshots import Snapshots

from .memory_file import MemoryFile

GiB = 1 << 30


class CountingFile(MemoryFile):
    """Knows how many bytes were read of it."""

    read_bytes = 0

    def read_some(self, offset: int, buffers: Any) -> int:
        self.read_bytes += sum(map(len, buffers))
        return super().read_some(offset, buffers)


@pytest.fixture(params=["numpy", "plain"])
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(counts, "_numpy", lambda: None)


def shared_l2(entries: int) -> CountingFile:
    """An image all of whose L1 entries name one L2 table."""
    file = CountingFile()
    write_empty(file, entries << 29, Options())  # type: ignore[arg-type]
    image = open_qcow2(file, read_only=False)  # type: ignore[arg-type]
    image.write(0, b"x")
    image.flush()
    table = array("Q", [image.l1[0]]) * entries
    table.byteswap()
    file.pwrite(image.header.l1_table_offset, table.tobytes())
    file.read_bytes = 0
    return file


def test_an_l2_table_that_every_l1_entry_names_is_read_once(counting: None) -> None:
    file = shared_l2(20_000)
    image = open_qcow2(file)  # type: ignore[arg-type]
    result = check(image)
    assert result.corruptions
    assert file.read_bytes < 4 * len(file.data)


def test_a_snapshot_of_such_an_image_reads_the_table_once_too(counting: None) -> None:
    file = shared_l2(2_000)
    image = open_qcow2(file, read_only=False)  # type: ignore[arg-type]
    with image.exclusive():
        Snapshots(image)
    Snapshots(image).create("s")
    assert file.read_bytes < 20 * len(file.data)


def test_repeated_references_are_all_counted(counting: None) -> None:
    """The table has 3,000 references, and so has what it names: repaired, nothing of it is free too early."""
    file = shared_l2(3_000)
    image = open_qcow2(file, read_only=False, for_repair=True)  # type: ignore[arg-type]
    assert check(image, repair="all").clean
    table = int(image.l1[0] & OFFSET_MASK)
    assert image.refcounts.get(table >> 16) == 3_000
    assert not image.l1[0] & COPIED
    image.write(0, b"only here")
    image.flush()
    assert image.read(512 << 20, 1) == b"x"


def far_apart(path: Path) -> None:
    """An image with one L2 table of 64 KiB, whose entries name clusters 64 MiB apart: the number of each is on another page."""
    create_image(path, 1 << 40)
    with open_image(path, read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        table = image.l1[0] & OFFSET_MASK
        entries = array("Q", [(i + 1) << 26 | COPIED for i in range(8192)])
        entries.byteswap()
        image.file.pwrite(table, entries.tobytes())
        image.file.truncate(1 << 40)


def test_clusters_that_are_far_apart_are_counted_in_bounded_memory(
    tmp_path: Path, counting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "far"
    far_apart(path)
    with open_image(path) as image:
        assert check(image).corruptions == 2 * 8192, "a count and a flag each"
        image.count_memory = 32 << 20
        with pytest.raises(BlockError, match=r"more memory than 32 MiB, the limit: .* count_memory of the image"):
            check(image)
    monkeypatch.setenv(counts.MEMORY_VARIABLE, "32")
    with open_image(path) as image, pytest.raises(BlockError, match="BLOCK_QCOW2_COUNT_MEMORY=MIB"):
        check(image)
    with open_image(path, read_only=False) as image:
        with pytest.raises(BlockError, match="more memory than 32 MiB"):
            Snapshots(image).create("s")
        image.write(1 << 39, b"still works")
    monkeypatch.setenv(counts.MEMORY_VARIABLE, "much")
    with open_image(path) as image, pytest.raises(BlockError, match="much: expected a number of MiB"):
        check(image)


def test_a_tebibyte_of_data_is_counted_within_the_limit(counting: None) -> None:
    """Whole tables one after the other, and then every other cluster of them."""
    header = open_qcow2(shared_l2(1)).header  # type: ignore[arg-type]
    count = counts.Counts(header, 1 << 24, memory=160 << 20)
    for step in (1, 2):
        for first in range(0, 1 << 24, 8192 * 64):
            table = array("Q", [(first + i * step) % (1 << 24) << 16 | COPIED for i in range(8192)])
            table.byteswap()
            count.add_l2(table.tobytes(), active=True)


def test_a_refcount_block_that_every_entry_of_the_table_names_is_read_once(counting: None) -> None:
    file: Any = CountingFile()
    write_empty(file, GiB, Options())
    header = open_qcow2(file).header
    file.pwrite(header.refcount_table_offset, bytes(file.pread(header.refcount_table_offset, 8)) * 8192)
    file.read_bytes = 0
    image = open_qcow2(file)
    assert check(image).corruptions >= 8191
    assert file.read_bytes < 8 * len(file.data)
    image = open_qcow2(file, read_only=False, for_repair=True)
    assert check(image, repair="all").clean
    image.write(0, b"x")


def test_l2_tables_in_holes_of_the_file_are_not_read(tmp_path: Path, counting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 KiB of an L1 table would have 8 GiB of zeroes looked at."""
    path = tmp_path / "holes"
    create_image(path, 1 << 50, options=Options(cluster_size=2 << 20))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        holes = array("Q", [(i + 512) << 21 for i in range(1, 2048)])
        holes.byteswap()
        image.file.pwrite(image.header.l1_table_offset + 8, holes.tobytes())
        image.file.truncate(1 << 34)
    tables: list[int] = []
    read_table = snapshots.read_table
    monkeypatch.setattr(snapshots, "read_table", lambda image, offset: tables.append(offset) or read_table(image, offset))
    with open_image(path) as image:
        assert check(image).corruptions == 2047, "that nothing counts the tables"
    assert len(tables) == 1


def bitmap_bomb(path: Path, number: int) -> None:
    """`number` bitmaps of 64 MiB that share one table, which says that every bit is set."""
    create_image(path, 256 * GiB, options=Options(cluster_size=2 << 20))
    with open_image(path, read_only=False) as image:
        bits = image.cluster_bits
        with image._lock:
            table, where = (image._allocate_adjacent(1) << bits for _ in range(2))
        image.file.pwrite(table, struct.pack(">Q", 1) * 32 + bytes((2 << 20) - 256))
        directory = b""
        for i in range(number):
            name = b"%06d" % i
            entry = bitmaps._ENTRY.pack(table, 32, bitmaps.AUTO, 1, 9, len(name), 0) + name
            directory += entry + bytes(-len(entry) % 8)
        image.file.pwrite(where, directory.ljust(2 << 20, b"\0"))
        image.commit()
        image.replace_extension(EXT_BITMAPS, bitmaps._EXTENSION.pack(number, 0, len(directory), where), 1)


def test_bitmaps_that_are_too_many_together_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    bitmap_bomb(path, 1000)
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from block_qcow2 import open_image\n"
        "from block_qcow2.errors import BlockError\n"
        "try: open_image(sys.argv[1], read_only=False)\n"
        "except BlockError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=120)
    assert f"at most {128 << 20} work together" in done.stdout
    with open_image(path) as image:
        table = Bitmaps(image)
        assert len(table.list) == 1000  # they can be listed
        table.bits(table.list[0])
        table.bits(table.list[1])
        with pytest.raises(BitmapError, match="000002"):
            table.bits(table.list[2])


def test_bitmap_tables_that_are_too_long_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb"
    bitmap_bomb(path, 100)
    monkeypatch.setattr(bitmaps, "_MAX_TABLE_ENTRIES", 32 * 99)
    with open_image(path) as image:
        with pytest.raises(ImageFormatError, match="entry 99: bitmap tables of more than"):
            Bitmaps(image)
        assert check(image).check_errors
