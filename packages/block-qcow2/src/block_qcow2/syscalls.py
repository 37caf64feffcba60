"""System calls that Python's standard library lacks, through libc. Imported on first use: ctypes costs start-up time.

Every function raises OSError with the errno of the call and retries when a signal interrupts it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from struct import Struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syscall.restype = ctypes.c_long

# linux/falloc.h
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10

# linux/fs.h
BLKSSZGET, BLKDISCARD, BLKZEROOUT, BLKGETSIZE64 = 0x1268, 0x1277, 0x127F, 0x80081272

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_MASK = Struct("=I")
_STATX_DIO = Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align, at offset 152 of struct statx
_STATX_DIO_OFFSET = 152

_NUMBERS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209, "statx": 332},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4, "statx": 291},
}
# The same on every architecture since they were added (Linux 5.1).
_COMMON = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}


def number(name: str) -> int:
    """The number of a system call on this machine. OSError (ENOSYS) where it is not known."""
    try:
        return _COMMON.get(name) or _NUMBERS[platform.machine()][name]
    except KeyError:
        raise OSError(errno.ENOSYS, f"{name} on {platform.machine()}") from None


def syscall(nr: int, *args: object) -> int:
    """Call the kernel. Pass ctypes values for anything wider than an int."""
    while True:
        result: int = _libc.syscall(ctypes.c_long(nr), *args)
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2): `mode` is a set of FALLOC_ flags; `offset` and `length` in bytes."""
    while _libc.fallocate64(fd, mode, offset, length) < 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def direct_io_alignment(fd: int) -> tuple[int, int] | None:
    """(memory alignment, offset and length alignment) of O_DIRECT on `fd`, in bytes; None where the kernel does not say.

    Source: statx(2), STATX_DIOALIGN (Linux 6.1).
    """
    answer = ctypes.create_string_buffer(256)
    try:
        syscall(number("statx"), fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer)
    except OSError:
        return None
    (mask,) = _STATX_MASK.unpack_from(answer, 0)
    memory, offset = _STATX_DIO.unpack_from(answer, _STATX_DIO_OFFSET)
    if not mask & _STATX_DIOALIGN or not memory or not offset:
        return None
    return memory, offset
