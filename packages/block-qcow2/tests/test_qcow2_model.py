"""Random operations on qcow2 images keep a plain byte array equal, and QEMU finds the image clean at every reopening."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import SnapshotError, Snapshots

from .qemu import is_clean, qemu_img


class Machine:
    """An image, its model, and what its snapshots held."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        extended = rng.random() < 0.3
        version = 2 if not extended and rng.random() < 0.2 else 3
        bits = 16 if version == 2 else rng.choice([1, 2, 4, 8, 16, 32, 64])
        self.cluster = rng.choice([16384, 65536] if extended else [512, 4096, 65536])
        self.path = folder / "image.qcow2"
        self.options = Options(version=version, cluster_size=self.cluster, extended_l2=extended, refcount_bits=bits)
        self.model = bytearray(rng.randrange(1, 240 * self.cluster) // 512 * 512 + 512)
        self.saved: dict[str, bytes] = {}
        create_image(self.path, len(self.model), options=self.options)
        self.open()

    def open(self) -> None:
        self.image = open_image(self.path, read_only=False)
        self.image.file.volatile = True  # no power fails here
        self.snapshots = Snapshots(self.image)

    def step(self, number: int) -> None:
        rng, image, model, size = self.rng, self.image, self.model, len(self.model)
        offset = rng.randrange(size)
        length = min(rng.choice([1, 512, 4096, self.cluster, 3 * self.cluster, rng.randrange(1, 200_000)]), size - offset)
        kind = rng.choice(
            ["write"] * 4
            + ["zero", "discard", "read", "read", "compressed", "flush"]
            + ["create", "apply", "delete", "resize", "reopen"]
        )
        if kind == "write":
            data = rng.randbytes(length)
            image.write(offset, data)
            model[offset : offset + length] = data
        elif kind == "zero":
            image.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif kind == "discard":
            image.discard(offset, length)
            first = -(-offset // self.cluster) * self.cluster
            end = size if offset + length == size else (offset + length) // self.cluster * self.cluster
            model[first : max(first, end)] = bytes(max(end - first, 0))
        elif kind == "read":
            assert image.read(offset, length) == model[offset : offset + length]
        elif kind == "compressed":
            at = offset // self.cluster * self.cluster
            data = (rng.randbytes(32) * self.cluster)[: min(self.cluster, size - at)]
            image.write_compressed(at, data)
            model[at : at + len(data)] = data
        elif kind == "flush":
            image.flush()
        elif kind == "create" and len(self.saved) < 6 and self.options.refcount_bits > 2:
            with suppress(SnapshotError):  # few bits count few references: then nothing has changed
                self.snapshots.create(f"s{number}")
                self.saved[f"s{number}"] = bytes(model)
        elif kind == "apply" and self.saved:
            name = rng.choice(sorted(self.saved))
            with suppress(SnapshotError):
                self.snapshots.apply(self.snapshots.find(name))
                model[:] = self.saved[name]
        elif kind == "delete" and self.saved:
            name = rng.choice(sorted(self.saved))
            self.snapshots.delete(self.snapshots.find(name))
            del self.saved[name]
        elif kind == "resize" and not (self.options.version == 2 and self.saved):
            new = rng.randrange(1, 300 * self.cluster) // 512 * 512 + 512
            image.resize(new, shrink=True)
            model[:] = (model + bytes(max(new - size, 0)))[:new]
        elif kind == "reopen":
            self.close()
            self.open()
            lines: list[str] = []
            assert check(self.image, report=lines.append).clean, lines

    def close(self) -> None:
        self.image.close()
        is_clean(self.path)

    def finish(self, folder: Path) -> None:
        assert self.image.read(0, len(self.model)) == self.model
        self.close()
        for name, content in self.saved.items():
            copy, raw = folder / "copy", folder / "raw"
            shutil.copy(self.path, copy)
            qemu_img("snapshot", "-a", name, copy)
            qemu_img("convert", "-O", "raw", copy, raw)
            assert raw.read_bytes() == content


def play(folder: Path, seed: int, steps: int) -> None:
    machine: Any = Machine(folder, seed)
    try:
        for number in range(steps):
            machine.step(number)
        machine.finish(folder)
    finally:
        machine.image.close()


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(80))
def test_an_image_is_what_was_written_to_it(tmp_path: Path, seed: int) -> None:
    """20,000 operations in all."""
    play(tmp_path, seed, 250)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_long_lives_of_images(tmp_path: Path, seed: int) -> None:
    play(tmp_path, seed, 300)


def test_counts_that_are_too_narrow_for_a_snapshot_leave_the_image_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "narrow.qcow2"
    create_image(path, 1 << 20, options=Options(refcount_bits=2))
    with open_image(path, read_only=False) as image:
        image.write(0, b"1" * 200_000)
        table = Snapshots(image)
        table.create("one")
        table.create("two")
        with pytest.raises(SnapshotError, match="2 bits a refcount are too few"):
            table.create("three")
        image.write(0, b"2" * 200_000)
        assert [s.name for s in table.list] == ["one", "two"]
    is_clean(path)
