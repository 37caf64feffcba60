"""What qemu-img finds in damaged images is found here; repairing makes images that it finds clean and loses no content."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.format import COPIED, OFFSET_MASK, REFCOUNT_OFFSET_MASK, ZERO
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import is_clean

MUTATIONS = 30  # of each image

IMAGES = [
    (Options(cluster_size=512, refcount_bits=2), True),
    (Options(cluster_size=512), False),
    (Options(cluster_size=4096, refcount_bits=64), True),
    (Options(cluster_size=4096, refcount_bits=8), False),
    (Options(cluster_size=4096, version=2), True),
    (Options(cluster_size=16384, extended_l2=True), True),
]


class Sound(NamedTuple):
    """An image without fault, and where its table entries are."""

    data: bytes
    spots: dict[str, list[int]]
    cluster: int


def sound(path: Path, options: Options, snapshot: bool) -> Sound:
    rng = random.Random(str(options))
    create_image(path, 1 << 20, options=options)
    cluster = options.cluster_size
    with open_image(path, read_only=False) as image:
        for _ in range(12):
            image.write(rng.randrange(900_000), rng.randbytes(9000))
        image.write_zeroes(100_000, 50_000)
        image.write_compressed(8 * cluster, b"q" * cluster)
        if snapshot:
            Snapshots(image).create("s")
            image.write(0, b"n" * 3000)
        if options.version == 3 and not snapshot:
            table = Bitmaps(image)
            table.add("b", 512)
            table.store()
    is_clean(path)
    spots: dict[str, list[int]] = {}
    with open_image(path) as image:
        h = image.header
        spots["l1"] = [h.l1_table_offset + 8 * i for i, e in enumerate(image.l1) if e]
        spots["l2"] = [(e & OFFSET_MASK) + 8 * i for e in image.l1 if e for i in range(cluster // 8)]
        blocks = [(i, e) for i, e in enumerate(image.refcounts.table) if e]
        spots["refcount table"] = [h.refcount_table_offset + 8 * i for i, _ in blocks]
        spots["refcount block"] = [(e & REFCOUNT_OFFSET_MASK) + 8 * i for _, e in blocks for i in range(cluster // 8)]
        if h.nb_snapshots:
            spots["snapshot"] = [h.snapshots_offset + 8 * i for i in range(8)]
    return Sound(path.read_bytes(), spots, cluster)


def mutate(image: Sound, rng: random.Random) -> tuple[bytes, str]:
    """The image with one word of a table wrong, and what that is."""
    where = rng.choice([w for w in ("l1", "l2", "l2", "l2", "refcount table", "refcount block", "snapshot") if w in image.spots])
    at = rng.choice(image.spots[where])
    data = bytearray(image.data)
    old = int.from_bytes(data[at : at + 8], "big")
    inside = rng.randrange(len(data)) // image.cluster * image.cluster
    how, new = rng.choice(
        [
            ("a bit flipped", old ^ 1 << rng.randrange(64)),
            ("anything", rng.getrandbits(64)),
            ("another cluster", inside),
            ("another cluster, COPIED", inside | COPIED),
            ("nothing", 0),
            ("misaligned", old + 512),
            ("far away", 1 << 44 | COPIED),
            ("a flag", old ^ rng.choice([1, 1 << 62, 1 << 63, 1 << 1, 1 << 61])),
        ]
    )
    data[at : at + 8] = (new & (1 << 64) - 1).to_bytes(8, "big")
    return bytes(data), f"{where} at {at:#x}: {how}, {old:#x} to {new:#x}"


def qemu_finds(path: Path) -> tuple[bool, bool]:
    """(whether something is wrong, whether something leaks) to qemu-img."""
    done = subprocess.run(["qemu-img", "check", "--output=json", str(path)], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.stdout.startswith("{") else {"check-errors": 1}
    return bool(found.get("corruptions") or found.get("check-errors")), bool(found.get("leaks"))


def found_here(path: Path) -> tuple[bool, bool]:
    try:
        with open_image(path, for_repair=True) as image:
            result = check(image)
    except BlockError:
        return True, False
    return bool(result.corruptions or result.check_errors), bool(result.leaks)


def contents(path: Path) -> list[bytes]:
    """The guest data of the image and of its snapshots, as far as they can be read."""
    found: list[bytes] = []
    try:
        with open_image(path) as image:
            found.append(image.read(0, image.size))
            for s in Snapshots(image).list:
                image.show_snapshot(s.l1_table_offset, s.l1_size, s.disk_size)
                found.append(image.read(0, image.size))
    except (BlockError, OSError):
        pass
    return found


@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_what_qemu_finds_is_found_and_repairing_loses_nothing(tmp_path: Path, number: int) -> None:
    base = sound(tmp_path / "sound", *IMAGES[number])
    path = tmp_path / "damaged"
    for seed in range(MUTATIONS):
        data, what = mutate(base, random.Random(1000 * number + seed))
        path.write_bytes(data)
        (wrong, leaks), (theirs_wrong, theirs_leaks) = found_here(path), qemu_finds(path)
        assert wrong == theirs_wrong, what
        # Where something is wrong, not every leak is called one: it may be what a wrong entry meant.
        assert leaks == theirs_leaks or wrong, what
        if not wrong and not leaks:
            continue
        before = contents(path)
        try:
            with open_image(path, read_only=False, for_repair=True) as image:
                clean = check(image, repair="all").clean
        except BlockError:
            clean = False
        after = contents(path)
        assert after[: len(before)] == before, what
        assert qemu_finds(path) == (False, False) or not clean, what


def test_an_l2_table_that_is_also_guest_data_of_a_snapshot_is_not_written_to(tmp_path: Path) -> None:
    """What looks like wrong flags of a table is somebody's data."""
    path = tmp_path / "image"
    create_image(path, 64 << 20, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, (b"\0\0\0\0\0\0\x10\0" * 512) * 2)  # as L2 entries: the cluster at 0x1000
        Snapshots(image).create("one")
        image.write(4096, b"now" * 1000)
        image.flush()
        [where] = {int(e.host) for e in image.block_status(0, 4096)}
        at = image.header.l1_table_offset + 8
    put(path, at, lambda e: where)
    before = contents(path)
    assert qemu_finds(path)[0]
    assert findings(path, "all")[0].corruptions
    assert contents(path) == before


# --- one by one ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    create_image(path, 1 << 20, options=Options(cluster_size=16384, extended_l2=True))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 100_000)
        Snapshots(image).create("one")
        image.write(0, b"y" * 100)
    return path


def entry_of(path: Path, index: int) -> int:
    with open_image(path) as image:
        return int(image.l1[0] & OFFSET_MASK) + 16 * index


def put(path: Path, at: int, change: Callable[[int], int]) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 8] = change(int.from_bytes(data[at : at + 8], "big")).to_bytes(8, "big")
    path.write_bytes(data)


def findings(path: Path, repair: str = "none") -> tuple[Any, str]:
    lines: list[str] = []
    with open_image(path, read_only=repair == "none", for_repair=True) as image:
        return check(image, repair=repair, report=lines.append), "\n".join(lines)


def test_reserved_bits_of_an_l2_entry_are_found(path: Path) -> None:
    put(path, entry_of(path, 1), lambda e: e | 1 << 60)
    assert "found l2 entry with reserved bits set" in findings(path)[1]
    assert qemu_finds(path)[0]


def test_reserved_bits_of_an_l1_entry_are_found(path: Path) -> None:
    with open_image(path) as image:
        at = image.header.l1_table_offset
    put(path, at, lambda e: e | 4)
    assert "found L1 entry with reserved bits set" in findings(path)[1]
    assert qemu_finds(path)[0]


def test_subclusters_that_are_allocated_in_no_cluster_are_found(path: Path) -> None:
    put(path, entry_of(path, 40) + 8, lambda e: e | 1)
    assert "Unallocated cluster has non-zero subcluster allocation map" in findings(path)[1]
    assert qemu_finds(path)[0]


def test_a_misaligned_cluster_that_only_reads_as_zeroes_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, 1 << 20, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 8192)
        image.write_zeroes(4096, 4096)
        table = int(image.l1[0] & OFFSET_MASK)
        image.flush()
    put(path, table + 8, lambda e: (e + 512) | ZERO)
    before = contents(path)
    assert qemu_finds(path)[0]
    result, said = findings(path, "all")
    assert "Repairing offset=" in said
    assert result.clean
    is_clean(path)
    assert contents(path) == before


def test_a_misaligned_cluster_with_data_is_reported_and_left(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, 1 << 20, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 8192)
        table = int(image.l1[0] & OFFSET_MASK)
    put(path, table + 8, lambda e: e + 512)
    before = path.read_bytes()
    result, said = findings(path, "all")
    assert "Data cluster is not properly aligned" in said
    assert result.corruptions
    assert path.read_bytes() == before


def test_snapshot_entries_that_lack_what_version_3_wants_are_repaired(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, 1 << 20)
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 8192)
        Snapshots(image).create("one")
        at = image.header.snapshots_offset
    data = bytearray(path.read_bytes())
    extra = int.from_bytes(data[at + 36 : at + 40], "big")
    rest = bytes(data[at + 40 + extra : at + 128])
    data[at + 36 : at + 128] = (bytes(4) + rest).ljust(92, b"\0")
    path.write_bytes(data)
    assert qemu_finds(path)[0]
    result, said = findings(path)
    assert "snapshot table entry 0 is incomplete" in said
    assert result.corruptions == 1
    before = contents(path)
    result, said = findings(path, "all")
    assert result.clean
    assert result.corruptions_fixed == 1
    is_clean(path)
    assert contents(path) == before
    with open_image(path) as image:
        assert [s.name for s in Snapshots(image).list] == ["one"]


def test_counts_that_are_too_narrow_for_the_references_are_reported(tmp_path: Path) -> None:
    """Nothing that is reachable has to go: the image stays readable, and can be converted to a wider one."""
    path = tmp_path / "image"
    create_image(path, 1 << 20, options=Options(cluster_size=4096, refcount_bits=1))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 8192)
        image.flush()
        table = int(image.l1[0] & OFFSET_MASK)
        other = table_entry(image, table)
    put(path, table + 8, lambda e: other)
    before = contents(path)
    result, said = findings(path, "all")
    assert result.corruptions == 1
    assert "refcount=1 reference=2" in said
    assert contents(path) == before


def table_entry(image: Any, at: int) -> int:
    return int.from_bytes(image.file.pread(at, 8), "big")


def test_what_is_left_after_repairing_is_what_another_check_finds(path: Path) -> None:
    with open_image(path) as image:
        block = int(image.refcounts.table[0])
    put(path, block + 8, lambda e: 0)
    put(path, entry_of(path, 1), lambda e: e | 1 << 60)
    repaired, _ = findings(path, "all")
    again, _ = findings(path)
    assert repaired.corruptions_fixed
    for name in ("corruptions", "leaks", "check_errors", "allocated_clusters", "image_end_offset"):
        assert getattr(repaired, name) == getattr(again, name), name
