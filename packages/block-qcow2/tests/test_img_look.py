"""info and map say what qemu-img 7.2 says, line by line."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image
from block_qcow2.images import open_any
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import qemu_img, qemu_io

MiB = 1 << 20

SECRET = ["--object", "secret,id=s,data=x"]
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


IMAGES = [
    ["-f", "raw"],
    ["-f", "qcow2"],
    ["-f", "qcow2", "-o", "compat=0.10"],
    ["-f", "qcow2", "-o", "data_file=data"],
    ["-f", "qcow2", "-o", "data_file=data,data_file_raw=on"],
    ["-f", "qcow2", "-o", "extended_l2=on,lazy_refcounts=on,refcount_bits=64,cluster_size=32k"],
    ["-f", "qcow2", "-b", "base", "-F", "qcow2"],
    ["-f", "vdi"],
    ["-f", "vhdx"],
    ["-f", "vpc"],
    ["-f", "vmdk"],
    ["-f", "vmdk", "-o", "subformat=streamOptimized"],
    [*SECRET, "-f", "qcow2", "-o", LUKS],
    [*SECRET, "-f", "qcow2", "-o", f"{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"],
    [*SECRET, "-f", "qcow2", "-o", f"{LUKS},encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha1"],
]
PLAIN = [[*words, "plain"] for words in IMAGES]
# qemu-img has neither for these without more words.
MORE = [[*words, more] for words in IMAGES[4:7] if "data_file" not in str(words) for more in ("bitmaps", "snapshots")]


@pytest.mark.parametrize("words", [*PLAIN, *MORE], ids=" ".join)
def test_info_is_what_qemu_img_prints(img: Any, words: list[str]) -> None:
    *words, more = words
    qemu_img("create", "-f", "qcow2", "base", "10M")
    qemu_img("create", *words, "a", "10M")
    if more == "bitmaps":
        qemu_img("bitmap", "--add", "a", "b0")
        qemu_img("bitmap", "--add", "--disable", "-g", "4k", "a", "b1")
    elif more == "snapshots":
        qemu_img("snapshot", "-c", "one", "a")
    assert img("info", "a").out == qemu_img("info", "a")
    ours = json.loads(img("info", "--output", "json", "a").out)
    assert ours == json.loads(qemu_img("info", "--output=json", "a"))


def scribbled(path: str, size: int, cluster: int, rng: random.Random, fmt: str) -> None:
    commands = []
    for _ in range(8):
        at = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, cluster, 5 * cluster]), size - at)
        zeroes = f"write -z {rng.choice(['-u ', ''])}{at} {length}"
        commands.append(rng.choice([f"write -P {rng.randrange(1, 255)} {at} {length}"] * 3 + [zeroes] * 2))
    qemu_io(path, *commands, fmt=fmt)


def joined(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the holes that the host's file system has inside of data, which qemu-img guesses when to look for."""
    found: list[dict[str, Any]] = []
    for e in extents:
        e["zero"] = e["zero"] and not e["data"]
        last = found[-1] if found else {"start": -1}
        alike = all(last.get(n) == e[n] for n in ("depth", "present", "zero", "data")) and ("offset" in last) == ("offset" in e)
        if alike and ("offset" not in e or last["offset"] + last["length"] == e["offset"]):
            last["length"] += e["length"]
            continue
        found.append(e)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_map_is_what_qemu_img_prints(img: Any, seed: int) -> None:
    rng = random.Random(seed)
    below = "raw" if seed % 2 else "qcow2"
    clusters = [rng.choice([512, 4096, 65536]) for _ in range(2)]
    sizes = [rng.randrange(200, 3000) * 1024 // 65536 * 65536 + 65536 for _ in range(2)]
    options = ["-o", f"cluster_size={clusters[0]}"] if below == "qcow2" else []
    qemu_img("create", "-f", below, *options, "base", sizes[0])
    scribbled("base", sizes[0], clusters[0], rng, below)
    if below == "qcow2":
        qemu_io("base", f"write -c -P 7 0 {clusters[0]}")
    qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={clusters[1]}", "-b", "base", "-F", below, "top", sizes[1])
    scribbled("top", sizes[1], clusters[1], rng, "qcow2")
    theirs = joined(json.loads(qemu_img("map", "--output=json", "top")))
    assert json.loads(img("map", "--output=json", "--allow-chain", "top").out) == theirs
    said = img("map", "--allow-chain", "top")
    if said.status == 0:
        assert said.out == qemu_img("map", "top")
    else:
        assert said.err == "stratovirt-img: File contains external, encrypted or compressed clusters.\n"
        assert "File contains external" in qemu_img("map", "top", status=1)


def test_map_names_the_files_of_a_chain_as_qemu_img_does(img: Any, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "below/base", "4M")
    qemu_io("below/base", "write -P 1 0 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "below/middle")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=data", "-b", "below/middle", "-F", "qcow2", "top")
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "below/middle", "-F", "qcow2", "absolute")
    qemu_io("top", "write -P 1 2M 1M")
    for path in ("top", str(tmp_path / "below/middle"), "absolute"):
        assert img("map", "--allow-chain", path).out == qemu_img("map", path)


def test_a_strict_comparison_says_what_it_found_as_qemu_img_does(img: Any) -> None:
    for name in ("a", "b", "c", "raw"):
        qemu_img("create", "-q", "-f", "raw" if name == "raw" else "qcow2", name, "4M")
    qemu_io("a", "write -z 1M 1M")
    qemu_io("b", "write -P 0 1M 1M")
    qemu_io("c", "write -P 1 2M 1M")
    for pair in itertools.permutations(("a", "b", "c", "raw"), 2):
        said = img("compare", "-s", *pair)
        assert (said.status, said.err) == (1, "")
        assert said.out == qemu_img("compare", "-s", *pair, status=1)


def test_names_cannot_make_up_lines_of_their_own(img: Any) -> None:
    name = "x\nbacking file: /etc/passwd\n\x1b[2J"
    create_image("a", MiB, options=Options(backing_file=name, backing_format="raw"))
    with open_any("a", read_only=False, named=False) as image:
        Snapshots(image).create(name)
    for words in (["info", "a"], ["snapshot", "-l", "a"]):
        out = img(*words).out
        assert "\x1b" not in out
        assert not [line for line in out.splitlines() if line.startswith("backing file: /etc")]
        assert "x\\nbacking file" in out
    assert json.loads(img("info", "--output", "json", "a").out)["backing-filename"] == name


def test_secrets_that_info_does_not_need_have_to_be_right(img: Any) -> None:
    create_image("a", MiB)
    assert img("info", "--object", "secret,id=s,data=x", "a").status == 0
    assert "--object secret needs id=" in img("info", "--object", "secret,id=s", "a").err
