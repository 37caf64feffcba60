"""The twelve defects of StratoVirt 2.4.0 that lose data (reference block-and-image, section 14), absent here, in its order."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import BlockError, ImageInUseError, UnsupportedFeatureError
from block_qcow2.hostfile import HostFile
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.format import OFFSET_MASK
from block_qcow2.qcow2.image import open_qcow2
from block_qcow2.qcow2.snapshots import Snapshots

from .conftest import Driver
from .memory_file import MemoryFile, PowerLosses
from .qemu import is_clean, qemu_img, qemu_io
from .test_qcow2_faults import Faulty

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def test_1_nothing_is_referenced_on_the_disk_before_it_is_counted_there() -> None:
    """StratoVirt writes L1 entries before the L2 table's refcount, and mappings before refcounts."""
    file: Any = MemoryFile()
    write_empty(file, 64 * KiB, Options(cluster_size=512))
    start = bytes(file.data)
    file.log = []
    image = open_qcow2(file, read_only=False)
    for at in range(0, 48 * KiB, 4096):
        image.write(at, b"d" * 3000)
        image.flush()
    losses, rng = PowerLosses(start, file.log), random.Random(1)
    for cut in range(len(file.log) + 1):
        result = check(open_qcow2(MemoryFile(losses.after(cut, rng))))  # type: ignore[arg-type]
        assert not result.corruptions, cut
        assert not result.check_errors, cut


def test_2_a_partial_write_to_a_preallocated_zero_cluster_exposes_no_old_bytes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"secret" * 10_000)
        image.write_zeroes(0, 65536)  # keeps the cluster, whose bytes are still on the disk
        assert b"secret" in path.read_bytes()
        image.write(4096, b"new" * 100)
        assert image.read(0, 65536) == (bytes(4096) + b"new" * 100).ljust(65536, b"\0")
    qemu_io(path, "read -P 0 0 4096", "read -P 0 8192 57344")
    is_clean(path)


def test_3_features_encryption_data_files_and_extended_tables_are_heeded_when_an_image_is_opened(tmp_path: Path) -> None:
    unknown, data, extended = (tmp_path / n for n in ("unknown", "external", "extended"))
    create_image(unknown, MiB)
    raw = bytearray(unknown.read_bytes())
    raw[72] |= 0x80  # incompatible bit 63
    unknown.write_bytes(raw)
    with pytest.raises(UnsupportedFeatureError, match="bit 63"):
        open_image(unknown)
    create_image(data, MiB, options=Options(data_file="guest-data"))
    with pytest.raises(UnsupportedFeatureError, match="data file"):
        open_image(data)
    with open_image(data, read_only=False, allow=True) as image:
        image.write(0, b"outside")
    assert (tmp_path / "guest-data").read_bytes().startswith(b"outside")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", extended, MiB)
    qemu_io(extended, "write -P 7 6k 2k", "write -z 64k 2k")
    with open_image(extended) as image:
        assert image.read(0, 10 * KiB) == bytes(6 * KiB) + b"\7" * 2 * KiB + bytes(2 * KiB)


def test_3_an_encrypted_image_is_not_served_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(passphrase=b"secret", luks_rounds=1000))
    with open_image(path, read_only=False, passphrase=b"secret") as image:
        image.write(0, b"hidden")
    with open_image(path) as image, pytest.raises(UnsupportedFeatureError, match="encrypted"):
        image.read(0, 512)
    with pytest.raises(BlockError, match="encrypted"):
        open_disk(path, format="qcow2")


def test_4_compressed_clusters_are_unpacked_and_no_repair_frees_them_or_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, MiB)
    qemu_io(path, "write -c -P 5 0 128k", "write -P 6 256k 64k")
    qemu_img("bitmap", "--add", path, "b")
    with open_image(path, read_only=False) as image:
        image.write(512 * KiB, b"x")  # the bitmap has a bit to keep
    for repair in ("leaks", "all"):
        with open_image(path, read_only=False, for_repair=True) as image:
            result = check(image, repair=repair)
            assert result.clean
            assert not result.leaks_fixed
    with open_image(path) as image:
        assert image.read(0, 128 * KiB) == b"\5" * 128 * KiB
        table = Bitmaps(image)
        assert table.bits(table.list[0])[1] == 1
    is_clean(path)


def test_4_no_repair_frees_the_header_of_an_encrypted_image(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(passphrase=b"secret", luks_rounds=1000))
    before = path.read_bytes()
    with open_image(path, read_only=False, for_repair=True) as image:
        assert check(image, repair="all").clean
    assert path.read_bytes() == before


def test_5_a_misaligned_data_cluster_is_not_zeroed_by_a_repair(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"data" * 30_000)
        at = int(image.l1[0] & OFFSET_MASK)
    raw = bytearray(path.read_bytes())
    raw[at : at + 8] = (int.from_bytes(raw[at : at + 8], "big") + 512).to_bytes(8, "big")
    path.write_bytes(raw)
    with open_image(path, read_only=False, for_repair=True) as image:
        assert check(image, repair="all").corruptions
    assert path.read_bytes() == raw


def test_6_an_error_while_metadata_are_flushed_is_reported_and_nothing_dirty_is_forgotten() -> None:
    call = 0
    failed = True
    while failed:
        call += 1
        file: Any = Faulty()
        write_empty(file, MiB, Options(cluster_size=4096))
        image = open_qcow2(file, read_only=False)
        image.write(0, b"kept" * 5000)
        file.calls, file.fail_at = 0, call
        try:
            image.flush()
            failed = False
        except OSError:
            image.flush()  # the error is over: what was dirty still is
        again: Any = open_qcow2(MemoryFile(bytes(file.data)))
        assert again.read(0, 20_000) == b"kept" * 5000, call
        assert check(again).clean, call
    assert call > 4


def test_7_errors_of_discards_and_zeroes_reach_the_guest(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(cluster_size=4096))
    with open_image(path, read_only=False) as image:
        image.write(0, b"x" * 100_000)
    disk: Any = open_disk(path, format="qcow2", discard=True)
    disk.lock()
    driver = Driver(disk)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "injected")

    disk.image.file.read_some = fail  # the L2 table cannot be read
    assert driver.wait(driver.channel.discard(0, 65536, "discard")) == -errno.EIO
    assert driver.wait(driver.channel.write_zeroes(0, 65536, "zero", True)) == -errno.EIO
    del disk.image.file.read_some
    assert driver.read(0, 100_000) == b"x" * 100_000
    disk.close()
    is_clean(path)


def test_7_a_discard_of_gigabytes_succeeds_and_its_space_is_given_back_before_it_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, 8 * GiB)
    disk: Any = open_disk(path, format="qcow2", discard=True)
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"1" * MiB) == 0
    disk.flush()
    assert driver.wait(driver.channel.discard(0, 5 * GiB, "discard")) == 0
    assert driver.wait(driver.channel.flush("flush")) == 0
    assert path.stat().st_blocks * 512 < MiB
    assert driver.write(4 * GiB, b"2" * MiB) == 0
    disk.flush()
    assert driver.read(4 * GiB, MiB) == b"2" * MiB
    assert driver.read(0, MiB) == bytes(MiB)
    disk.close()
    is_clean(path)


def test_8_snapshots_leak_nothing_when_they_go_and_a_failed_one_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"now" * 1000)
        table = Snapshots(image)
        for name in ("one", "two"):
            table.create(name)
        real = image.file.pwrite
        calls = []

        def pwrite(offset: int, data: bytes) -> None:
            calls.append(offset)
            if len(calls) == 2:  # the snapshot's L1 table
                raise OSError(errno.EIO, "injected")
            real(offset, data)

        image.file.pwrite = pwrite
        with pytest.raises(OSError, match="injected"):
            table.create("three")
        image.file.pwrite = real
        assert [s.name for s in table.list] == ["one", "two"]
        image.write(0, b"on" * 500)
    is_clean(path)
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        table.delete(table.find("one"))
        table.delete(table.find("two"))
    is_clean(path)  # the last table did not leak


def test_9_creating_over_an_image_in_use_is_refused_and_a_lock_outlives_other_opens(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        image.write(0, b"precious")
        image.flush()
        before = path.read_bytes()
        with pytest.raises(ImageInUseError):
            create_image(path, MiB)
        assert path.read_bytes() == before
        os.close(os.open(path, os.O_RDWR))  # a POSIX lock would be gone now
        open_image(path, force_share=True).close()
        assert "lock" in qemu_img("info", path, status=1)
        with pytest.raises(ImageInUseError):
            open_image(path)


def test_10_read_modify_write_of_direct_io_loses_no_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    file = HostFile(path)
    file.direct, file.alignment = True, 4096  # as a disk of 4 KiB sectors has it
    rounds = 200

    def write(sector: int) -> None:
        for n in range(rounds):
            file.pwrite(sector * 512, bytes([n + 1]) * 512)

    threads = [threading.Thread(target=write, args=(sector,)) for sector in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    file.close()
    assert path.read_bytes() == bytes([rounds]) * 4096


def test_11_a_flush_after_a_write_makes_its_mapping_last(tmp_path: Path) -> None:
    """What a device does for a guest that knows no flush; the mapping has to be on the disk, not only the data."""
    path, copy = tmp_path / "image", tmp_path / "copy"
    create_image(path, MiB)
    disk: Any = open_disk(path, format="qcow2")
    disk.lock()
    driver = Driver(disk)
    for n in range(4):
        assert driver.write(n * 100_000, bytes([n + 1]) * 50_000) == 0
        assert driver.wait(driver.channel.flush("flush")) == 0
        copy.write_bytes(path.read_bytes())  # the machine is gone, nobody closes the disk
        with open_image(copy) as image:
            assert image.read(n * 100_000, 50_000) == bytes([n + 1]) * 50_000
        is_clean(copy)
    disk.close()


def test_12_a_version_2_image_is_resized_as_the_image_that_it_is(tmp_path: Path, img: Any) -> None:
    path = tmp_path / "image"
    create_image(path, MiB, options=Options(version=2))
    with open_image(path, read_only=False) as image:
        image.write(MiB - 512, b"e" * 512)
    assert img("resize", path, "3M").status == 0
    with open_image(path) as image:
        assert (image.format, image.header.version, image.size) == ("qcow2", 2, 3 * MiB)
        assert image.read(MiB - 512, 1024) == b"e" * 512 + bytes(512)
    is_clean(path)
