"""What a qcow2 disk takes of the host: zeroes that are detected take nothing, and what is discarded is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk
from block_qcow2.qcow2.create import Options

from .conftest import Driver
from .qemu import is_clean

MiB = 1 << 20


@contextmanager
def used(path: Path, **options: Any) -> Iterator[tuple[Any, Driver]]:
    disk: Any = open_disk(path, format="qcow2", **options)
    disk.lock()
    yield disk, Driver(disk)
    disk.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    create_image(path, 16 * MiB)
    with used(path) as (_, driver):
        assert driver.write(0, b"x" * 4 * MiB) == 0
    return path


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


GIVING_BACK: dict[str, Callable[[Driver], int]] = {
    "discard": lambda d: d.wait(d.channel.discard(0, 4 * MiB, "discard")),
    "zeroes that may unmap": lambda d: d.wait(d.channel.write_zeroes(0, 4 * MiB, "zero", True)),
}


@pytest.mark.parametrize("how", GIVING_BACK)
@pytest.mark.parametrize("discard", [True, False])
def test_space_goes_back_to_the_host_where_that_is_allowed(path: Path, how: str, discard: bool) -> None:
    with used(path, discard=discard) as (disk, driver):
        assert GIVING_BACK[how](driver) == 0
        disk.flush()
        assert (taken(path) < MiB) == discard
        kept = how == "discard" and not discard
        assert driver.read(0, 4096) == (b"x" * 4096 if kept else bytes(4096))
    is_clean(path)


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_zeroes_that_are_detected_are_not_written(path: Path, mode: str) -> None:
    before = taken(path)
    with used(path, discard=True, detect_zeroes=mode) as (disk, driver):
        assert driver.write(8 * MiB, bytes(4 * MiB)) == 0  # never written before
        assert driver.write(0, bytes(4 * MiB)) == 0
        disk.flush()
        assert driver.read(0, 4 * MiB) == bytes(4 * MiB)
        if mode == "off":
            assert taken(path) >= before + 4 * MiB
        elif mode == "on":
            assert taken(path) <= before
        else:
            assert taken(path) < MiB
        assert driver.write(4096, b"y" * 512) == 0
        assert driver.read(4096 - 512, 1536) == bytes(512) + b"y" * 512 + bytes(512)
    is_clean(path)


def test_zeroes_over_a_backing_file_hide_it(tmp_path: Path, path: Path) -> None:
    top = tmp_path / "top"
    create_image(top, 16 * MiB, options=Options(backing_file=str(path), backing_format="qcow2"))
    with used(top, discard=True, detect_zeroes="unmap", allow=True) as (_, driver):
        assert driver.write(0, bytes(MiB)) == 0
        assert driver.wait(driver.channel.discard(MiB, MiB, "discard")) == 0
        assert driver.read(0, 2 * MiB) == bytes(2 * MiB)
        assert driver.read(2 * MiB, 4096) == b"x" * 4096
    assert taken(top) < MiB
    is_clean(top)
