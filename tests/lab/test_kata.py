"""What Kata Containers' driver for StratoVirt sends, whole: a sandbox's command line, and a container's disk by QMP.

A stock kernel stands for Kata's, so it is told nothing about ACPI; all else is the driver's: descriptors by number, a console
on a unix socket, files through a daemon whose socket the command line says to listen on.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import guests
from lab.network import open_tap, run, tap
from lab.peers import files_served
from lab.vmm import WAIT, Qmp, Vmm

CID = 3_141_592
MiB = 1 << 20

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture
def taps() -> Iterator[list[int]]:
    """Two descriptors of a tap with many queues, as the driver opens them."""
    with tap("tapkata", "10.81.0.1/24", "multi_queue"), ExitStack() as stack:
        opened = [open_tap("tapkata", queues=True) for _ in range(2)]
        for fd in opened:
            stack.callback(os.close, fd)
        yield opened


@pytest.fixture
def vsock() -> Iterator[int]:
    """A descriptor of the host kernel's vsock device."""
    run("modprobe", "vhost_vsock")
    fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def virtiofsd(folder: Path) -> Iterator[Path]:
    """A folder that a daemon serves at folder/"fs.sock", where it listens before the VMM starts."""
    shared = folder / "shared"
    shared.mkdir()
    with files_served(shared, folder / "fs.sock"):
        yield shared


@pytest.mark.soak
def test_a_sandbox_starts_as_kata_starts_it_and_takes_a_container_s_disk(
    start: Start, qmp: Connect, cloud_kernel: guests.Kernel, folder: Path, taps: list[int], vsock: int, virtiofsd: Path
) -> None:
    modules = ("virtio_net", "vmw_vsock_virtio_transport", "virtiofs")
    initrd = guests.initrd(cloud_kernel, (*guests.MODULES, *modules))
    rootfs = guests.rootfs(files=guests.programs("socat"))  # a file that several sandboxes have at once
    container = folder / "container"
    container.write_bytes(hashlib.shake_256(b"container").digest(4 * MiB))
    (virtiofsd / "config.json").write_text("from the host\n")
    vmm = start(
        "-name", "sandbox-6f1d", "-uuid", "5ca1ab1e-0000-4000-8000-0000000000aa", "-smp", 2, "-m", 512,
        "-kernel", cloud_kernel.image,
        "-append", "console=hvc0 quiet root=/dev/vda ro panic=1 net.ifnames=0",
        "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-D", "-disable-seccomp",
        "-machine", "type=microvm,dump-guest-core=off,mem-share=on", "-initrd", initrd,
        "-object", "rng-random,id=objrng0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=objrng0,id=virtio-rng0",
        "-drive", f"id=rootfs,file={rootfs},readonly=on,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=virtio-blk0",
        "-device", "virtio-serial-device,id=virtio-serial0",
        "-chardev", f"socket,id=charconsole0,path={folder}/console.sock,server,nowait",
        "-device", "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
        "-device", f"vhost-vsock-device,id=vsock-id,guest-cid={CID},vhostfd={vsock}",
        "-netdev", f"tap,id=network-0,fds={taps[0]}:{taps[1]}",
        "-device", "virtio-net-device,netdev=network-0,id=network-0,mac=52:54:00:aa:bb:cc",
        "-chardev", f"socket,id=virtio_fs,path={folder}/fs.sock,server,nowait",
        "-device", "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0",
        descriptors=[*taps, vsock],
    )  # fmt: skip
    client = qmp()  # its answer is how the driver knows that everything is there
    console = Vmm(["socat", "-", f"UNIX-CONNECT:{folder}/console.sock"], folder, "console")
    with console:
        console.expect(r"guest:\S*# ")
        assert console.run("cat /proc/cmdline; dmesg -n 1").startswith("console=hvc0")
        # The network's descriptors are the guest's card, with a queue a descriptor at hand.
        assert console.run("cat /sys/class/net/eth0/address").strip() == "52:54:00:aa:bb:cc"
        console.run("ip addr add 10.81.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 -i 0.2 10.81.0.1")
        # The shared folder, both ways.
        console.run("mount -t virtiofs kataShared /mnt; grep 'from the host' /mnt/config.json; echo from the guest > /mnt/answer")
        assert (virtiofsd / "answer").read_text() == "from the guest\n"
        # The agent's way: a port of the guest that the host connects to.
        console.run("(/usr/bin/socat VSOCK-LISTEN:1024 EXEC:'tr a-z A-Z' > /tmp/log 2>&1) &")
        with connected(1024) as agent:
            agent.sendall(b"agent")
            agent.shutdown(socket.SHUT_WR)
            assert agent.recv(16) == b"AGENT"
        # A container's disk in the slot that the driver chose.
        file = {"driver": "file", "filename": str(container), "aio": "threads"}
        disk = {"node-name": "drive-1", "file": file, "cache": {"direct": False}, "read-only": True}
        for _ in range(2):
            client.execute("blockdev-add", disk)
            client.execute("device_add", {"id": "drive-1", "driver": "virtio-blk-mmio", "drive": "drive-1", "addr": "1"})
            found = console.run("until [ $(cat /sys/block/vdb/size) = 8192 ]; do sleep 0.1; done; sha256sum < /dev/vdb")
            assert found.split()[0] == hashlib.sha256(container.read_bytes()).hexdigest()
            client.execute("device_del", {"id": "drive-1"})
            assert client.event("DEVICE_DELETED")["data"]["device"] == "drive-1"
            console.run("until [ $(cat /sys/block/vdb/size) = 0 ]; do sleep 0.1; done")
        console.run("umount /mnt")
        assert "Traceback" not in vmm.errors()
        vmm.kill()  # as the driver stops a sandbox


def connected(port: int) -> socket.socket:
    """A connection to the guest, as soon as somebody listens there."""
    deadline = time.monotonic() + WAIT
    while True:
        peer = socket.socket(socket.AF_VSOCK)
        peer.settimeout(WAIT)
        try:
            peer.connect((CID, port))
        except OSError:
            peer.close()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return peer
