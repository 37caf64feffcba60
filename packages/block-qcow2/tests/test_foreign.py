"""Images from elsewhere are read as QEMU reads them, and broken ones are refused."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import open_disk, open_image
from block_qcow2.errors import BlockError, ImageFormatError, OpenError, UnsupportedFeatureError
from block_qcow2.foreign.blocks import Table
from block_qcow2.foreign.vhdx import checksum
from block_qcow2.img import main

from .qemu import qemu_img, qemu_io

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
            for _ in zip(range(1000), opened.block_status(), strict=False):
                pass


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


@pytest.mark.parametrize(
    ("fmt", "options", "size"),
    [
        ("vmdk", "subformat=monolithicSparse", "4T"),
        ("vmdk", "subformat=streamOptimized", "1100G"),
        ("vdi", "", "17T"),
        ("vhdx", "block_size=1M", "9T"),
        ("vhdx", "block_size=256M", "10G"),
        ("vpc", "force_size=on", "2040G"),
    ],
)
def test_images_of_any_size_are_read(tmp_path: Path, fmt: str, options: str, size: str) -> None:
    """What nothing was written to is found in pieces, and no table of it is held whole."""
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", fmt, *(["-o", options] if options else []), path, size)
    with open_image(path, format=fmt) as opened:
        end = opened.size
    at = end // 2 & -MiB
    if "streamOptimized" not in options:
        qemu_io(path, f"write -P 7 {at} 64k", fmt=fmt)
    with open_image(path, format=fmt) as opened:
        parts = list(opened.block_status())
        assert sum(e.length for e in parts) == end
        data = [e for e in parts if not e.zero]
        if "streamOptimized" in options:
            assert data == []
        else:
            [found] = data
            assert found.offset <= at < found.offset + found.length
            assert opened.read(at, 65536) == b"\7" * 65536
        assert opened.read(end - 512, 512) == bytes(512)


def grains(path: Path, size: int, count: int) -> None:
    """A streamOptimized image of `count` grains of `size` bytes, all of one place in the file."""
    text = b'# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType="streamOptimized"\n'
    packed = zlib.compress(bytes(size))
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 3, 1 << 16, size // 512 * count, size // 512, 1, 1, 512, 0, 2, 0, 0, b"", 1
    )
    directory, table = struct.pack("<I", 3), struct.pack(f"<{count}I", *[8] * count)
    where = {0: header, 512: text, 1024: directory, 1536: table, 4096: struct.pack("<QI", 0, len(packed)) + packed}
    with path.open("wb") as file:
        for at, data in where.items():
            file.seek(at)
            file.write(data)
        file.truncate(1 << 20)


def test_few_large_grains_are_kept(tmp_path: Path) -> None:
    grains(tmp_path / "large", 16 * MiB, 12)
    buffer = bytearray(512)
    with open_image(tmp_path / "large") as opened, memoryview(buffer) as view:
        tracemalloc.start()
        for i in range(12):
            opened.read_into(i * 16 * MiB, [view])
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 40 * MiB


def vmdk(grain: int, per_table: int, capacity: int) -> bytes:
    """The first KiB of an image; its grain directory follows."""
    text = b'createType="monolithicSparse"\nparentCID=ffffffff\nCID=12345678\n'
    head = struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", 1, 3, capacity, grain, 1, 1, per_table, 0, 2, 128, 0, b"", 0)
    return head.ljust(512, b"\0") + text.ljust(512, b"\0")


def vdi(block: int, blocks: int) -> bytes:
    """The first KiB of an image; its block map follows."""
    head = struct.pack("<64xIIIII256xII", 0xBEDA107F, 0x10001, 400, 1, 0, 1024, 1024)
    return (head + struct.pack("<16x4xQIIII64x", block * blocks, block, 0, blocks, 0)).ljust(1024, b"\0")


def vhd(block: int, entries: int) -> bytes:
    """The first 1536 bytes of an image; its block table follows."""
    size = block * entries
    footer = struct.pack(">8sIIQI4sI4sQQHBBII", b"conectix", 2, 1 << 16, 512, 0, b"win ", 0, b"Wi2k", size, size, 0, 0, 0, 3, 0)
    dynamic = struct.pack(">8sQQIII", b"cxsparse", (1 << 64) - 1, 1536, 1 << 16, entries, block)
    return footer.ljust(512, b"\0") + dynamic.ljust(1024, b"\0")


@pytest.mark.parametrize(
    ("fmt", "head"),
    [
        ("vmdk", vmdk(1, 1, 1 << 41)),
        ("vmdk", vmdk(1, 512, 1 << 41)),
        ("vdi", vdi(4096, 1 << 31)),
        ("vpc", vhd(2 * MiB, 1 << 29)),
    ],
    ids=["vmdk", "vmdk of long tables", "vdi", "vpc"],
)
def test_a_table_that_the_file_does_not_have_is_refused_and_not_walked_through(tmp_path: Path, fmt: str, head: bytes) -> None:
    (tmp_path / "tiny").write_bytes(head + bytes(512))
    with pytest.raises(ImageFormatError, match=r"block table of \d+ bytes at .*, expected inside the file of"):
        open_image(tmp_path / "tiny", format=fmt)


@pytest.mark.parametrize(
    ("fmt", "data"),
    [
        ("vdi", vdi(4096, 1 << 20) + bytes(4 << 20)),
        ("vmdk", vmdk(1, 512, 4096 * 512) + struct.pack("<I", 34) * 4096 + struct.pack("<I", 34) * 512),
    ],
    ids=["vdi", "vmdk"],
)
def test_blocks_that_are_all_there_are_not_looked_at_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str, data: bytes
) -> None:
    """A small file may say so of very many, and name the same table for all of them."""
    (tmp_path / "full").write_bytes(data)
    loads: list[int] = []
    load = Table._load

    def counted(table: Table, number: int) -> Any:
        loads.append(number)
        return load(table, number)

    monkeypatch.setattr(Table, "_load", counted)
    with open_image(tmp_path / "full", format=fmt) as opened:
        image: Any = opened
        looked: list[int] = []
        block = image._block
        monkeypatch.setattr(image, "_block", lambda index: looked.append(index) or block(index))
        [extent] = image.block_status()
        assert (extent.length, extent.present) == (image.size, True)
    assert len(looked) < 600
    assert len(loads) < 600


# --- VHDX ---


@pytest.fixture
def vhdx(tmp_path: Path) -> Path:
    path = tmp_path / "image.vhdx"
    qemu_img("create", "-q", "-f", "vhdx", path, "16M")
    qemu_io(path, "write -P 7 1M 1M", fmt="vhdx")
    return path


def change(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def newest(path: Path) -> tuple[int, int]:
    """Where the newest header of a VHDX image is, and the other."""
    data = path.read_bytes()
    one, two = 64 << 10, 128 << 10
    return (one, two) if data[one + 8 : one + 16] > data[two + 8 : two + 16] else (two, one)


def head(path: Path, at: int, **fields: bytes) -> None:
    """Change a header and make its checksum right."""
    data = bytearray(path.read_bytes()[at : at + 4096])
    for name, value in fields.items():
        start = {"sequence": 8, "log": 48}[name]
        data[start : start + len(value)] = value
    data[4:8] = checksum(bytes(data)).to_bytes(4, "little")
    change(path, at, data)


def test_a_header_that_is_half_written_does_not_count(vhdx: Path) -> None:
    new, old = newest(vhdx)
    change(vhdx, new + 100, b"\1")
    with open_image(vhdx) as opened:
        assert opened.read(MiB, MiB) == b"\7" * MiB
    change(vhdx, old + 100, b"\1")
    with pytest.raises(BlockError, match="checksum"):
        open_image(vhdx)


def test_an_image_that_was_not_closed_is_refused_whatever_a_torn_header_says(vhdx: Path) -> None:
    new, old = newest(vhdx)
    head(vhdx, old, log=b"\1" * 16)
    change(vhdx, new + 100, b"\1")
    with pytest.raises(UnsupportedFeatureError, match="its log has to be replayed"):
        open_image(vhdx)


def test_regions_that_have_to_be_known_are_refused_by_name(vhdx: Path) -> None:
    change(vhdx, (192 << 10) + 8, struct.pack("<I", 3))
    change(vhdx, (192 << 10) + 16 + 2 * 32, struct.pack("<16sQII", b"?" * 16, MiB, MiB, 1))
    with pytest.raises(UnsupportedFeatureError, match=r"3f3f.* is required and not known"):
        open_image(vhdx)


@pytest.mark.parametrize("offset", [1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_regions_outside_the_file_are_refused(vhdx: Path, offset: int) -> None:
    for i in range(2):
        before = vhdx.read_bytes()
        change(vhdx, (192 << 10) + 16 + i * 32 + 16, struct.pack("<Q", offset))
        with pytest.raises(ImageFormatError, match="expected inside the file"):
            open_image(vhdx)
        vhdx.write_bytes(before)
