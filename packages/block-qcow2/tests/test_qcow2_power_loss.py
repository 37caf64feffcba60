"""A power loss at any write, with any order between two flushes, leaves an image that opens, leaks at worst, and has all that a
flush acknowledged; and a snapshot that it names keeps its content, whatever is written then.

Version 2 has no mark that says that its COPIED flags cannot be trusted: they may be wrong, where that does no harm.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from block_qcow2.images import _nothing
from block_qcow2.qcow2.amend import downgrade, set_refcount_bits
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check, repair_if_dirty
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.image import open_qcow2
from block_qcow2.qcow2.snapshots import Snapshots

from .memory_file import SECTOR, Below, MemoryFile, PowerLosses

SEEDS, CUTS = 40, 100


def workload(
    rng: random.Random, image: Any, snapshots: Snapshots, model: bytearray, saved: dict[str, bytes], ever: dict[str, bytes]
) -> str:
    """One random operation on the image and the model; its name."""
    size, cluster = len(model), image.cluster_size
    offset = rng.randrange(size // SECTOR) * SECTOR
    length = min(rng.choice([SECTOR, 4 * SECTOR, cluster, 3 * cluster]), size - offset)
    kind = rng.choice(
        ["write"] * 6 + ["zero", "unmap", "discard", "compressed", "create", "apply", "delete", "resize", "flush", "flush"]
    )
    if kind == "write":
        data = rng.randbytes(length)
        image.write(offset, data)
        model[offset : offset + length] = data
    elif kind in ("zero", "unmap"):
        image.write_zeroes(offset, length, unmap=kind == "unmap")
        model[offset : offset + length] = bytes(length)
    elif kind == "discard":
        image.discard(offset, length)
        first, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
        if offset + length == size:
            end = size
        model[first : max(first, end)] = bytes(max(end - first, 0))
    elif kind == "compressed":
        at = offset // cluster * cluster
        data = (rng.randbytes(32) * cluster)[: min(cluster, size - at)]
        image.write_compressed(at, data)
        model[at : at + len(data)] = data
    elif kind == "create" and len(saved) < 4:
        name = f"s{rng.random()}"
        saved[name] = ever[name] = bytes(model)
        snapshots.create(name)
    elif kind == "apply" and saved:
        name = rng.choice(sorted(saved))
        snapshots.apply(snapshots.find(name))
        model[:] = saved[name]
    elif kind == "delete" and saved:
        name = rng.choice(sorted(saved))
        snapshots.delete(snapshots.find(name))
        del saved[name]
    elif kind == "resize" and not (image.header.version == 2 and saved):
        new = max(size + rng.choice([-3, -1, 1, 4, 40]) * cluster, 1) // SECTOR * SECTOR + SECTOR
        image.resize(new, shrink=True)
        model[:] = (model + bytes(max(new - size, 0)))[:new]
    elif kind == "flush":
        image.flush()
    return kind


def run(seed: int, cuts: int, *, steps: int = 60) -> None:
    rng = random.Random(seed)
    version = 2 if rng.random() < 0.25 else 3
    extended = version == 3 and rng.random() < 0.25
    cluster = 16384 if extended else rng.choice([512, 1024, 4096])
    size = rng.randrange(20, 400) * SECTOR * (8 if extended else 1)
    file: Any = MemoryFile()
    bits = 16 if version == 2 else rng.choice([8, 16, 64])
    write_empty(file, size, Options(version=version, cluster_size=cluster, extended_l2=extended, refcount_bits=bits))
    start = bytes(file.data)
    file.log = log = []
    image = open_qcow2(file, read_only=False, discard=rng.random() < 0.5)
    snapshots = Snapshots(image)
    model = bytearray(size)
    saved: dict[str, bytes] = {}
    ever: dict[str, bytes] = {}
    # (entries logged when it was acknowledged, content): everything from the last acknowledged one before a cut may be found.
    versions: list[tuple[int, bytes]] = [(0, bytes(model))]
    acknowledged = [(0, 0)]  # (entries logged, index in versions)
    for _ in range(steps):
        before = bytes(model)
        kind = workload(rng, image, snapshots, model, saved, ever)
        if len(model) < len(before):  # what is cut off may be gone before the size says so
            versions.append((len(log), bytes(model) + bytes(len(before) - len(model))))
        versions.append((len(log), bytes(model)))
        if kind == "flush":
            acknowledged.append((len(log), len(versions) - 1))
    losses = PowerLosses(start, log)
    for cut in sorted(rng.randrange(len(log) + 1) for _ in range(cuts)):
        oldest = max(v for at, v in acknowledged if at <= cut)
        possible = [content for _, content in versions[oldest:]]
        survives(losses.after(cut, rng), possible, ever, f"seed {seed}, cut {cut}")


def survives(disk: bytes, possible: list[bytes], ever: dict[str, bytes], what: str) -> None:
    file: Any = MemoryFile(disk)
    image = open_qcow2(file, read_only=False)
    repair_if_dirty(image)
    lines: list[str] = []
    result = check(image, report=lines.append)
    flags = sum("OFLAG_COPIED" in line for line in lines) if image.header.version == 2 else 0
    assert result.corruptions == flags, (what, lines)
    assert not result.check_errors, (what, lines)
    whole = image.read(0, image.size)
    if whole not in possible:
        for at in range(0, image.size, SECTOR):
            sector = whole[at : at + SECTOR]
            assert any(content[at : at + len(sector)] == sector for content in possible), (
                f"{what}: sector at {at:#x} was never written like this"
            )
    for snapshot in Snapshots(image).list:
        assert snapshot_content(file, snapshot) == ever[snapshot.name], f"{what}: {snapshot.name}"
    image.write(0, b"x" * image.size)
    image.flush()
    for snapshot in Snapshots(image).list:
        assert snapshot_content(file, snapshot) == ever[snapshot.name], f"{what}: {snapshot.name} after a write"


def snapshot_content(file: Any, snapshot: Any) -> bytes:
    reader = open_qcow2(file)
    reader.show_snapshot(snapshot.l1_table_offset, snapshot.l1_size, snapshot.disk_size)
    return reader.read(0, reader.size)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_power_loss_leaves_leaks_at_worst_and_keeps_what_was_flushed(seed: int) -> None:
    run(seed, CUTS)


OLD, NEW = "/images/" + "a" * 100 + ".qcow2", "/srv/" + "b" * 90


def add_bitmap(image: Any) -> None:
    bitmaps = Bitmaps(image)
    bitmaps.add("one")
    bitmaps.store()


HEADER_CHANGES: dict[str, Callable[[Any], None]] = {
    "another backing file": lambda image: image.set_backing(NEW, "qcow2"),
    "no backing file": lambda image: image.set_backing(None, None),
    "a bitmap": add_bitmap,
    "another version": downgrade,
    "another width of counts": lambda image: set_refcount_bits(image, 64),
    "a larger L1 table": lambda image: image.resize(400 * image.cluster_size),
}


@pytest.mark.parametrize("cluster", [512, 1024, 65536])
@pytest.mark.parametrize("what", HEADER_CHANGES)
def test_a_power_loss_leaves_the_old_header_or_the_new_one(what: str, cluster: int) -> None:
    """Extensions and names are longer than a sector: half of a new header must not go with half of an old one."""
    file: Any = MemoryFile()
    options = Options(cluster_size=cluster, backing_file=OLD, backing_format="qcow2")
    write_empty(file, 200 * cluster, options)
    image = open_qcow2(file, read_only=False, open_backing=_nothing)
    image.write(0, b"x" * 5000)
    image.flush()
    start = bytes(file.data)
    file.log = log = []
    HEADER_CHANGES[what](image)
    image.flush()
    names = {OLD, image.backing_file}
    rng = random.Random(what)
    losses = PowerLosses(start, log)
    for cut in sorted(rng.randrange(len(log) + 1) for _ in range(150)):
        disk: Any = MemoryFile(losses.after(cut, rng))
        again = open_qcow2(disk, read_only=False, open_backing=_nothing)
        assert again.backing_file in names, cut
        repair_if_dirty(again)
        result = check(again)
        assert not result.corruptions, cut
        assert not result.check_errors, cut
        assert again.read(0, 5000) == b"x" * 5000
    again = open_qcow2(MemoryFile(bytes(file.data)), open_backing=_nothing)  # type: ignore[arg-type]
    assert again.backing_file == image.backing_file
    assert again.header.feature_names() == image.header.feature_names()


@pytest.mark.parametrize("more", [40, 400], ids=["the same L1 table", "a larger one"])
@pytest.mark.parametrize("inside", [0, 512], ids=["at a cluster's end", "inside a cluster"])
@pytest.mark.parametrize(
    "options",
    [Options(cluster_size=1024), Options(cluster_size=1024, version=2), Options(cluster_size=16384, extended_l2=True)],
    ids=["version 3", "version 2", "extended L2 entries"],
)
def test_a_power_loss_while_an_image_grows_shows_nothing_of_a_longer_backing_file(
    options: Options, inside: int, more: int
) -> None:
    cluster = options.cluster_size
    old, new = 10 * cluster + inside, (10 + more) * cluster
    below = Below(new - 3 * cluster - 512)
    file: Any = MemoryFile()
    write_empty(file, old, options._replace(backing_file="below", backing_format="raw"))
    image = open_qcow2(file, read_only=False, open_backing=lambda name, fmt: below)
    start = bytes(file.data)
    file.log = log = []
    image.resize(new)
    image.flush()
    rng = random.Random(more)
    losses = PowerLosses(start, log)
    sizes = set()
    for cut in sorted([0, len(log), *(rng.randrange(len(log) + 1) for _ in range(50))]):
        disk: Any = MemoryFile(losses.after(cut, rng))
        again = open_qcow2(disk, read_only=False, open_backing=lambda name, fmt: below)
        repair_if_dirty(again)
        if options.version == 3:
            result = check(again)
            assert not result.corruptions, cut
            assert not result.check_errors, cut
        assert again.read(0, again.size) == (b"B" * old).ljust(again.size, b"\0"), f"cut {cut} of {len(log)}"
        sizes.add(again.size)
        again.resize(new)  # who was interrupted does it again
        assert again.read(0, new) == (b"B" * old).ljust(new, b"\0"), f"cut {cut} of {len(log)}"
    assert sizes == {old, new}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_thousands_of_power_losses(seed: int) -> None:
    run(seed, 60, steps=100)
