"""What a running guest sees when the host's things break under it: errors of the thing itself, and a machine that goes on.

StratoVirt has no werror or rerror and never stops a guest for an I/O error, and neither does this: the error is the guest's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import WAIT, Qmp, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20
PATTERN = b"\x5a"

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def small(folder: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    path = folder / "small"
    path.mkdir()
    busybox = str(guests.busybox())  # the system's own mount keeps notes in /run
    run(busybox, "mount", "-t", "tmpfs", "-o", "size=1M", "none", str(path))
    yield path
    run(busybox, "umount", "-l", str(path))  # after a failed test the machine still has it


@pytest.fixture
def network() -> Iterator[None]:
    """A tap, and a way out for passt to take over."""
    run("modprobe", "-a", "tun", "dummy")
    run("ip", "tuntap", "add", "tapgone", "mode", "tap", "vnet_hdr")
    run("ip", "link", "set", "tapgone", "up")
    run("ip", "link", "add", "outside", "type", "dummy")
    run("ip", "addr", "add", "192.0.2.2/24", "dev", "outside")
    run("ip", "link", "set", "outside", "up")
    run("ip", "route", "add", "default", "via", "192.0.2.1")
    yield
    for name in ("tapgone", "outside"):
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def test_what_breaks_on_the_host_is_an_error_in_the_guest_and_not_the_end(
    start: Start, qmp: Connect, cloud_kernel: guests.Kernel, rootfs: Path, folder: Path, small: Path, network: None
) -> None:
    initrd = guests.initrd(cloud_kernel, (*guests.MODULES, "virtio_net"))
    for path in (small / "full", folder / "cut", folder / "gone"):
        with path.open("wb") as file:
            file.write(PATTERN * 65536)
            file.truncate(4 * MiB)
    disks = {"full": small / "full", "cut": folder / "cut", "gone": folder / "gone"}
    vmm = start(
        "-machine", "microvm", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image, "-initrd", initrd,
        "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 net.ifnames=0",
        "-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs",
        *(
            word
            for name, path in disks.items()
            for word in ("-drive", f"file={path},id={name},direct=off", "-device", f"virtio-blk-device,drive={name},id={name}")
        ),
        "-netdev", "tap,id=tap,ifname=tapgone", "-device", "virtio-net-device,netdev=tap,id=tap",
        "-netdev", "user,id=user", "-device", "virtio-net-device,netdev=user,id=user",
        "-chardev", f"socket,id=con,path={folder}/con.sock,server,nowait",
        "-device", "virtio-serial-device,id=ports", "-device", "virtconsole,chardev=con,id=con",
        "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
    )  # fmt: skip
    vmm.expect(PROMPT)
    vmm.run("dmesg -n 1")  # what the kernel says of it is not what a command prints
    client = qmp()

    def goes_on() -> None:
        assert client.execute("query-status") == {"running": True, "singlestep": False, "status": "running"}

    # A file system that is full: writing fails, what was there can be read, and with room again writing works.
    fill = "dd if=/dev/urandom of=/dev/vdb bs=64k seek=1 count=32 conv=fsync 2>&1"
    assert "error" in vmm.run(f"! {fill}")
    vmm.run("echo 1 > /proc/sys/vm/drop_caches")
    assert vmm.run("head -c 65536 /dev/vdb | tr -d Z | wc -c").strip() == "0"
    goes_on()
    run(str(guests.busybox()), "mount", "-o", "remount,size=8M", str(small))
    vmm.run(f"dd if=/dev/zero of=/dev/vdb bs=64k count=64 conv=fsync && {fill}")

    # An image that gets shorter: what is left can be read, what is gone is an error.
    assert vmm.run("head -c 65536 /dev/vdc | tr -d Z | wc -c").strip() == "0"
    os.truncate(disks["cut"], 4096)
    vmm.run("echo 1 > /proc/sys/vm/drop_caches")
    assert "error" in vmm.run("! dd if=/dev/vdc of=/dev/null bs=4k count=16 2>&1")
    assert vmm.run("head -c 4096 /dev/vdc | tr -d Z | wc -c").strip() == "0"
    goes_on()

    # An image whose name goes: the disk is what it was.
    disks["gone"].unlink()
    vmm.run("echo 1 > /proc/sys/vm/drop_caches; head -c 1048576 /dev/urandom > /tmp/data")
    vmm.run("dd if=/tmp/data of=/dev/vdd bs=64k seek=1 conv=fsync; echo 1 > /proc/sys/vm/drop_caches")
    vmm.run("[ $(head -c 65536 /dev/vdd | tr -d Z | wc -c) = 0 ]")
    vmm.run('[ "$(tail -c +65537 /dev/vdd | head -c 1048576 | sha256sum)" = "$(sha256sum < /tmp/data)" ]')
    goes_on()

    # A tap that is deleted, and a passt that is killed: no link any more.
    vmm.run("ip link set eth0 up; ip link set eth1 up")
    vmm.run("until [ $(cat /sys/class/net/eth0/carrier) = 1 ] && [ $(cat /sys/class/net/eth1/carrier) = 1 ]; do sleep 0.1; done")
    run("ip", "link", "del", "tapgone")
    vmm.run("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; [ $(cat /sys/class/net/eth1/carrier) = 1 ]")
    (passt,) = Path(f"/proc/{vmm.pid}/task/{vmm.pid}/children").read_text().split()
    os.kill(int(passt), signal.SIGKILL)
    vmm.run("until [ $(cat /sys/class/net/eth1/carrier) = 0 ]; do sleep 0.1; done")
    goes_on()

    # A console's peer that goes in the middle of what it is told: the next one is told the rest of it.
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WAIT)
        peer.connect(f"{folder}/con.sock")
        vmm.run("stty -F /dev/hvc0 raw -echo; (while echo again; do :; done > /dev/hvc0) 2>/dev/null &")
        assert peer.recv(1)
    goes_on()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WAIT)
        peer.connect(f"{folder}/con.sock")
        heard = b""
        while b"again" not in heard:
            heard += peer.recv(4096)
        vmm.run("kill %1; true")
    goes_on()

    # All that happened to the guest is what happened: its root and its shell are fine.
    vmm.run("sync; echo fine > /root/fine; sync; [ $(cat /root/fine) = fine ]")
    assert "Traceback" not in vmm.errors()
    vmm.send("poweroff")
    assert vmm.wait() == 0
