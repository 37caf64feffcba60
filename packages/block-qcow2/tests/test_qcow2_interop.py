"""QEMU reads what is written here, and what QEMU writes is read here, over what the format offers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import is_clean, qemu_img, qemu_io

KiB, MiB = 1 << 10, 1 << 20
SIZE = 3 * MiB + 512 * 7

CREATED = [
    {},
    {"compat": "0.10"},
    *({"cluster_size": n} for n in (512, 1024, 4096, 2 * MiB)),
    *({"refcount_bits": n} for n in (1, 2, 4, 8, 32, 64)),
    {"cluster_size": 512, "refcount_bits": 1},
    {"extended_l2": "on"},
    {"extended_l2": "on", "cluster_size": 16 * KiB},
    {"extended_l2": "on", "cluster_size": 2 * MiB},
    {"lazy_refcounts": "on"},
    {"compression_type": "zstd"},
    {"compression_type": "zstd", "cluster_size": 4096, "extended_l2": "off"},
    *({"preallocation": p} for p in ("metadata", "falloc", "full")),
    {"preallocation": "metadata", "extended_l2": "on"},
]


def words(options: dict[str, Any]) -> list[str]:
    return ["-o", ",".join(f"{k}={v}" for k, v in options.items())] if options else []


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "plain"


def written_by_qemu(path: Path, rng: random.Random, *, compress: bool = True) -> None:
    """Data, zeroes and discards of many sizes, some of them compressed."""
    # Only what is not allocated can be written compressed.
    commands = [f"write -c -P 33 {2 * MiB} {MiB // 2}"] if compress else []
    for _ in range(25):
        offset = rng.randrange(SIZE // 512) * 512
        length = min(rng.choice([512, 4096, 64 * KiB, 200 * KiB]), SIZE - offset)
        pattern = rng.randrange(1, 256)
        commands.append(rng.choice([f"write -P {pattern} {offset} {length}"] * 4 + [f"write -z {offset} {length}"]))
        if rng.random() < 0.1:
            commands.append(
                f"write -z -u {offset // 65536 * 65536} 64k" if offset + 65536 < SIZE - 65536 else f"discard {offset} {length}"
            )
    qemu_io(path, *commands)


def same_here(path: Path, tmp_path: Path, **options: Any) -> None:
    raw = tmp_path / "reference.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    expected = raw.read_bytes()
    with open_image(path, format="qcow2", **options) as image:
        assert image.size == len(expected)
        assert image.read(0, image.size) == expected
        for offset, length in ((0, 1), (511, 1025), (SIZE - 3, 3), (65535, 70000)):
            assert image.read(offset, length) == expected[offset : offset + length]


@pytest.mark.parametrize("options", CREATED, ids=name)
def test_what_qemu_writes_is_read_bit_by_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "q.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *words(options), path, SIZE)
    compress = options.get("cluster_size", 65536) < 2 * MiB and "preallocation" not in options
    written_by_qemu(path, random.Random(name(options)), compress=compress)
    same_here(path, tmp_path)
    with open_image(path) as image:
        lines: list[str] = []
        assert check(image, report=lines.append).clean, lines


@pytest.mark.parametrize("options", CREATED, ids=name)
def test_qemu_reads_what_is_written_here_over_what_qemu_wrote(tmp_path: Path, options: dict[str, Any]) -> None:
    rng = random.Random(name(options) + "w")
    path = tmp_path / "q.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *words(options), path, SIZE)
    written_by_qemu(path, rng, compress=options.get("cluster_size", 65536) < MiB and "preallocation" not in options)
    raw = tmp_path / "model.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    model = bytearray(raw.read_bytes())
    with open_image(path, read_only=False) as image:
        for _ in range(40):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 4096, 100 * KiB]), SIZE - offset)
            if rng.random() < 0.7:
                data = rng.randbytes(length)
                image.write(offset, data)
            else:
                data = bytes(length)
                image.write_zeroes(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = data
    raw.write_bytes(model)
    is_clean(path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)


OURS = [
    Options(),
    Options(version=2),
    Options(cluster_size=512, refcount_bits=1),
    Options(cluster_size=2 * MiB),
    Options(refcount_bits=64),
    Options(extended_l2=True),
    Options(compression_type="zstd"),
    Options(lazy_refcounts=True),
    Options(preallocation="metadata"),
    Options(preallocation="falloc", extended_l2=True),
    Options(preallocation="full"),
]


@pytest.mark.parametrize("options", OURS, ids=str)
def test_images_created_here_are_images_to_qemu(tmp_path: Path, options: Options) -> None:
    rng = random.Random(str(options))
    path, raw = tmp_path / "o.qcow2", tmp_path / "model.raw"
    create_image(path, SIZE, options=options)
    is_clean(path)
    model = bytearray(SIZE)
    with open_image(path, read_only=False) as image:
        for _ in range(30):
            offset = rng.randrange(SIZE)
            data = rng.randbytes(min(rng.choice([1, 512, 70 * KiB]), SIZE - offset))
            image.write(offset, data)
            model[offset : offset + len(data)] = data
        cluster = image.cluster_size
        for at in range(0, SIZE, cluster):
            if rng.random() < 0.2:
                data = (bytes([rng.randrange(256)]) * cluster)[: SIZE - at]
                image.write_compressed(at, data)
                model[at : at + len(data)] = data
    raw.write_bytes(model)
    is_clean(path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    written_by_qemu(path, rng, compress=False)
    same_here(path, tmp_path)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("extended", [False, True])
def test_a_chain_reads_and_writes_as_qemu_does(tmp_path: Path, fmt: str, extended: bool) -> None:
    rng = random.Random(7)
    base, middle, top = tmp_path / "base", tmp_path / "middle", tmp_path / "sub" / "top"
    top.parent.mkdir()
    qemu_img("create", "-q", "-f", fmt, base, MiB)
    qemu_io(base, "write -P 1 0 1M", fmt=fmt)
    qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base",
        "-F",
        fmt,
        *words({"extended_l2": (extended and "on") or "off"}),
        middle,
        2 * MiB,
    )
    qemu_io(middle, "write -P 2 100k 50k", "write -z 300k 20k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "../middle", "-F", "qcow2", top, SIZE)
    qemu_io(top, "write -P 3 120k 1k")
    same_here(top, tmp_path, allow=True)
    raw = tmp_path / "model.raw"
    qemu_img("convert", "-O", "raw", top, raw)
    model = bytearray(raw.read_bytes())
    before = base.read_bytes(), middle.read_bytes()
    with open_image(top, read_only=False, allow=True) as image:
        for _ in range(40):
            offset = rng.randrange(SIZE)
            data = rng.randbytes(min(rng.choice([1, 700, 5000]), SIZE - offset))
            if rng.random() < 0.3:
                data = bytes(len(data))
                image.write_zeroes(offset, len(data), unmap=True)
            else:
                image.write(offset, data)
            model[offset : offset + len(data)] = data
    raw.write_bytes(model)
    is_clean(top)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", top, raw)
    assert (base.read_bytes(), middle.read_bytes()) == before


@pytest.mark.parametrize("raw_external", ["on", "off"])
def test_an_external_data_file_is_read_and_written(tmp_path: Path, raw_external: str) -> None:
    path, data = tmp_path / "meta.qcow2", tmp_path / "data"
    qemu_img("create", "-q", "-f", "qcow2", *words({"data_file": data, "data_file_raw": raw_external}), path, SIZE)
    written_by_qemu(path, random.Random(raw_external), compress=False)
    same_here(path, tmp_path, allow=True)
    raw = tmp_path / "model.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    model = bytearray(raw.read_bytes())
    with open_image(path, read_only=False, allow=True) as image:
        image.write(777, b"here" * 5000)
        model[777 : 777 + 20000] = b"here" * 5000
        image.write_zeroes(MiB, 200000, unmap=True)
        model[MiB : MiB + 200000] = bytes(200000)
    raw.write_bytes(model)
    is_clean(path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    if raw_external == "on":
        assert data.read_bytes()[:SIZE] == model


def test_snapshots_go_both_ways(tmp_path: Path) -> None:
    path, raw = tmp_path / "s.qcow2", tmp_path / "out.raw"
    create_image(path, SIZE)
    contents = {}
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        for i, who in enumerate(("first", "second", "näme with spaces")):
            image.write(i * 70000, bytes([i + 1]) * 150000)
            table.create(who)
            contents[who] = image.read(0, SIZE)
    is_clean(path)
    qemu_io(path, "write -P 99 0 2M")
    qemu_img("snapshot", "-c", "theirs", path)
    qemu_io(path, "write -P 98 1M 1M")
    is_clean(path)
    for who, content in contents.items():
        qemu_img("convert", "-l", f"snapshot.name={who}", "-O", "raw", path, raw)
        assert raw.read_bytes() == content
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        assert [s.name for s in table.list] == [*contents, "theirs"]
        table.apply(table.find("theirs"))
        assert image.read(0, 2 * MiB) == bytes([99]) * (2 * MiB)
        table.delete(table.find("second"))
        table.apply(table.find("first"))
        assert image.read(0, SIZE) == contents["first"]
    is_clean(path)


def test_snapshot_entries_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "s.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        entry = table.create("a")
        special = entry._replace(id="not-a-number", vm_state_size=5 << 32, icount=42, extra=b"from the future!")
        table.list[0] = special
        table.create("b")
        assert table.list[1].id == "1"
    with open_image(path, read_only=False) as image:
        table = Snapshots(image)
        assert table.list[0] == special
        table.delete(table.find("b"))
    with open_image(path) as image:
        assert Snapshots(image).list == [special]
    is_clean(path)


def test_an_image_in_use_is_refused_both_ways(tmp_path: Path) -> None:
    from block_qcow2.errors import ImageInUseError

    path = tmp_path / "busy.qcow2"
    create_image(path, MiB)
    with open_image(path, read_only=False):
        assert "lock" in qemu_img("info", path, status=1)
        assert "lock" in qemu_img("check", path, status=1)
        qemu_img("info", "-U", path)
        with pytest.raises(ImageInUseError):
            open_image(path)
        with pytest.raises(ImageInUseError):
            create_image(path, MiB)
        open_image(path, force_share=True).close()
    with open_image(path):
        qemu_img("info", path)
        assert "lock" in qemu_img("resize", path, "2M", status=1)
