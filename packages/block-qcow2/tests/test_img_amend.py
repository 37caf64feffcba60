"""stratovirt-img amend: options change, content does not, and QEMU agrees with the result."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from block_qcow2 import create_image, open_image
from block_qcow2.errors import BlockError
from block_qcow2.luks import WrongPassphraseError
from block_qcow2.qcow2.amend import set_refcount_bits
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .qemu import is_clean, qemu_img, qemu_io

MiB = 1 << 20


def details(name: str) -> Any:
    return json.loads(qemu_img("info", "--output", "json", name))["format-specific"]["data"]


def content(name: str) -> bytes:
    with open_image(name, allow=True) as image:
        return bytes(image.read(0, image.size))


@pytest.mark.parametrize("cluster", ["512", "4k", "64k"])
def test_the_width_of_refcounts_changes_back_and_forth(img: Any, cluster: str) -> None:
    img("create", "-f", "qcow2", "-o", f"cluster_size={cluster}", "a", "4M")
    rng = random.Random(cluster)
    with open_image("a", read_only=False) as image:
        for _ in range(60):
            image.write(rng.randrange(4 * MiB - 9000) // 512 * 512, rng.randbytes(rng.randrange(1, 9000)))
        Snapshots(image).create("one")
        image.write(0, rng.randbytes(MiB))
    before = content("a")
    for old, new in pairwise([16, 64, 2, 8, 32, 4, 16]):
        assert img("amend", "-o", f"refcount_bits={new}", "a") == (0, "", "")
        assert details("a")["refcount-bits"] == new
        is_clean(Path("a"))
        assert content("a") == before, (old, new)
        with open_image("a", read_only=False) as image:  # what follows is counted in the new width
            image.write(rng.randrange(4 * MiB - 9000), b"more")
        before = content("a")
    is_clean(Path("a"))
    said = img("amend", "-o", "refcount_bits=1", "a")
    assert (said.status, "does not fit in 1 bits" in said.err) == (1, True)
    is_clean(Path("a"))
    assert "power of two" in img("amend", "-o", "refcount_bits=3", "a").err


def test_counts_follow_in_an_image_that_stays_open(img: Any) -> None:
    create_image("a", 8 * MiB, options=Options(cluster_size=512))
    rng = random.Random(3)
    with open_image("a", read_only=False) as image:
        model = bytearray(8 * MiB)
        for bits in (1, 64, 16, 8):
            for _ in range(50):
                at, data = rng.randrange(8 * MiB - 3000), rng.randbytes(3000)
                image.write(at, data)
                model[at : at + 3000] = data
            image.discard(MiB, MiB)
            model[MiB : 2 * MiB] = bytes(MiB)
            set_refcount_bits(image, bits)
        assert image.read(0, 8 * MiB) == model
    is_clean(Path("a"))


@pytest.mark.parametrize("where", [3 << 40, 0x40200], ids=["outside the file", "inside a cluster"])
def test_a_refcount_table_that_names_impossible_blocks_is_left_alone(img: Any, where: int) -> None:
    """Also if the block would count clusters that the file does not have."""
    img("create", "-f", "qcow2", "a", "1M")
    data = bytearray(Path("a").read_bytes())
    table = int.from_bytes(data[48:56], "big")
    data[table + 8 * 100 : table + 8 * 101] = where.to_bytes(8, "big")
    data += bytes(0x50000 - len(data))
    Path("a").write_bytes(data)
    said = img("amend", "-o", "refcount_bits=64", "a")
    assert (said.status, said.out) == (1, "")
    assert f"refcount table entry 100: block at {where:#x}, expected a cluster inside the file" in said.err
    assert Path("a").read_bytes() == data


@pytest.mark.parametrize("backing", [False, True])
def test_going_back_to_version_2_keeps_the_content(img: Any, backing: bool) -> None:
    if backing:
        img("create", "-f", "raw", "base", "3M")
        Path("base").write_bytes(b"B" * (3 * MiB))
    img("create", "-f", "qcow2", *(["-b", "base", "-F", "raw"] if backing else []), "a", "4M")
    qemu_io(Path("a"), "write -P 1 0 256k", "write -z 64k 64k", "write -z -u 128k 64k", "write -z 1M 128k", "write -z 3500k 64k")
    img("snapshot", "-c", "s", "a")
    qemu_io(Path("a"), "write -P 2 1M 64k", "write -z 2M 64k", "write -z 0 64k")
    before = content("a")
    assert img("amend", "--allow-chain", "-o", "compat=0.10", "a") == (0, "", "")
    assert details("a")["compat"] == "0.10"
    is_clean(Path("a"))
    assert content("a") == before
    qemu_img("convert", "-O", "raw", "a", "out")
    assert Path("out").read_bytes() == before
    img("snapshot", "-a", "s", "a")
    qemu_io(Path("a"), "read -P 0 64k 128k", "read -P 0 1M 128k", f"read -P {66 if backing else 0} 2M 64k", "read -P 1 0 64k")
    is_clean(Path("a"))
    assert img("amend", "-o", "compat=1.1", "a").status == 0
    is_clean(Path("a"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("extended_l2=on", "extended L2 entries"),
        ("data_file=data", "external data file"),
        ("refcount_bits=8", "requires refcount_bits=16"),
    ],
)
def test_what_version_2_does_not_have_is_named(img: Any, options: str, says: str) -> None:
    img("create", "-f", "qcow2", "-o", options, "a", "1M")
    said = img("amend", "--allow-chain", "-o", "compat=0.10", "a")
    assert (said.status, says in said.err) == (1, True), said
    assert details("a")["compat"] == "1.1"


def test_bitmaps_and_resized_snapshots_prevent_it(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "1M")
    img("bitmap", "--add", "a", "b")
    assert "dirty bitmaps" in img("amend", "-o", "compat=0.10", "a").err
    img("bitmap", "--remove", "a", "b")
    img("snapshot", "-c", "s", "a")
    img("resize", "a", "2M")
    assert "Internal snapshots prevent downgrade" in img("amend", "-o", "compat=0.10", "a").err
    is_clean(Path("a"))


def test_the_data_file_gets_another_name(img: Any) -> None:
    img("create", "-f", "qcow2", "-o", "data_file=one,data_file_raw=on", "a", "1M")
    qemu_io(Path("a"), "write -P 5 0 1M")
    Path("one").rename("two")
    assert img("amend", "-o", "data_file=two,data_file_raw=off", "a") == (0, "", "")
    assert (details("a")["data-file"], details("a")["data-file-raw"]) == ("two", False)
    assert content("a") == b"\5" * MiB
    assert "cannot be set on existing" in img("amend", "-o", "data_file_raw=on", "a").err
    img("create", "-f", "qcow2", "b", "1M")
    assert "only be set for images that use" in img("amend", "-o", "data_file=x", "b").err


def test_options_that_no_image_has(img: Any) -> None:
    img("create", "-f", "qcow2", "a", "1M")
    before = Path("a").read_bytes()
    for words, says in (
        (["cluster_size=4k"], "Invalid parameter 'cluster_size'"),
        (["encrypt.cipher=x"], "Invalid parameter 'encrypt.cipher'"),
        (["compat=0.9"], "Invalid value '0.9' for compat"),
        (["encrypt.state=active"], "not encrypted with LUKS"),
        (["encrypt.state=open"], "encrypt.state"),
        (["compat=0.10,lazy_refcounts=on"], "lazy_refcounts"),
    ):
        said = img("amend", "-o", *words, "a")
        assert (said.status, says in said.err) == (1, True), said
    assert Path("a").read_bytes() == before


def secret(name: str, data: str) -> list[str]:
    return ["--object", f"secret,id={name},data={data}"]


def opens(name: str, passphrase: bytes) -> bool:
    try:
        with open_image(name, passphrase=passphrase) as image:
            assert image.read(0, 512) == b"\7" * 512
    except WrongPassphraseError:
        return False
    return True


def test_passphrases_of_an_encrypted_image_come_and_go(img: Any) -> None:
    one, two, three = secret("one", "1111"), secret("two", "2222"), secret("three", "3333")
    words = ["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=one,encrypt.iter-time=10"]
    assert img("create", *one, *words, "a", "1M").status == 0
    opts = "driver=qcow2,file.filename=a,encrypt.key-secret="
    qemu_io_words = [*one, "--image-opts", opts + "one"]
    with open_image("a", read_only=False, passphrase=b"1111") as image:
        image.write(0, b"\7" * MiB)
    new = "encrypt.state=active,encrypt.iter-time=10,encrypt.new-secret="
    assert img("amend", *one, *two, "--key-secret", "one", "-o", new + "two", "a") == (0, "", "")
    assert (opens("a", b"1111"), opens("a", b"2222"), opens("a", b"3333")) == (True, True, False)
    assert img("amend", *two, *three, "-o", new + "three,encrypt.old-secret=two,encrypt.keyslot=5", "a").status == 0
    assert opens("a", b"3333")
    qemu_img("compare", *three, "--image-opts", opts + "three", "driver=null-co,read-zeroes=on,size=1M", status=1)
    assert (
        "Refusing to overwrite" in img("amend", *two, *three, "--key-secret", "two", "-o", new + "two,encrypt.keyslot=5", "a").err
    )
    assert "no LUKS key slot" in img("amend", *secret("no", "no"), *two, "--key-secret", "no", "-o", new + "two", "a").err
    # QEMU adds one, too, and sees ours go.
    qemu_img("amend", *one, *secret("four", "4444"), "--image-opts", opts + "one", "-o", new + "four,encrypt.keyslot=7")
    assert opens("a", b"4444")
    assert img("amend", *two, "-o", "encrypt.state=inactive,encrypt.old-secret=two", "a").status == 0
    assert not opens("a", b"2222")
    assert img("amend", "-o", "encrypt.state=inactive,encrypt.keyslot=5", "a").status == 0
    assert img("amend", "-o", "encrypt.state=inactive,encrypt.keyslot=7", "a").status == 0
    assert (opens("a", b"3333"), opens("a", b"4444"), opens("a", b"1111")) == (False, False, True)
    assert "already erased" in img("amend", "-o", "encrypt.state=inactive,encrypt.keyslot=5", "a").err
    assert "No keyslots match" in img("amend", *two, "-o", "encrypt.state=inactive,encrypt.old-secret=two", "a").err
    said = img("amend", *one, "-o", "encrypt.state=inactive,encrypt.old-secret=one", "a")
    assert (said.status, "All the active keyslots" in said.err) == (1, True)
    assert opens("a", b"1111")
    qemu_img("check", "-q", *qemu_io_words)
    assert img("amend", "--force", *one, "-o", "encrypt.state=inactive,encrypt.old-secret=one", "a").status == 0
    with pytest.raises(BlockError), open_image("a", passphrase=b"1111"):
        pass
