"""Raw disks: every engine behaves as a byte array would, and answers errors instead of raising or hanging."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block_qcow2 import open_disk
from block_qcow2.errors import EngineError, ImageInUseError, OpenError
from block_qcow2.hostfile import HostFile
from block_qcow2.zeroes import is_zero

from .conftest import Driver

KiB, MiB = 1 << 10, 1 << 20
SIZE = 256 * KiB

ENGINES = [("off", False), ("threads", False), ("threads", True), ("native", True), ("native", False)]
ENGINES += [("io_uring", False), ("io_uring", True)]


def offered(aio: str, direct: bool, where: Path) -> bool:
    """Whether this host has the engine (containers often lack io_uring) and this file system direct I/O."""
    probe = where / "probe"
    probe.write_bytes(bytes(4096))
    try:
        open_disk(probe, aio=aio, direct=direct).close()
    except (EngineError, OpenError):
        return False
    return True


@pytest.fixture(params=ENGINES, ids=lambda p: f"{p[0]}-{'direct' if p[1] else 'buffered'}")
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    aio, direct = request.param
    if not offered(aio, direct, tmp_path):
        pytest.skip(f"this host offers no aio={aio}{' with direct I/O' if direct else ''}")
    return {"aio": aio, "direct": direct}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disk(image: Path, engine: dict[str, Any], descriptors_stay: None) -> Iterator[Any]:
    disk = open_disk(image, discard=True, **engine)
    yield disk
    disk.close()


spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 40 * KiB)).map(lambda t: (t[0], min(t[1], SIZE - t[0])))
aligned = st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, 80)).map(
    lambda t: (t[0] * 512, min(t[1] * 512, SIZE - t[0] * 512))
)
operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "unmap", "discard", "flush"]), st.one_of(spans, aligned), st.integers(1, 9)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=operations)
def test_any_sequence_of_requests_leaves_what_a_byte_array_would_hold(disk: Any, image: Path, ops: list[Any]) -> None:
    driver = Driver(disk)
    model = bytearray(image.read_bytes())
    for number, (kind, (offset, length), pieces) in enumerate(ops):
        channel = driver.channel
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
            model[offset : offset + length] = bytes(length)  # on the file systems that tests run on
        else:
            assert driver.wait(channel.write_zeroes(offset, length, "z", kind == "unmap")) == 0
            model[offset : offset + length] = bytes(length)
    channel.close()
    assert image.read_bytes() == model


def test_many_requests_in_flight_each_complete_once(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    content = image.read_bytes()
    memory = memoryview(mmap.mmap(-1, 1000 * 4096))
    pending, done = set(), []
    for i in range(1000):
        offset = i * 37 % (SIZE // 4096) * 4096
        result = driver.channel.readv(offset, [memory[i * 4096 : i * 4096 + 4096]], i)
        assert result in (0, None)
        if result is None:
            pending.add(i)
    assert driver.channel.in_flight == len(pending)
    done = [token for token, result in driver.wait_for(len(pending)) if result == 0]
    assert sorted(done) == sorted(pending)
    assert driver.channel.in_flight == 0
    for i in range(1000):
        offset = i * 37 % (SIZE // 4096) * 4096
        assert memory[i * 4096 : i * 4096 + 4096] == content[offset : offset + 4096]
    driver.channel.close()


def test_misaligned_writes_to_one_block_do_not_undo_each_other(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    for i in range(256):
        driver.channel.writev(4096 + i * 16, [memoryview(bytearray([i]) * 16)], i)
    driver.channel.drain()
    driver.channel.completions()
    driver.channel.close()
    assert image.read_bytes()[4096:8192] == b"".join(bytes([i]) * 16 for i in range(256))


def test_more_buffers_than_the_kernel_takes_at_once(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    content = image.read_bytes()
    assert driver.read(0, 3000 * 16, pieces=3000) == content[: 3000 * 16]
    driver.channel.close()


def test_a_buffer_of_odd_address_is_filled_all_the_same(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    memory = memoryview(mmap.mmap(-1, 8192))
    assert driver.wait(driver.channel.readv(512 * 3, [memory[3 : 3 + 1024]], 0)) == 0
    assert memory[3 : 3 + 1024] == image.read_bytes()[512 * 3 :][:1024]
    driver.channel.close()


def test_a_file_truncated_by_somebody_answers_eio(disk: Any, image: Path) -> None:
    driver = Driver(disk)
    os.truncate(image, 64 * KiB)
    buffers = [memoryview(bytearray(8192))]
    assert driver.wait(driver.channel.readv(60 * KiB, buffers, 0)) == -errno.EIO
    assert driver.wait(driver.channel.readv(128 * KiB, buffers, 0)) == -errno.EIO
    driver.channel.close()


def test_outside_the_disk_is_refused(disk: Any) -> None:
    channel = disk.channel()
    buffer = [memoryview(bytearray(512))]
    assert channel.readv(SIZE - 511, buffer, 0) == -errno.EINVAL
    assert channel.writev(SIZE, buffer, 0) == -errno.EINVAL
    assert channel.readv(-512, buffer, 0) == -errno.EINVAL
    assert channel.discard(SIZE, 1, 0) == -errno.EINVAL
    assert channel.write_zeroes(0, SIZE + 1, 0, False) == -errno.EINVAL
    assert channel.completions() == []
    channel.close()


def test_a_read_only_disk_refuses_every_change(image: Path, engine: dict[str, Any]) -> None:
    disk = open_disk(image, read_only=True, discard=True, **engine)
    before = image.read_bytes()
    channel = disk.channel()
    assert channel.writev(0, [memoryview(bytearray(512))], 0) == -errno.EROFS
    assert channel.discard(0, 512, 0) == -errno.EROFS
    assert channel.write_zeroes(0, 512, 0, True) == -errno.EROFS
    disk.close()
    assert image.read_bytes() == before


def test_closing_with_requests_in_flight_waits_for_them(image: Path, engine: dict[str, Any], descriptors_stay: None) -> None:
    disk = open_disk(image, **engine)
    channel = disk.channel()
    for i in range(200):
        channel.writev(0, [memoryview(bytearray([7]) * 4096)], i)
    disk.close()
    assert image.read_bytes()[:4096] == bytes([7]) * 4096
    assert not [t for t in threading.enumerate() if t.name == "block-io"]


def test_drain_keeps_the_results_for_their_owner(disk: Any) -> None:
    channel = disk.channel()
    results = [channel.flush(i) for i in range(5)]
    disk.drain()
    assert results == [None] * 5
    assert sorted(channel.completions()) == [(i, 0) for i in range(5)]
    channel.close()


@pytest.mark.parametrize("aio", [aio for aio, direct in ENGINES if not direct])
def test_a_full_host_file_system_is_enospc(aio: str, tmp_path: Path) -> None:
    if not offered(aio, False, tmp_path):
        pytest.skip(f"this host offers no aio={aio}")
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    disk = open_disk(path, aio=aio)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, disk.file.fd)
    os.close(full)
    driver = Driver(disk)
    assert driver.write(0, b"x" * 4096) == -errno.ENOSPC
    disk.close()


@pytest.mark.parametrize("detect", ["on", "unmap"])
def test_zeroes_that_are_written_need_not_take_space(tmp_path: Path, detect: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MiB)
    disk = open_disk(path, discard=True, detect_zeroes=detect)
    driver = Driver(disk)
    assert driver.write(0, bytes(512 * KiB)) == 0
    disk.close()
    assert path.read_bytes() == bytes(512 * KiB) + b"x" * (512 * KiB)
    if detect == "unmap":
        assert path.stat().st_blocks * 512 <= 516 * KiB


def test_discard_does_nothing_unless_it_was_asked_for(image: Path) -> None:
    before = image.read_bytes()
    disk = open_disk(image)
    driver = Driver(disk)
    assert driver.wait(driver.channel.discard(0, SIZE, 0)) == 0
    disk.close()
    assert image.read_bytes() == before


def test_zeroing_works_where_the_file_system_cannot_do_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from block_qcow2 import syscalls

    def fallocate(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(syscalls, "fallocate", fallocate)
    before = image.read_bytes()
    disk = open_disk(image, discard=True)
    driver = Driver(disk)
    assert driver.wait(driver.channel.write_zeroes(1000, 5000, 0, True)) == 0
    assert driver.wait(driver.channel.discard(8192, 4096, 0)) == 0
    disk.close()
    assert image.read_bytes() == before[:1000] + bytes(5000) + before[6000:]


def test_where_the_page_cache_says_nothing_a_read_runs_in_the_caller_until_one_waits(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from block_qcow2.engines import threads

    real, clock, wait, switches = os.preadv, 0, 0, 0
    blocks = True

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal clock, switches
        if flags:
            raise OSError(errno.EOPNOTSUPP, "as overlayfs answers RWF_NOWAIT")
        clock += wait
        switches += bool(wait and blocks)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(threads.time, "perf_counter_ns", lambda: clock)
    monkeypatch.setattr(threads, "_waits", lambda: switches)
    content = image.read_bytes()
    disk = open_disk(image, aio="off")
    driver = Driver(disk)
    buffer = memoryview(bytearray(128 * KiB))

    def in_the_caller(offset: int, length: int = 4096) -> bool:
        part = buffer[:length]
        result = driver.channel.readv(offset, [part], 0)
        at_once = result is not None
        assert (result if at_once else driver.wait(result)) == 0
        assert part == content[offset : offset + length]
        return at_once

    def until_one_is_tried() -> int:
        count = 0
        while not in_the_caller(0):
            count += 1
        return count

    assert all(in_the_caller(4096 * n) for n in range(3))
    wait = 10_000_000
    assert in_the_caller(0), "it is known to have taken long only afterwards"
    assert in_the_caller(0), "and whether it waited only of the next"
    assert [until_one_is_tried() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    wait = 0
    assert until_one_is_tried() == 64
    assert all(in_the_caller(0) for _ in range(100))
    wait = 10_000_000
    assert in_the_caller(0)
    assert in_the_caller(0)
    assert until_one_is_tried() == 1, "one slow read among fast ones says little"
    wait = 0
    assert until_one_is_tried() == 2
    wait = 1_500_000
    assert in_the_caller(0, 128 * KiB)
    assert in_the_caller(0, 128 * KiB), "a slow machine may take as long to copy"
    wait, blocks = 10_000_000, False
    assert all(in_the_caller(0) for _ in range(100)), "a thread that lost its processor did not wait"
    disk.close()


def test_a_thread_that_waits_is_known_from_one_that_works() -> None:
    from block_qcow2.engines import threads

    before = threads._waits()
    time.sleep(0.01)
    assert threads._waits() > before


def test_direct_io_wants_an_aligned_file(tmp_path: Path) -> None:
    if not offered("threads", True, tmp_path):
        pytest.skip("this file system has no direct I/O")
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(OpenError, match="1000, is not aligned to"):
        open_disk(path, direct=True, aio="threads")


def test_direct_writes_inside_an_odd_file_keep_its_length(tmp_path: Path) -> None:
    if not offered("threads", True, tmp_path):
        pytest.skip("this file system has no direct I/O")
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    file = HostFile(path, direct=True)
    file.pwrite(990, b"yy")
    file.pwrite(1000, b"zz")
    assert bytes(file.pread(985, 17)) == b"xxxxxyyxxxxxxxxzz"
    file.close()
    assert path.read_bytes() == b"x" * 990 + b"yy" + b"x" * 8 + b"zz"


@pytest.mark.parametrize("what", ["missing", "directory", "fifo"])
def test_what_is_no_disk_is_refused_with_its_name(tmp_path: Path, what: str, descriptors_stay: None) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    with pytest.raises(OpenError, match=what):
        open_disk(path)


def test_wrong_options_are_refused(image: Path) -> None:
    with pytest.raises(OpenError, match="no such engine"):
        open_disk(image, aio="fast")
    with pytest.raises(OpenError, match="detect_zeroes"):
        open_disk(image, detect_zeroes="maybe")
    with pytest.raises(OpenError, match="vmdk"):
        open_disk(image, format="vmdk")


def test_two_writers_exclude_each_other_and_readers(image: Path) -> None:
    first, second = open_disk(image), open_disk(image)
    reader = open_disk(image, read_only=True)
    first.lock()
    for other in (second, reader):
        with pytest.raises(ImageInUseError, match=r"disk\.raw"):
            other.lock()
    first.unlock()
    reader.lock()
    with pytest.raises(ImageInUseError):
        second.lock()
    reader.unlock()
    second.lock()
    for disk in (first, second, reader):
        disk.close()


def test_two_readers_share(image: Path) -> None:
    disks = [open_disk(image, read_only=True) for _ in range(2)]
    for disk in disks:
        disk.lock()
    for disk in disks:
        disk.close()


def test_closing_another_descriptor_keeps_the_lock(image: Path) -> None:
    first, second = open_disk(image), open_disk(image)
    first.lock()
    image.read_bytes()
    with pytest.raises(ImageInUseError):
        second.lock()
    first.close()
    second.close()


def test_a_lock_held_by_a_posix_writer_is_seen(image: Path) -> None:
    # StratoVirt's writers hold exclusive record locks on bytes 101, 102 and 202.
    code = (
        "import fcntl,sys; f=open(sys.argv[1],'r+b')\n"
        "for b in (101,102,202): fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,1,b)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for read_only in (False, True):
            disk = open_disk(image, read_only=read_only)
            with pytest.raises(ImageInUseError):
                disk.lock()
            disk.close()


def test_opening_a_raw_disk_imports_little() -> None:
    code = """
import sys, tempfile
before = set(sys.modules)
from block_qcow2 import open_disk
f = tempfile.NamedTemporaryFile(); f.write(bytes(4096)); f.flush()
open_disk(f.name).channel()
heavy = {"asyncio", "numpy", "concurrent.futures", "ctypes", "inspect", "dataclasses", "block_qcow2.qcow2", "mmap"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("at", [0, 1, 4095, 65535, 65536, 99_999])
def test_one_byte_makes_a_buffer_not_zero(at: int) -> None:
    data = bytearray(100_000)
    assert is_zero(memoryview(data))
    data[at] = 1
    assert not is_zero(memoryview(data))


def test_misaligned_writes_at_the_end_do_not_cut_off_what_others_write_behind_it(tmp_path: Path) -> None:
    if not offered("threads", True, tmp_path):
        pytest.skip("this file system has no direct I/O")
    path = tmp_path / "growing"
    path.write_bytes(b"")
    file = HostFile(path, direct=True)
    rounds = 300
    barrier = threading.Barrier(2)
    problems: list[BaseException] = []

    def odd() -> None:
        try:
            for i in range(rounds):
                barrier.wait(60)
                file.pwrite(i * 16384, b"o" * 100)
        except BaseException as e:
            problems.append(e)

    thread = threading.Thread(target=odd)
    thread.start()
    for i in range(rounds):
        barrier.wait(60)
        file.pwrite(i * 16384 + 8192, b"a" * 8192)
    thread.join()
    file.close()
    assert not problems
    data = path.read_bytes()
    assert data == (b"o" * 100 + bytes(8092) + b"a" * 8192) * rounds


@pytest.mark.parametrize("aio", ["native", "io_uring"])
def test_a_request_that_neither_the_kernel_nor_a_thread_takes_is_finished_with_an_error(
    image: Path, tmp_path: Path, aio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not offered(aio, False, tmp_path):
        pytest.skip(f"this host offers no aio={aio}")
    disk = open_disk(image, aio=aio)
    driver = Driver(disk)

    def scarce(*_: object) -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def none(work: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(driver.channel, "_push", scarce)
        patch.setattr(disk._pool, "submit", none)  # type: ignore[attr-defined]
        assert driver.write(0, b"x" * 4096) == -errno.EAGAIN
    assert driver.write(0, b"x" * 4096) == 0
    disk.close()
