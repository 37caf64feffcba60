"""What headers hold: feature names where there is room, sizes that QEMU opens, and nothing that is written before it may be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import ImageInUseError
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.format import AUTOCLEAR_BITMAPS, EXT_FEATURE_NAMES
from block_qcow2.qcow2.snapshots import Snapshots

from .conftest import Driver
from .qemu import is_clean, qemu_img

MiB = 1 << 20
_AUTOCLEAR_AT = 88  # section "Header", autoclear_features
UNKNOWN = 1 << 40


# --- what fits ---


def test_the_smallest_clusters_have_room_for_a_backing_file(tmp_path: Path) -> None:
    create_image(tmp_path / "base", MiB)
    name = str(tmp_path / "base")
    path = tmp_path / "top"
    create_image(path, MiB, options=Options(cluster_size=512, backing_file=name, backing_format="qcow2"))
    qemu_img("check", path)
    with open_image(path, read_only=False, allow=True) as image:
        assert image.header.extension(EXT_FEATURE_NAMES) is None
        image.set_backing("x" * 250, "raw")
        image.set_backing(None, None)
    is_clean(path)


def test_the_smallest_clusters_have_room_for_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(cluster_size=512, data_file=str(tmp_path / "data")))
    is_clean(path)


def test_the_smallest_clusters_have_room_for_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(cluster_size=512))
    with open_image(path, read_only=False) as image:
        table = Bitmaps(image)
        table.add("here", 512)
        table.store()
    qemu_img("bitmap", "--add", path, "there")
    is_clean(path)


def test_the_smallest_clusters_have_room_for_an_encrypted_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(cluster_size=512, passphrase=b"secret", luks_rounds=1000))
    with open_image(path, read_only=False, passphrase=b"secret") as image:
        image.write(0, b"hidden")
        assert check(image).clean


def test_feature_names_stay_where_there_is_room(tmp_path: Path) -> None:
    create_image(tmp_path / "image", MiB)
    with open_image(tmp_path / "image") as image:
        assert image.header.extension(EXT_FEATURE_NAMES) is not None


@pytest.mark.parametrize("size", [1, 511, 513, MiB + 1])
def test_a_size_is_rounded_up_to_a_sector_as_qemu_does(tmp_path: Path, size: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create_image(ours, size)
    qemu_img("create", "-q", "-f", "qcow2", theirs, size)
    qemu_img("compare", "-s", ours, theirs)
    with open_image(ours) as one, open_image(theirs) as two:
        assert one.size == two.size == -(-size // 512) * 512


# --- autoclear bits that nobody knows ---


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    path = tmp_path / "strange"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"y" * 65536)
    set_autoclear(path, UNKNOWN)
    return path


def set_autoclear(path: Path, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(_AUTOCLEAR_AT)
        file.write(bits.to_bytes(8, "big"))


def autoclear(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[_AUTOCLEAR_AT : _AUTOCLEAR_AT + 8], "big")


CHANGES: dict[str, Callable[[Any], object]] = {
    "write": lambda image: image.write(0, b"x"),
    "zeroes": lambda image: image.write_zeroes(0, 65536),
    "discard": lambda image: image.discard(0, 65536),
    "compressed": lambda image: image.write_compressed(65536, bytes(65536)),
    "resize": lambda image: image.resize(2 * MiB),
    "snapshot": lambda image: Snapshots(image).create("s"),
    "repair": lambda image: check(image, repair="all"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unknown_autoclear_bit_is_cleared_by_the_first_change(strange: Path, change: str) -> None:
    with open_image(strange, read_only=False) as image:
        assert autoclear(strange) == UNKNOWN
        CHANGES[change](image)
        assert autoclear(strange) == 0
    is_clean(strange)


@pytest.mark.parametrize("read_only", [True, False])
def test_an_unknown_autoclear_bit_stays_where_nothing_changes(strange: Path, read_only: bool) -> None:
    before = strange.read_bytes()
    with open_image(strange, read_only=read_only) as image:
        image.read(0, image.size)
        check(image)
    assert strange.read_bytes() == before


def test_opening_a_disk_changes_nothing_before_it_is_locked(strange: Path) -> None:
    before = strange.read_bytes()
    with open_image(strange):
        disk = open_disk(strange, format="qcow2")
        with pytest.raises(ImageInUseError):
            disk.lock()
        disk.close()
    assert strange.read_bytes() == before


def test_a_bit_that_somebody_set_before_the_lock_is_cleared_by_a_write_to_a_mapped_cluster(strange: Path) -> None:
    set_autoclear(strange, 0)
    disk = open_disk(strange, format="qcow2")
    set_autoclear(strange, UNKNOWN)
    disk.lock()
    driver = Driver(disk)
    driver.read(0, 512)
    assert driver.write(0, b"x" * 512) == 0
    assert autoclear(strange) == 0
    disk.close()


def test_known_autoclear_bits_stay(strange: Path) -> None:
    set_autoclear(strange, 0)
    qemu_img("bitmap", "--add", strange, "b")
    set_autoclear(strange, AUTOCLEAR_BITMAPS | UNKNOWN)
    with open_image(strange, read_only=False) as image:
        image.write(0, b"x")
    assert autoclear(strange) == AUTOCLEAR_BITMAPS


# --- the lock ---


def test_an_image_that_qemu_holds_is_neither_written_nor_created_over(tmp_path: Path) -> None:
    path = tmp_path / "held"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"precious")
    before = path.read_bytes()
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        while b"ops" not in holder.stdout.readline():
            pass  # it has opened the image when it answers
        for attempt in (
            lambda: open_image(path, read_only=False),
            lambda: open_image(path),
            lambda: create_image(path, 1),
            lambda: open_disk(path, format="qcow2").lock(),
        ):
            with pytest.raises(ImageInUseError):
                attempt()
        open_image(path, force_share=True).close()
    finally:
        holder.communicate(b"quit\n", timeout=60)
    assert path.read_bytes()[512:] == before[512:]
    with open_image(path, read_only=False) as image:
        assert image.read(0, 8) == b"precious"
