"""As `test_qcow2_power_loss`, while several threads write and flush, and one makes and deletes snapshots: what a flush told any
of them is true.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from block_qcow2.qcow2.check import check, repair_if_dirty
from block_qcow2.qcow2.create import Options, write_empty
from block_qcow2.qcow2.image import Qcow2Image, open_qcow2

from .memory_file import SECTOR, MemoryFile, PowerLosses

THREADS, STEPS, CUTS = 3, 50, 40


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Let the interpreter change threads all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class SlowFile(MemoryFile):
    """Takes its time, so that others come in between."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._lock = threading.RLock()

    def _wait(self, most: float) -> None:
        if self._rng.random() < 0.4:
            time.sleep(self._rng.random() * most)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._wait(0.002)
        with self._lock:
            super().pwrite(offset, data)

    def read_some(self, offset: int, buffers: Any) -> int:
        with self._lock:
            return super().read_some(offset, buffers)

    def flush(self) -> None:
        self._wait(0.003)
        with self._lock:
            super().flush()


class Writer(threading.Thread):
    """Has a part of the disk for itself: `versions` of it, and which of them flushes made last, and when."""

    def __init__(self, image: Qcow2Image, log: list[Any], number: int, part: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.image, self.log, self.base, self.part = image, log, number * part, part
        self.rng = random.Random(seed * 10 + number)
        self.versions = [bytes(part)]
        self.acknowledged = [(0, 0)]  # (entries logged, index in versions)
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(STEPS):
                self.step()
            assert self.image.read(self.base, self.part) == self.versions[-1]
        except BaseException as e:  # the thread of the test raises it
            self.problem = e

    def step(self) -> None:
        rng, image, cluster = self.rng, self.image, self.image.cluster_size
        offset = rng.randrange(self.part // SECTOR) * SECTOR
        length = min(rng.choice([SECTOR, 4 * SECTOR, cluster, 3 * cluster]), self.part - offset)
        whole, end = offset // cluster * cluster, (offset + length) // cluster * cluster
        kind = rng.random()
        if kind < 0.5:
            data = rng.randbytes(length)
            image.write(self.base + self.becomes(offset, data), data)
        elif kind < 0.6:
            image.write_zeroes(self.base + self.becomes(offset, bytes(length)), length, unmap=rng.random() < 0.5)
        elif kind < 0.7 and end > whole:
            image.discard(self.base + self.becomes(whole, bytes(end - whole)), end - whole)
        elif kind < 0.8:
            data = rng.randbytes(32) * (cluster // 32)
            image.write_compressed(self.base + self.becomes(whole, data), data)
        else:
            version = len(self.versions) - 1
            image.flush()
            self.acknowledged.append((len(self.log), version))

    def becomes(self, offset: int, data: bytes) -> int:
        """What the part will be; return the offset."""
        before = self.versions[-1]
        self.versions.append(before[:offset] + data + before[offset + len(data) :])
        return offset

    def survived(self, after: Qcow2Image, cut: int) -> bool:
        oldest = max(version for at, version in self.acknowledged if at <= cut)
        data = after.read(self.base, self.part)
        return all(
            any(version[at : at + SECTOR] == data[at : at + SECTOR] for version in self.versions[oldest:])
            for at in range(0, self.part, SECTOR)
        )


@pytest.mark.parametrize("seed", range(12))
def test_what_any_thread_was_told_is_on_the_disk_survives(seed: int) -> None:
    rng = random.Random(seed)
    version = 2 if seed % 4 == 0 else 3
    extended = seed % 4 == 1
    cluster = 16384 if extended else rng.choice([512, 1024, 4096])
    part = (256 if extended else 64) * SECTOR
    file: Any = SlowFile(rng)
    bits = 16 if version == 2 else rng.choice([8, 16, 64])
    write_empty(file, THREADS * part, Options(version=version, cluster_size=cluster, extended_l2=extended, refcount_bits=bits))
    start = bytes(file.data)
    file.log = log = []
    image = open_qcow2(file, read_only=False, discard=bool(seed % 2))
    if seed % 3 == 0:
        image.l2.limit, image.refcounts.cached_blocks = 2, 4
    writers = [Writer(image, log, n, part, seed) for n in range(THREADS)]
    for writer in writers:
        writer.start()
    names: list[str] = []
    while any(writer.is_alive() for writer in writers):
        if len(names) < 3 and rng.random() < 0.6:
            names.append(image.snapshots.create(f"s{len(log)}").name)
        elif names:
            image.snapshots.delete(names.pop(rng.randrange(len(names))))
        time.sleep(rng.random() * 0.02)
    for writer in writers:
        if writer.problem is not None:
            raise writer.problem
    losses = PowerLosses(start, log)
    for cut in sorted(rng.randrange(len(log) + 1) for _ in range(CUTS)):
        disk: Any = MemoryFile(losses.after(cut, rng))
        after = open_qcow2(disk, read_only=False)
        repair_if_dirty(after)
        lines: list[str] = []
        result = check(after, report=lines.append)
        flags = sum("OFLAG_COPIED" in line for line in lines) if version == 2 else 0
        assert result.corruptions == flags, (cut, lines)
        assert not result.check_errors, (cut, lines)
        assert all(writer.survived(after, cut) for writer in writers), cut
