"""Requests whose clusters lie apart in the file: they go to it in parts, at once where the file's channel answers at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.lookup import PARTS_MAX

from .conftest import Driver
from .test_raw import ENGINES, offered

CLUSTER = 4096
COUNT = 64  # clusters that are written, each one apart from its neighbours in the file


def pattern(cluster: int) -> bytes:
    return bytes([cluster + 1]) * CLUSTER


def scattered(path: Path, **options: Any) -> Any:
    """A disk of which the first COUNT clusters are written, last first, and its tables are known."""
    create_image(path, 1 << 20, options=Options(cluster_size=CLUSTER))
    disk = open_disk(path, format="qcow2", **options)
    driver = Driver(disk)
    for cluster in reversed(range(COUNT)):
        assert driver.write(cluster * CLUSTER, pattern(cluster)) == 0
    driver.channel.close()
    return disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    disk = scattered(tmp_path / "image")
    yield disk
    disk.close()


def views(data: bytearray, *edges: int) -> list[memoryview]:
    view, ends = memoryview(data), [*edges, len(data)]
    return [view[a:b] for a, b in zip([0, *edges], ends, strict=True)]


def test_a_read_of_clusters_that_lie_apart_needs_no_thread(disk: Any) -> None:
    channel = disk.channel()
    data = bytearray(4 * CLUSTER)
    assert channel.readv(CLUSTER // 2, views(data, 100, 5000), "read") == 0
    assert data == (pattern(0) + pattern(1) + pattern(2) + pattern(3) + pattern(4))[CLUSTER // 2 : -CLUSTER // 2]
    assert channel.in_flight == 0


def test_a_write_to_clusters_that_lie_apart_needs_no_thread(disk: Any) -> None:
    channel, data = disk.channel(), os.urandom(4 * CLUSTER)
    assert channel.writev(CLUSTER // 2, views(bytearray(data), 100, 5000), "write") == 0
    back = bytearray(5 * CLUSTER)
    assert channel.readv(0, [memoryview(back)], "read") == 0
    assert back == pattern(0)[: CLUSTER // 2] + data + pattern(4)[CLUSTER // 2 :]


def test_what_no_image_has_reads_as_zeroes_at_once_beside_what_is_there(disk: Any) -> None:
    channel = disk.channel()
    data = bytearray(b"x" * 4 * CLUSTER)
    assert channel.readv((COUNT - 2) * CLUSTER, views(data, 3 * CLUSTER + 7), "read") == 0
    assert data == pattern(COUNT - 2) + pattern(COUNT - 1) + bytes(2 * CLUSTER)


def test_an_image_that_nobody_wrote_to_is_read_at_once(tmp_path: Path) -> None:
    create_image(tmp_path / "empty", 1 << 30)
    with_nothing = open_disk(tmp_path / "empty", format="qcow2")
    channel = with_nothing.channel()
    data = bytearray(b"x" * (1 << 20))
    for offset in (0, 512 << 20, (512 << 20) - 4096):
        assert channel.readv(offset, [memoryview(data)], "read") == 0
        assert not any(data)
    with_nothing.close()


def test_more_than_a_mebibyte_does_not_hold_the_caller_s_loop(tmp_path: Path) -> None:
    create_image(tmp_path / "empty", 1 << 30)
    disk = open_disk(tmp_path / "empty", format="qcow2")
    driver = Driver(disk)
    data = bytearray(b"x" * ((1 << 20) + 512))
    assert driver.channel.readv(0, [memoryview(data)], "read") is None
    assert driver.wait_for(1) == [("read", 0)]
    assert not any(data)
    disk.close()


def test_a_cluster_that_lies_in_the_metadata_is_not_written_to(tmp_path: Path) -> None:
    disk = scattered(tmp_path / "image")
    disk.flush()
    at = disk.image.header.l1_table_offset
    disk.close()
    image = bytearray((tmp_path / "image").read_bytes())
    l2 = int.from_bytes(image[at : at + 8], "big") & ((1 << 56) - 512)
    image[l2 + 16 : l2 + 24] = (1 << 63 | l2).to_bytes(8, "big")  # the third cluster's data are said to be in the L2 table
    (tmp_path / "image").write_bytes(image)
    disk = open_disk(tmp_path / "image", format="qcow2")
    driver = Driver(disk)
    assert driver.read(0, CLUSTER) == pattern(0)  # the table is known now
    assert driver.write(CLUSTER, bytes(3 * CLUSTER)) == -errno.EIO
    disk.close()
    assert (tmp_path / "image").read_bytes()[l2 : l2 + 512] == image[l2 : l2 + 512]


def test_what_a_backing_image_may_have_is_asked_of_it(tmp_path: Path) -> None:
    scattered(tmp_path / "base").close()
    options = Options(backing_file=str(tmp_path / "base"), backing_format="qcow2")
    create_image(tmp_path / "top", 1 << 20, options=options)
    disk = open_disk(tmp_path / "top", format="qcow2", allow=lambda name: True)
    driver = Driver(disk)
    assert driver.read(CLUSTER, 2 * CLUSTER) == pattern(1) + pattern(2)
    disk.close()


def test_a_write_to_a_cluster_that_a_snapshot_has_too_goes_elsewhere(disk: Any) -> None:
    disk.snapshot_create("before")
    driver = Driver(disk)
    new = os.urandom(3 * CLUSTER)
    assert driver.write(CLUSTER, new) == 0
    assert driver.read(0, 5 * CLUSTER) == pattern(0) + new + pattern(4)
    disk.snapshot_apply("before")
    assert driver.read(CLUSTER, 3 * CLUSTER) == pattern(1) + pattern(2) + pattern(3)


def test_a_request_of_more_parts_than_are_worth_it_is_done_all_the_same(disk: Any) -> None:
    driver, count = Driver(disk), PARTS_MAX + 1
    data = bytearray(count * CLUSTER)
    assert driver.channel.readv(0, [memoryview(data)], "read") is None
    assert driver.wait_for(1) == [("read", 0)]
    assert data == b"".join(pattern(cluster) for cluster in range(count))
    assert driver.channel.readv(0, [memoryview(data)[: PARTS_MAX * CLUSTER]], "read") == 0


@pytest.mark.parametrize(("aio", "direct"), ENGINES, ids=str)
def test_many_scattered_requests_at_once_end_once_each(tmp_path: Path, aio: str, direct: bool) -> None:
    if not offered(aio, direct, tmp_path):
        pytest.skip(f"this host offers no aio={aio}{' with direct I/O' if direct else ''}")
    disk = scattered(tmp_path / "image", aio=aio, direct=direct)
    driver = Driver(disk)
    wanted = [(first, memoryview(bytearray(3 * CLUSTER))) for first in range(COUNT - 3)]
    waiting = []
    for first, buffer in wanted:
        result = driver.channel.readv(first * CLUSTER, [buffer], first)
        if result is None:
            waiting.append(first)
        else:
            assert result == 0
    assert sorted(driver.wait_for(len(waiting))) == [(first, 0) for first in waiting]
    for first, buffer in wanted:
        assert buffer == pattern(first) + pattern(first + 1) + pattern(first + 2)
    assert driver.channel.in_flight == 0
    disk.snapshot_create("nothing is running")  # which would wait for ever for a request that never ends
    disk.close()


class Failing:
    """The file's channel; `fails` says of each part how it ends: (at once, result)."""

    def __init__(self, fails: Sequence[tuple[bool, int]]) -> None:
        self.completion_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.fails = list(fails)
        self.later: list[tuple[Any, int]] = []
        self.asked = 0

    @property
    def in_flight(self) -> int:
        return len(self.later)

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        self.asked += 1
        at_once, result = self.fails.pop(0)
        if at_once:
            return result
        self.later.append((token, result))
        return None

    writev = readv

    def completions(self) -> list[tuple[Any, int]]:
        done, self.later = self.later, []
        return done

    def drain(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.completion_fd)


@pytest.mark.parametrize(
    ("fails", "asked", "result"),
    [
        ([(True, 0), (True, -errno.ENOSPC)], 2, -errno.ENOSPC),
        ([(True, 0), (False, -errno.ENOSPC), (False, -errno.EIO)], 3, -errno.ENOSPC),
        ([(False, -errno.EIO), (True, 0), (True, -errno.ENOSPC)], 3, -errno.ENOSPC),
        ([(False, 0), (True, 0), (False, 0)], 3, 0),
        ([(False, 0), (False, -errno.EDQUOT), (True, 0)], 3, -errno.EDQUOT),
    ],
)
def test_the_first_error_of_a_part_is_the_request_s_and_comes_when_no_part_is_on_its_way(
    disk: Any, monkeypatch: pytest.MonkeyPatch, fails: list[tuple[bool, int]], asked: int, result: int
) -> None:
    channel = disk.channel()
    inner = Failing(fails)
    channel._inner.close()
    monkeypatch.setattr(channel, "_inner", inner)
    at_once = channel.writev(0, [memoryview(bytearray(3 * CLUSTER))], "write")
    assert inner.asked == asked
    if any(not each for each, _ in fails):
        assert at_once is None
        assert channel.completions() == [("write", result)]
    else:
        assert at_once == result
    disk.snapshot_create("nothing is running")
    channel.close()


def test_a_file_that_ends_inside_one_of_the_parts_reads_as_zeroes_there(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = scattered(path)
    driver = Driver(disk)
    assert driver.wait(driver.channel.flush("flush")) == 0
    assert disk.image.map_range(0, CLUSTER)[0].host + CLUSTER == path.stat().st_size, "cluster 0 is the last one in the file"
    os.truncate(path, path.stat().st_size - CLUSTER // 2)
    assert driver.read(0, 3 * CLUSTER) == pattern(0)[: CLUSTER // 2] + bytes(CLUSTER // 2) + pattern(1) + pattern(2)
    disk.close()
