"""Space and attributes of new files: preallocation, no-copy-on-write, extent size hints. Not here: what an image maps."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hostfile import HostFile

Report = Callable[[int, int], None]  # bytes done, bytes in all
MODES = ("off", "metadata", "falloc", "full")
_STEP = 1 << 30  # bytes of one call of fallocate: between two of them progress is told
_PIECE = 1 << 20

# linux/fs.h. These hold for the whole file, and are set while it is empty.
_GETFLAGS, _SETFLAGS, _NOCOW = 0x80086601, 0x40086602, 0x00800000
_GETXATTR, _SETXATTR, _EXTSIZE = 0x801C581F, 0x401C5820, 0x00000800
_FSXATTR = Struct("=IIIII8x")  # fsx_xflags, fsx_extsize, fsx_nextents, fsx_projid, fsx_cowextsize
_NOT_THERE = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.ENOSYS}


def fill(file: HostFile, start: int, end: int, mode: str, report: Report | None = None) -> None:
    """Give the bytes from `start` to `end` of a regular file their space ("falloc"), or zeroes ("full")."""
    at, total = start, end - start
    zeroes = memoryview(bytes(min(_PIECE, max(total, 0))))
    while at < end:
        if mode == "full":
            n = min(_PIECE, end - at)
            file.writev(at, [zeroes[:n]])
        else:
            n = min(_STEP, end - at)
            try:
                os.posix_fallocate(file.fd, at, n)
            except OSError as e:
                raise OSError(e.errno, e.strerror, file.path) from None
        at += n
        if report is not None:
            report(at - start, total)
    file.refresh_size()


def set_nocow(file: HostFile) -> None:
    """Ask for no copy-on-write of the empty file. A file system that copies nothing on write has no such attribute: no error."""
    try:
        flags = int.from_bytes(fcntl.ioctl(file.fd, _GETFLAGS, bytes(8))[:4], "little")
        fcntl.ioctl(file.fd, _SETFLAGS, (flags | _NOCOW).to_bytes(8, "little"))
    except OSError as e:
        if e.errno not in _NOT_THERE:
            raise OSError(e.errno, e.strerror, file.path) from None


def set_extent_size(file: HostFile, size: int) -> None:
    """Hint in what pieces, in bytes, space of the empty file is to be found. It stays a hint: no error where there is none."""
    try:
        xflags, _, extents, project, cow = _FSXATTR.unpack(fcntl.ioctl(file.fd, _GETXATTR, bytes(_FSXATTR.size)))
        fcntl.ioctl(file.fd, _SETXATTR, _FSXATTR.pack(xflags | _EXTSIZE, size, extents, project, cow))
    except OSError as e:
        if e.errno not in _NOT_THERE:
            raise OSError(e.errno, e.strerror, file.path) from None
