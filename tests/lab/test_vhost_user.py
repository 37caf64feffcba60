"""A guest whose disks and files other processes serve (vhost-user): real ones, killed and started anew while it uses them."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import debian, guests
from lab.peers import serve_files
from lab.vmm import WAIT, Qmp, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20
SIZES = {"daemon": 24, "raw": 28, "qcow2": 32}  # MiB; how the guest's disks are told apart
IMG = [sys.executable, "-m", "block_qcow2.img"]

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


def content(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder by its path in it, with its hash."""
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def listed(text: str) -> dict[str, str]:
    """The same of what `find -type f -exec sha256sum` prints."""
    return {name.removeprefix("./"): hashed for hashed, name in (line.split() for line in text.split("\n") if line.strip())}


class Peer:
    """A back end: a program that serves a socket in `folder`, and can be started again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.sock"
        self.monitor = folder / f"{name}.qmp"
        self.file = folder / f"{name}.img"
        self._name = name
        self._pid_file = folder / f"{name}.pid"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start, and wait until the socket is listened on."""
        if self._name == "files":
            self._process = serve_files(self.file, self.path, stdout=subprocess.PIPE)
        elif self._name == "daemon":
            self._pid_file.unlink(missing_ok=True)
            self._run(
                debian.tool("qemu-storage-daemon"), "--blockdev", f"driver=file,node-name=file,filename={self.file}",
                "--blockdev", "driver=raw,node-name=disk,file=file",
                "--export", f"type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={self.path}",
                "--chardev", f"socket,id=m,path={self.monitor},server=on,wait=off", "--monitor", "chardev=m",
                "--pidfile", str(self._pid_file),
            )  # fmt: skip
            # Written when it is ready. Its monitor says so too, but to a command that comes before that it may never answer.
            self._await(lambda: self._pid_file.is_file() and self._pid_file.stat().st_size > 0)
        else:
            self._run(*IMG, "serve", "--type", "vhost-user-blk", "-f", self._name, "-k", str(self.path), str(self.file))
            assert self._process is not None
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == f"Serving {self.file} on {self.path}\n"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        with self._process as process:
            status = process.wait(WAIT)
        self._process = None
        return status

    def leaves(self) -> int:
        """Wait until it ends by itself; return its exit status."""
        return self.end(0)

    def close(self) -> None:
        """Kill what a failed test has left."""
        if self._process is not None:
            self.end(signal.SIGKILL)

    def _run(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _await(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not ready():
            assert self._process is not None
            assert self._process.poll() is None, f"{self._name} ended"
            assert time.monotonic() < deadline, f"{self._name} did not become ready"
            time.sleep(0.05)


@pytest.mark.soak
def test_back_ends_die_and_come_back_and_nothing_is_lost(
    start: Start, qmp: Connect, cloud_kernel: guests.Kernel, folder: Path
) -> None:
    initrd = guests.initrd(cloud_kernel, (*guests.MODULES, "virtiofs"))
    rootfs = guests.copy_image(guests.rootfs(files=guests.programs("fio")), folder / "rootfs.ext4")
    (folder / "peers").mkdir()
    peers = {name: Peer(folder / "peers", name) for name in (*SIZES, "files")}
    for name in ("daemon", "raw"):
        with peers[name].file.open("wb") as file:
            file.truncate(SIZES[name] * MiB)
    subprocess.run([*IMG, "create", "-q", "-f", "qcow2", str(peers["qcow2"].file), f"{SIZES['qcow2']}M"], check=True)
    shared = peers["files"].file
    for name, size in (("empty", 0), ("small", 5), ("deep/er/large", 3 * MiB + 17)):
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_bytes(content(name, size))

    with ExitStack() as stack:
        for peer in peers.values():
            stack.callback(peer.close)
            peer.start()
        vmm = start(
            "-machine", "microvm,mem-share=on", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image, "-initrd", initrd,
            "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1",
            "-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
            *(word for name, peer in peers.items() for word in ("-chardev", f"socket,id={name},path={peer.path}")),
            *(word for name in SIZES for word in ("-device", f"vhost-user-blk-device,id=d-{name},chardev={name}")),
            "-device", "vhost-user-fs-device,id=d-files,chardev=files,tag=share",
            "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
        )  # fmt: skip
        vmm.expect(PROMPT)
        vmm.run("dmesg -n 1")
        client = qmp()
        found = dict(
            line.split() for line in vmm.run("cd /sys/block; for d in vd*; do echo $(cat $d/size) $d; done; cd").splitlines()
        )
        disks = {name: found[str(size * MiB // 512)] for name, size in SIZES.items()}
        disks_survive_their_back_ends(vmm, client, peers, disks)
        sizes_reach_the_guest(vmm, peers, disks)
        files_are_the_same_on_both_sides(vmm, shared)
        a_file_server_may_be_replaced(vmm, client, peers["files"])

        hashes = {name: vmm.run(f"sync; sha256sum < /dev/{disk}").split()[0] for name, disk in disks.items()}
        assert "Traceback" not in vmm.errors()
        vmm.send("poweroff")
        assert vmm.wait() == 0
        assert peers["files"].leaves() == 0
        assert [peers[name].end() for name in SIZES] == [0, 0, 0]
        raw = folder / "qcow2.raw"
        subprocess.run([*IMG, "check", "-q", str(peers["qcow2"].file)], check=True)
        subprocess.run([*IMG, "convert", "-O", "raw", str(peers["qcow2"].file), str(raw)], check=True)
        files = {"daemon": peers["daemon"].file, "raw": peers["raw"].file, "qcow2": raw}
        assert {name: digest(file.read_bytes()) for name, file in files.items()} == hashes


def disks_survive_their_back_ends(vmm: Vmm, client: Qmp, peers: dict[str, Peer], disks: dict[str, str]) -> None:
    """fio writes random blocks and then reads all of them back; in both halves the disk loses its back end.

    Two are killed. What the third, a qcow2 image, has acknowledged and was not asked to flush is in its memory: it ends in order.
    """
    for name, disk in disks.items():
        peer, number = peers[name], signal.SIGTERM if name == "qcow2" else signal.SIGKILL
        vmm.run(
            f"(/usr/bin/fio --name=v --filename=/dev/{disk} --rw=randwrite --bs=4k --size=8m --direct=1 --ioengine=libaio"
            f" --iodepth=16 --rate_iops=1000,1000 --verify=crc32c --do_verify=1 --verify_fatal=1 > /tmp/{disk} 2>&1;"
            f" echo $? > /tmp/{disk}.status) &"
        )
        for column in (7, 3):  # sectors written, sectors read: Linux, Documentation/block/stat.rst
            vmm.run(f"until [ $(awk '{{print ${column}}}' /sys/block/{disk}/stat) -gt 3000 ]; do usleep 20000; done")
            assert peer.end(number) == (0 if name == "qcow2" else -number)
            waiting = vmm.run(f"usleep 200000; cat /sys/block/{disk}/inflight").split()
            assert sum(map(int, waiting)) > 0, "it is in the middle of it"
            assert client.execute("query-status")["running"]
            peer.start()
        vmm.run(f"until [ -s /tmp/{disk}.status ]; do usleep 50000; done; cat /tmp/{disk}; [ $(cat /tmp/{disk}.status) = 0 ]")
        assert vmm.errors().count(f"the back end at {peer.path} is back") == 2, vmm.errors()


def sizes_reach_the_guest(vmm: Vmm, peers: dict[str, Peer], disks: dict[str, str]) -> None:
    """A disk grows under a running back end, and another while it is away.

    QEMU 7.2's daemon tells its front end of no change, so the guest learns both when they are back.
    """
    with Qmp(peers["daemon"].monitor) as monitor:
        monitor.execute("block_resize", {"node-name": "disk", "size": 40 * MiB})
    assert [peers[name].end() for name in ("daemon", "raw")] == [0, 0]
    subprocess.run([*IMG, "resize", "-q", "-f", "raw", str(peers["raw"].file), "44M"], check=True)
    for name in ("daemon", "raw"):
        peers[name].start()
    for name, size in (("daemon", 40), ("raw", 44)):
        disk = disks[name]
        vmm.run(f"until [ $(cat /sys/block/{disk}/size) = {size * 2048} ]; do usleep 50000; done")
        vmm.run(f"echo end | dd of=/dev/{disk} bs=512 seek={size * 2048 - 1} conv=sync,fsync 2>/dev/null")
        with peers[name].file.open("rb") as file:
            file.seek(size * MiB - 512)
            assert file.read(4) == b"end\n"


def files_are_the_same_on_both_sides(vmm: Vmm, shared: Path) -> None:
    vmm.run("mkdir -p /mnt/share; mount -t virtiofs share /mnt/share")
    assert listed(vmm.run("cd /mnt/share; find . -type f -exec sha256sum {} +; cd")) == tree(shared)
    vmm.run("mkdir -p /mnt/share/from/guest; head -c 2000003 /dev/urandom > /mnt/share/from/guest/data")
    vmm.run("cp /bin/busybox /mnt/share/from/")
    vmm.run("mv /mnt/share/small /mnt/share/from/moved; rm /mnt/share/empty; sync")
    there = tree(shared)
    assert set(there) == {"deep/er/large", "from/guest/data", "from/busybox", "from/moved"}
    assert there["from/moved"] == digest(content("small", 5))
    assert listed(vmm.run("cd /mnt/share; find . -type f -exec sha256sum {} +; cd")) == there


def a_file_server_may_be_replaced(vmm: Vmm, client: Qmp, peer: Peer) -> None:
    """What is under way fails, as the new one knows no open file; what was written is there, and the guest mounts it again."""
    vmm.run(
        "(n=0; while cp /bin/busybox /mnt/share/copy-$n && sync; do echo $n > /tmp/copied; n=$((n + 1)); done;"
        " echo over > /tmp/over) > /dev/null 2>&1 &"
    )
    vmm.run("until [ -s /tmp/copied ] && [ $(cat /tmp/copied) -gt 1 ]; do usleep 20000; done")
    assert peer.end(signal.SIGKILL) == -signal.SIGKILL
    assert client.execute("query-status")["running"]
    peer.start()
    vmm.run("until [ -e /tmp/over ]; do usleep 20000; done; umount -l /mnt/share; mount -t virtiofs share /mnt/share")
    copied = int(vmm.run("cat /tmp/copied"))
    there = tree(peer.file)
    assert {there[f"copy-{n}"] for n in range(copied + 1)} == {there["from/busybox"]}
    vmm.run("rm /mnt/share/copy-*; echo again > /mnt/share/again; sync")
    assert listed(vmm.run("cd /mnt/share; find . -type f -exec sha256sum {} +; cd")) == tree(peer.file)
