"""Every form in which a kernel can be given: what a distribution ships, and what can be made from it."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from lab import guests, modules
from lab.vmm import Qmp, Vmm

Start = Callable[..., Vmm]
Connect = Callable[[], Qmp]

PROMPT = r"guest:\S*# "
PVH_NOTE = struct.pack("<III4s", 4, 8, 18, b"Xen\0")  # XEN_ELFNOTE_PHYS32_ENTRY with a 64-bit value


@pytest.fixture(scope="module")
def vmlinux(cloud_kernel: guests.Kernel) -> bytes:
    """The ELF file inside of the bzImage."""
    return guests.unpacked(cloud_kernel).read_bytes()


def pvh(vmlinux: bytes) -> bytes:
    assert PVH_NOTE in vmlinux
    return vmlinux


def without_pvh(vmlinux: bytes) -> bytes:
    return vmlinux.replace(PVH_NOTE, PVH_NOTE.replace(b"Xen", b"Not"))


def plain(vmlinux: bytes) -> bytes:
    """What `objcopy -O binary` makes of it: memory from the first segment on."""
    segments = [segment for segment in ELFFile(io.BytesIO(vmlinux)).iter_segments("PT_LOAD") if segment["p_filesz"]]
    base = segments[0]["p_paddr"]
    memory = bytearray(max(segment["p_paddr"] + segment["p_filesz"] for segment in segments) - base)
    for segment in segments:
        start = segment["p_paddr"] - base
        memory[start : start + segment["p_filesz"]] = segment.data()
    return bytes(memory)


@pytest.mark.parametrize("form", [pvh, *(pytest.param(form, marks=pytest.mark.soak) for form in (without_pvh, plain))])
def test_a_kernel_that_is_not_compressed_boots_with_its_ram_disk(
    start: Start, cloud_kernel: guests.Kernel, vmlinux: bytes, folder: Path, form: Callable[[bytes], bytes]
) -> None:
    kernel = folder / "vmlinux"
    kernel.write_bytes(form(vmlinux))
    initrd = guests.initrd(cloud_kernel, modules=("button",), script="echo cpus=$(nproc)=; poweroff -f; sleep 60")
    vmm = start(
        *("-machine", "microvm", "-smp", 2, "-m", 256, "-kernel", kernel, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"),
    )
    assert vmm.expect(r"cpus=(\d+)=")[1] == "2"
    assert vmm.wait() == 0


@pytest.mark.soak
@pytest.mark.parametrize("machine", ["microvm,acpi=off", "microvm"])
def test_a_kernel_that_reads_virtio_mmio_words_finds_every_device_once(
    start: Start, qmp: Connect, generic_kernel: guests.Kernel, rootfs: Path, folder: Path, machine: str
) -> None:
    """What StratoVirt's microvm is made for. Without ACPI the words are all that the guest has; with it, it has both."""
    initrd = guests.initrd(
        generic_kernel, (*guests.MODULES, "virtio_net"), built={"virtio_mmio": modules.virtio_mmio_with_words(generic_kernel)}
    )
    for name in ("second", "plugged"):
        (folder / name).write_bytes(hashlib.shake_256(name.encode()).digest(1 << 20))
    vmm = start(
        *("-machine", machine, "-smp", 2, "-m", 512, "-kernel", generic_kernel.image, "-initrd", initrd),
        *("-append", "console=ttyS0 quiet root=/dev/vda rw reboot=k panic=1 net.ifnames=0"),
        *("-drive", f"file={rootfs},id=rootfs,direct=off", "-device", "virtio-blk-device,drive=rootfs,id=rootfs"),
        *("-drive", f"file={folder}/second,id=second,direct=off,readonly=on"),
        *("-device", "virtio-blk-device,drive=second,id=second,serial=second"),
        *("-object", "rng-random,id=objrng,filename=/dev/urandom", "-device", "virtio-rng-device,rng=objrng,id=rng"),
        *("-device", "virtio-serial-device", "-chardev", f"file,id=port,path={folder}/port"),
        *("-device", "virtserialport,chardev=port,id=port,name=port,nr=1"),
        *("-qmp", f"unix:{folder}/qmp.sock,server,nowait", "-serial", "stdio"),
    )  # fmt: skip
    vmm.expect(PROMPT)
    assert vmm.run("nproc").strip() == "2"
    assert sorted(vmm.run("cat /sys/bus/virtio/devices/*/device").split()) == sorted(
        4 * ["0x0002"] + 2 * ["0x0001"] + ["0x0003", "0x0004"]
    )
    assert vmm.run("cat /sys/block/vd[abcd]/size").split() == [str(rootfs.stat().st_size // 512), "2048", "0", "0"]
    assert vmm.run("sha256sum < /dev/vdb").split()[0] == hashlib.sha256((folder / "second").read_bytes()).hexdigest()
    assert vmm.run("head -c 100 /dev/hwrng | wc -c").strip() == "100"
    vmm.run("echo said > $(ls /dev/vport*p1)")
    assert (folder / "port").read_text() == "said\n"

    client = qmp()
    file = {"driver": "file", "filename": str(folder / "plugged")}
    arguments = {"node-name": "plugged", "file": file, "cache": {"direct": False}, "read-only": True}
    client.execute("blockdev-add", arguments)
    client.execute("device_add", {"id": "plugged", "driver": "virtio-blk-mmio", "addr": "0x2"})
    vmm.run("until [ $(cat /sys/block/vdc/size) = 2048 ]; do sleep 0.1; done")
    assert vmm.run("sha256sum < /dev/vdc").split()[0] == hashlib.sha256((folder / "plugged").read_bytes()).hexdigest()

    vmm.send("reboot -f" if machine.endswith("off") else "poweroff")  # without ACPI a reset is the only end
    assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
    assert vmm.wait() == 0
