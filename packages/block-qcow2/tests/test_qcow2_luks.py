"""LUKS images: QEMU reads what is encrypted here, and the other way round; without the passphrase nothing is served."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from block_qcow2 import create_image, open_disk, open_image
from block_qcow2.errors import BlockError, ImageFormatError, OpenError, UnsupportedFeatureError
from block_qcow2.luks import WrongPassphraseError
from block_qcow2.qcow2.check import check
from block_qcow2.qcow2.create import Options
from block_qcow2.qcow2.snapshots import Snapshots

from .conftest import Driver
from .qemu import qemu_img

MiB = 1 << 20
SIZE = 3 * MiB
SECRET = "secret,id=s,data=open sesame"
PASSPHRASE = b"open sesame"
OURS = Options(passphrase=PASSPHRASE, luks_rounds=1000)


def qemu_io(path: Path, *commands: str) -> None:
    words = ["qemu-io", "--object", SECRET, "--image-opts"]
    for command in commands:
        words += ["-c", command]
    words.append(f"driver=qcow2,encrypt.key-secret=s,file.filename={path}")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def created_by_qemu(path: Path, options: str) -> None:
    """qemu-img times its key derivation, and gives up when the kernel's clock says that it took no time: then once more."""
    words = ["qemu-img", "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", options, str(path), str(SIZE)]
    for _ in range(50):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def is_clean(path: Path) -> None:
    qemu_img("check", "-q", "--object", SECRET, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}")


def plain(path: Path, out: Path) -> bytes:
    source = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    qemu_img("convert", "--object", SECRET, "--image-opts", source, "-O", "raw", out)
    return out.read_bytes()


@pytest.mark.parametrize(
    "cipher",
    ["", ",encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256", ",encrypt.cipher-alg=aes-128"],
)
def test_what_qemu_encrypts_is_read_and_written(tmp_path: Path, cipher: str) -> None:
    path, out = tmp_path / "l.qcow2", tmp_path / "out"
    created_by_qemu(path, f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{cipher}")
    qemu_io(path, "write -P 1 100k 300k", "write -P 2 1M 3k", "write -z 1500k 64k")
    model = bytearray(plain(path, out))
    rng = random.Random(cipher)
    with open_image(path, read_only=False, passphrase=PASSPHRASE) as image:
        assert image.read(0, SIZE) == model
        for _ in range(25):
            offset = rng.randrange(SIZE)
            data = rng.randbytes(min(rng.choice([1, 512, 5000, 70000]), SIZE - offset))
            if rng.random() < 0.3:
                data = bytes(len(data))
                image.write_zeroes(offset, len(data))
            else:
                image.write(offset, data)
            model[offset : offset + len(data)] = data
        Snapshots(image).create("s")
        image.write(0, b"after")
        model[:5] = b"after"
        assert image.read(0, SIZE) == model
        assert check(image).clean
    is_clean(path)
    assert plain(path, out) == model


def test_qemu_reads_what_is_encrypted_here(tmp_path: Path) -> None:
    path, out = tmp_path / "l.qcow2", tmp_path / "out"
    create_image(path, SIZE, options=OURS)
    is_clean(path)
    with open_image(path, read_only=False, passphrase=PASSPHRASE) as image:
        image.write(70_000, b"some secret text" * 1000)
    assert b"some secret text" not in path.read_bytes()
    assert plain(path, out) == bytes(70_000) + b"some secret text" * 1000 + bytes(SIZE - 86_000)
    qemu_io(path, "write -P 9 0 1M")
    with open_image(path, passphrase=PASSPHRASE) as image:
        assert image.read(0, MiB) == b"\x09" * MiB
    is_clean(path)


def test_without_the_passphrase_nothing_is_served(tmp_path: Path) -> None:
    path = tmp_path / "l.qcow2"
    create_image(path, SIZE, options=OURS)
    with open_image(path, read_only=False, passphrase=PASSPHRASE) as image:
        image.write(0, b"x" * 512)
    with pytest.raises(WrongPassphraseError):
        open_image(path, passphrase=b"guess")
    with pytest.raises(OpenError, match="passphrase is needed"):
        open_disk(path, format="qcow2")
    before = path.read_bytes()
    with open_image(path, read_only=False) as image:
        assert check(image).clean
        with pytest.raises(UnsupportedFeatureError, match="passphrase is needed"):
            image.read(0, 512)
        with pytest.raises(UnsupportedFeatureError, match="passphrase is needed"):
            image.write(0, b"y" * 512)
    assert path.read_bytes() == before


@pytest.mark.parametrize("aio", ["off", "io_uring"])
def test_a_guest_reads_back_what_it_wrote(tmp_path: Path, aio: str) -> None:
    path = tmp_path / "l.qcow2"
    create_image(path, SIZE, options=OURS)
    disk = open_disk(path, format="qcow2", aio=aio, passphrase=PASSPHRASE)
    disk.lock()
    driver = Driver(disk)
    assert driver.write(4096, b"guest" * 1000) == 0
    assert driver.read(4096, 5000) == b"guest" * 1000
    assert driver.read(0, 4096) == bytes(4096)
    disk.close()
    assert b"guestguest" not in path.read_bytes()
    is_clean(path)


def test_a_header_with_absurd_numbers_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "l.qcow2"
    create_image(path, SIZE, options=OURS)
    data = bytearray(path.read_bytes())
    at = data.index(b"LUKS\xba\xbe")
    for offset, value in (
        (164, b"\xff" * 4),
        (108, b"\xff" * 4),
        (212, b"\xff" * 4),
        (248, b"\xff" * 4),
        (252, b"\xff" * 4),
        (6, b"\0\2"),
    ):
        broken = bytearray(data)
        broken[at + offset : at + offset + len(value)] = value
        path.write_bytes(broken)
        with pytest.raises(BlockError, match="LUKS"):
            open_image(path, passphrase=PASSPHRASE)


@pytest.mark.parametrize("slot", [0, 5])
@pytest.mark.parametrize("offset", [0, 1, 8 + 63, 1 << 20])
def test_key_slots_that_overlap_something_are_refused(tmp_path: Path, slot: int, offset: int) -> None:
    """Erasing such a slot would destroy the header, another slot, or data."""
    path = tmp_path / "evil.qcow2"
    create_image(path, MiB, options=Options(passphrase=b"a", luks_rounds=1000))
    with open_image(path) as image:
        where = image.header.luks_header[0]
    with path.open("r+b") as file:
        file.seek(where + 208 + 48 * slot + 40)
        file.write(offset.to_bytes(4, "big"))
    with pytest.raises(ImageFormatError, match=r"LUKS key slot \d: key material at sector"):
        open_image(path, passphrase=b"a")
