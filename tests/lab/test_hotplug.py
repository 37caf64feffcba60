"""Devices that come and go, and many of them: what a running stock guest sees, reads and writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import guests
from lab.vmm import Qmp, Vmm

PROMPT = r"guest:\S*# "
MiB = 1 << 20

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]


@pytest.fixture
def arguments(cloud_kernel: guests.Kernel, initrd: Path, rootfs: Path, folder: Path) -> list[object]:
    """A microVM with a root disk. -qmp is folder/qmp.sock."""
    return [
        *("-machine", "microvm", "-smp", 2, "-m", 512, "-kernel", cloud_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw panic=-1"),
        *("-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    ]


def content(name: str, size: int) -> bytes:
    """Bytes that no other disk has."""
    return hashlib.shake_256(name.encode()).digest(size)


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
