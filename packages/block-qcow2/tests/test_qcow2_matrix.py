"""Interoperation over pairs of everything that the format offers: images of QEMU here, and images from here in QEMU.

The rows are made in the test run: every value of every property meets every value of each other one in some row, as far as they
go together. Each row is an image that QEMU writes and one that is written here.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.qcow2.bitmaps import Bitmaps
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import qemu_img

KiB, MiB = 1 << 10, 1 << 20
SIZE = MiB + 512 * 7
PASSPHRASE = "matrix"

PROPERTIES: dict[str, list[Any]] = {
    "version": [3, 2],
    "cluster": [65536, 512, 4096, 16384, 2 * MiB],
    "refcount_bits": [16, 1, 2, 4, 8, 32, 64],
    "compression": ["zlib", "zstd"],
    "compressed": [False, True],
    "extended": [False, True],
    "backing": [None, "raw", "qcow2"],
    "data_file": [None, "data", "raw"],
    "preallocation": ["off", "metadata", "falloc", "full"],
    "bitmap": [False, True],
    "luks": [False, True],
    "snapshot": [False, True],
}
Row = dict[str, Any]


def goes(row: Row) -> bool:
    """Whether the format (and qemu-img 7.2) has images like that; a row may lack properties yet."""
    r = {name: row.get(name, values[0]) for name, values in PROPERTIES.items()}
    external, luks = r["data_file"], r["luks"]
    return not (
        (r["version"] == 2 and (r["refcount_bits"] != 16 or r["compression"] != "zlib" or r["extended"] or external))
        or (r["version"] == 2 and (r["bitmap"] or luks))
        or (r["extended"] and row.get("cluster", 65536) < 16384)
        or (external and (r["compressed"] or r["snapshot"] or luks or (external == "raw" and r["backing"])))
        or (luks and (r["compressed"] or r["preallocation"] != "off"))
        or (r["preallocation"] != "off" and r["backing"] and not r["extended"])
        or (r["preallocation"] != "off" and r["compressed"])  # only what is not allocated can be written compressed
        or (r["snapshot"] and r["refcount_bits"] == 1)
        or (r["compressed"] and r["refcount_bits"] == 1)
        or (r["compressed"] and r["snapshot"] and r["refcount_bits"] < 8)  # many of them share a cluster
    )


def rows() -> Iterator[Row]:
    """Rows that together have every pair of values that goes together."""
    rng = random.Random(1)
    names = list(PROPERTIES)
    wanted = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in PROPERTIES[a]
        for y in PROPERTIES[b]
        if goes(filled({a: x, b: y}, rng))
    }
    while wanted:
        best, score = None, 0
        for _ in range(20):
            pair = rng.choice(sorted(wanted, key=str))
            row = filled(dict(pair), rng)
            covered = sum(1 for p in pairs(row) if p in wanted)
            if goes(row) and covered > score:
                best, score = row, covered
        if best is not None:
            wanted -= set(pairs(best))
            yield best


def filled(row: Row, rng: random.Random) -> Row:
    """The row with the rest of its properties: any value that goes with those that it has; the first one if none does."""
    row = dict(row)
    for name in rng.sample(list(PROPERTIES), len(PROPERTIES)):
        if name not in row:
            fit = [v for v in PROPERTIES[name] if goes(row | {name: v})] or PROPERTIES[name][:1]
            # Keys take QEMU long to derive: not more encrypted images than the pairs need.
            row[name] = fit[0] if name == "luks" else rng.choice(fit)
    return row


def pairs(row: Row) -> list[Any]:
    return list(itertools.combinations([(name, row[name]) for name in PROPERTIES], 2))


def name(row: Row) -> str:
    return "-".join(f"{k}={v}" for k, v in row.items() if v != PROPERTIES[k][0]) or "plain"


ROWS = list(rows())


class Bench:
    """A folder with the files of one row, and the words that qemu-img wants for its images."""

    def __init__(self, folder: Path, row: Row) -> None:
        self.folder, self.row = folder, row
        self.rng = random.Random(name(row))
        self.backing: Path | None = None
        self.model = bytearray(SIZE)
        if row["backing"]:
            self.backing = folder / "backing"
            raw = folder / "backing.raw"
            content = self.rng.randbytes(700 * KiB)
            raw.write_bytes(content)
            qemu_img("convert", "-O", row["backing"], raw, self.backing)
            self.model[: len(content)] = content
        self.secret = ["--object", f"secret,id=s,data={PASSPHRASE}"] if row["luks"] else []

    def options(self, path: Path) -> str:
        r = self.row
        words = [f"compat={'0.10' if r['version'] == 2 else '1.1'}", f"cluster_size={r['cluster']}"]
        if r["version"] == 3:
            words += [f"refcount_bits={r['refcount_bits']}", f"compression_type={r['compression']}"]
            words.append(f"extended_l2={'on' if r['extended'] else 'off'}")
        if r["data_file"]:
            words += [f"data_file={path}.data", f"data_file_raw={'on' if r['data_file'] == 'raw' else 'off'}"]
        if r["luks"]:
            words += ["encrypt.format=luks", "encrypt.key-secret=s", "encrypt.iter-time=10"]
        return ",".join([*words, f"preallocation={r['preallocation']}"])

    def by_qemu(self, path: Path) -> None:
        words = [*self.secret, "-f", "qcow2", "-o", self.options(path)]
        if self.backing:
            words += ["-b", str(self.backing), "-F", self.row["backing"]]
        qemu_img("create", "-q", *words, path, SIZE)

    def here(self, path: Path) -> None:
        r = self.row
        create_image(
            path,
            SIZE,
            options=Options(
                version=r["version"],
                cluster_size=r["cluster"],
                refcount_bits=r["refcount_bits"],
                compression_type=r["compression"],
                extended_l2=r["extended"],
                backing_file=str(self.backing) if self.backing else None,
                backing_format=r["backing"],
                data_file=f"{path}.data" if r["data_file"] else None,
                data_file_raw=r["data_file"] == "raw",
                preallocation=r["preallocation"],
                passphrase=PASSPHRASE.encode() if r["luks"] else None,
                luks_rounds=1000,
            ),
        )

    def opened(self, path: Path, *, read_only: bool = True) -> Any:
        passphrase = PASSPHRASE.encode() if self.row["luks"] else None
        image = open_image(path, format="qcow2", read_only=read_only, allow=True, passphrase=passphrase)
        image.file.volatile = True  # no power fails here
        return image

    def qemu_image(self, path: Path) -> list[str]:
        """How qemu-img is told of the image."""
        if not self.row["luks"]:
            return [str(path)]
        return [*self.secret, "--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s"]

    def is_clean_and_same(self, path: Path) -> None:
        qemu_img("check", "-q", "-T", "unsafe", *self.qemu_image(path))
        model = self.folder / "model.raw"
        model.write_bytes(self.model)
        if self.row["luks"]:
            qemu_img("compare", "-q", *self.qemu_image(path), f"driver=raw,file.filename={model}")
        else:
            qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", path, model)
        with self.opened(path) as image:
            assert image.read(0, SIZE) == self.model
            assert check(image).clean

    # --- writing ---

    def some(self) -> Iterator[tuple[int, bytes]]:
        """Places and what comes there; zeroes among them."""
        for n in range(12):
            offset = self.rng.randrange(SIZE // 512) * 512
            length = min(self.rng.choice([512, 4096, 70 * KiB]), SIZE - offset)
            data = bytes(length) if n % 4 == 3 else bytes([self.rng.randrange(1, 256)]) * length
            self.model[offset : offset + length] = data
            yield offset, data

    def write_by_qemu(self, path: Path) -> None:
        words = ["qemu-io", "-t", "unsafe", *self.secret]
        cluster = self.row["cluster"]
        if self.row["compressed"] and cluster < MiB and path.name == "by_qemu":  # only what is not allocated yet
            where = (SIZE // 2) // cluster * cluster
            words += ["-c", f"write -c -P 9 {where} {cluster}"]
            self.model[where : where + cluster] = b"\t" * cluster
        for offset, data in self.some():
            words += ["-c", f"write -P {data[0]} {offset} {len(data)}" if data[0] else f"write -z {offset} {len(data)}"]
        target = self.qemu_image(path)[-1] if self.row["luks"] else str(path)
        words += ["--image-opts", target] if self.row["luks"] else ["-f", "qcow2", target]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout

    def write_here(self, path: Path) -> None:
        with self.opened(path, read_only=False) as image:
            cluster = image.cluster_size
            if self.row["compressed"]:
                for at in range(0, SIZE - cluster, 5 * cluster if cluster > 512 else 300 * cluster):
                    data = (self.rng.randbytes(8) * cluster)[:cluster]
                    image.write_compressed(at, data)
                    self.model[at : at + cluster] = data
            for offset, data in self.some():
                if any(data):
                    image.write(offset, data)
                else:
                    image.write_zeroes(offset, len(data), unmap=self.rng.random() < 0.5)


@pytest.mark.extras
@pytest.mark.parametrize("row", ROWS, ids=name)
def test_images_go_both_ways(tmp_path: Path, row: Row) -> None:
    bench = Bench(tmp_path, row)
    start = bytes(bench.model)
    for maker, other in (
        (bench.by_qemu, (bench.write_by_qemu, bench.write_here)),
        (bench.here, (bench.write_here, bench.write_by_qemu)),
    ):
        path = tmp_path / maker.__name__
        bench.model[:] = start
        maker(path)
        theirs = maker == bench.by_qemu
        other[0](path)
        kept = bytes(bench.model)
        if row["snapshot"]:
            take_snapshot(bench, path, theirs=theirs)
        if row["bitmap"]:
            add_bitmap(bench, path, theirs=theirs)
        bench.is_clean_and_same(path)
        other[1](path)
        bench.is_clean_and_same(path)
        if row["bitmap"]:
            with bench.opened(path) as image:
                table = Bitmaps(image)
                assert any(table.bits(table.list[0]))
        if row["snapshot"]:
            with bench.opened(path) as image:
                [s] = Snapshots(image).list
                image.show_snapshot(s.l1_table_offset, s.l1_size, s.disk_size)
                assert image.read(0, SIZE) == kept


def take_snapshot(bench: Bench, path: Path, *, theirs: bool) -> None:
    if theirs and not bench.row["luks"]:
        qemu_img("snapshot", "-c", "kept", path)
    else:
        with bench.opened(path, read_only=False) as image:
            Snapshots(image).create("kept")


def add_bitmap(bench: Bench, path: Path, *, theirs: bool) -> None:
    if theirs and not bench.row["luks"]:
        qemu_img("bitmap", "--add", "-g", "4096", path, "b")
    else:
        with bench.opened(path, read_only=False) as image:
            table = Bitmaps(image)
            table.add("b", 4096)
            table.store()


def test_every_pair_of_values_that_goes_together_is_in_some_row() -> None:
    covered = {p for row in ROWS for p in pairs(row)}
    for a, b in itertools.combinations(PROPERTIES, 2):
        for x, y in itertools.product(PROPERTIES[a], PROPERTIES[b]):
            assert ((a, x), (b, y)) in covered or not any(goes(filled({a: x, b: y}, random.Random(n))) for n in range(30))


@pytest.mark.parametrize(
    "options", [Options(), Options(cluster_size=4096), Options(extended_l2=True)], ids=lambda o: f"{o.cluster_size}"
)
def test_an_ext4_file_system_that_was_written_here_is_clean(tmp_path: Path, options: Options) -> None:
    source, raw, path, out = (tmp_path / n for n in ("tree", "fs.raw", "fs.qcow2", "out.raw"))
    source.mkdir()
    rng = random.Random(4)
    for n in range(40):
        (source / f"file{n}").write_bytes(rng.randbytes(rng.randrange(1, 60_000)))
    shutil.copytree(source, source / "again")
    raw.write_bytes(bytes(16 * MiB))
    mkfs = ["mkfs.ext4", "-q", "-F", "-d", str(source), str(raw)]
    subprocess.run(mkfs, check=True, capture_output=True, timeout=60, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    content = raw.read_bytes()
    create_image(path, len(content), options=options)
    places = list(range(0, len(content), 24 * KiB))
    rng.shuffle(places)
    with open_image(path, read_only=False) as image:
        for at in places:
            part = content[at : at + 24 * KiB]
            if any(part):
                image.write(at, part)
        Snapshots(image).create("whole")
    qemu_img("check", "-q", path)
    qemu_img("convert", "-O", "raw", path, out)
    fsck = ["e2fsck", "-fn", str(out)]
    done = subprocess.run(
        fsck, capture_output=True, text=True, check=False, timeout=60, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.read_bytes() == content
