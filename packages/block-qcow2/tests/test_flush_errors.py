"""A flush that failed is never followed by one that claims success: what was lost stays lost, and whoever asks is told."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.hostfile import HostFile
from block_qcow2.qcow2.bitmaps import Bitmaps

from .conftest import Driver


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel after a write to the medium failed: one fdatasync says so, those after it know nothing of it."""
    real, calls = os.fdatasync, []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return calls


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("aio", ["off", "threads"])
def test_a_failed_flush_fails_until_the_file_is_opened_anew(tmp_path: Path, fmt: str, aio: str, lossy: list[int]) -> None:
    path = tmp_path / "disk"
    lossy.append(-1)  # creating loses nothing
    create_image(path, 1 << 20, format=fmt)
    disk = open_disk(path, format=fmt, aio=aio)
    disk.lock()
    driver = Driver(disk)
    assert driver.write(0, b"x" * 4096) == 0
    lossy.clear()
    for _ in range(3):
        assert driver.wait(driver.channel.flush("flush")) == -errno.EIO
        with pytest.raises(OSError, match="error"):
            disk.flush()
    assert len(lossy) == 1
    with pytest.raises(OSError, match="error") if fmt == "qcow2" else nullcontext():
        disk.close()
    disk = open_disk(path, format=fmt, aio=aio)
    disk.lock()
    disk.flush()
    disk.close()


def test_a_failed_flush_of_an_image_fails_its_closing_too(tmp_path: Path, lossy: list[int]) -> None:
    path = tmp_path / "image"
    lossy.append(-1)
    create_image(path, 1 << 20)
    image = open_image(path, read_only=False)
    image.write(0, b"x")
    lossy.clear()
    with pytest.raises(OSError, match="error"):
        image.flush()
    with pytest.raises(OSError, match="flushed before"):
        image.flush()
    with pytest.raises(OSError, match="flushed before"):
        image.close()


def test_bitmaps_that_cannot_be_stored_do_not_keep_an_image_from_writing_back_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    create_image(path, 1 << 20)
    with open_image(path, read_only=False) as image:
        bitmaps = Bitmaps(image)
        bitmaps.add("b")
        bitmaps.store()
    image = open_image(path, read_only=False)
    image.write(0, b"x" * 512)
    monkeypatch.setattr(Bitmaps, "_lay_out", _fail)
    with pytest.raises(OSError, match="not well"):
        image.close()
    with open_image(path) as image:
        assert image.read(0, 512) == b"x" * 512


def _fail(*_: object) -> None:
    raise OSError(errno.EIO, "the disk is not well")


def test_a_flush_that_runs_beside_one_that_fails_does_not_claim_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells the first of them only, whatever the other one has waited for."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = HostFile(path)
    fails, go_on = threading.Event(), threading.Event()
    ends: list[str] = []

    def fdatasync(fd: int) -> None:
        if not fails.is_set():
            fails.set()
            assert go_on.wait(20)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush() -> None:
        try:
            file.flush()
        except OSError as e:
            ends.append(e.strerror or "")
        else:
            ends.append("done")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first, second = threading.Thread(target=flush), threading.Thread(target=flush)
    first.start()
    assert fails.wait(20)
    second.start()
    second.join(0.2)  # it may or may not wait for the other
    go_on.set()
    first.join()
    second.join()
    assert sorted(ends) == ["Input/output error", "Input/output error, when the file was flushed before"]
    file.close()


def test_flushes_at_once_share_one_that_began_after_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = HostFile(path)
    began, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        began.set()
        assert go_on.wait(20)

    waiting = threading.Semaphore(0)
    wait = file._flushing.wait

    def wait_seen() -> bool:
        waiting.release()
        return wait()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(file._flushing, "wait", wait_seen)
    threads = [threading.Thread(target=file.flush) for _ in range(8)]
    threads[0].start()
    assert began.wait(20)
    for thread in threads[1:]:
        thread.start()
    for _ in threads[1:]:
        assert waiting.acquire(timeout=20)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    file.flush()
    assert len(calls) == 3
    file.close()
