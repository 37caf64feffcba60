"""stratovirt-img convert's finer points: backing files, bitmaps, offload, salvage, encryption. qemu-img is the measure."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from block_qcow2 import open_image
from block_qcow2.img.copy import copy
from block_qcow2.img.progress import Progress

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20


@pytest.fixture
def source(img: Any) -> bytes:
    """A raw image of 6 MiB and three sectors with data, zeroes and holes."""
    content = bytearray(6 * MiB + 1536)
    content[:MiB] = random.Random(1).randbytes(MiB)
    content[3 * MiB + 5000 : 3 * MiB + 9000] = b"text" * 1000
    content[-512:] = b"end!" * 128
    Path("source").write_bytes(content)
    return bytes(content)


def test_a_new_overlay_takes_what_the_source_has_itself(img: Any) -> None:
    img("create", "-f", "qcow2", "base", "4M")
    qemu_io(Path("base"), "write -P 1 0 4M")
    img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "5M")
    qemu_io(Path("top"), "write -P 2 1M 64k", "write -z 2M 1M", "write -P 3 4M 64k")
    for words in (["-B", "base", "-F", "qcow2"], ["-o", "backing_file=base,backing_fmt=qcow2"]):
        assert img("convert", "--allow-chain", "-O", "qcow2", *words, "top", "out") == (0, "", "")
        qemu_img("compare", "top", "out")
        is_clean(Path("out"))
        assert json.loads(qemu_img("info", "--output", "json", "out"))["backing-filename"] == "base"
        assert Path("out").stat().st_size < MiB
    # A source without a backing image is all of what the target has.
    img("create", "-f", "qcow2", "alone", "5M")
    qemu_io(Path("alone"), "write -P 5 1M 4k")
    assert img("convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", "alone", "out").status == 0
    qemu_img("compare", "alone", "out")
    assert "needs its format" in img("convert", "-O", "qcow2", "-B", "base", "alone", "out").err


def test_bitmaps_go_along(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "8M")
    qemu_img("bitmap", "--add", "-g", "4096", "a", "one")
    qemu_img("bitmap", "--add", "a", "two")
    qemu_io(Path("a"), "write 5000 1", "write 3M 200k")
    qemu_img("bitmap", "--disable", "a", "two")
    assert img("convert", "-O", "qcow2", "--bitmaps", "a", "ours") == (0, "", "")
    qemu_img("convert", "-O", "qcow2", "--bitmaps", "a", "theirs")
    ours, theirs = (json.loads(qemu_img("info", "--output", "json", n))["format-specific"]["data"] for n in ("ours", "theirs"))
    assert ours["bitmaps"] == theirs["bitmaps"]
    is_clean(Path("ours"))
    from block_qcow2.qcow2.bitmaps import Bitmaps

    with open_image("ours") as a, open_image("theirs") as b:
        one, other = Bitmaps(a), Bitmaps(b)
        assert [one.bits(m) for m in one.list] == [other.bits(m) for m in other.list]
        assert any(map(any, (one.bits(m) for m in one.list)))


def test_a_broken_bitmap_is_left_out_when_asked(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "1M")
    img("bitmap", "--add", "a", "good")
    img("bitmap", "--add", "a", "bad")
    from block_qcow2.qcow2.bitmaps import IN_USE, Bitmaps

    with open_image("a", read_only=False) as image:
        image.release_bitmaps()
        bitmaps = Bitmaps(image)
        bitmaps.find("bad").flags |= IN_USE
        bitmaps._write_flags()
    said = img("convert", "-O", "qcow2", "--bitmaps", "a", "out")
    assert (said.status, "'bad'" in said.err, Path("out").exists()) == (1, True, False)
    said = img("convert", "-O", "qcow2", "--bitmaps", "--skip-broken-bitmaps", "a", "out")
    assert (said.status, "Skipping inconsistent bitmap 'bad'" in said.err) == (0, True)
    assert [b["name"] for b in json.loads(qemu_img("info", "--output", "json", "out"))["format-specific"]["data"]["bitmaps"]] == [
        "good"
    ]


@pytest.mark.parametrize("words", [["-W"], ["-W", "-m", "4"], ["-C"], ["-T", "none", "-t", "none"], ["-t", "writeback"]])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_every_way_of_copying_keeps_every_byte(img: Any, source: bytes, words: list[str], fmt: str) -> None:
    if "none" in words and len(source) % 4096:
        Path("source").write_bytes(source := source.ljust(7 * MiB, b"\0"))
    assert img("convert", "-f", "raw", "-O", fmt, *words, "source", "out") == (0, "", "")
    qemu_img("compare", "-f", "raw", "-F", fmt, "source", "out")
    assert img("convert", "-f", fmt, "-O", "raw", *words, "out", "back").status == 0
    assert Path("back").read_bytes() == source
    if "-C" not in words:  # the kernel does not look for zeroes
        assert Path("back").stat().st_blocks * 512 <= 3 * MiB


def test_offload_looks_through_a_chain(img: Any) -> None:
    img("create", "-f", "qcow2", "base", "4M")
    qemu_io(Path("base"), "write -P 1 0 4M")
    img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "4M")
    qemu_io(Path("top"), "write -P 2 1M 64k", "write -z 2M 1M")
    assert img("convert", "--allow-chain", "-C", "-O", "raw", "top", "out").status == 0
    qemu_img("compare", "-F", "raw", "top", "out")


def test_offload_where_the_kernel_refuses(img: Any, source: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    assert img("convert", "-f", "raw", "-C", "-O", "raw", "source", "out").status == 0
    assert Path("out").read_bytes() == source


def test_a_target_that_exists_gets_its_zeroes(img: Any, source: bytes) -> None:
    for fmt in ("raw", "qcow2"):
        for words in (["-n"], ["-n", "-W"], ["-n", "-S", "0"]):
            img("create", "-f", fmt, "out", "8M")
            qemu_io(Path("out"), "write -P 255 0 8M", fmt=fmt)
            assert img("convert", "-f", "raw", *words, "-O", fmt, "source", "out").status == 0
            with open_image("out", format=fmt) as image:
                assert image.read(0, len(source)) == source
    img("create", "-f", "qcow2", "out", "8M")
    qemu_io(Path("out"), "write -P 255 0 8M")
    assert img("convert", "-f", "raw", "-n", "-c", "-O", "qcow2", "source", "out").status == 0
    with open_image("out") as image:
        assert image.read(0, len(source)) == source


def test_what_can_be_read_is_salvaged(img: Any, source: bytes) -> None:
    img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=64k", "source", "a")
    with open_image("a") as image:
        table = int(image.l1[0]) & 0x00FFFFFFFFFFFE00
    data = bytearray(Path("a").read_bytes())
    data[table + 5 * 8 : table + 6 * 8] = (1 << 63 | 512).to_bytes(8, "big")
    Path("a").write_bytes(data)
    assert img("convert", "-O", "raw", "a", "out").status == 1
    assert not Path("out").exists()
    said = img("convert", "--salvage", "-O", "raw", "a", "out")
    assert said.status == 0
    assert "warning: error while reading" in said.err
    expected = source[: 5 * 65536] + bytes(65536) + source[6 * 65536 :]
    assert Path("out").read_bytes() == expected


def test_a_rate_is_kept(img: Any, source: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    from block_qcow2.img import copy as module

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    assert img("convert", "-f", "raw", "-S", "0", "-r", "1M", "-O", "raw", "source", "out").status == 0
    assert sum(slept) == pytest.approx(len(source) / MiB, rel=0.2)


def test_encrypted_targets_and_sources_by_secrets(img: Any, source: bytes) -> None:
    Path("key").write_bytes(b"open sesame")
    secret = ["--object", "secret,id=s0,data=open sesame"]
    words = ["-f", "raw", "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"]
    assert img("convert", *secret, *words, "source", "locked") == (0, "", "")
    opts = "driver=qcow2,file.filename=locked,encrypt.key-secret=s0"
    qemu_img("compare", *secret, "--image-opts", opts, "driver=raw,file.filename=source")
    qemu_img("check", "-q", *secret, "--image-opts", opts)
    assert img("convert", "-O", "raw", "--key-file", "key", "locked", "out").status == 0
    assert Path("out").read_bytes() == source
    assert img("compare", *secret, "-F", "raw", "locked", "source") == (0, "Images are identical.\n", "")
    assert img("compare", "-F", "raw", "locked", "source").status == 4
    assert img("map", *secret, "--output", "json", "locked").status == 0
    # An overlay of it, of which only the image below is encrypted.
    img("create", "-f", "qcow2", "-u", "-b", "locked", "-F", "qcow2", "top", "8M")
    assert img("dd", "--allow-chain", *secret, "if=top", "of=out", "count=1", "bs=1M").status == 0
    assert Path("out").read_bytes() == source[:MiB]
    for wrong, says in (
        (["--object", "secret,id=s0,data=close sesame"], "no LUKS key slot"),
        (["--object", "secret,id=s0"], "--object secret needs id="),
        (["--object", "tls,id=s0"], "expected secret"),
        (["--object", "secret,id=a,data=1", "--key-secret", "b"], "No secret with id 'b'; there are: a"),
        (["--object", "secret,id=a,data=!,format=base64"], "no base64"),
        (["--key-file", "nowhere"], "--key-file: nowhere: No such file"),
    ):
        said = img("convert", "-O", "raw", *wrong, "locked", "out2")
        assert (said.status, says in said.err, Path("out2").exists()) == (1, True, False), said
    assert img("dd", "--object", "secret,id=a,data=b3BlbiBzZXNhbWU=,format=base64", "if=locked", "of=out3").status == 0
    assert "not encrypted" in img("dd", "--key-file", "key", "-f", "raw", "if=source", "of=out4").err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-c", "-W", "-O", "qcow2"], "mutually exclusive"),
        (["-C", "-S", "4k"], "copy offloading"),
        (["-n", "-O", "qcow2", "-B", "x"], "no effect"),
        (["--target-is-zero"], "requires use of -n"),
        (["--skip-broken-bitmaps"], "requires --bitmaps"),
        (["--bitmaps", "a", "-O", "qcow2"], "single source"),
        (["-O", "qcow2", "--bitmaps", "-f", "raw"], "has no bitmaps"),
        (["-t", "sometimes"], "expected one of"),
        (["-O", "qcow2", "-o", "encrypt.format=luks"], "needs a passphrase"),
        (["-O", "qcow2", "-o", "encrypt.format=aes"], "luks is"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together(img: Any, source: bytes, words: list[str], says: str) -> None:
    said = img("convert", *words, "source", "out")
    assert (said.status, says in said.err) == (1, True), said
    assert not Path("out").exists()


def test_an_interrupted_copy_ends_its_threads(img: Any, source: bytes) -> None:
    class Interrupting(Progress):
        def at(self, done: int) -> None:
            if done > MiB:
                raise KeyboardInterrupt

    img("create", "out", "8M")
    with (
        open_image("source", format="raw") as a,
        open_image("out", format="raw", read_only=False) as b,
        pytest.raises(KeyboardInterrupt),
    ):
        copy(a, b, 0, Interrupting(1, shown=False), zero=True, threads=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("copy")]
