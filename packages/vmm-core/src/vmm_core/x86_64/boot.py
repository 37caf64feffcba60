"""Put a Linux kernel, its command line and its RAM disk into guest memory, and say how the first vCPU starts.

Four kinds of kernel file, told apart by their contents:

- bzImage, entered at its 64-bit entry point;
- ELF with a PVH note (vmlinux of a kernel with CONFIG_PVH), entered in 32-bit protected mode;
- ELF without, entered in long mode with a zero page;
- `objcopy -O binary vmlinux`, which StratoVirt's manual calls PE. It has no header; that it is Linux shows in its banner.

Anything else is a BootError. Loading overwrites all that a former guest may have left of it, so a reset may load again, and from
the same files, whatever has become of their names (`KernelFiles`).
Not here: ACPI and MP tables (`acpi_tables`, `mp_table`), what goes into the command line.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple, Self

from vmm_core.errors import BootError, InitrdError, KernelCommandLineError
from vmm_core.guestmem import GuestMemory
from vmm_core.x86_64 import bzimage
from vmm_core.x86_64.boot_state import long_mode, protected_mode, write_reset_vector
from vmm_core.x86_64.image import ImageFile
from vmm_core.x86_64.layout import Microvm, Range
from vmm_core.x86_64.memory_map import MapEntry, memory_map
from vmm_core.x86_64.vcpu_boot import VcpuBoot
from vmm_core.x86_64.zero_page import DEFAULT_HEADER, zero_page

_ELF_MAGIC: Final = b"\x7fELF"
_COMMAND_LINE_MAX: Final = 2047  # COMMAND_LINE_SIZE of Linux on x86, less the NUL: for kernels that do not say
_INITRD_MAX: Final = 0xFFFF_FFFF
_PLAIN_MIN: Final = 1 << 20  # no Linux is smaller than this when it is not compressed
_ZEROS: Final = bytes(1 << 20)

# Other things that people give as a kernel, by how they begin (offset, bytes, what it is).
_FOREIGN: Final = (
    (0x38, b"ARM\x64", "an arm64 kernel"),
    (0x38, b"RSC\x05", "a riscv kernel"),
    (0, b"\x1f\x8b", "a gzip file, which must be unpacked first"),
    (0, b"\xfd7zXZ\x00", "an xz file, which must be unpacked first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file, which must be unpacked first"),
    (0, b"\x02\x21\x4c\x18", "an lz4 file, which must be unpacked first"),
    (0, b"BZh", "a bzip2 file, which must be unpacked first"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
)


class LoadedKernel(NamedTuple):
    """What the loader put where. Ranges are guest-physical."""

    protocol: str  # "bzImage", "PVH", "ELF" or "raw"
    vcpu_boot: VcpuBoot
    kernel: Range  # all that the kernel takes until it reads the memory map
    initrd: Range | None
    memory_map: list[MapEntry]


class _Placed(NamedTuple):
    protocol: str
    entry: int
    kernel: Range
    header: bytes = DEFAULT_HEADER
    command_line_max: int = _COMMAND_LINE_MAX
    initrd_max: int = _INITRD_MAX


def load_kernel(
    memory: GuestMemory, kernel_path: str, initrd_path: str | None = None, command_line: str = "", *, rsdp: int | None = None
) -> LoadedKernel:
    """Load a kernel once, from files that are open no longer than that. As `KernelFiles` and its load()."""
    with KernelFiles(kernel_path, initrd_path) as files:
        return files.load(memory, command_line, rsdp=rsdp)


class KernelFiles:
    """A kernel and its RAM disk, open for as long as a machine may boot. A context manager.

    By their descriptors, and not by their names: the upgrade of a kernel package removes the old file under a guest that
    runs, and the guest's next reboot still finds it.
    """

    def __init__(self, kernel_path: str, initrd_path: str | None = None) -> None:
        """Open the files. Raises BootError, InitrdError for the RAM disk: one line that names the file."""
        self._kernel = ImageFile(kernel_path)
        self._initrd: ImageFile | None = None
        if initrd_path is not None:
            try:
                self._initrd = ImageFile(initrd_path, InitrdError)
            except InitrdError:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Twice is fine."""
        for file in (self._kernel, self._initrd):
            if file is not None:
                file.close()

    def load(self, memory: GuestMemory, command_line: str = "", *, rsdp: int | None = None) -> LoadedKernel:
        """Load the kernel for the microvm machine. `rsdp` is the address of ACPI's root pointer, if the machine has ACPI.

        Raises BootError when a file cannot be read or is not what it should be, or when something does not fit RAM, as
        InitrdError for the RAM disk; KernelCommandLineError when the command line is longer than the kernel takes.
        """
        entries = memory_map((region.base, region.size) for region in memory.regions)
        self._kernel.measure()
        placed = _place(memory, self._kernel)
        _write_command_line(memory, command_line, placed.command_line_max)
        initrd = None
        if self._initrd is not None:
            self._initrd.measure()
            initrd = _load_initrd(memory, self._initrd, placed)
        write_reset_vector(memory)
        if placed.protocol == "PVH":
            from vmm_core.x86_64.pvh import start_info

            memory.write(Microvm.PVH_START.base, start_info(entries, initrd=initrd, rsdp=rsdp))
            vcpu_boot = protected_mode(memory, placed.entry)
        else:
            memory.write(Microvm.ZERO_PAGE.base, zero_page(entries, header=placed.header, initrd=initrd, rsdp=rsdp))
            vcpu_boot = long_mode(memory, placed.entry)
        return LoadedKernel(placed.protocol, vcpu_boot, placed.kernel, initrd, entries)


def _place(memory: GuestMemory, file: ImageFile) -> _Placed:
    head = file.head(bzimage.HEAD)
    if bzimage.is_bzimage(head):
        return _place_bzimage(memory, file, head)
    if head.startswith(_ELF_MAGIC):
        return _place_elf(memory, file)
    for offset, magic, what in _FOREIGN:
        if head.startswith(magic, offset):
            raise BootError(f"{file.path}: {what}; a bzImage or ELF kernel for x86_64 is needed")
    return _place_plain(memory, file, head)


def _place_bzimage(memory: GuestMemory, file: ImageFile, head: bytes) -> _Placed:
    image = bzimage.parse_bzimage(file.path, head, file.size)
    first = min(image.load_address, image.run_address)
    last = max(image.load_address + image.kernel_size, image.run_address + image.run_size)
    kernel = _in_low_ram(memory, file, Range(first, last - first))
    file.load(memory, image.load_address, image.kernel_offset, image.kernel_size)
    return _Placed("bzImage", image.entry, kernel, image.header, image.command_line_max, image.initrd_max)


def _place_elf(memory: GuestMemory, file: ImageFile) -> _Placed:
    from vmm_core.x86_64.elf import parse_elf  # a bzImage needs none of it

    image = parse_elf(file)
    first, last = image.segments[0].address, image.segments[-1].range.end
    kernel = _in_low_ram(memory, file, Range(first, last - first))
    for segment in image.segments:
        if segment.file_size:
            file.load(memory, segment.address, segment.offset, segment.file_size)
        _zero(memory, Range(segment.address + segment.file_size, segment.size - segment.file_size))
    if image.pvh_entry is not None:
        return _Placed("PVH", image.pvh_entry, kernel)
    return _Placed("ELF", image.entry, kernel)


def _place_plain(memory: GuestMemory, file: ImageFile, head: bytes) -> _Placed:
    refusal = BootError(f"{file.path}: not a kernel image (no bzImage header, no ELF magic at offset 0)")
    if file.size < _PLAIN_MIN or not any(head[:8]):  # code starts at once; many disks do not, whatever lies in their files
        raise refusal
    kernel = _in_low_ram(memory, file, Range(Microvm.PLAIN_KERNEL, file.size))
    file.load(memory, kernel.base, 0, kernel.size)
    import re  # 7 ms, for kernels that nearly nobody uses

    # The whole line: compressed by LZ4, its beginning is still readable.
    if not re.search(rb"Linux version \d[ -~]{20,}\n", memory.view(*kernel)):
        raise refusal
    return _Placed("raw", kernel.base, kernel)


def _in_low_ram(memory: GuestMemory, file: ImageFile, kernel: Range) -> Range:
    """Return `kernel`. Raises BootError when not all of it is low RAM, where every kind of kernel starts."""
    end = memory.regions[0].size
    if kernel.end > end:
        raise BootError(
            f"{file.path}: does not fit: needs {kernel.size} bytes of RAM at {kernel.base:#x}, "
            f"where the machine has {max(end - kernel.base, 0)}"
        )
    return kernel


def _zero(memory: GuestMemory, where: Range) -> None:
    for base in range(where.base, where.end, len(_ZEROS)):
        size = min(len(_ZEROS), where.end - base)
        memory.write(base, _ZEROS[:size])


def _write_command_line(memory: GuestMemory, command_line: str, limit: int) -> None:
    try:
        data = os.fsencode(command_line)
    except UnicodeEncodeError as error:
        raise KernelCommandLineError(f"kernel command line: {error}") from None
    if b"\0" in data:
        raise KernelCommandLineError(f"kernel command line: NUL at byte {data.index(0)}")
    limit = min(limit, Microvm.COMMAND_LINE.size - 1)
    if len(data) > limit:
        raise KernelCommandLineError(f"kernel command line: {len(data)} bytes; this kernel takes at most {limit}")
    memory.write(Microvm.COMMAND_LINE.base, data + b"\0")


def _load_initrd(memory: GuestMemory, file: ImageFile, placed: _Placed) -> Range:
    if file.size == 0:
        raise InitrdError(f"{file.path}: empty")
    highest = min(memory.regions[0].size, placed.initrd_max + 1)
    # Where StratoVirt puts it; a larger one goes as high as the kernel and RAM allow.
    for top in (min(Microvm.INITRD_TOP, highest), highest):
        base = (top - file.size) & ~0xFFF
        if base >= placed.kernel.end:
            break
    else:
        raise InitrdError(
            f"{file.path}: does not fit: {file.size} bytes, and {max(highest - placed.kernel.end, 0)} of RAM "
            f"are left between the kernel's end at {placed.kernel.end:#x} and {highest:#x}"
        )
    file.load(memory, base, 0, file.size)
    return Range(base, file.size)
