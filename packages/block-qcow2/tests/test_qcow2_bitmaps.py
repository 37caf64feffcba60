"""Dirty bitmaps stay right while images are written here, and QEMU agrees about them."""

from __future__ import annotations

import errno
import json
import random
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import ImageFormatError
from block_qcow2.img import main
from block_qcow2.qcow2.bitmaps import BitmapError, Bitmaps, marked
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .conftest import Driver
from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20
SIZE = 64 * MiB
LIMIT = 60.0  # seconds, for what takes a thousandth of one


def described(path: Path) -> list[dict[str, Any]]:
    data = json.loads(qemu_img("info", "--output", "json", path))["format-specific"]["data"]
    return data.get("bitmaps", [])  # type: ignore[no-any-return]


def listens(where: Path) -> bool:
    """Whether somebody can be reached at a socket: its file is there a little earlier."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(where)) == 0


def dirty_by_qemu(path: Path, name: str, tmp_path: Path) -> list[tuple[int, int]]:
    """(start, end) of the dirty parts, as qemu-nbd exports them."""
    where = tmp_path / "nbd"
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(where), str(path)])
    try:
        options = f"driver=nbd,server.type=unix,server.path={where},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        deadline = time.monotonic() + LIMIT
        while not listens(where):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found: list[tuple[int, int]] = []
        # x-dirty-bitmap shows dirty parts as holes.
        for e in json.loads(qemu_img("map", "--output", "json", "--image-opts", options)):
            if not e["data"]:
                start, end = e["start"], e["start"] + e["length"]
                if found and found[-1][1] == start:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((start, end))
        return found
    finally:
        server.terminate()
        server.wait()


def dirty_here(path: Path, name: str) -> list[tuple[int, int]]:
    with open_image(path) as image:
        table = Bitmaps(image)
        bitmap = table.find(name)
        granule = 1 << bitmap.granularity_bits
        return [(a * granule, min(b * granule, image.size)) for a, b in marked(table.bits(bitmap))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "b.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    qemu_img("bitmap", "--add", "-g", "64k", path, "one")
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "--disable", path, "still")
    return path


def test_what_qemu_marked_is_read(path: Path, tmp_path: Path) -> None:
    qemu_io(path, "write 1M 100k", "write 33M 1", "discard 40M 1M")
    for name in ("one", "fine", "still"):
        assert dirty_here(path, name) == dirty_by_qemu(path, name, tmp_path)
    assert dirty_here(path, "still") == []


def test_writes_here_are_marked_and_qemu_agrees(path: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    qemu_io(path, "write 1M 100k")
    touched = [(MiB, MiB + 102400)]
    with open_image(path, read_only=False) as image:
        for _ in range(30):
            offset, length = rng.randrange(SIZE - 300_000), rng.choice([1, 512, 70_000, 300_000])
            rng.choice([lambda o, n: image.write(o, b"x" * n), image.write_zeroes, image.discard])(offset, length)
            touched.append((offset, offset + length))
        assert check(image).clean
    is_clean(path)
    for name, granule in (("one", 65536), ("fine", 512)):
        expected = {g for a, b in touched for g in range(a // granule, (b - 1) // granule + 1)}
        here = dirty_here(path, name)
        assert {g for a, b in here for g in range(a // granule, -(-b // granule))} == expected
        assert here == dirty_by_qemu(path, name, tmp_path)
    assert dirty_here(path, "still") == []
    assert [b["flags"] for b in described(path)] == [["auto"], ["auto"], []]


def test_bitmaps_are_followed_on_when_the_last_flush_before_letting_go_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk: Any = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(5 * MiB, b"g" * 4096) == 0

    def fails() -> None:
        raise OSError(errno.EIO, "the disk is not well")

    with monkeypatch.context() as patch:
        patch.setattr(disk.image, "flush", fails)
        with pytest.raises(OSError, match="not well"):
            disk.unlock()
    assert driver.write(7 * MiB, b"h" * 4096) == 0  # the image is still ours, and the guest runs on
    driver.channel.close()
    disk.unlock()
    disk.close()
    is_clean(path)
    assert dirty_here(path, "one") == [(5 * MiB, 5 * MiB + 65536), (7 * MiB, 7 * MiB + 65536)]


def test_a_guest_marks_what_it_writes(path: Path) -> None:
    disk = open_disk(path, format="qcow2", discard=True)
    disk.lock()
    driver = Driver(disk)
    for _ in range(2):  # the second one goes straight to the file
        assert driver.write(5 * MiB, b"g" * 4096) == 0
    disk.unlock()
    assert dirty_here(path, "one") == [(5 * MiB, 5 * MiB + 65536)]
    disk.lock()
    assert driver.write(5 * MiB + 65536, b"h") == 0
    disk.close()
    assert dirty_here(path, "fine") == [(5 * MiB, 5 * MiB + 4096), (5 * MiB + 65536, 5 * MiB + 65536 + 512)]
    is_clean(path)


def test_a_guest_whose_writes_would_not_be_marked_does_not_write(path: Path) -> None:
    """The image is not locked, so its bitmaps are not followed."""
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 65536)
    disk = open_disk(path, format="qcow2")
    driver = Driver(disk)
    driver.read(0, 512)
    assert driver.write(0, b"y" * 512) == -errno.EIO
    disk.lock()
    driver.read(0, 512)
    assert driver.write(0, b"y" * 512) == 0
    disk.close()


def test_after_a_crash_a_bitmap_is_known_to_be_wrong(path: Path, tmp_path: Path) -> None:
    crashed = tmp_path / "crashed"
    with open_image(path, read_only=False) as image:
        image.write(0, b"x")
        image.flush()
        crashed.write_bytes(path.read_bytes())
    assert described(crashed)[0]["flags"] == ["in-use", "auto"]
    with open_image(crashed) as image:
        table = Bitmaps(image)
        with pytest.raises(BitmapError, match="inconsistent"):
            table.bits(table.find("one"))
    with open_image(crashed, read_only=False) as image:
        image.write(MiB, b"y")
    assert described(crashed)[0]["flags"] == ["in-use", "auto"]
    assert main(["bitmap", "--remove", str(crashed), "one"]) == 0
    assert [b["name"] for b in described(crashed)] == ["fine", "still"]
    is_clean(crashed)


def test_the_command_does_what_qemu_imgs_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.qcow2"
    create_image(path, SIZE, options=Options(cluster_size=4096))

    def run(*words: Any, status: int = 0) -> str:
        assert main(["bitmap", *map(str, words)]) == status
        return capsys.readouterr().err

    run("--add", path, "a")
    run("--add", "-g", "4k", "--disable", path, "b")
    assert described(path) == [
        {"flags": ["auto"], "name": "a", "granularity": 65536},
        {"flags": [], "name": "b", "granularity": 4096},
    ]
    qemu_io(path, "write 1M 1M", "write 10M 512")
    run("--merge", "a", path, "b")
    assert dirty_here(path, "b") == [(MiB, 2 * MiB), (10 * MiB, 10 * MiB + 65536)] == dirty_by_qemu(path, "b", tmp_path)
    run("--clear", path, "a")
    assert dirty_here(path, "a") == []
    other = tmp_path / "other.qcow2"
    create_image(other, SIZE)
    run("--add", other, "c")
    run("--merge", "b", "-b", path, other, "c")
    assert dirty_here(other, "c") == [(MiB, 2 * MiB), (10 * MiB, 10 * MiB + 65536)]
    run("--disable", path, "a")
    run("--enable", path, "b")
    assert [b["flags"] for b in described(path)] == [[], ["auto"]]
    assert "already exists" in run("--add", path, "a", status=1)
    assert "not found" in run("--clear", path, "z", status=1)
    assert "Need at least one" in run(path, "z", status=1)
    run("--remove", path, "a")
    run("--remove", path, "b")
    assert described(path) == []
    is_clean(path)
    is_clean(other)


def test_snapshots_and_resizing_keep_bitmaps(path: Path) -> None:
    with open_image(path, read_only=False) as image:
        image.write(0, b"1" * 100_000)
        table = Snapshots(image)
        table.create("s")
        image.resize(SIZE * 2)
        image.write(SIZE + MiB, b"2")
    is_clean(path)
    assert dirty_here(path, "one") == [(0, 131072), (SIZE + MiB, SIZE + MiB + 65536)]
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        table.apply(table.find("s"))
    is_clean(path)
    assert dirty_here(path, "one") == [(0, SIZE)], "anything may have changed"


def test_bitmaps_that_there_is_no_room_for_are_followed_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(MiB, b"x" * 65536) == 0
    driver.wait(driver.channel.flush("flush"))
    file = disk.image.file
    pwrite = file.pwrite

    def full(offset: int, data: bytes) -> None:
        if offset + len(data) > file.refresh_size():
            raise OSError(errno.ENOSPC, "no room")
        pwrite(offset, data)

    monkeypatch.setattr(file, "pwrite", full)
    with pytest.raises(OSError, match="no room"):
        disk.unlock()
    monkeypatch.undo()
    assert driver.write(2 * MiB, b"y" * 65536) == 0
    disk.unlock()
    disk.close()
    is_clean(path)
    assert dirty_here(path, "fine")[-2:] == [(MiB, MiB + 65536), (2 * MiB, 2 * MiB + 65536)]


def test_a_size_that_a_bitmap_cannot_follow_changes_nothing(path: Path) -> None:
    with open_image(path, read_only=False) as image:
        size = image.size
        with pytest.raises(BitmapError, match="'fine' takes"):
            image.resize(1 << 40)
        assert image.size == size
        image.write(size - 512, b"x" * 512)
    with open_image(path) as image:
        assert image.size == size
        assert Bitmaps(image).find("fine").consistent


def test_a_wrong_directory_is_refused_and_not_believed(path: Path) -> None:
    with open_image(path) as image:
        data = image.header.extension(0x23852875)
        at = int.from_bytes(data[16:24], "big")
    good = path.read_bytes()
    rng = random.Random(5)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[at + rng.randrange(80)] = rng.randrange(256)
        path.write_bytes(data)
        with suppress(ImageFormatError, BitmapError), open_image(path, read_only=False) as image:
            image.write(0, b"x")
