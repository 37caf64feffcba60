"""A host that fails now and then: what was acknowledged stays, the rest is old or new, and nothing is corrupt afterwards."""

from __future__ import annotations

import errno
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError
from block_qcow2.qcow2 import refcount, tables
from block_qcow2.qcow2.bitmaps import Bitmaps, marked
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.image import open_qcow2
from block_qcow2.qcow2.snapshots import Snapshots

from .memory_file import SECTOR, MemoryFile
from .qemu import is_clean, qemu_img

HALF_WAY = "half-way"  # the dirty bit is on the disk then: the next one who opens the image repairs it


class Faulty(MemoryFile):
    """Any call fails with probability `p`, or the call number `fail_at`."""

    rng: random.Random | None = None
    p = 0.0
    fail_at = -1
    calls = 0

    def hit(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at or (self.rng and self.rng.random() < self.p):
            raise OSError(errno.EIO, "injected")

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.hit()
        super().pwrite(offset, data)

    def read_some(self, offset: int, buffers: Any) -> int:
        self.hit()
        return super().read_some(offset, buffers)

    def flush(self) -> None:
        self.hit()
        super().flush()


class Run:
    """Random operations on an image over a file that fails, and a model that knows which sectors an error left unknown."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        extended = rng.random() < 0.25
        self.cluster = 16384 if extended else rng.choice([512, 1024, 4096])
        size = rng.randrange(50, 600) * SECTOR * (8 if extended else 1)
        self.file = Faulty()
        options = Options(cluster_size=self.cluster, extended_l2=extended, refcount_bits=rng.choice([8, 16, 64]))
        write_empty(self.file, size, options)  # type: ignore[arg-type]
        self.image: Any = open_qcow2(
            self.file,  # type: ignore[arg-type]
            read_only=False,
            discard=rng.random() < 0.5,
            l2_cache_bytes=rng.choice([0, 2 * self.cluster]),
        )
        self.image.refcounts.cached_blocks = rng.choice([512, 4])
        self.snapshots = Snapshots(self.image)
        self.model = bytearray(size)
        self.unknown: set[int] = set()  # sectors
        self.saved: dict[str, tuple[bytes, set[int]]] = {}
        self.file.rng = random.Random(seed + 1)

    def play(self, steps: int) -> None:
        for number in range(steps):
            self.file.p = self.rng.choice([0, 0, 0.02, 0.1])
            lo, hi = self.step(number)
            self.unknown |= set(range(lo // SECTOR, -(-hi // SECTOR)))
            if self.image._broken:
                break
        self.file.p = 0

    def step(self, number: int) -> tuple[int, int]:
        """One operation; the range that is unknown after it."""
        rng, image, model, cluster, size = self.rng, self.image, self.model, self.cluster, len(self.model)
        offset = rng.randrange(size // SECTOR) * SECTOR
        length = min(rng.choice([SECTOR, 4 * SECTOR, cluster, 3 * cluster]), size - offset)
        kinds = ["write"] * 6 + ["zero", "discard", "compressed", "create", "apply", "delete", "flush", "flush", "read"]
        kind = rng.choice(kinds)
        lo, hi, content = offset, offset + length, bytes(length)
        name = rng.choice(sorted(self.saved)) if self.saved else ""
        if kind == "write":
            content = rng.randbytes(length)
        elif kind == "discard":
            lo, hi = -(-offset // cluster) * cluster, size if hi == size else hi // cluster * cluster
            hi = max(lo, hi)
            content = bytes(hi - lo)
        elif kind == "compressed":
            lo = offset // cluster * cluster
            hi = min(lo + cluster, size)
            content = (rng.randbytes(32) * cluster)[: hi - lo]
        else:
            lo, hi = (lo, hi) if kind == "zero" else (0, 0)
        try:
            if kind == "write":
                image.write(lo, content)
            elif kind == "zero":
                image.write_zeroes(lo, hi - lo, unmap=rng.random() < 0.5)
            elif kind == "discard":
                image.discard(offset, length)
            elif kind == "compressed":
                image.write_compressed(lo, content)
            elif kind == "create" and len(self.saved) < 4:
                self.snapshots.create(f"s{number}")
                self.saved[f"s{number}"] = bytes(model), set(self.unknown)
            elif kind == "apply" and name:
                self.snapshots.apply(self.snapshots.find(name))
                model[:], self.unknown = self.saved[name][0], set(self.saved[name][1])
            elif kind == "delete" and name:
                self.snapshots.delete(self.snapshots.find(name))
                del self.saved[name]
            elif kind == "flush":
                image.flush()
            elif kind == "read":
                self.same(image.read(offset, length), offset)
        except (OSError, BlockError):
            return lo, hi
        model[lo:hi] = content[: hi - lo]
        self.unknown -= set(range(lo // SECTOR, -(-hi // SECTOR)))
        return 0, 0

    def same(self, data: bytes, offset: int = 0) -> None:
        for at in range(0, len(data), SECTOR):
            if (offset + at) // SECTOR not in self.unknown:
                expected = self.model[offset + at : offset + at + SECTOR]
                assert data[at : at + SECTOR] == expected, f"sector at {offset + at:#x}"


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_errors_of_the_host_lose_nothing_that_was_acknowledged(start: int) -> None:
    for seed in range(start, start + 20):
        run = Run(seed)
        run.play(100)
        image = run.image
        broken = image._broken
        if not broken:
            run.same(image.read(0, len(run.model)))
            image.flush()
            image.flush()
        again = open_qcow2(MemoryFile(bytes(run.file.data)), read_only=False, for_repair=True)  # type: ignore[arg-type]
        lines: list[str] = []
        result = check(again, report=lines.append)
        if broken:
            assert HALF_WAY in broken or "undone" in broken, (seed, broken)
            assert again.needs_repair or not result.corruptions, (seed, lines)
            assert check(again, repair="all").clean, seed
        else:
            assert not result.corruptions, (seed, lines)
            assert not result.check_errors, (seed, lines)
            run.same(again.read(0, len(run.model)))


@pytest.mark.parametrize("operation", ["create", "delete", "apply"])
def test_a_snapshot_operation_that_fails_anywhere_is_undone_or_repaired(operation: str) -> None:
    """An error at each single call in turn."""
    done = False
    call = 0
    while not done:
        call += 1
        file: Any = Faulty()
        write_empty(file, 40 * 1024, Options(cluster_size=1024))
        image = open_qcow2(file, read_only=False)
        table = Snapshots(image)
        image.write(0, b"1" * 20_000)
        table.create("one")
        image.write(5000, b"2" * 20_000)
        image.flush()
        now = image.read(0, image.size)
        file.calls, file.fail_at = 0, call
        try:
            if operation == "create":
                table.create("two")
            elif operation == "delete":
                table.delete(table.find("one"))
            else:
                table.apply(table.find("one"))
            done = file.calls < call
        except (OSError, BlockError):
            pass
        file.fail_at = -1
        broken = image._broken
        if not broken:
            image.flush()
            assert done or operation == "apply" or image.read(0, image.size) == now
        again: Any = open_qcow2(MemoryFile(bytes(file.data)), read_only=False, for_repair=True)
        result = check(again, repair="all" if broken else "none")
        assert not result.corruptions, (call, broken)
        assert not result.check_errors, (call, broken)
        names = [s.name for s in Snapshots(again).list]
        assert names in (["one"], ["one", "two"]) if operation != "delete" else names in (["one"], [])
        content = again.read(0, again.size)
        old = b"1" * 20_000 + bytes(again.size - 20_000)
        assert content == now or (operation == "apply" and content == old), call
    assert call > 10


class NoRoom(MemoryFile):
    """The write number `full_at` finds no room."""

    full_at = -1
    writes = 0
    failed: tuple[int, int] = (-1, 0)  # offset, and the number of snapshots that the header named then

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1
        if self.writes == self.full_at:
            self.failed = offset, int.from_bytes(self.data[60:64], "big")
            raise OSError(errno.ENOSPC, "injected")
        super().pwrite(offset, data)


@pytest.mark.parametrize("version", [2, 3])
def test_a_snapshot_that_there_is_no_room_for_leaves_an_image_that_can_be_written(version: int) -> None:
    """Up to the moment when the header names it, every failed write is undone."""
    done = False
    call = undone = 0
    while not done:
        call += 1
        file: Any = NoRoom()
        write_empty(file, 40 * 1024, Options(cluster_size=1024, version=version))
        image = open_qcow2(file, read_only=False)
        image.write(0, b"1" * 40 * 1024)
        image.flush()
        file.writes, file.full_at = 0, call
        try:
            Snapshots(image).create("two")
            done = file.writes < call
        except OSError:
            offset, snapshots = file.failed
            if image._broken:
                assert snapshots or not offset, (call, image._broken)
                continue
            undone += 1
        file.full_at = -1
        image.write(0, b"2" * 40 * 1024)
        image.flush()
        again: Any = open_qcow2(MemoryFile(bytes(file.data)))
        assert check(again).clean, call
        assert again.read(0, again.size) == b"2" * 40 * 1024
    assert undone > 4


def test_a_compressed_write_that_fails_leaks_nothing() -> None:
    for call in range(1, 4):
        file: Any = Faulty()
        write_empty(file, 64 * 1024, Options(cluster_size=4096))
        image = open_qcow2(file, read_only=False)
        image.write_compressed(0, b"a" * 4096)
        file.calls, file.fail_at = 0, call
        try:
            image.write_compressed(4096, b"b" * 4096)
            image.flush()
        except OSError:
            file.fail_at = -1
        image.write_compressed(8192, b"c" * 4096)
        image.flush()
        image.flush()
        assert image.read(0, 4096) == b"a" * 4096
        assert image.read(8192, 4096) == b"c" * 4096
        result = check(open_qcow2(MemoryFile(bytes(file.data))))  # type: ignore[arg-type]
        assert result.clean, (call, vars(result))


@pytest.mark.parametrize("discard", [False, True])
def test_a_flush_that_fails_anywhere_leaves_the_next_one_to_free_what_was_given_back(discard: bool) -> None:
    size = 256 << 10
    for fail_at in range(1, 1000):
        file: Any = Faulty()
        write_empty(file, size, Options(cluster_size=512, refcount_bits=64))
        image = open_qcow2(file, read_only=False)
        image.write(0, b"x" * size)
        image.flush()
        file.refresh_size()
        image = open_qcow2(file, read_only=False, discard=discard)
        image.refcounts.cached_blocks = 4  # of nine: they have to be read for their counts to fall
        image.discard(0, size)
        file.calls, file.fail_at = 0, fail_at
        try:
            image.flush()
        except OSError:
            image.flush()
        file.fail_at = -1
        result = check(image)
        assert result.clean, (fail_at, result.leaks, result.corruptions)
        if file.calls < fail_at:
            break
    assert fail_at > 10


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_a_full_file_system_keeps_what_was_acknowledged(tmp_path: Path, cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system has room for 1 MiB; writes that need more fail as they do there."""
    limit = 1 << 20
    real = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if offset + sum(map(len, buffers)) > max(limit, os.fstat(fd).st_size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, buffers, offset, *flags)

    path = tmp_path / "full"
    size = 4 << 20
    create_image(path, size, options=Options(cluster_size=cluster))
    monkeypatch.setattr(os, "pwritev", pwritev)
    rng = random.Random(cluster)
    model = bytearray(size)
    unknown: set[int] = set()
    refused = others = 0
    image = open_image(path, read_only=False)
    for number in range(250):
        offset = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, 65536]), size - offset)
        sectors = set(range(max(offset - cluster, 0) // 512, (offset + length + cluster) // 512))
        try:
            if rng.random() < 0.8:
                data = rng.randbytes(length)
                image.write(offset, data)
            elif rng.random() < 0.5:
                data = bytes(length)
                image.write_zeroes(offset, length, unmap=True)
            elif rng.random() < 0.5:
                Snapshots(image).create(f"s{number}")
                continue
            else:
                image.flush()
                continue
        except OSError as e:
            refused += e.errno == errno.ENOSPC
            others += e.errno != errno.ENOSPC
            unknown |= sectors
        else:
            model[offset : offset + length] = data
            unknown -= set(range(offset // 512, (offset + length) // 512))
    assert refused
    assert not others
    assert not image._broken
    content = image.read(0, size)
    wrong = [
        s for s in range(size // 512) if s not in unknown and content[s * 512 : s * 512 + 512] != model[s * 512 : s * 512 + 512]
    ]
    assert not wrong
    monkeypatch.setattr(os, "pwritev", real)  # somebody made room
    image.close()
    qemu_img("check", "-q", path)
    is_clean(path)


def test_a_flush_that_finds_no_memory_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 << 10
    for fail_at in range(1, 100):
        file: Any = Faulty()
        write_empty(file, size, Options(cluster_size=512))
        image = open_qcow2(file, read_only=False)
        image.write(0, b"x" * size)
        left = iter(range(1, fail_at))

        def scarce(*arguments: Any, real: Any, left: Any = left) -> bytes:
            if next(left, None) is None:
                raise MemoryError
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(tables, "to_bytes", partial(scarce, real=tables.to_bytes))
            patch.setattr(refcount, "pack", partial(scarce, real=refcount.pack))
            try:
                image.flush()
            except MemoryError:
                failed = True
            else:
                failed = False
        image.flush()
        file.refresh_size()
        after = open_qcow2(file)
        assert after.read(0, size) == b"x" * size, fail_at
        assert check(after).clean
        if not failed:
            break
    assert fail_at > 3


def test_a_bitmap_whose_storing_fails_anywhere_is_not_trusted_if_writes_go_on() -> None:
    for fail_at in range(1, 100):
        file: Any = Faulty()
        write_empty(file, 1 << 20, Options(cluster_size=4096))
        image = open_qcow2(file, read_only=False)
        bitmaps = Bitmaps(image)
        bitmaps.add("b", 4096)
        bitmaps.store()
        image.flush()
        file.refresh_size()
        image = open_qcow2(file, read_only=False)
        image.follow_bitmaps()
        image.write(0, b"a" * 4096)
        image.flush()
        file.calls, file.fail_at = 0, fail_at
        try:
            image.release_bitmaps()
        except OSError:
            failed = True
        else:
            failed = False
        file.fail_at = -1
        try:
            image.write(65536, b"b" * 4096)
            image.flush()
        except BlockError:  # it is not followed any more
            pass
        else:
            file.refresh_size()
            after = Bitmaps(open_qcow2(file))  # as after a crash
            known = [b for b in after.list if b.consistent]
            assert all(marked(after.bits(b)) == [(0, 1), (16, 17)] for b in known), fail_at
        if not failed:
            break
    assert fail_at > 10
