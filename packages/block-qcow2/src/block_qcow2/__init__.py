"""qcow2 and raw disk images as a library and as the command stratovirt-img.

`open_disk` is the way in for virtual machine monitors: a disk with completion-based channels (`block_qcow2.disk`).

Importing this package imports nothing else of it: what is used is loaded when it is used.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .disk import Disk

__version__ = "0.1.0"
__all__ = ["open_disk"]


def open_disk(
    path: str | os.PathLike[str],
    *,
    format: str | None = "raw",
    read_only: bool = False,
    direct: bool = False,
    aio: str = "off",
    discard: bool = False,
    detect_zeroes: str = "off",
) -> Disk:
    """Open an image for guest I/O. Takes no lock: see `Disk.lock`.

    `format`: "raw". `aio`: "off" (in the caller where it does not block, else threads), "threads", "native" (libaio) or
    "io_uring". `discard`: pass discards to the host. `detect_zeroes`: "on" turns written zeroes into zeroed ranges, "unmap"
    into holes (if `discard`).

    Raises OpenError (the file, or an option), EngineError (the host lacks the engine).
    """
    from .errors import OpenError
    from .hostfile import HostFile
    from .raw import RawDisk

    if format != "raw":
        raise OpenError(f"{os.fspath(path)}: format {format!r} is not supported yet; only raw is")
    file = HostFile(path, read_only=read_only, direct=direct)
    try:
        disk = RawDisk(file, aio=aio, discard=discard, detect_zeroes=detect_zeroes)
        if aio in ("native", "io_uring"):
            disk.channel().close()  # a host without the engine is found out now and not when a guest starts
    except BaseException:
        file.close()
        raise
    return disk
