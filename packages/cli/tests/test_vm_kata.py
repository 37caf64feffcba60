"""What Kata Containers' driver for StratoVirt does with the program, in test mode: everything of it that needs no privileges.

A whole sandbox with a guest, a tap, vhost-vsock and virtiofsd is in tests/lab/test_kata.py.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deaf_peers import DeafBackEnd
from vm_process import LIMIT, WINDOWS, Client

BLK, RNG, CONSOLE, FS = 2, 4, 3, 26  # virtio 1.2, section 5


class Sandbox:
    """A process as the driver starts it: nothing in its environment but the log's level."""

    def __init__(self, folder: Path, name: str) -> None:
        self.monitor = folder / "qmp.sock"
        self.log = folder / f"{name}.log"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / f"{name}.test"))
            listener.listen()
            listener.settimeout(LIMIT)
            command = [sys.executable, "-m", "pystratovirt", "-mod-test", str(folder / f"{name}.test")]
            command += ["-name", "sandbox-6f1d", "-uuid", "5ca1ab1e-0000-4000-8000-0000000000aa", "-smp", "2", "-m", "128"]
            command += ["-append", "tsc=reliable no_timer_check reboot=k panic=1 console=hvc0 acpi=off quiet"]
            command += ["-qmp", f"unix:{self.monitor},server,nowait", "-D", "-disable-seccomp"]
            command += ["-machine", "type=microvm,dump-guest-core=off,mem-share=on"]
            command += ["-object", "rng-random,id=objrng0,filename=/dev/urandom"]
            command += ["-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0"]
            command += ["-drive", f"id=rootfs,file={folder}/rootfs,readonly=on,direct=off"]
            command += [
                "-device",
                "virtio-blk-device,drive=rootfs,id=virtio-blk0",
                "-device",
                "virtio-serial-device,id=virtio-serial0",
            ]
            command += ["-chardev", f"socket,id=charconsole0,path={folder}/console.sock,server,nowait"]
            command += ["-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0"]
            command += ["-chardev", f"socket,id=virtio_fs,path={folder}/{name}.fs,server,nowait"]
            command += ["-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0"]
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"STRATOVIRT_LOG_LEVEL": "info"}
                )
            try:
                self._test, _ = listener.accept()
            except TimeoutError:
                self.process.kill()
                raise AssertionError(self.log.read_text()) from None
        self._test.settimeout(LIMIT)

    def device(self, slot: int) -> int:
        self._test.sendall(f"readl {WINDOWS + 0x200 * slot + 8:#x}\n".encode())
        return int(self._test.recv(64).split()[1], 16)

    def kill(self) -> None:
        """As the driver stops a sandbox."""
        self.process.kill()
        self.process.wait(LIMIT)
        self._test.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Images, and who serves files to two sandboxes."""
    (tmp_path / "rootfs").write_bytes(bytes(1 << 20))
    (tmp_path / "container").write_bytes(bytes(2 << 20))
    daemons = [DeafBackEnd(str(tmp_path / f"{name}.fs")) for name in ("first", "second")]
    yield tmp_path
    for daemon in daemons:
        daemon.close()


def test_a_sandbox_starts_takes_a_container_s_disk_and_is_killed_and_the_next_one_starts_in_its_place(folder: Path) -> None:
    for name in ("first", "second"):
        sandbox = Sandbox(folder, name)
        try:
            with Client(str(sandbox.monitor), early=True) as client:  # readiness is its answer
                assert client.run("query-status")["return"]["status"] == "running"
                slots = range(9)
                assert [sandbox.device(slot) for slot in slots] == [BLK] * 4 + [1, 1, RNG, CONSOLE, FS]
                file = {"driver": "file", "filename": f"{folder}/container", "aio": "threads"}
                disk = {"node-name": "drive-1", "driver": "raw", "file": file, "cache": {"direct": False}, "read-only": True}
                for _ in range(2):
                    assert client.run("blockdev-add", disk) == {"return": {}}
                    plugged = {"id": "drive-1", "driver": "virtio-blk-mmio", "drive": "drive-1", "addr": "1"}
                    assert client.run("device_add", plugged) == {"return": {}}
                    client.send('{"execute":"device_del","arguments":{"id":"drive-1"}}\n')
                    event = client.read()
                    assert (event["event"], event["data"]["device"]) == ("DEVICE_DELETED", "drive-1")
                    assert client.read() == {"return": {}}
                with socket.socket(socket.AF_UNIX) as console:
                    console.connect(f"{folder}/console.sock")
        finally:
            sandbox.kill()
        lines = sandbox.log.read_text().splitlines()
        assert any(re.search(r"([^:]):INFO: ", line) for line in lines), "what the driver looks for in the log"
        assert not [line for line in lines if ":ERROR: " in line or "Traceback" in line]
