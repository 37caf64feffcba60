"""Checking finds what qemu-img finds, and repairing loses nothing that could be reached."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError
from block_qcow2.qcow2 import check as check_module
from block_qcow2.qcow2 import counts, tables
from block_qcow2.qcow2.amend import set_refcount_bits
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.counts import Counts
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.format import COPIED, INCOMPAT_DIRTY, OFFSET_MASK
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import is_clean, qemu_img

MiB = 1 << 20
SIZE = 8 * MiB


@pytest.fixture(params=[16, 2, 64], ids=lambda b: f"refcount_bits={b}")
def image_path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rng = random.Random(1)
    path = tmp_path / "c.qcow2"
    create_image(path, SIZE, options=Options(cluster_size=4096, refcount_bits=request.param))
    with open_image(path, read_only=False) as image:
        for _ in range(60):
            image.write(rng.randrange(SIZE - 9000), rng.randbytes(9000))
        image.write_compressed(0, bytes(4096 - 1) + b"c")
        Snapshots(image).create("kept")
        image.write(MiB, b"after" * 1000)
    return path


def content(path: Path) -> bytes:
    with open_image(path) as image:
        return bytes(image.read(0, image.size))


def damage(path: Path, what: str) -> None:
    """Write a wrong value into the image, as a bug or a bad disk would."""
    with open_image(path) as image:
        h = image.header
        block = int(image.refcounts.table[0])
        l1 = [e & OFFSET_MASK for e in image.l1]
        l2 = next(e for e in l1 if e)
        entries = [(i, e) for i, e in enumerate(table_of(image, l2)) if e & OFFSET_MASK and not e >> 62 & 1]
        index, entry = entries[3]
        cluster = (entry & OFFSET_MASK) >> image.cluster_bits
        bits = 1 << h.refcount_order
    data = bytearray(path.read_bytes())

    def put_count(c: int, value: int) -> None:
        if bits >= 8:
            at = block + c * bits // 8
            data[at : at + bits // 8] = value.to_bytes(bits // 8, "big")
        else:
            at, shift = block + c * bits // 8, c * bits % 8
            data[at] = data[at] & ~(((1 << bits) - 1) << shift) | value << shift

    if what == "leak":
        data += bytes(-len(data) % 4096 + 4096)
        put_count(len(data) // 4096 - 1, 1)
    elif what == "missing count":
        put_count(cluster, 0)
    elif what == "copied flag":
        data[l2 + 8 * index : l2 + 8 * index + 8] = (entry ^ COPIED).to_bytes(8, "big")
    elif what == "l1 copied flag":
        at = h.l1_table_offset
        data[at : at + 8] = (int.from_bytes(data[at : at + 8], "big") ^ COPIED).to_bytes(8, "big")
    elif what == "refcount block offset":
        data[h.refcount_table_offset : h.refcount_table_offset + 8] = (12345 << 9).to_bytes(8, "big")
    elif what == "no refcount block":
        data[h.refcount_table_offset : h.refcount_table_offset + 8] = bytes(8)
    elif what == "data behind the end":
        data[l2 + 8 * index : l2 + 8 * index + 8] = (1 << 40 | COPIED).to_bytes(8, "big")
    path.write_bytes(data)


def table_of(image: Any, offset: int) -> list[int]:
    raw = image.file.pread(offset, image.cluster_size)
    return [int.from_bytes(raw[i : i + 8], "big") for i in range(0, len(raw), 8)]


REPAIRABLE = ["leak", "missing count", "copied flag", "l1 copied flag", "refcount block offset", "no refcount block"]


@pytest.mark.parametrize("what", REPAIRABLE)
def test_what_is_found_is_what_qemu_finds_and_is_repaired(image_path: Path, what: str) -> None:
    before = content(image_path)
    damage(image_path, what)
    # 1: qemu-img gives up on a block that it cannot read.
    qemu_img("check", image_path, status={"leak": 3, "refcount block offset": 1}.get(what, 2))
    with open_image(image_path) as image:
        found = check(image)
        assert (found.leaks > 0, found.corruptions > 0) == (what == "leak", what != "leak")
    with open_image(image_path, read_only=False, for_repair=True) as image:
        fixed = check(image, repair="all")
        assert fixed.clean
        assert fixed.leaks_fixed + fixed.corruptions_fixed
    is_clean(image_path)
    assert content(image_path) == before
    with open_image(image_path, read_only=False) as image:
        table = Snapshots(image)
        table.apply(table.find("kept"))
        image.write(0, b"goes on")
    is_clean(image_path)


def test_repairing_leaks_leaves_corruptions_alone(image_path: Path) -> None:
    damage(image_path, "leak")
    damage(image_path, "missing count")
    with open_image(image_path, read_only=False, for_repair=True) as image:
        result = check(image, repair="leaks")
    assert (result.leaks_fixed > 0, result.leaks, result.corruptions > 0) == (True, 0, True)


def test_data_behind_the_end_are_reported_and_not_thrown_away(image_path: Path) -> None:
    damage(image_path, "data behind the end")
    before = image_path.read_bytes()
    with open_image(image_path) as image:
        lines: list[str] = []
        assert check(image, report=lines.append).corruptions
        assert any("0x10000000000" in line for line in lines)
    assert image_path.read_bytes() == before
    qemu_img("check", image_path, status=2)


def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing(image_path: Path) -> None:
    damage(image_path, "missing count")
    data = bytearray(image_path.read_bytes())
    data[79] |= INCOMPAT_DIRTY
    image_path.write_bytes(data)
    with open_image(image_path, read_only=False) as image:
        assert not image.needs_repair
        image.write(0, b"x")
    is_clean(image_path)


def test_bitmaps_are_counted_and_not_taken_for_leaks(tmp_path: Path) -> None:
    path = tmp_path / "b.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_img("bitmap", "--add", "-g", "64k", path, "one")
    qemu_img("bitmap", "--add", path, "two")
    with open_image(path) as image:
        assert check(image).clean
    with open_image(path, read_only=False, for_repair=True) as image:
        assert check(image, repair="all").clean
    is_clean(path)
    assert "name: one" in qemu_img("info", path)


@pytest.mark.parametrize("what", ["leak", "missing count", "copied flag", "data behind the end"])
def test_without_numpy_the_result_is_the_same(image_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(image_path, what)
    seen = []
    for plain in (False, True):
        if plain:
            original = Counts.__init__

            def slow(self: Counts, header: Any, clusters: int, original: Any = original, **more: Any) -> None:
                original(self, header, clusters, use_numpy=False, **more)

            monkeypatch.setattr(Counts, "__init__", slow)
        with open_image(image_path) as image:
            lines: list[str] = []
            result = check(image, report=lines.append)
        seen.append((lines, vars(result)))
    assert seen[0] == seen[1]
    if what != "data behind the end":
        with open_image(image_path, read_only=False, for_repair=True) as image:
            check(image, repair="all")
            Snapshots(image).create("slow one")
        is_clean(image_path)


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "plain"])
def test_a_file_that_is_nearly_all_hole_costs_what_is_in_it(tmp_path: Path, numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse files travel well: a few KiB in an archive must not become minutes or gigabytes here."""
    original = Counts.__init__

    def init(self: Counts, header: Any, clusters: int, **more: Any) -> None:
        original(self, header, clusters, use_numpy=numpy, **more)

    monkeypatch.setattr(Counts, "__init__", init)
    path = tmp_path / "hole.qcow2"
    create_image(path, SIZE, options=Options())
    os.truncate(path, 4 << 40)
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
        (table,) = [entry & OFFSET_MASK for entry in image.l1 if entry & OFFSET_MASK]
    with path.open("r+b") as file:  # the second cluster is the last one of the file
        file.seek(table + 8)
        file.write(((4 << 40) - 65536 | COPIED).to_bytes(8, "big"))
    tracemalloc.start()
    try:
        with open_image(path) as image:
            result = check(image)
        assert tracemalloc.get_traced_memory()[1] < 32 * MiB
    finally:
        tracemalloc.stop()
    assert (result.corruptions, result.leaks, result.image_end_offset) == (2, 0, 4 << 40)  # a count and its flag


def test_snapshots_of_a_file_that_is_nearly_all_hole_look_at_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "hole.qcow2"
    create_image(path, SIZE, options=Options(cluster_size=512))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
    os.truncate(path, 1 << 40)
    with open_image(path, read_only=False) as image:
        looked: list[int] = []
        block = image.refcounts._block
        image.refcounts._block = lambda index: looked.append(index) or block(index)
        Snapshots(image).create("one")
        assert len(looked) < 2000, "of 8,388,608 blocks"
        image.write(0, b"y" * 65536)
        table = Snapshots(image)
        table.apply(table.list[0])
        assert image.read(0, 65536) == b"x" * 65536
    with open_image(path) as image:  # qemu-img finds the file too large
        assert check(image).clean


def test_counts_of_a_file_that_is_nearly_all_hole_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "hole.qcow2"
    create_image(path, SIZE, options=Options())
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
        table = image.header.refcount_table_offset
    with path.open("r+b") as file:
        file.seek(table)
        file.write((0x123400).to_bytes(8, "big"))  # a refcount block that cannot be
    os.truncate(path, 1 << 38)
    with open_image(path, read_only=False, for_repair=True) as image:
        check(image, repair="all")
    is_clean(path)
    with open_image(path) as image:
        assert image.read(0, 65536) == b"x" * 65536


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "plain"])
def test_another_width_of_the_counts_of_a_file_that_is_nearly_all_hole(
    tmp_path: Path, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not numpy:
        monkeypatch.setattr(counts, "_numpy", lambda: None)
    path = tmp_path / "hole.qcow2"
    create_image(path, 8 << 40)
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
    os.truncate(path, 8 << 40)
    for bits in (64, 1, 16):
        with open_image(path, read_only=False) as image:
            set_refcount_bits(image, bits)
            blocks = sum(1 for entry in image.refcounts.table if entry)
            assert blocks < 20, "not one for each part of the hole"
        with open_image(path, read_only=False) as image:
            assert check(image).clean
            assert image.read(0, 65536) == b"x" * 65536
            image.write(65536, b"y" * 65536)


def test_more_wrong_flags_than_are_remembered_are_all_found(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_image(image_path, read_only=False) as image:
        image.write(0, b"x" * MiB)
        image.flush()
        table = image.l1[0] & OFFSET_MASK
        entries = [e & ~COPIED for e in tables.load(image.file, table, 16)]
        image.file.pwrite(table, b"".join(e.to_bytes(8, "big") for e in entries))
    seen = []
    for most in (1 << 16, 3):
        monkeypatch.setattr(check_module, "_MANY", most)
        lines: list[str] = []
        with open_image(image_path) as image:
            found = check(image, report=lines.append)
        seen.append((found.corruptions, lines))
    assert seen[0][0] >= 16
    assert seen[0] == seen[1]


def test_more_clusters_than_can_be_counted_are_refused_by_number(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "CLUSTERS_MAX", 100)
    with (
        open_image(image_path) as image,
        pytest.raises(BlockError, match=r"the file has \d+ clusters, at most 100 can be counted"),
    ):
        check(image)


def test_references_that_no_count_can_hold_come_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "narrow.qcow2"
    create_image(path, SIZE, options=Options(refcount_bits=1))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
        table = next(entry & OFFSET_MASK for entry in image.l1 if entry & OFFSET_MASK)
    data = bytearray(path.read_bytes())
    data[table + 8 : table + 16] = data[table : table + 8]
    path.write_bytes(data)
    lines: list[str] = []
    with open_image(path, read_only=False, for_repair=True) as image:
        assert check(image, repair="all", report=lines.append).corruptions == 1
        (advice,) = [line for line in lines if line.startswith("A refcount of 2 does not fit in 1 bits")]
        assert "amend -o refcount_bits=8" in advice
        set_refcount_bits(image, 8)
        assert check(image, repair="all").clean
    is_clean(path)
