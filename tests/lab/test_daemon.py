"""A guest of a machine that went to the background: what whoever started it hears, and that it runs like any other."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import WAIT, Qmp, Vmm

PROMPT = r"guest:\S*# "

Connect = Callable[[], Qmp]


class Background:
    """Starts one daemon in a folder, which is ended with it."""

    def __init__(self, folder: Path, kernel: guests.Kernel, initrd: Path, rootfs: Path) -> None:
        self.folder = folder
        self.pidfile = folder / "pid"
        self._program = os.environ.get("STRATOVIRT") or str(Path(sys.executable).with_name("stratovirt"))
        self._words = [
            "-machine", "microvm", "-smp", "2", "-m", "512", "-kernel", str(kernel.image), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 mitigations=off nokaslr cryptomgr.notests audit=0",
            "-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
        ]  # fmt: skip
        self.process = -1  # a descriptor of it

    def start(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the command until the process that was started ends. The machine's sockets are called after `name`."""
        command = [self._program, *self._words, "-daemonize", "-pidfile", str(self.folder / f"{name}pid")]
        command += ["-qmp", f"unix:{self.folder}/{name}qmp.sock,server,nowait", "-D", str(self.folder / f"{name}log")]
        command += ["-serial", f"socket,path={self.folder}/{name}tty.sock,server,nowait", *options]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=WAIT, check=False)

    def started(self) -> int:
        """Start a machine that comes up; return its process id."""
        done = self.start("")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = int(self.pidfile.read_text())
        self.process = os.pidfd_open(pid)
        return pid

    def close(self) -> None:
        if self.process >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, signal.SIGKILL)
            os.close(self.process)


@pytest.fixture
def background(cloud_kernel: guests.Kernel, initrd: Path, rootfs: Path, folder: Path) -> Iterator[Background]:
    background = Background(folder, cloud_kernel, initrd, rootfs)
    yield background
    background.close()


def test_a_guest_in_the_background_runs_and_whoever_starts_it_knows_whether_it_does(
    background: Background, qmp: Connect, rootfs: Path, folder: Path
) -> None:
    pid = background.started()
    # It can be reached the moment the starting process has ended.
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "qmp.sock"))
    monitor = qmp()
    assert monitor.execute("query-status")["running"]
    assert os.getsid(pid) != os.getsid(0)
    vcpus = {cpu["thread_id"] for cpu in monitor.execute("query-cpus")}
    assert len(vcpus) == 2
    assert all(Path(f"/proc/{pid}/task/{thread}").is_dir() for thread in vcpus)

    # Another start that fails as late as can be hears of it, and leaves nothing; nor does it disturb the first.
    done = background.start("second")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("stratovirt: ")
    assert str(rootfs) in line
    assert line.removeprefix("stratovirt: ") in (folder / "secondlog").read_text()
    assert sorted(path.name for path in folder.glob("second*")) == ["secondlog"]

    with Vmm(["socat", "-", f"UNIX-CONNECT:{folder}/tty.sock"], folder, "console") as console:
        console.send("")
        console.expect(PROMPT)
        assert console.run("nproc") == "2\n"
        assert console.run("echo kept > /root/kept; sync; cat /root/kept") == "kept\n"
        console.send("poweroff")
        assert monitor.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert select.select([background.process], [], [], WAIT)[0], "the process ends with its guest"
    assert not background.pidfile.exists()
    assert not (folder / "qmp.sock").exists()
    assert not (folder / "tty.sock").exists()
    assert "Traceback" not in (folder / "log").read_text()
