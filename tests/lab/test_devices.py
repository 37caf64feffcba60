"""Devices of a microVM with a stock kernel, as many as fit in one boot: disks on every engine, the console, entropy, serial."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import Qmp, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20
UPTIME = "cut -d' ' -f1 /proc/uptime"

Start = Callable[..., Vmm]


def content(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


@pytest.fixture
def root(cloud_kernel: guests.Kernel, initrd: Path, rootfs: Path, folder: Path) -> list[object]:
    """A guest with a qcow2 root disk. -qmp is folder/qmp.sock."""
    image = folder / "root.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-c", str(rootfs), str(image)], check=True)
    return [
        *("-machine", "microvm", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1"),
        *("-drive", f"file={image},id=rootfs,format=qcow2,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    ]


def test_disks_on_every_engine_and_format_carry_the_same_bytes(
    start: Start, root: list[object], folder: Path, direct_folder: Path
) -> None:
    size = 16 * MiB
    engines = {
        "off": "direct=off,aio=off",
        "native": "direct=on,aio=native",
        "uring": "direct=on,aio=io_uring",
        "threads": "direct=off,aio=threads,format=qcow2,discard=unmap,detect-zeroes=unmap",
    }
    options: list[object] = ["-object", "iothread,id=io1", "-object", "iothread,id=io2"]
    images = {}
    for number, (name, drive) in enumerate(engines.items()):
        images[name] = direct_folder / name
        if "qcow2" in drive:
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(images[name]), str(size)], check=True)
        else:
            images[name].write_bytes(bytes(size))
        options += ["-drive", f"id={name},file={images[name]},{drive}"]
        options += ["-device", f"virtio-blk-device,id={name},drive={name},iothread=io{number % 2 + 1},num-queues=2,serial={name}"]
    source = folder / "source"
    source.write_bytes(content("source", size))
    options += ["-drive", f"id=source,file={source},direct=off,readonly=on,throttling.iops-total=1000"]
    options += ["-device", "virtio-blk-device,id=source,drive=source,serial=source"]
    vmm = start(*root, *options)
    vmm.expect(PROMPT)
    listing = vmm.run("for d in /sys/block/vd*; do echo $(basename $d)=$(cat $d/serial); done")
    names = {serial: disk for disk, serial in re.findall(r"(vd\w)=(\S+)", listing)}
    assert names.keys() == {*engines, "source"}
    for name in engines:
        vmm.run(f"dd if=/dev/{names['source']} of=/dev/{names[name]} bs=256k conv=fsync 2>&1", 120)
    vmm.run("echo 3 > /proc/sys/vm/drop_caches")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for name in engines:
        assert vmm.run(f"sha256sum < /dev/{names[name]}", 120).split()[0] == digest, name
    # Half of the sparse disk goes back to the host.
    vmm.run(f"dd if=/dev/zero of=/dev/{names['threads']} bs=1M count=8 conv=fsync 2>&1", 120)
    vmm.send("poweroff")
    assert vmm.wait() == 0
    for name in ("off", "native", "uring"):
        assert hashlib.sha256(images[name].read_bytes()).hexdigest() == digest, name
    subprocess.run(["qemu-img", "check", "-q", str(images["threads"])], check=True)
    assert images["threads"].stat().st_blocks * 512 < 12 * MiB
    for image in images.values():
        image.unlink()


@pytest.mark.soak
def test_a_limit_on_requests_and_one_on_bytes_are_what_the_guest_gets(start: Start, root: list[object], folder: Path) -> None:
    disk = folder / "disk"
    disk.write_bytes(bytes(64 * MiB))
    free_disk = folder / "free"
    with free_disk.open("wb") as file:
        file.truncate(1 << 36)  # holes, and more than can be read in 20 s
    vmm = start(
        *root,
        *("-drive", f"id=slow,file={disk},direct=off,readonly=on,throttling.bps-total={2 * MiB}"),
        *("-device", "virtio-blk-device,id=slow,drive=slow"),
        *("-drive", f"id=few,file={disk},direct=off,readonly=on,throttling.iops-total=40"),
        *("-device", "virtio-blk-device,id=few,drive=few"),
        *("-drive", f"id=free,file={free_disk},direct=off,readonly=on", "-device", "virtio-blk-device,id=free,drive=free"),
    )
    vmm.expect(PROMPT)
    for disk_name, block, limit in (("vdb", "128k", 2 * MiB * 20 // (128 << 10)), ("vdc", "4k", 40 * 20)):
        read = "timeout 20 dd if=/dev/{} of=/dev/null iflag=direct bs={} 2> /dev/null"
        counts = f"{UPTIME}; awk '{{print $1}}' /sys/block/{disk_name}/stat /sys/block/vdd/stat"
        before = [float(word) for word in vmm.run(counts).split()]
        vmm.run(f"{read.format('vdd', block)} & {read.format(disk_name, block)}; wait", 90)
        elapsed, served, free = (float(word) - first for word, first in zip(vmm.run(counts).split(), before, strict=True))
        # What a limit promises is an upper bound, which no load of the host can break: bytes in 20 s, requests in 20 s.
        assert served <= limit * elapsed / 20 * 1.05 + 40, (disk_name, served, elapsed)
        # It is no lower limit than was asked for: a disk without one, read in the same way at the same time, tells what a host
        # that is busy with other things has left for one.
        assert served >= min(limit, free) * 0.5, (disk_name, served, free, elapsed)
    vmm.send("poweroff")
    assert vmm.wait() == 0


@pytest.mark.soak
def test_the_serial_port_loses_nothing_in_either_direction(start: Start, root: list[object]) -> None:
    vmm = start(*root)
    vmm.expect(PROMPT)
    vmm.run("seq 1 2000 > /tmp/numbers")
    shown = vmm.run("cat /tmp/numbers", 120)
    assert [int(line) for line in shown.split()] == list(range(1, 2001))
    text = "".join(f"line {number} of the paste\n" for number in range(200))
    vmm.send(f"stty -echo; echo go; head -c {len(text)} > /tmp/paste; stty echo; echo taken")
    vmm.expect("go\r?\n")
    vmm.write(text.encode())
    vmm.expect("taken\r?\n", 120)
    assert hashlib.md5(text.encode()).hexdigest() in vmm.run("md5sum /tmp/paste")
    vmm.send("poweroff")
    assert vmm.wait() == 0


def test_entropy_and_a_virtio_console(start: Start, root: list[object], folder: Path) -> None:
    vmm = start(
        *root,
        *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r,id=rng"),
        *("-device", "virtio-serial-device,id=vs", "-chardev", f"file,id=c,path={folder}/hvc"),
        *("-device", "virtconsole,chardev=c,id=con"),
    )
    vmm.expect(PROMPT)
    assert "virtio" in vmm.run("cat /sys/class/misc/hw_random/rng_current")
    assert int(vmm.run("dd if=/dev/hwrng bs=512 count=4 2>/dev/null | wc -c")) == 2048
    vmm.run("seq 1 500 > /dev/hvc0")
    with Qmp(folder / "qmp.sock") as client:
        client.execute("quit")
    assert vmm.wait() == 0
    assert (folder / "hvc").read_text().split() == [str(number) for number in range(1, 501)]
