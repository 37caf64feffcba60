"""stratovirt-img: StratoVirt's words and lines, qemu-img's exit codes, and nothing half-done left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.qcow2.create import Options

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20


def test_create_prints_what_stratovirt_prints(img: Any) -> None:
    assert img("create", "a.raw", "1M") == (0, "Stratovirt-img: fmt=raw size=1048576\n", "")
    assert img("create", "-f", "qcow2", "-o", "cluster_size=4k", "-o", "refcount_bits=8", "a.qcow2", "1G").out == (
        "Stratovirt-img: fmt=qcow2 cluster_size=4096 extended_l2=off compression_type=zlib size=1073741824 "
        "lazy_refcounts=off refcount_bits=8\n"
    )
    is_clean(Path("a.qcow2"))
    assert img("create", "-f", "qcow2", "plain.qcow2", "1G").status == 0
    assert Path("plain.qcow2").stat().st_size == 262144
    assert img("create", "b.raw", "1000").out == "Stratovirt-img: fmt=raw size=1024\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Not enough arguments"),
        (["frobnicate"], "Command not found: frobnicate"),
        (["create"], "Image creation requires path and size parameters"),
        (["create", "x"], "Image creation requires size parameters"),
        (["create", "x", "1M", "y"], "Unexpected argument: y"),
        (["create", "x", "0"], "can't be zero"),
        (["create", "x", "1Q"], "Invalid image size '1Q'"),
        (["create", "-f", "vmdk", "x", "1M"], "Unknown format type 'vmdk'"),
        (["create", "-o", "cluster_size=4k", "x", "1M"], "Format raw does not support parameter 'cluster_size'"),
        (["create", "-f", "qcow2", "-o", "cluster_size=3k", "x", "1M"], "cluster_size=3072"),
        (["create", "-f", "qcow2", "-o", "shape=round", "x", "1M"], "Invalid parameter 'shape'"),
        (["create", "-f", "qcow2", "-o", "refcount_bits=3", "x", "1M"], "refcount_bits=3"),
        (["create", "-f"], "missing argument for option '-f'"),
        (["create", "--frob", "x", "1M"], "unrecognized option '--frob'"),
        (["check"], "Image check requires path"),
        (["check", "-r", "some", "x"], "Unknown option value for -r \"some\"(expects 'leaks' or 'all')"),
        (["check", "nowhere"], "nowhere: No such file"),
        (["resize", "x"], "Not enough arguments"),
        (["snapshot", "-l", "-c", "a", "x"], "Cannot mix '-l', '-a', '-c', '-d'"),
        (["snapshot"], "Image snapshot requires path"),
        (["convert", "x"], "Must specify image file name"),
        (["convert", "-c", "-O", "raw", "x", "y"], "Compression not supported"),
        (["compare", "x"], "Expecting two image file names"),
        (["rebase", "x"], "rebase needs -b"),
        (["dd", "of=x"], "Must specify both"),
        (["measure"], "Either --size N or one filename"),
        (["info", "--output", "xml", "x"], "--output xml"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_made(img: Any, words: list[str], says: str) -> None:
    said = img(*words)
    assert said.status in (1, 2)
    assert said.out == ""
    assert says in said.err
    assert list(Path.cwd().iterdir()) == []


def test_an_image_in_use_is_not_overwritten(img: Any) -> None:
    img("create", "-f", "qcow2", "busy", "1M")
    with open_image("busy", read_only=False) as image:
        image.write(0, b"precious")
        image.flush()
        said = img("create", "-f", "qcow2", "busy", "1M")
        assert (said.status, "lock" in said.err) == (1, True)
        assert img("convert", "-n", "-O", "qcow2", "busy", "busy").status == 1
    with open_image("busy") as image:
        assert image.read(0, 8) == b"precious"


def test_check_has_the_exit_codes_of_qemu_img(img: Any) -> None:
    img("create", "a.raw", "1M")
    assert img("check", "a.raw") == (63, "", "stratovirt-img: This image format does not support checks\n")
    img("create", "-f", "qcow2", "a", "1M")
    assert img("check", "a").status == 0
    assert img("check", "a").out == "No errors were found on the image.\nImage end offset: 262144\n"
    data = bytearray(Path("a").read_bytes())
    data[131072 + 8 : 131072 + 10] = b"\0\1"  # cluster 4 counts one reference
    Path("a").write_bytes(data + bytes(65536))
    said = img("check", "a")
    assert said.status == 3
    assert said.out.startswith("Leaked cluster 4 refcount=1 reference=0\n1 leaked clusters were found on the image.\n")
    assert "Leaked" not in img("check", "-no_print_error", "a").out
    assert json.loads(img("check", "--output", "json", "a").out)["leaks"] == 1
    said = img("check", "-r", "leaks", "a")
    assert said.status == 0
    assert "\t1 leaked clusters\n\t0 corruptions\n" in said.out
    is_clean(Path("a"))
    data[131072 + 6 : 131072 + 8] = b"\0\0"  # the L1 table's cluster counts none
    Path("a").write_bytes(data)
    assert img("check", "a").status == 2
    assert img("check", "-r", "all", "a").status == 0
    is_clean(Path("a"))


def test_resize(img: Any) -> None:
    for fmt in ("raw", "qcow2"):
        img("create", "-f", fmt, "a", "1M")
        assert img("resize", "a", "+1M") == (0, "Image resized.\n", "")
        assert img("resize", "-f", fmt, "a", "5M").status == 0
        said = img("resize", "a", "1M")
        assert (said.status, "shrink" in said.err) == (1, True)
        assert img("resize", "a", "100").status == 1
        assert img("resize", "--shrink", "a", "-2M").status == 0
        assert json.loads(qemu_img("info", "--output", "json", "-f", fmt, "a"))["virtual-size"] == 3 * MiB


def test_a_version_2_image_is_no_raw_image(img: Any) -> None:
    img("create", "-f", "qcow2", "-o", "compat=0.10", "a", "1M")
    assert img("check", "a").status == 0
    before = Path("a").stat().st_size
    assert img("resize", "a", "2M").status == 0
    assert Path("a").stat().st_size == before
    is_clean(Path("a"))


def test_an_overlay_that_grows_does_not_show_what_its_backing_image_has_there(img: Any) -> None:
    Path("base").write_bytes(b"secret!!" * (MiB // 4))
    img("create", "-f", "qcow2", "-b", "base", "-F", "raw", "top", "1M")
    assert img("resize", "top", "3M").status == 1
    assert img("resize", "--allow-chain", "top", "3M").status == 0
    with open_image("top", allow=True) as image:
        assert image.read(MiB, 2 * MiB) == bytes(2 * MiB)
        assert image.read(MiB - 8, 8) == b"secret!!"
    is_clean(Path("top"))


def test_snapshots(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "1M")
    header = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT\r\n"
    assert img("snapshot", "-l", "a").out == "Snapshot list:\n" + header
    qemu_io(Path("a"), "write -P 1 0 1M")
    assert img("snapshot", "-c", "first", "a") == (0, "", "")
    assert img("snapshot", "-c", "first", "a").err == "stratovirt-img: Snapshot first exists!\n"
    qemu_io(Path("a"), "write -P 2 0 1M")
    [line] = img("snapshot", "-l", "a").out.splitlines()[2:]
    assert line.split()[:4] == ["1", "first", "0", "B"]
    assert img("snapshot", "-a", "first", "a").status == 0
    qemu_io(Path("a"), "read -P 1 0 1M")
    assert img("snapshot", "-d", "first", "a").status == 0
    assert img("snapshot", "-d", "first", "a").err == "stratovirt-img: Snapshot with name first does not exist\n"
    is_clean(Path("a"))
    img("create", "a.raw", "1M")
    assert "Operation not supported" in img("snapshot", "-c", "x", "a.raw").err


def test_info_and_map_say_what_qemu_img_says(img: Any) -> None:
    img("create", "-f", "qcow2", "-o", "cluster_size=4k", "base", "4M")
    qemu_io(Path("base"), "write -P 1 100k 300k", "write -z 1M 64k")
    img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "4M")
    qemu_io(Path("top"), "write -P 2 64k 64k")
    for name in ("base", "top"):
        ours = json.loads(img("info", "--output", "json", name).out)
        theirs = json.loads(qemu_img("info", "--output", "json", name))
        theirs.pop("children", None)
        ours["full-backing-filename"] = ours.get("backing-filename")
        theirs["full-backing-filename"] = theirs.get("backing-filename")
        assert ours == theirs
        assert img("info", name).out.replace(str(Path.cwd()) + "/", "") == qemu_img("info", name) or name == "top"
    ours = json.loads(img("map", "--allow-chain", "--output", "json", "top").out)
    assert ours == json.loads(qemu_img("map", "--output", "json", "top"))
    assert img("map", "--allow-chain", "top").out.split("\n")[0] == qemu_img("map", "top").split("\n")[0]
    assert len(json.loads(img("info", "--backing-chain", "--allow-chain", "--output", "json", "top").out)) == 2


def test_nothing_that_an_image_names_is_opened_unasked(img: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"root" * 1024)
    create_image("evil", MiB, options=Options(backing_file=str(secret), backing_format="raw"))
    for words in (
        ["convert", "-O", "raw", "evil", "out"],
        ["compare", "evil", "secret"],
        ["map", "evil"],
        ["measure", "-O", "raw", "evil"],
        ["dd", "if=evil", "of=out"],
        ["info", "--backing-chain", "evil"],
        ["commit", "evil"],
        ["rebase", "-b", "", "evil"],
    ):
        said = img(*words)
        assert said.status in (1, 2), words
        assert "has to be allowed" in said.err, words
    assert not Path("out").exists()
    assert secret.read_bytes() == b"root" * 1024
    assert img("info", "evil").status == 0
    assert img("check", "evil").status == 0


@pytest.fixture
def source(img: Any) -> bytes:
    """A raw image with data, zeroes and holes, named source."""
    content = bytearray(6 * MiB + 1536)
    content[:MiB] = os.urandom(MiB)
    content[3 * MiB + 5000 : 3 * MiB + 9000] = b"text" * 1000
    content[-512:] = os.urandom(512)
    Path("source").write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize(
    "words",
    [
        ["-O", "qcow2"],
        ["-c", "-O", "qcow2"],
        ["-O", "raw"],
        ["-O", "qcow2", "-o", "cluster_size=4k,extended_l2=off"],
        ["-O", "raw", "-S", "0"],
        ["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
        ["-O", "qcow2", "-m", "1"],
        ["-O", "qcow2", "-o", "extended_l2=on"],
    ],
    ids=" ".join,
)
def test_convert_keeps_every_byte(img: Any, source: bytes, words: list[str]) -> None:
    assert img("convert", "-f", "raw", *words, "source", "out") == (0, "", "")
    fmt = words[words.index("-O") + 1]
    qemu_img("compare", "-f", "raw", "-F", fmt, "source", "out")
    if fmt == "qcow2":
        is_clean(Path("out"))
    assert img("convert", "-O", "raw", "-f", fmt, "out", "back").status == 0
    assert Path("back").read_bytes() == source
    if "-S" not in words:
        assert Path("back").stat().st_blocks * 512 < 2 * MiB


def test_convert_into_an_image_that_exists_writes_its_zeroes(img: Any, source: bytes) -> None:
    img("create", "-f", "qcow2", "out", "8M")
    qemu_io(Path("out"), "write -P 255 0 8M")
    assert img("convert", "-f", "raw", "-n", "-O", "qcow2", "source", "out").status == 0
    with open_image("out") as image:
        assert image.read(0, len(source)) == source
    is_clean(Path("out"))


def test_convert_of_a_snapshot(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "1M")
    qemu_io(Path("a"), "write -P 1 0 1M")
    img("snapshot", "-c", "old", "a")
    qemu_io(Path("a"), "write -P 2 0 1M")
    assert img("convert", "-l", "old", "-O", "raw", "a", "out").status == 0
    assert Path("out").read_bytes() == b"\1" * MiB


def test_a_conversion_that_fails_leaves_no_target(img: Any, source: bytes) -> None:
    img("convert", "-f", "raw", "-O", "qcow2", "source", "a")
    with open_image("a") as image:
        table = int(image.l1[0]) & 0x00FFFFFFFFFFFE00
    data = bytearray(Path("a").read_bytes())
    data[table + 3 * 8 : table + 4 * 8] = (1 << 63 | 512).to_bytes(8, "big")
    Path("a").write_bytes(data)
    said = img("convert", "-O", "raw", "a", "out")
    assert said.status == 1
    assert "L2 table" in said.err
    assert not Path("out").exists()


def test_ctrl_c_leaves_no_target(img: Any, monkeypatch: pytest.MonkeyPatch, source: bytes) -> None:
    from block_qcow2.img import convert

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "copy", interrupted)
    assert img("convert", "-f", "raw", "-O", "qcow2", "source", "out").status == 130
    assert not Path("out").exists()


def test_compare(img: Any, source: bytes) -> None:
    img("convert", "-f", "raw", "-O", "qcow2", "source", "same")
    assert img("compare", "-f", "raw", "source", "same") == (0, "Images are identical.\n", "")
    with open_image("same", read_only=False) as image:
        image.write(3 * MiB + 6000, b"X")
    assert img("compare", "-f", "raw", "source", "same") == (1, f"Content mismatch at offset {3 * MiB + 6000}!\n", "")
    assert img("compare", "source", "nowhere").status == 2
    img("create", "larger", "9M")
    img("create", "smaller", "8M")
    assert img("compare", "larger", "smaller").out == "Warning: Image size mismatch!\nImages are identical.\n"
    assert img("compare", "-s", "larger", "smaller") == (1, "Strict mode: Image size mismatch!\n", "")


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "extended_l2=on"])
def test_an_image_that_stood_alone_keeps_its_zeroes_over_a_backing_image(img: Any, options: str) -> None:
    Path("below").write_bytes(b"b" * (4 * MiB))
    assert img("create", "-f", "qcow2", "-o", options, "top", "3M").status == 0
    with open_image("top", read_only=False) as image:
        image.write(MiB + 100, b"t" * 70_000)
        before = image.read(0, image.size)
    assert img("rebase", "-b", "below", "-F", "raw", "top").status == 0
    with open_image("top", allow=True) as image:
        assert image.read(0, image.size) == before
    qemu_img("check", "top")


def test_commit_and_rebase_keep_the_content(img: Any) -> None:
    img("create", "-f", "qcow2", "base", "2M")
    qemu_io(Path("base"), "write -P 1 0 2M")
    img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", "4M")
    qemu_io(Path("top"), "write -P 2 64k 128k", "write -z 1M 64k", "write -P 3 3M 4k")
    with open_image("top", allow=True) as image:
        before = image.read(0, image.size)
    Path("other").write_bytes(b"\1" * (MiB // 2) + b"\7" * MiB)
    assert img("rebase", "--allow-chain", "-b", "other", "-F", "raw", "top").status == 0
    with open_image("top", allow=True) as image:
        assert image.read(0, image.size) == before
    is_clean(Path("top"))
    assert img("commit", "--allow-chain", "top") == (0, "Image committed.\n", "")
    with open_image("top", allow=True) as image:
        assert image.read(0, image.size) == before
    assert Path("other").read_bytes() == before
    assert img("rebase", "--allow-chain", "-b", "", "top").status == 0
    with open_image("top") as image:
        assert image.backing_file is None
        assert image.read(0, image.size) == before
    is_clean(Path("top"))


def test_an_encrypted_image_is_made_and_converted(img: Any, source: bytes) -> None:
    Path("key").write_bytes(b"open sesame")
    assert img("create", "-f", "qcow2", "-o", "encrypt.format=luks", "secret", "8M").status == 1
    assert img("create", "-f", "qcow2", "-o", "encrypt.format=luks", "--key-file", "key", "secret", "1M").status == 0
    with open_image("secret", read_only=False, passphrase=b"open sesame") as image:
        image.write(0, source[:MiB])
    assert source[:64] not in Path("secret").read_bytes()
    said = img("convert", "-O", "raw", "secret", "out")
    assert (said.status, "passphrase" in said.err) == (1, True)
    assert img("convert", "-O", "raw", "--key-file", "key", "secret", "out").status == 0
    assert Path("out").read_bytes() == source[:MiB]
    assert '"encrypted": true' in img("info", "--output", "json", "secret").out


def test_amend(img: Any) -> None:
    img("create", "-f", "qcow2", "-o", "compat=0.10", "a", "1M")
    qemu_io(Path("a"), "write -P 5 0 1M")
    assert img("amend", "-o", "lazy_refcounts=on", "a").status == 1
    assert img("amend", "-o", "compat=1.1,lazy_refcounts=on,size=2M", "a") == (0, "", "")
    data = json.loads(qemu_img("info", "--output", "json", "a"))
    assert data["virtual-size"] == 2 * MiB
    details = data["format-specific"]["data"]
    assert (details["compat"], details["lazy-refcounts"]) == ("1.1", True)
    qemu_io(Path("a"), "read -P 5 0 1M", "read -P 0 1M 1M")
    is_clean(Path("a"))
    assert img("amend", "-o", "backing_file=b,backing_fmt=raw", "a").status == 0
    assert json.loads(img("info", "--output", "json", "a").out)["backing-filename"] == "b"


def test_bench(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "4M")
    said = img("bench", "-c", "500", "-d", "8", "-w", "--pattern", "7", "--flush-interval", "100", "a")
    assert said.status == 0
    assert said.out.startswith(
        "Sending 500 write requests, 4096 bytes each, 8 in parallel (starting at offset 0, step size 4096)\n"
        "Sending flush every 100 draining requests\nRun "
    )
    qemu_io(Path("a"), "read -P 7 0 2000k")
    is_clean(Path("a"))
    assert img("bench", "-c", "1000", "-s", "64k", "--aio", "threads", "a").status == 0
    assert "flush-interval needs -w" in img("bench", "--flush-interval", "5", "a").err


def test_dd(img: Any, source: bytes) -> None:
    assert img("dd", "-f", "raw", "if=source", "of=out", "bs=512", "skip=3", "count=100").status == 0
    assert Path("out").read_bytes() == source[1536 : 1536 + 51200]


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512,refcount_bits=1", "cluster_size=2M", "extended_l2=on"])
def test_measure_says_what_qemu_img_says(img: Any, source: bytes, options: str) -> None:
    words = ["measure", "-O", "qcow2", "-o", options]
    assert img(*words, "--size", "10G").out == qemu_img(*words, "--size", "10G")
    # QEMU looks for holes in the file below: there are none where clusters are written as a whole.
    qemu_img("convert", "-f", "raw", "-S", "0", "-O", "qcow2", "source", "a")
    assert img(*words, "a").out == qemu_img(*words, "a")


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=2M"])
def test_measure_counts_bitmaps_and_the_header_of_encryption(img: Any, options: str) -> None:
    img("create", "-f", "qcow2", "a", "10G")
    for words in (["-g", "4096", "a", "first"], ["a", "a longer name for a bitmap"], ["-g", "512", "a", "x"]):
        qemu_img("bitmap", "--add", *words)
    words = ["measure", "-O", "qcow2", "-o", options]
    assert img(*words, "a").out == qemu_img(*words, "a")
    assert json.loads(img(*words, "--output", "json", "a").out) == json.loads(qemu_img(*words, "--output", "json", "a"))
    words = ["measure", "-O", "qcow2", "-o", f"{options},encrypt.format=luks,encrypt.key-secret=s", "--size", "1G"]
    assert img(*words).out == qemu_img(*words, "--object", "secret,id=s,data=x")


def test_measure_of_a_snapshot(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "8M")
    img("snapshot", "-c", "empty", "a")
    qemu_io(Path("a"), "write 0 4M")
    assert img("measure", "-O", "qcow2", "-l", "empty", "a").out == img("measure", "-O", "qcow2", "--size", "8M").out + (
        "bitmaps size: 0\n"
    )


def test_the_command_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "block_qcow2.img", "create", "-f", "qcow2", str(tmp_path / "a"), "1M"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Stratovirt-img: fmt=qcow2")
    done = subprocess.run([sys.executable, "-m", "block_qcow2.img", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("stratovirt-img version ")
