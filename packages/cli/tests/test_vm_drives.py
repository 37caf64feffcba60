"""Drives of a machine, in test mode: image formats, their caches, and the files that an image names."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from block_qcow2 import create_image
from block_qcow2.qcow2.create import Options
from pystratovirt import main
from pystratovirt.cmdline import parse
from pystratovirt.cmdline.config import Config
from pystratovirt.errors import VmError
from pystratovirt.vm import VirtualMachine
from vmm_core.machine.core import MachineEvent

CAPACITY = 0xF010_0100
SIZE = 1 << 20


def post(event: MachineEvent) -> None:
    raise AssertionError(f"nobody asked for {event}")


def machine(folder: Path, drive: str, *words: str) -> VirtualMachine:
    options = ["-mod-test", str(folder / "unused"), "-drive", f"id=d,direct=off,{drive}", *words]
    return VirtualMachine(parse([*options, "-device", "virtio-blk-device,drive=d,id=d"]), post)


def descriptors(*, settle: bool = False) -> int:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("caches", ["", ",l2-cache-size=1M,refcount-cache-size=64K"])
def test_a_qcow2_image_is_the_disk_that_it_describes(tmp_path: Path, caches: str) -> None:
    create_image(tmp_path / "disk", SIZE)
    assert (tmp_path / "disk").stat().st_size < SIZE
    with machine(tmp_path, f"file={tmp_path}/disk,format=qcow2{caches}") as vm:
        vm.start()
        assert int.from_bytes(vm.test_access().read(CAPACITY, 8), "little") == SIZE // 512


def test_a_backing_file_is_opened_only_when_the_drive_allows_it(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    create_image(tmp_path / "disk", SIZE, options=Options(backing_file=str(tmp_path / "base"), backing_format="raw"))
    before = descriptors(settle=True)
    with pytest.raises(VmError, match=r"-drive id=d: .*base.* has to be allowed \(external-files=allow\)$"):
        machine(tmp_path, f"file={tmp_path}/disk,format=qcow2")
    assert descriptors() == before
    with machine(tmp_path, f"file={tmp_path}/disk,format=qcow2,external-files=allow") as vm:
        assert vm.disks["d"].size == SIZE


def test_a_qcow2_image_in_a_raw_drive_is_just_bytes(tmp_path: Path) -> None:
    create_image(tmp_path / "disk", 1 << 30)
    size = (tmp_path / "disk").stat().st_size
    with machine(tmp_path, f"file={tmp_path}/disk") as vm:
        assert vm.disks["d"].size == size


def test_what_is_no_qcow2_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with pytest.raises(VmError, match=r"-drive id=d: .*disk"):
        machine(tmp_path, f"file={tmp_path}/disk,format=qcow2")


def test_a_qcow2_image_is_locked_for_as_long_as_the_machine_has_it(tmp_path: Path) -> None:
    create_image(tmp_path / "disk", SIZE)
    with machine(tmp_path, f"file={tmp_path}/disk,format=qcow2"), pytest.raises(VmError, match=r"-drive id=d: .*lock"):
        machine(tmp_path, f"file={tmp_path}/disk,format=qcow2")
    machine(tmp_path, f"file={tmp_path}/disk,format=qcow2").close()


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """An image of qemu-img's making, with `geheim` as its passphrase and a sector of 1s."""
    path = tmp_path / "luks"
    secret = ["--object", "secret,id=s,data=geheim"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    create = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, str(path), str(SIZE)]
    for _ in range(20):
        done = subprocess.run(create, capture_output=True, text=True, check=False)
        # qemu-img measures how fast the host is, and gives up where the clock of its thread did not move meanwhile.
        if "accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    where = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    subprocess.run(["qemu-io", *secret, "-c", "write -P 1 0 512", "--image-opts", where], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("secret", ["data=geheim", "file=SECRET", "data=Z2VoZWlt,format=base64", "file=LINES,format=base64"])
def test_an_encrypted_image_is_read_with_the_secret_that_the_drive_names(tmp_path: Path, encrypted: Path, secret: str) -> None:
    (tmp_path / "SECRET").write_bytes(b"geheim")
    (tmp_path / "LINES").write_bytes(b"Z2Vo\nZWlt\n")
    words = ["-object", f"secret,id=s,{secret.replace('file=', f'file={tmp_path}/')}"]
    with machine(tmp_path, f"file={encrypted},format=qcow2,encrypt.key-secret=s", *words) as vm:
        channel, data = vm.disks["d"].channel(), bytearray(512)
        result = channel.readv(0, [memoryview(data)], "token")
        if result is None:
            channel.drain()
        channel.close()
        assert data == b"\1" * 512


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("data=falsch", "passphrase"),
        ("data=!,format=base64", "secret s: no base64"),
        ("file=/nonexistent", "secret s: /nonexistent: No such file or directory"),
        ("file=/dev/zero", "secret s: /dev/zero: expected at most 65536 bytes"),
    ],
)
def test_a_secret_that_does_not_open_the_image_is_refused_by_name(
    tmp_path: Path, encrypted: Path, secret: str, problem: str
) -> None:
    before = descriptors(settle=True)
    with pytest.raises(VmError, match=f"-drive id=d: .*{problem}"):
        machine(tmp_path, f"file={encrypted},format=qcow2,encrypt.key-secret=s", "-object", f"secret,id=s,{secret}")
    assert descriptors() == before


def test_an_encrypted_image_without_a_secret_is_refused(tmp_path: Path, encrypted: Path) -> None:
    with pytest.raises(VmError, match=r"-drive id=d: .*encrypted.*\(encrypt\.key-secret=ID, of an -object secret\)$"):
        machine(tmp_path, f"file={encrypted},format=qcow2")


def test_a_disk_that_cannot_be_written_back_at_the_end_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    create_image(tmp_path / "disk", SIZE)

    def run(config: Config, stack: ExitStack) -> int:
        disk = stack.enter_context(VirtualMachine(config, lambda _event: None)).disks["d"]
        close = disk.close

        def fail() -> None:
            close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(disk, "close", fail)
        return 0

    logged: list[str] = []
    monkeypatch.setattr(main, "_run", run)
    monkeypatch.setattr(main.log, "setup", lambda *_, **__: None)
    monkeypatch.setattr(main.log, "error", logged.append)
    words = ["-machine", "microvm", "-mod-test", "unused", "-m", "128", "-D", str(tmp_path / "log")]
    with pytest.raises(SystemExit, match="1"):
        main.main(
            [*words, "-drive", f"id=d,file={tmp_path}/disk,format=qcow2,direct=off", "-device", "virtio-blk-device,drive=d,id=d"]
        )
    told = "-drive id=d: closed, but may lack what was written last: [Errno 28] No space left on device"
    assert capfd.readouterr().err == f"stratovirt: {told}\n"
    assert logged == [told]
