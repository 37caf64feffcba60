"""Touching every page of guest RAM before the guest does. Loaded only when asked for (`-mem-prealloc`).

Not here: how much memory there is (`_available`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vmm_core import _available
from vmm_core.errors import PreallocError

_MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14
_SLICE = 256 << 20  # small enough to share out evenly, large enough that the calls do not count


def expect_room(size: int) -> None:
    """Raise PreallocError when `size` bytes of RAM are more than there are: touching them would end with the OOM killer."""
    room = _available.room()
    if room is not None and size > room.size:
        raise PreallocError(
            f"{size >> 20} MiB of guest RAM cannot be there from the start: {room.where} has {room.size >> 20} MiB"
        )


def expect_blocks(fd: int, size: int) -> None:
    """Raise PreallocError when the file system of `fd` has no room for `size` bytes of it.

    Finding out by allocating would take the last of a disk from everybody else on it.
    """
    system = os.fstatvfs(fd)
    free = system.f_bavail * system.f_frsize + os.fstat(fd).st_blocks * 512
    if system.f_blocks and size > free:  # one without a limit has 0 of 0 blocks
        raise PreallocError(
            f"{size >> 20} MiB of guest RAM cannot be there from the start: the file system has {free >> 20} MiB for them"
        )


def populate(views: Sequence[memoryview], fd: int, size: int, threads: int) -> None:
    """Make every page of `views` present and writable, without changing its content, with up to `threads` threads.

    `fd` is the file of a shared mapping, `size` bytes of it in use, or -1: its blocks are allocated first, since a full
    file system shows itself at a write to a mapping only by a signal that ends the process.

    Raises PreallocError when the memory cannot be had.
    """
    try:
        if fd >= 0:
            os.posix_fallocate(fd, 0, size)
        slices = [view[at : at + _SLICE] for view in views for at in range(0, len(view), _SLICE)]
        with ThreadPoolExecutor(min(threads, len(slices)), "prealloc") as pool:
            for _ in pool.map(_touch, slices):
                pass
    except OSError as error:
        raise PreallocError(f"cannot allocate {size:#x} bytes of guest RAM in advance: {error.strerror}") from None


def _touch(view: memoryview) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # releases the GIL, which mmap.madvise does not
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    while madvise(address, len(view), _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        if number == errno.EINVAL:  # an older kernel
            first_bytes = view[:: os.sysconf("SC_PAGESIZE")]
            first_bytes[:] = first_bytes.tobytes()
            return
        if number not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number))
