"""Options that qemu-img has: taken and meant, or refused by name. The reference is qemu-img itself where it can be asked."""

from __future__ import annotations

import errno
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image, read_secret
from block_qcow2.qcow2.create import Options

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20


def virtual_size(path: str) -> int:
    return int(json.loads(qemu_img("info", "--output=json", path))["virtual-size"])


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "words", [["new", "1000"], ["-o", "size=1M", "new"], ["-o", "size=1000", "new"], ["new", "1.5K"]], ids=" ".join
)
def test_sizes_are_what_qemu_img_makes_of_them(img: Any, fmt: str, words: list[str]) -> None:
    assert img("create", "-f", fmt, *words).status == 0
    qemu_img("create", "-f", fmt, *["theirs" if w == "new" else w for w in words])
    assert virtual_size("new") == virtual_size("theirs")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "size=1M", "x", "2M"], "The image size must be specified only once"),
        (["-f", "qcow2", "-o", "encryption=on", "x", "1M"], "encryption: qcow2's old AES"),
        (["-f", "qcow2", "-o", "encrypt.format=aes", "x", "1M"], "encrypt.format=aes: qcow2's old"),
        (["-f", "qcow2", "-o", "encrypt.cipher-alg=aes-128", "x", "1M"], "encrypt.cipher-alg is of encrypted images"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.cipher-alg=serpent-256", "x", "1M"], "serpent-256: expected one of"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.cipher-mode=ctr", "x", "1M"], "cipher-mode=ctr: expected one of xts"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.hash-alg=md5", "x", "1M"], "hash-alg=md5: expected one of sha1"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.cipher-alg=aes-192", "x", "1M"], "aes-192: expected one of aes-128"),
        (["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.colour=red", "x", "1M"], "Invalid parameter 'encrypt.colour'"),
        (["-o", "preallocation=metadata", "x", "1M"], "preallocation=metadata: raw images have off, falloc and full"),
        (["-f", "qcow2", "-o", "preallocation=some", "x", "1M"], "Invalid preallocation mode 'some'"),
        (["-f", "qcow2", "-o", "extent_size_hint=8G", "x", "1M"], "Invalid extent_size_hint '8G'"),
        (["--image-opts", "driver=qcow2,file.filename=x"], "option '--image-opts': images are given as a file name"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_create_refuses_it_names(img: Any, words: list[str], says: str) -> None:
    said = img("create", *words)
    assert (said.status, says in said.err) == (1, True), said
    assert list(Path.cwd().iterdir()) == []


def test_help_lists_every_option_of_qemu_img(img: Any) -> None:
    def names(text: str) -> set[str]:
        return set(re.findall(r"^  ([a-z0-9_.-]+)=", text, re.MULTILINE))

    for command in (["create", "-f", "qcow2"], ["convert", "-O", "qcow2"]):
        ours, theirs = img(*command, "-o", "help"), qemu_img("create", "-f", "qcow2", "-o", "help")
        assert ours.status == 0
        assert names(theirs) - names(ours.out) == {"encryption"}  # which is refused with the reason
    theirs = qemu_img("create", "-f", "raw", "-o", "help", "a.raw")
    assert names(theirs) == names(img("create", "-f", "raw", "-o", "help").out)
    assert "  encrypt.keyslot" in img("amend", "-o", "help").out


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_raw_images_have_their_space(img: Any, mode: str) -> None:
    said = img("create", "-o", f"preallocation={mode},nocow=on,extent_size_hint=1M", "a", "4M")
    assert said.out == f"Stratovirt-img: fmt=raw size=4194304 preallocation={mode}\n"
    assert Path("a").stat().st_blocks * 512 >= 4 * MiB
    assert img("resize", "-f", "raw", "--preallocation", mode, "a", "6M").status == 0
    assert Path("a").stat().st_size == 6 * MiB
    assert Path("a").stat().st_blocks * 512 >= 6 * MiB


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,extended_l2=on", "data_file=data"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_growing_with_preallocation(img: Any, options: str, mode: str) -> None:
    img("create", "-f", "qcow2", "-o", options, "a", "3000K")
    chain = ["--allow-chain"] if "data_file" in options else []
    with open_image("a", read_only=False, allow=bool(chain)) as image:
        image.write(2900 * 1024, b"\7" * (100 * 1024))
        image.write(MiB, b"\7" * MiB)
        image.discard(MiB, MiB)  # what was in these clusters must not come back
    assert img("resize", *chain, "--preallocation", mode, "a", "9M").status == 0
    is_clean(Path("a"))
    mapped = json.loads(qemu_img("map", "--output=json", "a"))
    assert all(part["present"] for part in mapped if part["start"] >= 3 * MiB)
    qemu_io("a", "read -P 7 2900K 100K", "read -P 0 3000K 6216K")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_growing_without_room_for_it_gives_back_what_it_took(img: Any, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a")

    img("create", "-f", fmt, "a", "1M")
    monkeypatch.setattr("block_qcow2.prealloc.fill", full)
    monkeypatch.setattr("block_qcow2.qcow2.create.fill", full)
    said = img("resize", "-f", fmt, "--preallocation", "falloc", "a", "+8M")
    assert (said.status, said.out, said.err) == (1, "", "stratovirt-img: a: No space left on device\n")
    assert virtual_size("a") == MiB
    if fmt == "qcow2":
        is_clean("a")


def test_what_growing_with_preallocation_refuses(img: Any) -> None:
    create_image("base", 8 * MiB)
    create_image("over", MiB, options=Options(backing_file="base", backing_format="qcow2"))
    assert "longer than the image" in img("resize", "--allow-chain", "--preallocation=full", "over", "4M").err
    assert "only be used for growing" in img("resize", "--shrink", "--preallocation=full", "base", "1M").err
    img("create", "raw", "1M")
    assert "metadata is of qcow2" in img("resize", "-f", "raw", "--preallocation=metadata", "raw", "2M").err
    assert virtual_size("base") == 8 * MiB


SECRET = ["--object", "secret,id=s,data=geheim"]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("encrypt.cipher-alg=aes-128", {"cipher-alg": "aes-128", "cipher-mode": "xts"}),
        ("encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256", {"ivgen-alg": "essiv"}),
        ("encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc", {"cipher-alg": "aes-128", "cipher-mode": "cbc"}),
        ("encrypt.ivgen-alg=plain,encrypt.hash-alg=sha512,encrypt.iter-time=20", {"ivgen-alg": "plain", "hash-alg": "sha512"}),
    ],
)
def test_encrypted_images_with_other_ciphers(img: Any, options: str, shown: dict[str, str]) -> None:
    options = f"encrypt.format=luks,encrypt.key-secret=s,{options}"
    words = ["create", *SECRET, "-f", "qcow2", "-o", options, "a", "1M"]
    assert img(*words).status == 0
    details = json.loads(qemu_img("info", "--output=json", "a"))["format-specific"]["data"]["encrypt"]
    assert shown.items() <= details.items()
    Path("plain").write_bytes(b"\7" * MiB)
    assert img("convert", *SECRET, "-f", "raw", "-O", "qcow2", "-o", options, "plain", "b").status == 0
    source = "driver=qcow2,file.filename=b,encrypt.key-secret=s"
    qemu_img("convert", *SECRET, "--image-opts", source, "-O", "raw", "back")
    assert Path("back").read_bytes() == b"\7" * MiB
    measured = img("measure", "-O", "qcow2", "-o", options, "--size", "1M")
    assert measured.out == qemu_img("measure", *SECRET, "-O", "qcow2", "-o", options, "--size", "1M")


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "preallocation=full", "--size", "1G"],
        ["-o", "preallocation=metadata", "--size", "1G"],
        ["-O", "qcow2", "-o", "preallocation=full", "--size", "1G"],
        ["-O", "qcow2", "-o", "preallocation=falloc,cluster_size=4k", "--size", "1G"],
        ["-O", "qcow2", "-o", "preallocation=metadata", "--size", "1G"],
        ["-O", "qcow2", "-o", "refcount_bits=64,extended_l2=on", "--size", "3G"],
        ["-O", "qcow2", "-o", "compat=0.10", "--size", "1000"],
        ["--size", "1E"],
    ],
    ids=" ".join,
)
def test_measure_says_what_qemu_img_says(img: Any, words: list[str]) -> None:
    assert img("measure", *words).out == qemu_img("measure", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["-O", "qcow2", "-o", "refcount_bits=3", "--size", "1G"],
        ["-O", "qcow2", "-o", "cluster_size=3k", "--size", "1G"],
        ["-O", "qcow2", "--size", "1E"],
        ["--size", "15E"],
        ["-p", "--size", "1G"],
        ["-q", "--size", "1G"],
    ],
    ids=" ".join,
)
def test_measure_refuses_what_qemu_img_refuses(img: Any, words: list[str]) -> None:
    theirs = subprocess.run(["qemu-img", "measure", *words], capture_output=True, text=True, check=False)
    assert "required size" not in theirs.stdout
    said = img("measure", *words)
    assert (said.status, said.out) == (1, "")


@pytest.mark.parametrize("command", ["info", "map"])
@pytest.mark.parametrize("option", ["-p", "-q"])
def test_options_that_would_mean_nothing_are_refused(img: Any, command: str, option: str) -> None:
    create_image("a", MiB)
    assert img(command, option, "a") == (1, "", f"stratovirt-img: unrecognized option '{option}'\n")


# --- commit -b ---


def chain_of_three() -> None:
    """base 4 MiB of 1; mid 2 MiB with 2 at 1 MiB; top 4 MiB with 3 at 0.5 MiB. Between 2 and 4 MiB top reads zeroes."""
    qemu_img("create", "-f", "qcow2", "base", "4M")
    qemu_io("base", "write -P 1 0 4M")
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid", "2M")
    qemu_io("mid", "write -P 2 1M 64k")
    qemu_img("create", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "4M")
    qemu_io("top", "write -P 3 512k 64k")


def test_commit_to_an_image_further_down(img: Any) -> None:
    chain_of_three()
    qemu_img("convert", "-O", "raw", "top", "before")
    top, mid = Path("top").read_bytes(), Path("mid").read_bytes()
    assert img("commit", "--allow-chain", "-b", "base", "top") == (0, "Image committed.\n", "")
    is_clean(Path("base"))
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "base", "before")
    assert (Path("top").read_bytes(), Path("mid").read_bytes()) == (top, mid)


def test_commit_names_what_could_be_committed_to(img: Any) -> None:
    chain_of_three()
    said = img("commit", "--allow-chain", "-b", "elsewhere", "top")
    assert said.status == 1
    assert re.search(r"-b elsewhere: no backing file of top; there are: \S*/mid, \S*/base$", said.err)
    assert "opening it has to be allowed" in img("commit", "-b", "base", "top").err


# --- caches, sharing, snapshots, bench ---


def test_cache_modes_wherever_qemu_img_has_them(img: Any) -> None:
    chain_of_three()
    for mode in ("none", "writeback", "writethrough", "directsync", "unsafe"):
        for words in (
            ["amend", "-t", mode, "-o", "lazy_refcounts=on", "top"],
            ["check", "-T", mode, "top"],
            ["compare", "-T", mode, "--allow-chain", "top", "top"],
            ["convert", "-t", mode, "-T", mode, "--allow-chain", "-O", "qcow2", "top", "out"],
            ["rebase", "-t", mode, "-T", mode, "--allow-chain", "-b", "mid", "-F", "qcow2", "top"],
            ["commit", "-t", mode, "-d", "--allow-chain", "top"],
            ["bench", "-t", mode, "-c", "3", "--allow-chain", "top"],
        ):
            assert img(*words).status == 0, words
    for command in (["amend", "-o", "compat=1.1"], ["bench"], ["commit", "--allow-chain"], ["rebase", "-b", ""]):
        assert "-t fast: expected one of writeback" in img(*command, "-t", "fast", "top").err


def test_cache_unsafe_does_not_wait_for_the_disk(img: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain_of_three()
    count = 0

    def counting(_: int) -> None:
        nonlocal count
        count += 1

    monkeypatch.setattr("os.fdatasync", counting)
    assert img("commit", "-d", "--allow-chain", "-t", "unsafe", "top").status == 0
    assert count == 0
    assert img("commit", "-d", "--allow-chain", "top").status == 0
    assert count > 0


def test_rebase_shares_the_backing_files_only(img: Any) -> None:
    chain_of_three()
    qemu_img("create", "-f", "qcow2", "new", "4M")
    words = ["rebase", "--allow-chain", "-b", "new", "-F", "qcow2", "top"]
    with open_image("mid", read_only=False, allow=True):
        assert "lock" in img(*words).err
        assert img(*words[:1], "-U", *words[1:]).status == 0
    qemu_io("top", "read -P 3 512k 64k", "read -P 2 1M 64k", "read -P 1 0 512k")
    with open_image("top"[:3], read_only=False, allow=True):
        assert "lock" in img("rebase", "-U", "-u", "-b", "", "top").err


def test_snapshots_by_id_and_name(img: Any) -> None:
    create_image("a", MiB)
    for number in (1, 2):
        qemu_io("a", f"write -P {number} 0 1M")
        assert img("snapshot", "-c", f"s{number}", "a").status == 0
    for text, value in (
        ("snapshot.id=1", 1),
        ("snapshot.name=s2", 2),
        ("snapshot.id=2,snapshot.name=s2", 2),
        ("s1", 1),
        ("2", 2),
    ):
        assert img("convert", "-l", text, "a", "out").status == 0
        assert Path("out").read_bytes() == bytes([value]) * MiB
    for text, says in (
        ("snapshot.id=1,snapshot.name=s2", "No snapshot with snapshot.id=1 and snapshot.name=s2"),
        ("snapshot.size=1", "Invalid parameter 'snapshot.size'"),
    ):
        said = img("convert", "-l", text, "a", "other")
        assert (said.status, says in said.err, Path("other").exists()) == (1, True, False)


def test_bench_takes_the_options_of_qemu_img(img: Any) -> None:
    create_image("a", MiB)
    assert img("bench", "-c", "9", "-i", "threads", "-t", "writeback", "a").status == 0
    assert img("bench", "-c", "9", "-n", "-t", "none", "a").status == 0
    said = img("bench", "-w", "-c", "9", "--flush-interval", "4", "--no-drain", "a")
    assert "Sending flush every 4 non-draining requests\n" in said.out
    assert "Sending flush every 4 draining requests\n" in img("bench", "-w", "-c", "9", "--flush-interval", "4", "a").out
    assert "--no-drain needs --flush-interval" in img("bench", "-w", "--no-drain", "a").err
    assert "-n needs -t none" in img("bench", "-n", "a").err
    assert "-n is -i native" in img("bench", "-n", "-i", "threads", "-t", "none", "a").err


def test_secrets_are_checked_where_they_are_not_needed(img: Any) -> None:
    create_image("a", MiB)
    for words in (["check"], ["snapshot", "-l"], ["bitmap", "--add"]):
        name = ["b"] if words[0] == "bitmap" else []
        assert img(*words, *SECRET, "a", *name).status == 0
        assert "--object secret needs id=" in img(*words, "--object", "secret", "a", *name).err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--object", "secret,id=s,data=b3Blbg!=,format=base64"], "secret s: no base64: "),
        (["--object", "secret,id=s,data=b3Blb,format=base64"], "secret s: no base64: "),
        (["--object", "secret,id=s,data="], "secret s: is empty"),
        (["--object", "secret,id=s,file=no/such"], "secret s: no/such: No such file or directory"),
        (["--key-file", "no/such"], "--key-file: no/such: No such file or directory"),
        (["--key-file", "/dev/zero"], "--key-file: /dev/zero: expected at most 65536 bytes"),
        (["--key-file", "/dev/null"], "--key-file: is empty"),
    ],
)
def test_secrets_that_are_none_are_refused_by_name(img: Any, words: list[str], says: str) -> None:
    create_image("a", MiB)
    said = img("map", *words, "a")
    assert (said.status, said.out) == (1, "")
    assert says in said.err


def test_secrets_may_be_of_any_bytes_and_in_lines(tmp_path: Path) -> None:
    assert read_secret("s", data="caf\udce9") == b"caf\xe9"
    (tmp_path / "lines").write_text("b3Bl\nbg==\n")
    assert read_secret("s", file=str(tmp_path / "lines"), format="base64") == b"open"
    (tmp_path / "raw").write_bytes(b"open\n")
    assert read_secret("s", file=str(tmp_path / "raw")) == b"open\n"


@pytest.mark.parametrize(
    "words",
    [
        ["check", "--format", "qcow2", "--repair", "leaks", "a"],
        ["check", "--repair=all", "a"],
        ["info", "--format=qcow2", "--force-share", "a"],
        ["map", "--format", "qcow2", "--force-share", "--start-offset=0", "--max-length=1M", "a"],
        ["bench", "--force-share", "-c", "1", "-q", "a"],
        ["measure", "--force-share", "-O", "qcow2", "a"],
        ["bitmap", "--merge", "b", "--source-file", "other", "--source-format", "qcow2", "a", "b"],
        ["check", "-f", "vpc", "other.vpc"],
    ],
    ids=" ".join,
)
def test_every_long_name_that_qemu_img_has(img: Any, words: list[str]) -> None:
    for name in ("a", "other"):
        qemu_img("create", "-q", "-f", "qcow2", name, "1M")
        qemu_img("bitmap", "--add", name, "b")
    qemu_img("create", "-q", "-f", "vpc", "other.vpc", "1M")
    status = img(*words).status
    assert subprocess.run(["qemu-img", *words], capture_output=True, check=False).returncode == status
    assert status in (0, 63)


def test_a_file_may_be_called_like_the_wish_for_help(img: Any) -> None:
    assert img("create", "--", "-h", "1M").status == 0
    assert Path("-h").stat().st_size == MiB
    assert img("create", "-h").out.startswith("stratovirt-img create")
