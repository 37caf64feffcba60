"""Devices that come and go, and many of them: what a running stock guest sees, reads and writes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import guests
from lab.network import open_tap, tap
from lab.vmm import Qmp, QmpError, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture(scope="module")
def net_initrd(cloud_kernel: guests.Kernel) -> Path:
    return guests.initrd(cloud_kernel, (*guests.MODULES, "virtio_net"))


@pytest.fixture
def arguments(cloud_kernel: guests.Kernel, net_initrd: Path, rootfs: Path, folder: Path) -> list[object]:
    """A microVM with a root disk. -qmp is folder/qmp.sock."""
    return [
        *("-machine", "microvm", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image, "-initrd", net_initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 net.ifnames=0"),
        *("-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    ]


@pytest.fixture
def taps() -> Iterator[None]:
    """tap0 and tap1, with addresses 10.80.0.1 and 10.80.1.1."""
    with tap("tap0", "10.80.0.1/24"), tap("tap1", "10.80.1.1/24"):
        yield


def content(name: str, size: int) -> bytes:
    """Bytes that no other disk has."""
    return hashlib.shake_256(name.encode()).digest(size)


@pytest.mark.soak
def test_thirty_devices_work_at_once(start: Start, arguments: list[object], folder: Path) -> None:
    names = [f"disk{number}" for number in range(29)]
    for name in names:
        (folder / name).write_bytes(content(name, MiB))
    disks = [
        (
            "-drive",
            f"file={folder / name},id={name},direct=off",
            "-device",
            f"virtio-blk-device,drive={name},id={name},serial={name}",
        )
        for name in names
    ]
    vmm = start(*arguments, *(argument for disk in disks for argument in disk))
    vmm.expect(PROMPT)
    found = vmm.run(
        "for disk in /sys/block/vd*; do name=${disk##*/}; [ $name = vda ] && continue; serial=$(cat $disk/serial);"
        " sum=$(sha256sum < /dev/$name); dd if=/dev/$name of=/dev/$name bs=64k seek=8 count=8 conv=fsync 2>/dev/null;"
        " echo $serial ${sum%% *}; done"
    )
    sums = dict(line.split() for line in found.splitlines() if line.startswith("disk"))
    assert sums == {name: hashlib.sha256(content(name, MiB)).hexdigest() for name in names}
    wires = vmm.run("grep -c 'IO-APIC.*virtio' /proc/interrupts")
    assert int(wires) == 30
    vmm.send("poweroff")
    assert vmm.wait() == 0
    for name in names:
        first = content(name, MiB)[: MiB // 2]
        assert (folder / name).read_bytes() == first + first, name


def test_a_running_guest_uses_what_is_plugged_in_and_misses_what_is_pulled_out(
    start: Start, qmp: Connect, arguments: list[object], direct_folder: Path, taps: None
) -> None:
    disk = direct_folder / "plugged"
    disk.write_bytes(content("plugged", 4 * MiB))
    vmm = start(*arguments)
    vmm.expect(PROMPT)
    client = qmp()
    assert vmm.run("ls /sys/class/net").split() == ["lo"]  # ACPI says nothing of slots that are empty
    assert vmm.run("cat /sys/block/vd[bcd]/size").split() == ["0", "0", "0"]

    # The manual's commands: a disk that is there at once under the name of its slot, without rescanning.
    for _ in range(2):
        file = {"driver": "file", "filename": str(disk), "aio": "native"}
        client.execute("blockdev-add", {"node-name": "drive-0", "file": file, "cache": {"direct": True}, "read-only": False})
        client.execute("device_add", {"id": "drive-0", "driver": "virtio-blk-mmio", "addr": "0x1", "serial": "plugged"})
        vmm.run("until [ $(cat /sys/block/vdb/size) = 8192 ]; do sleep 0.1; done")
        assert vmm.run("cat /sys/block/vdb/serial").strip() == "plugged"
        assert vmm.run("sha256sum < /dev/vdb").split()[0] == hashlib.sha256(disk.read_bytes()).hexdigest()
        vmm.run("dd if=/dev/urandom of=/tmp/written bs=1M count=2 2>/dev/null; dd if=/tmp/written of=/dev/vdb conv=fsync")
        client.execute("device_del", {"id": "drive-0"})
        assert client.event("DEVICE_DELETED")["data"] == {"device": "drive-0", "path": "drive-0"}
        vmm.run("until [ $(cat /sys/block/vdb/size) = 0 ]; do sleep 0.1; done")
        written = hashlib.sha256(disk.read_bytes()[: 2 * MiB]).hexdigest()
        assert vmm.run("sha256sum < /tmp/written").split()[0] == written
    client.execute("blockdev-del", {"node-name": "drive-0"})  # it is gone already, which is fine once

    # A card that was not there: first with a descriptor, then by name.
    opened = open_tap("tap0")
    client.execute("getfd", {"fdname": "tapA"}, fds=[opened])
    os.close(opened)
    client.execute("netdev_add", {"id": "net-0", "fds": "tapA"})
    client.execute("device_add", {"id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0", "mac": "52:54:00:80:00:01"})
    vmm.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
    assert vmm.run("cat /sys/class/net/eth0/address").strip() == "52:54:00:80:00:01"
    vmm.run("ip addr add 10.80.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 -W 5 10.80.0.1")
    client.execute("device_del", {"id": "net-0"})
    vmm.run("until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done")
    client.execute("netdev_add", {"id": "net-0", "ifname": "tap0"})
    client.execute("device_add", {"id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0"})
    vmm.run("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; ping -c 3 -W 5 10.80.0.1")
    assert vmm.run("ls /sys/class/net").split() == ["eth0", "lo"]  # the other slot is still nobody's business

    # Nothing of it upset the guest, and one can look inside.
    complaints = vmm.run("dmesg | grep -E 'acpi|ACPI|LNRO|virtio' | grep -iE 'error|fail|warn|not present|already' || echo none")
    assert complaints.strip() == "none"
    assert int(client.execute("query-vcpu-reg", {"addr": "cr0", "vcpu": 1}), 16) & 0x8000_0001 == 0x8000_0001
    assert int(client.execute("query-vcpu-reg", {"addr": "efer", "vcpu": 0}), 16) & 0x500 == 0x500
    with pytest.raises(QmpError, match=r"no register r99; there are: rax, .*, msr:NUMBER"):
        client.execute("query-vcpu-reg", {"addr": "r99", "vcpu": 0})

    # What is plugged in stays over a reboot, and is found at once then.
    vmm.send("reboot")
    client.event("RESET")
    vmm.expect("initrd: up")
    vmm.expect(PROMPT)
    assert vmm.run("ls /sys/class/net").split() == ["eth0", "lo"]
    vmm.run("ip addr add 10.80.0.2/24 dev eth0; ip link set eth0 up; until ping -c 1 -W 5 10.80.0.1; do sleep 1; done")
    vmm.send("poweroff")
    assert vmm.wait() == 0


ROUNDS = 500
SETTLED = 50  # rounds after which everything that is loaded or kept once is there


def held(pid: int) -> tuple[int, int, int]:
    """What a process holds: descriptors, threads, and KiB of memory of its own (PSS without what belongs to files)."""
    process = Path(f"/proc/{pid}")
    rollup = dict(line.split(":", 1) for line in (process / "smaps_rollup").read_text().splitlines()[1:])
    anonymous = int(rollup["Pss_Anon"].split()[0])
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), anonymous


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_five_hundred_disks_and_cards_in_turn_under_load_leave_nothing_and_lose_nothing(
    start: Start, qmp: Connect, arguments: list[object], folder: Path, taps: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = {}
    for name in ("one", "two"):
        (folder / name).write_bytes(content(name, MiB))
        sums[name] = hashlib.sha256(content(name, MiB)).hexdigest()
    vmm = start(*arguments, "-netdev", "tap,id=load,ifname=tap0", "-device", "virtio-net-device,netdev=load,id=load")
    vmm.expect(PROMPT)
    client = qmp()
    at_rest = held(vmm.pid)[1]
    # The load: a writer that checks every block of the root disk that it wrote, and a ping that counts what comes back.
    vmm.run("ip addr add 10.80.0.2/24 dev eth0; ip link set eth0 up; until ping -c 1 -W 5 10.80.0.1; do sleep 1; done")
    vmm.run(
        "(while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/root/f bs=64k count=4 2>/dev/null; s=$(sha256sum < /root/f); sync;"
        ' echo 1 > /proc/sys/vm/drop_caches; [ "$s" = "$(sha256sum < /root/f)" ] || echo LOST > /tmp/bad; done; echo > /tmp/w) &'
    )
    vmm.run(
        "(while [ ! -e /tmp/stop ]; do"
        " ping -A -q -c 200 -W 5 10.80.0.1 | grep -q ' 0% packet loss' || echo LOST > /tmp/bad; done;"
        " echo > /tmp/p) &"
    )
    before, began = (0, 0, 0), time.monotonic()
    for number in range(ROUNDS):
        if number == SETTLED:
            before = held(vmm.pid)
        if number % 25 == 0:
            descriptors, threads, memory = held(vmm.pid)
            with capsys.disabled():  # three quarters of an hour without a word look like a lab that stands still
                took = time.monotonic() - began
                print(f"{took:5.0f} s: round {number}: {descriptors} descriptors, {threads} threads, {memory} KiB", flush=True)
        if number % 2:
            client.execute("netdev_add", {"id": "net", "ifname": "tap1"})
            client.execute("device_add", {"id": "net", "driver": "virtio-net-mmio", "addr": "0x1"})
            vmm.run(
                "until [ -e /sys/class/net/eth1 ]; do sleep 0.02; done; [ $(cat /sys/class/net/eth1/flags) = 0x1003 ] ||"
                " { ip addr add 10.80.1.2/24 dev eth1; ip link set eth1 up; };"
                " until [ $(cat /sys/class/net/eth1/carrier) = 1 ]; do sleep 0.02; done; ping -q -c 1 -W 5 10.80.1.1"
            )
            client.execute("device_del", {"id": "net"})
        else:
            name, slot = ("one", "two")[number // 2 % 2], number % 3 + 1
            disk = "/dev/vd" + "abcd"[slot]
            file = {"driver": "file", "filename": str(folder / name), "aio": "threads"}
            client.execute("blockdev-add", {"node-name": "disk", "file": file, "cache": {"direct": False}})
            client.execute("device_add", {"id": "disk", "driver": "virtio-blk-mmio", "addr": str(slot)})
            found = vmm.run(f"until [ $(cat /sys/block/{disk[5:]}/size) = 2048 ]; do sleep 0.02; done; sha256sum < {disk}")
            assert found.split()[0] == sums[name], number
            client.execute("device_del", {"id": "disk"})
            vmm.run(f"until [ $(cat /sys/block/{disk[5:]}/size) = 0 ]; do sleep 0.02; done")
    after = held(vmm.pid)
    vmm.run("echo > /tmp/stop; until [ -e /tmp/w ] && [ -e /tmp/p ]; do sleep 0.2; done; [ ! -e /tmp/bad ]")
    assert after[0] == before[0]
    assert after[2] - before[2] < 4096, f"{before} to {after}"
    # A disk has threads for reads that wait, as many as there are such reads; without any they end after ten seconds.
    for _ in range(60):
        if held(vmm.pid)[1] <= at_rest:
            break
        time.sleep(1)
    assert held(vmm.pid)[1] <= at_rest
    vmm.send("poweroff")
    assert vmm.wait() == 0
