"""Image locks that QEMU understands: open-file-description byte locks on one file.

QEMU's scheme (docs/system/images, "Disk image file locking"; block/file-posix): permission number i that an opener *uses* is
a shared lock on byte 100 + i, permission i that it does *not share* with others is a shared lock on byte 200 + i. An opener
conflicts when somebody else does not share what it uses, or uses what it does not share. StratoVirt locks bytes 101, 102 and
202 exclusively as a writer, which this scheme excludes too.

Open-file-description locks do not vanish when another descriptor of the same file is closed, as POSIX record locks do.

Not here: when a virtual machine takes and drops them.
"""

from __future__ import annotations

import errno
import fcntl
from struct import Struct

from .errors import ImageInUseError

_USED, _UNSHARED = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # numbers of QEMU's permissions; 2 is "write unchanged", 4 "graph modification"
_NAMES = {_CONSISTENT_READ: "consistent read", _WRITE: "write", _RESIZE: "resize"}

# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid (which must be 0 for these locks).
_FLOCK = Struct("@hhqqi4x")


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, 0, byte, 1, 0)


def lock(fd: int, path: str, *, write: bool, share: bool = False) -> None:
    """Take the locks of a reader or a writer on `fd`, or raise ImageInUseError and hold none.

    A reader excludes writers, a writer excludes everybody. `share` (reading only) excludes nobody: what is read may change
    meanwhile. The lock goes with the open file description: `unlock`, or closing every copy of `fd`, ends it.
    """
    used = [_CONSISTENT_READ]
    unshared = [_WRITE, _RESIZE]
    if write:
        used += [_WRITE, _RESIZE]
    elif share:
        used, unshared = [], []
    try:
        for byte in [_USED + i for i in used] + [_UNSHARED + i for i in unshared]:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        # Ours are in place, so of two openers at the same time at least one sees the other.
        for i in used:
            _refuse_if_held(fd, _UNSHARED + i, path, f'Failed to get "{_NAMES[i]}" lock')
        for i in unshared:
            _refuse_if_held(fd, _USED + i, path, f'Failed to get shared "{_NAMES[i]}" lock')
    except OSError as e:
        unlock(fd)
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise ImageInUseError(_text(path, 'Failed to get "write" lock')) from None
        raise ImageInUseError(f"{path}: cannot be locked: {e.strerror}") from e
    except ImageInUseError:
        unlock(fd)
        raise


def unlock(fd: int) -> None:
    """Drop every lock taken through this open file description. Harmless when there is none."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, _USED, _UNSHARED + 100 - _USED, 0))


def _refuse_if_held(fd: int, byte: int, path: str, what: str) -> None:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    assert isinstance(answer, bytes)
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        raise ImageInUseError(_text(path, what))


def _text(path: str, what: str) -> str:
    return f"{path}: {what}. Is another process using the image?"
