"""One thread stands still where it hurts most, and another one does what a guest, or who serves it, may do meanwhile."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import ImageCorruptError, ImageFormatError
from block_qcow2.hostfile import HostFile
from block_qcow2.luks import CryptFile
from block_qcow2.qcow2.bitmaps import Bitmaps, marked
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.format import INCOMPAT_CORRUPT, OFFSET_MASK
from block_qcow2.qcow2.image import read_header
from block_qcow2.qcow2.snapshots import load

from .conftest import Driver
from .qemu import is_clean
from .test_raw import offered

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
LIMIT = 20.0  # seconds, for what takes a thousandth of one
A_WHILE = 0.2  # for what has to wait, or does not


class Other(threading.Thread):
    """A thread that remembers what it ended with."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as e:
            self.error = e

    def ended(self) -> BaseException | None:
        self.join(LIMIT)
        assert not self.is_alive(), "it hangs"
        return self.error


class Stop:
    """A place where the thread `who` stands still until it may go on; the others pass."""

    def __init__(self, function: Callable[..., Any], *, behind: bool = False) -> None:
        self._function, self._behind = function, behind
        self.who: threading.Thread | None = None
        self._reached, self._go_on = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self._function(*arguments, **named) if self._behind else None
        if threading.current_thread() is self.who:
            self._reached.set()
            assert self._go_on.wait(LIMIT)
        return result if self._behind else self._function(*arguments, **named)

    def hold(self, work: Callable[[], Any]) -> Other:
        """Have another thread work until it is here."""

        def held() -> None:
            self.who = threading.current_thread()
            work()

        other = Other(held)
        assert self._reached.wait(LIMIT)
        return other

    def go_on(self) -> None:
        self._go_on.set()


@pytest.mark.parametrize("fails", [False, True], ids=["", "that fails"])
def test_a_flush_waits_for_what_another_thread_is_writing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    path, copy = tmp_path / "disk.qcow2", tmp_path / "copy.qcow2"
    create_image(path, MiB)
    found: list[bytes] = []
    with open_image(path, read_only=False) as image:
        image.write(0, b"new" * 1000)
        write_in_order: Any = image._write_in_order

        def maybe(*arguments: Any) -> None:
            if fails and threading.current_thread() is stop.who:
                raise OSError(5, "the disk is not well")
            write_in_order(*arguments)

        stop = Stop(maybe)
        monkeypatch.setattr(image, "_write_in_order", stop)
        first = stop.hold(image.flush)

        def flush_and_look() -> None:
            image.flush()
            shutil.copy(path, copy)  # what is there if the power goes now
            with open_image(copy) as after:
                found.append(after.read(0, 3000))

        second = Other(flush_and_look)
        second.join(A_WHILE)
        stop.go_on()
        assert isinstance(first.ended(), OSError if fails else type(None))
        assert second.ended() is None
    assert found == [b"new" * 1000]


def requests(offset: int, length: int) -> dict[str, Callable[[Any], None]]:
    """What changes a range of an image, each in its way."""
    data = b"\x5a" * length
    return {
        "write": lambda image: image.write(offset, data),
        "zero": lambda image: image.write_zeroes(offset, length),
        "unmap": lambda image: image.write_zeroes(offset, length, unmap=True),
        "discard": lambda image: image.discard(offset, length),
        "compressed": lambda image: image.write_compressed(offset, data),
    }


@pytest.mark.parametrize("how", requests(0, 0))
def test_a_request_behind_the_end_of_a_disk_that_a_snapshot_made_smaller_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.snapshots.create("small")
        image.resize(2 * GiB)
        begin: Any = image.begin
        stop = Stop(begin)
        monkeypatch.setattr(image, "begin", stop)
        # It waits for the snapshot, or is about to, when the disk still has that range.
        request = stop.hold(lambda: requests(GiB, 64 * KiB)[how](image))
        image.snapshots.apply("small")
        stop.go_on()
        assert isinstance(request.ended(), ValueError)
        image.resize(2 * GiB)
        assert not any(image.read(GiB, 64 * KiB))
    is_clean(path)


@pytest.mark.parametrize("how", ["zero", "unmap", "discard"])
def test_what_is_written_behind_the_old_end_of_a_disk_stays_when_a_request_up_to_it_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB + 512)
    with open_image(path, read_only=False) as image:
        image.write(MiB, b"a" * 512)
        stop = Stop(image.begin)
        monkeypatch.setattr(image, "begin", stop)
        request = stop.hold(lambda: requests(MiB, 512)[how](image))
        image.resize(2 * MiB)
        image.write(MiB + 512, b"b" * 512)
        stop.go_on()
        assert request.ended() is None
        assert image.read(MiB + 512, 512) == b"b" * 512
        assert image.read(MiB, 512) == (b"a" if how == "discard" else b"\0") * 512
    is_clean(path)


def test_a_bitmap_that_is_followed_knows_of_a_request_while_the_disk_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        bitmaps = Bitmaps(image)
        bitmaps.add("b")
        bitmaps.store()
    with open_image(path, read_only=False) as image:
        assert image.bitmaps is not None
        stop = Stop(image.bitmaps.resized)
        monkeypatch.setattr(image.bitmaps, "resized", stop)
        resizer = stop.hold(lambda: image.resize(64 * MiB))  # the header says so already
        request = Other(lambda: image.discard(32 * MiB, 64 * KiB))
        request.join(A_WHILE)
        stop.go_on()
        assert resizer.ended() is None
        assert request.ended() is None
        bits = image.bitmaps.find("b").bits
        assert bits is not None
        assert marked(bits) == [(32 * MiB >> 16, (32 * MiB >> 16) + 1)]
    is_clean(path)


def test_a_write_that_waited_for_a_snapshot_which_broke_the_image_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    image = open_image(path, read_only=False)
    image.write(0, b"a" * 512)
    stop = Stop(image.begin)
    monkeypatch.setattr(image, "begin", stop)
    request = stop.hold(lambda: image.write(0, b"b" * 512))
    image._broken = "a snapshot operation failed half-way"
    stop.go_on()
    assert isinstance(request.ended(), ImageCorruptError)
    assert image.read(0, 512) == b"a" * 512
    image.close()


def test_repairing_an_image_in_use_that_was_found_wrong_does_not_mix_what_is_not_on_the_disk_with_what_is(
    tmp_path: Path,
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 64 * MiB, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        for at in (0, 4096, 32 * MiB):
            image.write(at, b"a" * 4096)
        image.discard(4096, 4096)  # one free cluster before the second L2 table
        image.flush()
        image.refcounts.add((image.l1[32 * MiB >> image._l2_shift] & OFFSET_MASK) >> image.cluster_bits, 1, -1)
    disk: Any = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(8192, b"b" * 4096) == 0  # takes the free one
    assert driver.write(12288, b"c" * 4096) == -errno.EIO  # finds that the next one is a table whose count is 0
    found = disk.check(repair="all")
    assert found.clean
    assert driver.write(16384, b"d" * 4096) == 0
    assert driver.read(8192, 4096) == b"b" * 4096
    assert driver.read(0, 4096) == driver.read(32 * MiB, 4096) == b"a" * 4096
    driver.channel.close()
    disk.close()
    is_clean(path)


def waiting_for_requests(disk: Any) -> Other:
    """Somebody who makes a snapshot of a disk as soon as its requests have finished."""
    snapper = Other(lambda: disk.snapshot_create("kept"))
    deadline = time.monotonic() + LIMIT
    while not disk.image._exclusive:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return snapper


def test_requests_that_wait_for_a_snapshot_leave_threads_to_those_that_the_snapshot_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 8 * MiB)
    disk: Any = open_disk(path, format="qcow2", aio="threads")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"a" * 512) == 0
    stop = Stop(driver.channel._inner.writev)
    driver.channel._inner.writev = stop
    written: list[int] = []
    writer = stop.hold(lambda: written.append(driver.write(0, b"b" * 512)))  # its place is known, and the file does not have it
    snapper = waiting_for_requests(disk)
    many = Driver(disk)
    data = [memoryview(bytearray(b"c" * 512))]
    for at in range(100):
        assert many.channel.writev(MiB + 512 * at, data, at) is None
    stop.go_on()
    assert writer.ended() is None
    assert snapper.ended() is None
    assert written == [0]
    assert [result for _, result in many.wait_for(100)] == [0] * 100
    disk.snapshot_apply("kept")
    assert many.read(0, 512) == b"b" * 512
    assert not any(many.read(MiB, 51200))
    for each in (driver, many):
        each.channel.close()
    disk.close()
    is_clean(path)


def test_a_read_that_the_kernel_ends_early_finishes_though_many_requests_wait_for_the_snapshot_that_waits_for_it(
    tmp_path: Path,
) -> None:
    if not offered("io_uring", False, tmp_path):
        pytest.skip("this host offers no aio=io_uring")
    path = tmp_path / "disk.qcow2"
    create_image(path, 8 * MiB)
    disk: Any = open_disk(path, format="qcow2", aio="io_uring")
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"a" * 512) == 0  # and the file ends there
    found = bytearray(4096)
    assert driver.channel.readv(0, [memoryview(found)], "early") is None
    driver.channel.submit()
    snapper = waiting_for_requests(disk)
    data = [memoryview(bytearray(b"c" * 512))]
    for at in range(100):
        assert driver.channel.writev(MiB + 512 * at, data, at) is None
    assert {result for _, result in driver.wait_for(101)} == {0}
    assert found == b"a" * 512 + bytes(3584)
    assert snapper.ended() is None
    driver.channel.close()
    disk.close()
    is_clean(path)


def test_listing_snapshots_does_not_wait_for_a_snapshot_that_waits_for_one_s_own_requests(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    disk: Any = open_disk(path, format="qcow2")
    disk.lock()
    disk.snapshot_create("first")
    request = disk.image.begin()
    snapper = waiting_for_requests(disk)
    found: list[str] = []
    lister = Other(lambda: found.extend(snapshot.name for snapshot in disk.snapshots()))
    assert lister.ended() is None
    assert found == ["first"]
    disk.image.end(request)
    assert snapper.ended() is None
    assert [snapshot.name for snapshot in disk.snapshots()] == ["first", "kept"]
    disk.close()


class NoCipher:
    """Stands for LUKS's: what is encrypted is as it was."""

    def encrypt(self, sector: int, data: memoryview) -> None:
        pass

    decrypt = encrypt


def test_part_of_an_encrypted_sector_is_not_written_over_a_whole_one_with_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encrypted"
    path.write_bytes(b"a" * 1024)
    file = HostFile(path)
    crypt = CryptFile(file, NoCipher())  # type: ignore[arg-type]
    stop = Stop(crypt._sectors, behind=True)
    monkeypatch.setattr(crypt, "_sectors", stop)
    part = stop.hold(lambda: crypt.writev(0, [memoryview(b"b" * 100)]))
    whole = Other(lambda: crypt.writev(0, [memoryview(b"c" * 1024)]))
    whole.join(A_WHILE)
    stop.go_on()
    assert part.ended() is None
    assert whole.ended() is None
    assert path.read_bytes()[100:] == b"c" * 924
    file.close()


def test_who_is_interrupted_while_it_waits_to_be_alone_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        request = image.begin()

        def interrupted(timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(image._changed, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                image.snapshots.create("never")
        assert Other(lambda: image.write(0, b"a" * 512)).ended() is None
        image.end(request)
        image.snapshots.create("then")
    is_clean(path)


def test_an_image_found_wrong_while_its_header_is_written_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 64 * MiB, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        for at in (0, 32 * MiB):
            image.write(at, b"a" * 4096)
        image.header.autoclear |= 1 << 40  # of somebody else
        image.write_header()
    image = open_image(path, read_only=False)
    image.l1[32 * MiB >> image._l2_shift] = OFFSET_MASK & ~0xFFF  # far outside of the file
    stop = Stop(image.header.pack_fields, behind=True)
    monkeypatch.setattr(image.header, "pack_fields", stop)
    writer = stop.hold(lambda: image.write(0, b"b" * 4096))  # makes the header ours first
    reader = Other(lambda: image.read(32 * MiB, 4096))
    reader.join(A_WHILE)
    stop.go_on()
    writer.ended()
    assert isinstance(reader.ended(), ImageCorruptError)
    assert read_header(image.file).incompatible & INCOMPAT_CORRUPT
    image.close()


def test_the_place_of_a_snapshot_table_that_a_repair_made_longer_is_free_after_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB, options=Options(cluster_size=512))
    with open_image(path, read_only=False) as image:
        for number in range(7):
            image.snapshots.create(f"number {number}")
        forget_extra_data(image)
    with open_image(path, read_only=False) as image:
        stop = Stop(image.exclusive)
        monkeypatch.setattr(image, "exclusive", stop)
        snapper = stop.hold(lambda: image.snapshots.create("one more"))
        assert image.check(repair="all").clean
        stop.go_on()
        assert snapper.ended() is None
        assert image.check().clean
        assert len(image.snapshots.list()) == 8
    is_clean(path)


def forget_extra_data(image: Any) -> None:
    """Leave the snapshot table's entries as old programs wrote them: without what version 3 wants, and so shorter."""
    old, length = load(image.file, image.header)
    table = b""
    for snapshot in old:
        entry = snapshot.pack()
        rest = entry[64:]  # id and name behind 40 bytes of fields and 24 of extra data
        table += entry[:36] + bytes(4) + rest
    image.file.pwrite(image.header.snapshots_offset, table.ljust(length, b"\0"))


class Chained(NoCipher):
    """Stands for CBC: what a byte of a sector is encrypted to depends on all before it."""

    def encrypt(self, sector: int, data: memoryview) -> None:
        for i in range(len(data)):
            data[i] ^= data[i - 1] if i % 512 else 0

    def decrypt(self, sector: int, data: memoryview) -> None:
        for i in reversed(range(len(data))):
            data[i] ^= data[i - 1] if i % 512 else 0


def test_a_part_of_an_encrypted_sector_reads_as_it_is_while_another_part_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encrypted"
    path.write_bytes(bytes(512))
    file = HostFile(path)
    crypt = CryptFile(file, Chained())  # type: ignore[arg-type]
    crypt.writev(0, [memoryview(b"a" * 512)])
    stop = Stop(lambda: None)
    pwrite = file.pwrite

    def in_two(offset: int, data: bytearray) -> None:
        pwrite(offset, data[:256])
        stop()
        pwrite(offset + 256, data[256:])

    monkeypatch.setattr(file, "pwrite", in_two)  # the host promises no more: a sector is in two pages, or a write is short
    writer = stop.hold(lambda: crypt.writev(0, [memoryview(b"b" * 101)]))
    found = bytearray(100)
    reader = Other(lambda: crypt.readv(200, [memoryview(found)]))
    reader.join(A_WHILE)
    stop.go_on()
    assert writer.ended() is None
    assert reader.ended() is None
    assert found == b"a" * 100
    file.close()


def test_what_a_guest_writes_behind_the_new_end_of_a_disk_that_gets_smaller_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, 4 * MiB)
    with open_image(path, read_only=False) as image:
        image.write(2 * MiB, b"a" * 512)
        stop = Stop(image.exclusive)
        monkeypatch.setattr(image, "exclusive", stop)
        resizer = stop.hold(lambda: image.resize(MiB, shrink=True))
        image.write(3 * MiB, b"b" * 512)
        stop.go_on()
        assert resizer.ended() is None
        image.resize(4 * MiB)
        assert not any(image.read(3 * MiB, 512))
    is_clean(path)


def test_an_image_of_version_2_gets_no_other_size_beside_the_snapshot_that_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB, options=Options(version=2))
    with open_image(path, read_only=False) as image:
        stop = Stop(image.exclusive)
        monkeypatch.setattr(image, "exclusive", stop)
        resizer = stop.hold(lambda: image.resize(2 * MiB))
        image.snapshots.create("kept")
        stop.go_on()
        assert isinstance(resizer.ended(), ImageFormatError)
        assert image.size == MiB
    is_clean(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize(2 * MiB),
        lambda image: image.set_lazy_refcounts(True),
        lambda image: image.set_backing("b", "raw"),
    ],
    ids=["size", "lazy", "backing"],
)
def test_the_header_of_an_image_that_was_found_wrong_meanwhile_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    path = tmp_path / "disk.qcow2"
    create_image(path, MiB)
    image = open_image(path, read_only=False)
    stop = Stop(image.exclusive)
    monkeypatch.setattr(image, "exclusive", stop)
    changer = stop.hold(lambda: change(image))
    image._broken = "a snapshot operation failed half-way"
    before = path.read_bytes()
    stop.go_on()
    assert isinstance(changer.ended(), ImageCorruptError)
    assert path.read_bytes() == before
    image.close()
