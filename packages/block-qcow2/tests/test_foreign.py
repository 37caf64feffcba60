"""Images from elsewhere are read as QEMU reads them, and broken ones are refused."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import open_disk, open_image
from block_qcow2.errors import BlockError, OpenError, UnsupportedFeatureError
from block_qcow2.img import main

from .qemu import qemu_img

MiB = 1 << 20
KINDS: list[tuple[str, str]] = [
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vpc", "force_size=on"),
    ("vhdx", ""),
    ("vhdx", "block_size=1M,subformat=fixed"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
]


@pytest.fixture(params=KINDS, ids=lambda k: "-".join(filter(None, k)))
def image(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path, bytes]:
    """(format, image, content)"""
    fmt, options = request.param
    content = bytearray(12 * MiB + 512 * 5)
    rng = random.Random(fmt + options)
    for _ in range(12):
        at = rng.randrange(len(content) - 300_000)
        content[at : at + 200_000] = rng.randbytes(100_000) + b"text" * 25_000
    raw, path, back = tmp_path / "raw", tmp_path / "image", tmp_path / "back"
    raw.write_bytes(content)
    qemu_img("convert", "-f", "raw", "-O", fmt, *(["-o", options] if options else []), raw, path)
    qemu_img("convert", "-f", fmt, "-O", "raw", path, back)
    return fmt, path, back.read_bytes()


def test_every_byte_is_what_qemu_reads(image: tuple[str, Path, bytes]) -> None:
    fmt, path, content = image
    with open_image(path, format=fmt) as opened:
        assert opened.size == len(content)
        assert opened.read(0, opened.size) == content
        rng = random.Random(1)
        for _ in range(50):
            at = rng.randrange(len(content))
            n = min(rng.choice([1, 513, 100_000]), len(content) - at)
            assert opened.read(at, n) == content[at : at + n]
        parts = list(opened.block_status())
        assert sum(e.length for e in parts) == opened.size
        assert all(content[e.offset : e.offset + e.length].count(0) == e.length for e in parts if e.zero)


def test_they_are_converted_and_compared(image: tuple[str, Path, bytes], tmp_path: Path) -> None:
    fmt, path, _ = image
    out = tmp_path / "out.qcow2"
    assert main(["convert", "-f", fmt, "-O", "qcow2", str(path), str(out)]) == 0
    qemu_img("compare", "-f", fmt, "-F", "qcow2", path, out)
    assert main(["compare", "-f", fmt, str(path), str(out)]) == 0


def test_they_are_only_read(image: tuple[str, Path, bytes]) -> None:
    fmt, path, _ = image
    with pytest.raises(OpenError, match="only read"):
        open_image(path, format=fmt, read_only=False)
    with pytest.raises(OpenError, match="cannot be disks"):
        open_disk(path, format=fmt, read_only=True)


def test_broken_ones_give_errors_of_this_package_only(image: tuple[str, Path, bytes]) -> None:
    fmt, path, _ = image
    good = path.read_bytes()
    rng = random.Random(2)
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([rng.randrange(2048), rng.randrange(len(data)), len(data) - 1 - rng.randrange(1536)])
            data[at] = rng.choice([0, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        with suppress(BlockError, OSError), open_image(path, format=fmt) as opened:
            opened.read(0, min(opened.size, 4 * MiB))


@pytest.mark.parametrize(("fmt", "options"), [("vmdk", "subformat=monolithicFlat"), ("vmdk", "subformat=twoGbMaxExtentSparse")])
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, fmt: str, options: str) -> None:
    path = tmp_path / f"image.{fmt}"
    qemu_img("create", "-q", "-f", fmt, *(["-o", options] if options else []), path, "8M")
    wrong: Any = (UnsupportedFeatureError, BlockError)
    with pytest.raises(wrong):
        open_image(path, format="vmdk" if fmt == "vmdk" else None)


def test_a_chain_of_vmdk_images_is_refused(tmp_path: Path) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", base, "8M")
    qemu_img("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", top)
    with pytest.raises(UnsupportedFeatureError, match="depends on another"):
        open_image(top)
