"""Socket devices of a whole machine in test mode: what a command line may say, and that nothing is left behind."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import pytest

from pystratovirt.cmdline import parse
from pystratovirt.cmdline.errors import CommandLineError
from pystratovirt.errors import VmError
from pystratovirt.vm import VirtualMachine
from vmm_core.machine.core import MachineEvent

WINDOW = 0xF010_0000 + 6 * 0x200


def post(event: MachineEvent) -> None:
    raise AssertionError(f"nobody asked for {event}")


def machine(folder: Path, *devices: str) -> VirtualMachine:
    options = ["-mod-test", str(folder / "unused"), "-object", "iothread,id=io"]
    return VirtualMachine(parse([*options, *(word for device in devices for word in ("-device", device))]), post)


def descriptors(*, settle: bool = False) -> list[str]:
    """Return what this process has open; `settle`: after what other tests left to the garbage collector has gone."""
    if settle:
        gc.collect()
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("thread", ["", ",iothread=io"])
def test_a_socket_device_listens_while_its_machine_is_there(tmp_path: Path, thread: str) -> None:
    before = descriptors(settle=True)
    path = tmp_path / "v"
    with machine(tmp_path, f"virtio-vsock-device,id=v,guest-cid=5,path={path}{thread}") as vm:
        vm.start()
        access = vm.test_access()
        assert int.from_bytes(access.read(WINDOW + 8, 4), "little") == 19
        assert int.from_bytes(access.read(WINDOW + 0x100, 8), "little") == 5
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(path))
            client.sendall(b"CONNECT 1\n")
            assert client.recv(100) == b"", "the guest has no driver yet"
        with pytest.raises(VmError, match=r"-device virtio-vsock-device,id=v: v: .* is in use: somebody listens on it"):
            machine(tmp_path, f"virtio-vsock-device,id=v,guest-cid=5,path={path}")
    assert not path.exists()
    assert descriptors() == before


def test_a_descriptor_that_is_no_vhost_is_refused(tmp_path: Path) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(VmError, match=rf"id=v: vhostfd={fd}: no descriptor that was passed by that number"):
        machine(tmp_path, f"vhost-vsock-device,id=v,guest-cid=5,vhostfd={fd}")
    os.set_inheritable(fd, True)
    with pytest.raises(VmError, match="-device vhost-vsock-device,id=v: v: VHOST_SET_OWNER: not a vhost device of that kind"):
        machine(tmp_path, f"vhost-vsock-device,id=v,guest-cid=5,vhostfd={fd}")
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("vhost-vsock-device,id=v", "needs guest-cid=..."),
        ("vhost-vsock-device,guest-cid=3", "needs id=..."),
        ("vhost-vsock-device,id=v,guest-cid=2", "guest-cid=2: at least 3"),
        ("vhost-vsock-device,id=v,guest-cid=4294967295", "guest-cid=4294967295: at most 4294967294"),
        ("vhost-vsock-device,id=v,guest-cid=3,vhostfd=x", "vhostfd=x: not a whole decimal number"),
        ("virtio-vsock-device,id=v,guest-cid=3", "needs path=..."),
        (f"virtio-vsock-device,id=v,guest-cid=3,path={'p' * 97}", "at most 96 bytes"),
        ("virtio-vsock-device,id=v,guest-cid=3,path=p,iothread=no", "iothread=no: no such iothread"),
    ],
)
def test_a_socket_device_that_cannot_be_is_refused(device: str, words: str) -> None:
    with pytest.raises(CommandLineError, match=words):
        parse(["-kernel", "k", "-device", device])


@pytest.mark.parametrize("fd", ["", ",vhostfd=7"])
def test_what_kata_sends_is_understood(fd: str) -> None:
    assert parse(["-kernel", "k", "-device", f"vhost-vsock-device,id=vsock-id,guest-cid=3{fd}"]).devices[0].id == "vsock-id"
