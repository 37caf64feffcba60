"""What a microvm has room for: its slots and who may be in them, and one guest that uses every device at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from lab import guests
from lab.network import ANSWERS, DHCP, GATEWAY, echoes, never_ending, run, tap, way_out
from lab.peers import files_served
from lab.vmm import WAIT, Qmp, Vmm

PROMPT = r"guest:\S*# "

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


def test_without_acpi_there_are_eleven_slots_and_five_of_them_are_for_devices_that_stay(start: Start, folder: Path) -> None:
    def devices(count: int) -> list[object]:
        rngs = [
            ("-object", f"rng-random,id=r{n},filename=/dev/urandom", "-device", f"virtio-rng-device,rng=r{n},id=d{n}")
            for n in range(count)
        ]
        return [word for words in rngs for word in words]

    kernel = guests.kernel("cloud")
    common = ("-machine", "microvm,acpi=off", "-kernel", kernel.image, "-S", "-qmp", f"unix:{folder}/qmp.sock,server,nowait")
    full = start(*common, *devices(5))
    with Qmp(folder / "qmp.sock") as client:
        assert client.execute("query-status")["status"] == "paused"
        client.execute("quit")
    assert full.wait() == 0
    over = start(*common, *devices(6))
    assert over.wait() == 1
    assert over.errors().strip().endswith("a microvm without ACPI has room for 5 other devices")


# One guest with everything at once

BULK = hashlib.shake_256(b"ports").digest(192 << 10)
BULK_DIGEST = hashlib.sha256(BULK).hexdigest()
LIMIT = 40  # requests a second of the throttled disk
PORTS = ("con", "text", "pty", "net")


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def network() -> Iterator[None]:
    """A tap with an address and two queues, and a way out for passt to take over."""
    with tap("tapall", "10.80.0.1/24", "multi_queue"), way_out(), echoes():
        yield


@pytest.fixture
def shared(folder: Path) -> Iterator[Path]:
    """A folder that a real virtiofsd serves at folder/"fs.sock"."""
    path = folder / "shared"
    (path / "deep/er").mkdir(parents=True)
    (path / "deep/er/large").write_bytes(BULK * 5)
    (path / "empty").touch()
    with files_served(path, folder / "fs.sock"):
        yield path


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_one_guest_uses_every_device_at_once(start: Start, qmp: Connect, folder: Path, network: None, shared: Path) -> None:
    kernel = guests.kernel("cloud")
    modules = ("virtio_net", "virtio_balloon", "vmw_vsock_virtio_transport", "virtiofs")
    initrd = guests.initrd(kernel, (*guests.MODULES, *modules))
    programs = guests.programs("fio", "iperf3", "socat")
    rootfs = guests.copy_image(guests.rootfs(files={"etc/dhcp": DHCP, **programs}), folder / "rootfs.ext4")
    run("qemu-img", "create", "-q", "-f", "qcow2", str(folder / "cow"), "64M")
    (folder / "fixed").write_bytes(BULK * 16)
    (folder / "slow").write_bytes(bytes(8 << 20))
    with socket.create_server(("127.0.0.1", 0)) as free:
        tcp = free.getsockname()[1]
    vmm = start(
        "-machine", "microvm,mem-share=on", "-smp", 2, "-m", 512, "-kernel", kernel.image, "-initrd", initrd,
        "-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1 net.ifnames=0",
        "-object", "iothread,id=io1", "-object", "iothread,id=io2",
        "-drive", f"id=rootfs,file={rootfs},direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs,serial=rootfs",
        "-drive", f"id=cow,file={folder}/cow,format=qcow2,direct=off,discard=unmap",
        "-device", "virtio-blk-device,drive=cow,id=cow,serial=cow,iothread=io1,num-queues=2",
        "-drive", f"id=fixed,file={folder}/fixed,readonly=on,direct=off",
        "-device", "virtio-blk-device,drive=fixed,id=fixed,serial=fixed",
        "-drive", f"id=slow,file={folder}/slow,direct=off,throttling.iops-total={LIMIT}",
        "-device", "virtio-blk-device,drive=slow,id=slow,serial=slow,iothread=io2",
        "-netdev", "tap,id=mq,ifname=tapall,queues=2", "-device", "virtio-net-device,netdev=mq,id=mq,mq=on,iothread=io2",
        "-netdev", "user,id=out", "-device", "virtio-net-device,netdev=out,id=out",
        "-device", "virtio-serial-device,id=ports,max_ports=4",
        "-chardev", f"socket,id=con,path={folder}/con.sock,server,nowait", "-device", "virtconsole,chardev=con,id=con",
        "-chardev", f"file,id=text,path={folder}/text", "-device", "virtserialport,chardev=text,id=text,nr=1",
        "-chardev", "pty,id=pty", "-device", "virtserialport,chardev=pty,id=pty,nr=2",
        "-chardev", f"socket,id=net,host=127.0.0.1,port={tcp},server,nowait", "-device", "virtserialport,chardev=net,id=net,nr=3",
        "-object", "rng-random,id=r,filename=/dev/urandom",
        "-device", "virtio-rng-device,rng=r,id=rng,max-bytes=4096,period=1000",
        "-device", "virtio-balloon-device,id=balloon,deflate-on-oom=on",
        "-device", f"virtio-vsock-device,id=vsock,guest-cid=7,path={folder}/v",
        "-chardev", f"socket,id=fs,path={folder}/fs.sock", "-device", "vhost-user-fs-device,id=fs,chardev=fs,tag=share",
        "-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio",
    )  # fmt: skip
    vmm.expect(PROMPT)
    client = qmp()
    vmm.run("dmesg -n 1")
    never_ending(vmm)
    listing = vmm.run("for d in /sys/block/vd*; do echo $(cat $d/serial)=${d##*/}; done")
    disks = dict(re.findall(r"(\w+)=(vd\w)", listing))
    assert disks.keys() == {"rootfs", "cow", "fixed", "slow"}
    the_throttled_disk_has_its_rate(vmm, disks["slow"])
    disks_keep_what_they_are_given(vmm, disks, folder)
    both_networks_carry_frames_both_ways(vmm)
    every_port_carries_bytes_both_ways(vmm, client, folder, tcp)
    entropy_comes_at_its_rate(vmm, client)
    the_balloon_moves(client)
    sockets_lead_both_ways(vmm, folder)
    files_are_the_same_on_both_sides(vmm, shared)
    assert client.execute("query-status")["running"]
    content = vmm.run(f"sync; sha256sum < /dev/{disks['cow']}").split()[0]
    vmm.send("poweroff")
    assert vmm.wait() == 0
    assert "Traceback" not in vmm.errors()
    run("qemu-img", "check", "-q", str(folder / "cow"))
    run("qemu-img", "convert", "-O", "raw", str(folder / "cow"), str(folder / "cow.raw"))
    assert hashlib.sha256((folder / "cow.raw").read_bytes()).hexdigest() == content


def the_throttled_disk_has_its_rate(vmm: Vmm, disk: str) -> None:
    """Over 20 s of the guest's clock, within 5 %. So many requests wait that the guest may be late by a second for a new one."""
    line = vmm.run(
        f"/usr/bin/fio --name=t --filename=/dev/{disk} --direct=1 --ioengine=libaio --rw=randread --bs=4k --iodepth=64"
        " --time_based --runtime=20 --output-format=terse --terse-version=3", 300
    )  # fmt: skip
    rate = float(next(text for text in line.splitlines() if text.startswith("3;")).split(";")[7])
    assert LIMIT * 0.95 <= rate <= LIMIT * 1.05


def disks_keep_what_they_are_given(vmm: Vmm, disks: dict[str, str], folder: Path) -> None:
    """A qcow2 disk under fio's own verification, and one that can only be read."""
    vmm.run(
        f"/usr/bin/fio --name=v --filename=/dev/{disks['cow']} --rw=randwrite --bs=4k --size=6m --direct=1 --ioengine=libaio"
        " --iodepth=8 --verify=crc32c --do_verify=1 --verify_fatal=1 > /tmp/fio 2>&1 || { cat /tmp/fio; false; }", 300
    )  # fmt: skip
    fixed = hashlib.sha256((folder / "fixed").read_bytes()).hexdigest()
    assert vmm.run(f"sha256sum < /dev/{disks['fixed']}").split()[0] == fixed
    vmm.run(f"! echo x 2>/dev/null > /dev/{disks['fixed']}")
    vmm.run(f"dd if=/dev/{disks['fixed']} of=/root/copy bs=64k conv=fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches")
    assert vmm.run("sha256sum < /root/copy").split()[0] == fixed


def both_networks_carry_frames_both_ways(vmm: Vmm) -> None:
    vmm.run("ip addr add 10.80.0.2/24 dev eth0; ip link set eth0 up; ip link set eth1 up; udhcpc -q -n -i eth1 -s /etc/dhcp")
    assert vmm.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").strip() == "2"
    vmm.run("ping -c 2 -i 0.2 10.80.0.1")
    run(str(guests.busybox()), "ping", "-c", "2", "-i", "0.2", "10.80.0.2")
    # By passt, which carries echoes from the guest only: the guest's address is the host's own, so nobody could send it any.
    vmm.run(f"ping -c 2 -i 0.2 {ANSWERS}")
    for host, peer in (("10.80.0.1", "10.80.0.1"), ("127.0.0.1", GATEWAY)):
        for words in ("", "-R"):
            with subprocess.Popen(["iperf3", "-s", "-1", "-B", host], stdout=subprocess.DEVNULL) as server:
                try:
                    text = vmm.run(f"/usr/bin/iperf3 -J -t 5 -c {peer} {words} <&9", 300)
                    assert server.wait(WAIT) == 0
                finally:
                    server.kill()
            end = json.loads(text[text.index("{") : text.rindex("}") + 1])["end"]
            assert end["sum_received"]["bytes"] >= 256 << 10  # far more than a window: the other side must have answered


def every_port_carries_bytes_both_ways(vmm: Vmm, client: Qmp, folder: Path, tcp: int) -> None:
    """As much as waits nowhere, so that nothing but back pressure brings all of it to the other side."""
    names = vmm.run("for p in /sys/class/virtio-ports/*; do echo $(cat $p/name)=${p##*/}; done")
    ports = {name: f"/dev/{device}" for name, device in re.findall(r"(\w+)=(vport\w+)", names)}
    assert ports.keys() == set(PORTS)
    ports["con"] = "/dev/hvc0"
    vmm.run("exec 8<>/dev/hvc0; stty raw -echo <&8")  # held open: Linux resets this terminal when the last one closes it
    source = "/mnt/bulk"
    vmm.run(f"mkdir -p /mnt; head -c {len(BULK)} /dev/urandom > {source}")
    digest = vmm.run(f"sha256sum < {source}").split()[0]
    vmm.run(f"cat {source} > {ports['text']}")
    wait_until(lambda: (folder / "text").stat().st_size == len(BULK))
    assert hashlib.sha256((folder / "text").read_bytes()).hexdigest() == digest
    pty = next(one["filename"] for one in client.execute("query-chardev") if one["label"] == "pty").removeprefix("pty:")
    terminal = os.open(pty, os.O_RDWR | os.O_NOCTTY)
    tty.setraw(terminal)
    with (
        socket.socket(socket.AF_UNIX) as console,
        socket.create_connection(("127.0.0.1", tcp), WAIT) as network,
        os.fdopen(terminal, "r+b", buffering=0) as line,
    ):
        console.connect(str(folder / "con.sock"))
        console.settimeout(WAIT)
        ways: dict[str, tuple[Callable[[int], bytes | None], Callable[[bytes], object]]] = {
            "con": (console.recv, console.sendall),
            "net": (network.recv, network.sendall),
            "pty": (line.read, lambda data: write_all(line, data)),
        }
        for name, (read, write) in ways.items():
            vmm.run(f"cat {source} > {ports[name]} &")
            found = b""
            while len(found) < len(BULK):
                found += read(65536) or b""
            assert hashlib.sha256(found).hexdigest() == digest, name
            vmm.run(f"wait; (head -c {len(BULK)} < {ports[name]} | sha256sum > /tmp/{name}) &")
            write(BULK)
            assert vmm.run(f"wait; cat /tmp/{name}", 300).split()[0] == BULK_DIGEST, name


def write_all(file: IO[bytes], data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def entropy_comes_at_its_rate(vmm: Vmm, client: Qmp) -> None:
    """20 KiB at 4 KiB a second: a second's worth at once, and one more for a host that was late. The kernel reads some too."""

    def given() -> int:
        text = client.execute("human-monitor-command", {"command-line": "info stats"})
        return int(re.search(r"^rng \(virtio-rng-device\):\r\n    .*bytes=(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    assert "virtio" in vmm.run("cat /sys/class/misc/hw_random/rng_current")
    before, began = given(), time.monotonic()
    assert int(vmm.run("dd if=/dev/hwrng bs=512 count=40 2>/dev/null | wc -c", 300)) == 20 << 10
    bytes_, elapsed = given() - before, time.monotonic() - began
    assert bytes_ > 16 << 10
    assert bytes_ <= 4096 * (elapsed + 2) + 1024
    assert elapsed > 2.5


def the_balloon_moves(client: Qmp) -> None:
    full = client.execute("query-balloon")["actual"]
    for target in (full - (128 << 20), full):
        client.execute("balloon", {"value": target})
        wait_until(lambda target=target: client.execute("query-balloon")["actual"] == target)


def sockets_lead_both_ways(vmm: Vmm, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "v_5000"))
        listener.listen(1)
        listener.settimeout(WAIT)
        vmm.run("/usr/bin/socat -u OPEN:/mnt/bulk VSOCK-CONNECT:2:5000 > /tmp/log 2>&1 &")
        with listener.accept()[0] as peer:
            peer.settimeout(WAIT)
            found = b"".join(iter(lambda: peer.recv(65536), b""))
        assert hashlib.sha256(found).hexdigest() == vmm.run("wait; sha256sum < /mnt/bulk").split()[0]
    (folder / "v_5000").unlink()
    vmm.run("(/usr/bin/socat -u VSOCK-LISTEN:52 CREATE:/tmp/heard > /tmp/log 2>&1; echo heard > /tmp/over) &")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(WAIT)
        answer = b""
        while not answer.startswith(b"OK "):  # until the guest listens
            peer.close()
            peer = socket.socket(socket.AF_UNIX)
            peer.settimeout(WAIT)
            peer.connect(str(folder / "v"))
            peer.sendall(b"CONNECT 52\n")
            answer = peer.recv(64)
        peer.sendall(BULK)
        peer.close()
    vmm.run("until [ -e /tmp/over ]; do usleep 50000; done")
    assert vmm.run("sha256sum < /tmp/heard").split()[0] == BULK_DIGEST


def files_are_the_same_on_both_sides(vmm: Vmm, shared: Path) -> None:
    vmm.run(
        "mkdir -p /share; mount -t virtiofs share /share; mkdir -p /share/from/guest; cp /mnt/bulk /share/from/guest/data; sync"
    )
    text = vmm.run("cd /share; find . -type f -exec sha256sum {} +; cd", 300)
    there = {name.removeprefix("./"): hashed for hashed, name in (line.split() for line in text.splitlines() if line.strip())}
    assert there == tree(shared)
    assert set(there) == {"deep/er/large", "empty", "from/guest/data"}
