"""Every form in which a kernel can be given: what a distribution ships, and what can be made from it."""

from __future__ import annotations

import io
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from lab import guests
from lab.vmm import Vmm

Start = Callable[..., Vmm]

PVH_NOTE = struct.pack("<III4s", 4, 8, 18, b"Xen\0")  # XEN_ELFNOTE_PHYS32_ENTRY with a 64-bit value


@pytest.fixture(scope="module")
def vmlinux(cloud_kernel: guests.Kernel) -> bytes:
    """The ELF file inside of the bzImage (Linux boot protocol: payload_offset, payload_length)."""
    image = cloud_kernel.image.read_bytes()
    setup = (image[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup * 512 + offset :][: length - 4]
    unpacked = subprocess.run(["lz4", "-dc"], input=payload, capture_output=True, check=False).stdout
    assert unpacked.startswith(b"\x7fELF")
    return unpacked


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
