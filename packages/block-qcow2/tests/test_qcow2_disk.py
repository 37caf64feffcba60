"""qcow2 disks behind channels: what a virtual machine does to them, from one thread and from many."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import ImageFormatError, ImageInUseError
from block_qcow2.qcow2 import metadata
from block_qcow2.qcow2.create import Options

from .conftest import Driver
from .qemu import is_clean, qemu_img
from .test_raw import ENGINES, SIZE, offered, operations

KiB, MiB = 1 << 10, 1 << 20
LIMIT = 60.0  # seconds, for what takes a thousandth of one


@pytest.fixture(params=ENGINES, ids=lambda p: f"{p[0]}-{'direct' if p[1] else 'buffered'}")
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    aio, direct = request.param
    if not offered(aio, direct, tmp_path):
        pytest.skip(f"this host offers no aio={aio}{' with direct I/O' if direct else ''}")
    return {"aio": aio, "direct": direct}


@pytest.fixture(params=[4096, 65536], ids=lambda n: f"cluster={n}")
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "disk.qcow2"
    create_image(path, SIZE, options=Options(cluster_size=request.param))
    return path


@pytest.fixture
def disk(image: Path, engine: dict[str, Any], descriptors_stay: None) -> Iterator[Any]:
    disk = open_disk(image, format="qcow2", discard=True, **engine)
    disk.lock()
    yield disk
    disk.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=operations)
def test_any_sequence_of_requests_leaves_what_a_byte_array_would_hold(disk: Any, image: Path, ops: list[Any]) -> None:
    driver = Driver(disk)
    channel = driver.channel
    model = bytearray(driver.read(0, SIZE))
    for number, (kind, (offset, length), pieces) in enumerate(ops):
        if kind == "read":
            assert driver.read(offset, length, pieces) == model[offset : offset + length]
        elif kind == "write":
            data = bytes([number + 1]) * length
            assert driver.write(offset, data, pieces) == 0
            model[offset : offset + length] = data
        elif kind == "flush":
            assert driver.wait(channel.flush("f")) == 0
        elif kind == "discard":
            assert driver.wait(channel.discard(offset, length, "d")) == 0
            cluster = disk.image.cluster_size
            first, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
            model[first : max(first, end)] = bytes(max(end - first, 0))
        else:
            assert driver.wait(channel.write_zeroes(offset, length, "z", kind == "unmap")) == 0
            model[offset : offset + length] = bytes(length)
    assert driver.read(0, SIZE) == model
    disk.flush()
    is_clean_while_open(image)
    channel.close()


def is_clean_while_open(path: Path) -> None:
    qemu_img("check", "-q", "-U", path)


def test_a_file_that_ends_inside_a_cluster_reads_as_zeroes(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    assert driver.write(0, b"x" * 512) == 0
    cluster = disk.image.cluster_size
    assert driver.read(0, cluster) == b"x" * 512 + bytes(cluster - 512)
    assert driver.wait(driver.channel.flush(0)) == 0
    assert driver.read(0, cluster) == b"x" * 512 + bytes(cluster - 512)
    driver.channel.close()


def test_a_read_that_no_thread_can_do_again_is_finished_with_an_error(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file ends inside the cluster, so the fast way gives up; and the host has no thread to give."""
    disk = open_disk(image, format="qcow2", aio="threads")
    driver = Driver(disk)
    driver.write(0, b"x" * 65536)
    driver.wait(driver.channel.flush("flush"))
    image_file = disk.image.file
    os.truncate(image, image_file.refresh_size() - 32768)
    submit = disk.pool.submit
    monkeypatch.setattr(disk.pool, "submit", _no_thread)  # of the image; the file has one
    data = bytearray(65536)
    inline = driver.channel.readv(0, [memoryview(data)], "read")
    assert driver.wait(inline) == -errno.EAGAIN
    monkeypatch.setattr(disk.pool, "submit", submit)
    disk.close()


def _no_thread(work: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_outside_the_disk_is_refused(disk: Any) -> None:
    channel = disk.channel()
    buffer = [memoryview(bytearray(512))]
    assert channel.readv(SIZE - 511, buffer, 0) == -errno.EINVAL
    assert channel.writev(SIZE, buffer, 0) == -errno.EINVAL
    assert channel.write_zeroes(0, SIZE + 1, 0, False) == -errno.EINVAL
    channel.close()


def test_a_read_only_disk_refuses_every_change(image: Path, engine: dict[str, Any]) -> None:
    before = image.read_bytes()
    disk = open_disk(image, format="qcow2", read_only=True, discard=True, **engine)
    disk.lock()
    channel = disk.channel()
    assert channel.writev(0, [memoryview(bytearray(512))], 0) == -errno.EROFS
    assert channel.discard(0, 512, 0) == -errno.EROFS
    assert channel.write_zeroes(0, 512, 0, True) == -errno.EROFS
    disk.close()
    assert image.read_bytes() == before


def test_a_corrupt_table_is_an_io_error_to_the_guest(image: Path) -> None:
    with open_image(image, read_only=False) as i:
        i.write(0, b"x")
        i.flush()
        at = i.header.l1_table_offset
    data = bytearray(image.read_bytes())
    data[at : at + 8] = (1 << 63 | 777 << 50).to_bytes(8, "big")
    image.write_bytes(data)
    disk = open_disk(image, format="qcow2")
    driver = Driver(disk)
    assert driver.wait(driver.channel.readv(0, [memoryview(bytearray(512))], 0)) == -errno.EIO
    assert driver.write(0, b"y" * 512) == -errno.EIO
    disk.close()
    assert image.read_bytes()[79] & 2


def test_what_another_process_did_meanwhile_is_seen_after_locking(image: Path) -> None:
    disk = open_disk(image, format="qcow2")
    driver = Driver(disk)
    disk.lock()
    assert driver.write(0, b"1" * 4096) == 0
    with pytest.raises(ImageInUseError):
        open_image(image, read_only=False)
    disk.unlock()
    is_clean(image)
    with open_image(image, read_only=False) as other:
        assert other.read(0, 4096) == b"1" * 4096
        other.write(100 * KiB, b"2" * 4096)
    disk.lock()
    assert driver.read(100 * KiB, 4096) == b"2" * 4096
    assert driver.write(0, b"3" * 4096) == 0
    disk.close()
    is_clean(image)


def test_a_snapshot_after_drain_does_not_wait_for_the_owner_of_a_channel(image: Path) -> None:
    disk = open_disk(image, format="qcow2", aio="threads")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"1" * 4096) == 0
    assert driver.channel.writev(0, [memoryview(bytearray(b"2" * 4096))], "late") is None
    disk.drain()
    disk.snapshot_create("while it stands still")
    assert driver.channel.in_flight == 1
    assert driver.wait_for(1) == [("late", 0)]
    assert driver.channel.in_flight == 0
    disk.close()
    is_clean(image)


def test_small_caches_change_nothing_but_speed(tmp_path: Path) -> None:
    path = tmp_path / "small.qcow2"
    create_image(path, 8 * MiB, options=Options(cluster_size=512))
    disk: Any = open_disk(path, format="qcow2", l2_cache_bytes=1024, refcount_cache_bytes=1024)
    disk.lock()
    assert (disk.image.l2.limit, disk.image.refcounts.cached_blocks) == (2, 4)
    stress(disk, seed=1, threads=2, steps=100)
    disk.close()
    is_clean(path)


def test_an_image_that_was_replaced_is_not_taken_for_the_old_one(image: Path) -> None:
    disk = open_disk(image, format="qcow2")
    cluster = disk.image.cluster_size
    replacement = image.with_name("other")
    create_image(replacement, SIZE, options=Options(cluster_size=cluster * 2))
    image.write_bytes(replacement.read_bytes())
    with pytest.raises(ImageFormatError, match="replaced"):
        disk.lock()
    disk.close()


@pytest.mark.parametrize("cluster", [1024, 4096, 65536])
def test_many_threads_and_snapshots_on_one_image_keep_every_byte(tmp_path: Path, engine: dict[str, Any], cluster: int) -> None:
    path = tmp_path / "stress.qcow2"
    create_image(path, 8 * MiB, options=Options(cluster_size=cluster))
    disk = open_disk(path, format="qcow2", discard=True, **engine)
    disk.lock()
    for round_ in range(2):
        stress(disk, seed=round_, threads=4, steps=100)
        disk.flush()
        is_clean_while_open(path)
    disk.close()
    is_clean(path)


def stress(disk: Any, *, seed: int, threads: int, steps: int) -> None:
    """Each thread owns every fourth 512-byte sector, so clusters are fought over and every byte has one owner."""
    size = disk.size
    problems: list[BaseException] = []

    def worker(me: int) -> None:
        try:
            rng = random.Random(seed * 100 + me)
            driver = Driver(disk)
            mine = {s: driver.read(s * 512, 512) for s in rng.sample(range(me, size // 512, threads), 300)}
            sectors = list(mine)
            for _ in range(steps):
                sector = rng.choice(sectors)
                roll = rng.random()
                if roll < 0.55:
                    mine[sector] = rng.randbytes(512)
                    assert driver.write(sector * 512, mine[sector]) == 0
                elif roll < 0.7:
                    mine[sector] = bytes(512)
                    assert driver.wait(driver.channel.write_zeroes(sector * 512, 512, 0, True)) == 0
                elif roll < 0.75:
                    assert driver.wait(driver.channel.flush(0)) == 0
                elif roll < 0.77 and me == 0:
                    disk.snapshot_create(f"s{rng.random()}")
                elif roll < 0.79 and me == 0 and disk.snapshots():
                    disk.snapshot_delete(rng.choice(disk.snapshots()).name)
                else:
                    assert driver.read(sector * 512, 512) == mine[sector]
            for sector, content in mine.items():
                assert driver.read(sector * 512, 512) == content
            driver.channel.close()
        except BaseException as e:
            problems.append(e)

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if problems:
        raise problems[0]


def test_asking_where_data_are_while_a_snapshot_is_made_lets_no_write_reach_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"old" * 1000)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    reading, go_on = threading.Event(), threading.Event()
    load = metadata.tables.load

    def slow_load(*arguments: Any) -> Any:
        table = load(*arguments)
        if threading.current_thread() is asker:
            reading.set()
            go_on.wait(LIMIT)
        return table

    monkeypatch.setattr(metadata.tables, "load", slow_load)
    asker = threading.Thread(target=lambda: list(disk.block_status()))
    snapper = threading.Thread(target=lambda: disk.snapshot_create("kept"))
    asker.start()
    assert reading.wait(LIMIT)
    snapper.start()
    snapper.join(0.2)  # it may or may not wait for the other
    go_on.set()
    asker.join()
    snapper.join()
    assert Driver(disk).write(0, b"new" * 1000) == 0
    disk.snapshot_apply("kept")
    assert Driver(disk).read(0, 3000) == b"old" * 1000
    disk.close()
    is_clean(path)


def test_asking_where_data_are_does_not_wait_for_a_snapshot_that_waits_for_one_s_own_requests(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    assert Driver(disk).write(0, b"a" * 512) == 0
    request = disk.image.begin()
    snapper = threading.Thread(target=lambda: disk.snapshot_create("kept"))
    snapper.start()
    deadline = time.monotonic() + LIMIT
    while not disk.image._exclusive:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    asker = threading.Thread(target=lambda: list(disk.block_status()), daemon=True)
    asker.start()
    asker.join(LIMIT)
    assert not asker.is_alive()
    disk.image.end(request)
    snapper.join()
    assert [snapshot.name for snapshot in disk.snapshots()] == ["kept"]
    disk.close()


def test_snapshots_that_several_threads_make_and_delete_are_all_made_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    gate = threading.Barrier(3)

    def worker(me: int) -> None:
        gate.wait()
        for number in range(10):
            disk.snapshot_create(f"{me}-{number}")
            if number % 2:
                disk.snapshot_delete(f"{me}-{number}")

    workers = [threading.Thread(target=worker, args=(me,)) for me in range(3)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(s.name for s in disk.snapshots()) == sorted(f"{me}-{number}" for me in range(3) for number in range(0, 10, 2))
    disk.close()
    is_clean(path)


def test_a_full_host_is_enospc_to_the_request_and_the_image_stays_good(tmp_path: Path) -> None:
    path = tmp_path / "full.qcow2"
    create_image(path, 64 * MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"a" * 4096) == 0
    original = disk.image.file.writev
    disk.image.file.writev = no_space
    assert driver.write(MiB, b"b" * 4096) == -errno.ENOSPC
    disk.image.file.writev = original
    assert driver.write(2 * MiB, b"c" * 4096) == 0
    assert driver.read(MiB, 4096) == bytes(4096)
    disk.close()
    is_clean(path)


def no_space(offset: int, buffers: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_flush_that_fails_says_so_and_is_done_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "flaky.qcow2"
    create_image(path, MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"a" * 4096) == 0
    original = disk.image.file.writev
    disk.image.file.writev = no_space
    assert driver.wait(driver.channel.flush(0)) == -errno.ENOSPC
    disk.image.file.writev = original
    assert driver.wait(driver.channel.flush(0)) == 0
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    with open_image(copy) as image:
        assert image.read(0, 4096) == b"a" * 4096
    is_clean(copy)
    disk.close()


def test_a_mistake_in_a_request_is_an_error_to_the_guest_and_told_and_the_next_ones_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    disk = open_disk(path, format="qcow2")
    disk.lock()
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with monkeypatch.context() as broken:
        broken.setattr(disk.image, "write_from", lambda *_: {}["nobody thought of this"])
        for _ in range(40):  # more than there are threads
            assert Driver(disk).write(0, b"a" * 512) == -errno.EIO
    assert Driver(disk).write(0, b"b" * 512) == 0
    assert Driver(disk).read(0, 512) == b"b" * 512
    disk.close()  # waits for the threads, which tell of it after they have answered
    assert [arguments.exc_type for arguments in told] == [KeyError] * 40
