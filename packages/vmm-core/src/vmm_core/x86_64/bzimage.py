"""The setup header of a bzImage, checked (Linux kernel, Documentation/arch/x86/boot.rst).

Only kernels with a 64-bit entry point (boot protocol 2.12, Linux 3.8) are accepted: it spares the guest real mode.
Not here: loading, and the zero page that the header is copied into (`zero_page`).
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from vmm_core.errors import BootError
from vmm_core.x86_64.layout import Microvm

SETUP_HEADER: Final = 0x1F1  # where the header starts, in the file and in the zero page alike
HEADER_ROOM: Final = 0x290  # the zero page has room for the header up to here
HEAD: Final = 0x300  # how much of the file holds all of it

_MAGIC = b"HdrS"
_MINIMUM_VERSION = 0x020C
_SYSSIZE = Struct("<I")  # at 0x1F4, in paragraphs of 16 bytes
_BOOT_FLAG = Struct("<H")  # at 0x1FE
_MIDDLE = Struct("<HxxxxxxxxxBxxI")  # at 0x206: version, 0x211: loadflags, 0x214: code32_start
_END = Struct("<IIB")  # at 0x22C: initrd_addr_max, kernel_alignment, relocatable_kernel
_XLOADFLAGS = Struct("<HI")  # at 0x236: xloadflags, cmdline_size
_PAYLOAD = Struct("<II")  # at 0x248: payload_offset, payload_length
_INIT = Struct("<QI")  # at 0x258: pref_address, init_size

_LOADED_HIGH = 1  # loadflags
_XLF_KERNEL_64 = 1  # xloadflags
_ENTRY_64 = 0x200  # the 64-bit entry point within the protected-mode kernel


class BzImage(NamedTuple):
    """What a loader must know of a bzImage. Offsets and sizes are in bytes, of the file; addresses are guest-physical."""

    header: bytes  # the setup header, from SETUP_HEADER on
    kernel_offset: int  # the protected-mode kernel
    kernel_size: int
    load_address: int
    entry: int
    run_address: int  # where the kernel unpacks itself to, and
    run_size: int  # how much memory it takes there before it looks at the memory map
    command_line_max: int  # without its NUL
    initrd_max: int  # highest address that the last byte of a RAM disk may have
    payload_offset: int  # the compressed kernel proper
    payload_size: int


def is_bzimage(head: bytes) -> bool:
    """Return whether a file that begins with `head` has the signature of a bzImage."""
    return head[0x202:0x206] == _MAGIC


def parse_bzimage(path: str, head: bytes, size: int) -> BzImage:
    """Read the setup header in `head`, the first HEAD bytes of a file of `size` bytes.

    Raises BootError, naming `path`, when it is truncated, has no 64-bit entry point, or contradicts itself.
    """
    if len(head) < HEAD:
        raise BootError(f"{path}: truncated: {size} bytes do not hold the setup header of a bzImage")
    (boot_flag,) = _BOOT_FLAG.unpack_from(head, 0x1FE)
    if boot_flag != 0xAA55:
        raise BootError(f"{path}: broken bzImage: boot_flag is {boot_flag:#06x} and not 0xaa55")
    version, loadflags, code32_start = _MIDDLE.unpack_from(head, 0x206)
    if version < _MINIMUM_VERSION:
        raise BootError(
            f"{path}: kernel too old: boot protocol {version >> 8}.{version & 0xFF:02} has no 64-bit entry point, 2.12 is needed"
        )
    xloadflags, command_line_max = _XLOADFLAGS.unpack_from(head, 0x236)
    if not xloadflags & _XLF_KERNEL_64:
        raise BootError(f"{path}: a 32-bit kernel: no 64-bit entry point (xloadflags {xloadflags:#x})")
    if not loadflags & _LOADED_HIGH:
        raise BootError(f"{path}: a zImage, which loads below 1 MiB; a bzImage is needed")
    header_end = 0x202 + head[0x201]
    if not 0x264 <= header_end <= HEADER_ROOM:  # init_size, which every kernel of this version has, ends at 0x264
        raise BootError(f"{path}: broken bzImage: the setup header ends at {header_end:#x}")
    kernel_offset = ((head[0x1F1] or 4) + 1) * 512  # a setup_sects of 0 means 4
    kernel_size = _SYSSIZE.unpack_from(head, 0x1F4)[0] * 16
    # A signature may follow the kernel. The last paragraph may be incomplete: not every build tool pads it.
    if size < kernel_offset + kernel_size - 15:
        raise BootError(f"{path}: truncated: {size} bytes of {kernel_offset + kernel_size}")
    kernel_size = min(kernel_size, size - kernel_offset)
    if kernel_size <= _ENTRY_64:
        raise BootError(f"{path}: broken bzImage: a kernel of {max(kernel_size, 0)} bytes")
    initrd_max, alignment, relocatable = _END.unpack_from(head, 0x22C)
    pref_address, init_size = _INIT.unpack_from(head, 0x258)
    payload_offset, payload_size = _PAYLOAD.unpack_from(head, 0x248)
    if payload_offset + payload_size > kernel_size:
        raise BootError(
            f"{path}: broken bzImage: the payload ends {payload_offset + payload_size - kernel_size} bytes behind the kernel"
        )
    load_address = run_address = pref_address
    if relocatable:
        if alignment == 0 or alignment & (alignment - 1):
            raise BootError(f"{path}: broken bzImage: kernel_alignment {alignment:#x} is not a power of two")
        load_address = run_address = (pref_address + alignment - 1) & -alignment
    else:
        load_address = code32_start  # it moves itself to pref_address from there
    for address in (load_address, run_address):
        if not Microvm.KERNEL_BASE <= address < Microvm.LOW_RAM_LIMIT:
            raise BootError(f"{path}: broken bzImage: a load address of {address:#x}, which is never free RAM")
    return BzImage(
        header=head[SETUP_HEADER:header_end],
        kernel_offset=kernel_offset,
        kernel_size=kernel_size,
        load_address=load_address,
        entry=load_address + _ENTRY_64,
        run_address=run_address,
        run_size=max(init_size, kernel_size),
        command_line_max=command_line_max,
        initrd_max=initrd_max,
        payload_offset=kernel_offset + payload_offset,
        payload_size=payload_size,
    )
