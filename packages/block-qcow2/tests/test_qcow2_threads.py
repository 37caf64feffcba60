"""Four threads on one image whose requests overlap: each sector holds what one of them wrote last, and the metadata are sound."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_disk
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.image import Qcow2Image

from .conftest import Driver
from .qemu import is_clean, qemu_img
from .test_raw import ENGINES, offered

SECTOR = 512
SIZE = 1 << 20
THREADS, STEPS = 4, 60


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Let the interpreter change threads all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Worker(threading.Thread):
    """One queue of a guest: `last` is what it wrote to each sector last."""

    def __init__(self, disk: Any, number: int, seed: int, cluster: int, snapshots: bool) -> None:
        super().__init__()
        self.disk, self.number, self.cluster, self.snapshots = disk, number, cluster, snapshots
        self.rng = random.Random(seed * 10 + number)
        self.last: dict[int, bytes] = {}
        self.problem: BaseException | None = None

    def run(self) -> None:
        driver = Driver(self.disk)
        try:
            for step in range(STEPS):
                self.step(driver, step)
        except BaseException as e:  # the thread of the test raises it
            self.problem = e
        finally:
            driver.channel.close()

    def step(self, driver: Driver, step: int) -> None:
        rng, cluster, channel = self.rng, self.cluster, driver.channel
        offset = rng.randrange(SIZE // SECTOR) * SECTOR
        length = min(rng.choice([SECTOR, 4096, cluster, 3 * cluster, 2 * cluster + SECTOR]), SIZE - offset, 256 << 10)
        kind = rng.random()
        if kind < 0.6:
            stamp = (self.number * 100_000 + step + 1).to_bytes(4, "little") * (SECTOR // 4)
            assert driver.write(offset, stamp * (length // SECTOR), pieces=rng.choice([1, 3])) == 0
            self.holds(offset, offset + length, stamp)
        elif kind < 0.75:
            assert driver.wait(channel.discard(offset, length, "discard")) == 0
            end = offset + length
            self.holds(-(-offset // cluster) * cluster, SIZE if end == SIZE else end // cluster * cluster, bytes(SECTOR))
        elif kind < 0.85:
            assert driver.wait(channel.write_zeroes(offset, length, "zero", rng.random() < 0.5)) == 0
            self.holds(offset, offset + length, bytes(SECTOR))
        elif kind < 0.9:
            assert driver.wait(channel.flush("flush")) == 0
        elif kind < 0.95 and self.number == 0 and self.snapshots:
            self.disk.snapshot_create(f"s{step}")
        elif self.number == 0 and self.disk.snapshots():
            self.disk.snapshot_delete(rng.choice(self.disk.snapshots()).name)
        else:
            driver.read(offset, length)

    def holds(self, start: int, end: int, content: bytes) -> None:
        for sector in range(start // SECTOR, end // SECTOR):
            self.last[sector] = content


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: f"{e[0]}-{'direct' if e[1] else 'buffered'}")
@pytest.mark.parametrize(
    "options",
    [
        Options(cluster_size=512, refcount_bits=64),
        Options(cluster_size=4096),
        Options(cluster_size=65536, refcount_bits=8),
        Options(cluster_size=16384, extended_l2=True),
    ],
    ids=lambda o: f"cluster={o.cluster_size}",
)
def test_overlapping_requests_of_four_threads(tmp_path: Path, options: Options, engine: tuple[str, bool]) -> None:
    aio, direct = engine
    if not offered(aio, direct, tmp_path):
        pytest.skip(f"this host offers no aio={aio}")
    path = tmp_path / "disk"
    create_image(path, SIZE, options=options)
    seed = ENGINES.index(engine)
    if seed % 2:
        qemu_img("bitmap", "--add", "-g", "4096", path, "b")
    disk: Any = open_disk(
        path,
        format="qcow2",
        discard=True,
        aio=aio,
        direct=direct,
        l2_cache_bytes=(seed % 3) * 4096,
        refcount_cache_bytes=(seed % 2) * 4096,
    )
    disk.lock()
    workers = [Worker(disk, n, seed, options.cluster_size, True) for n in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), "a request hangs"
        if worker.problem is not None:
            raise worker.problem
    driver = Driver(disk)
    data = driver.read(0, SIZE)
    driver.channel.close()
    wrong = []
    for sector in range(SIZE // SECTOR):
        possible = [w.last[sector] for w in workers if sector in w.last] or [bytes(SECTOR)]
        if data[sector * SECTOR : (sector + 1) * SECTOR] not in possible:
            wrong.append(sector)
    assert not wrong
    disk.flush()
    qemu_img("check", "-q", "-U", path)
    if seed % 2:
        covers(disk.image, workers)
    disk.close()
    is_clean(path)


def covers(image: Qcow2Image, workers: list[Worker]) -> None:
    """The dirty bitmap has a bit for everything that was written."""
    table = image.bitmaps
    assert isinstance(table, Bitmaps)
    bits = table.bits(table.list[0])
    written = {sector * SECTOR // 4096 for w in workers for sector in w.last}
    assert all(bits[g >> 3] >> (g & 7) & 1 for g in written)
