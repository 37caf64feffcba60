"""qcow2 and raw disk images as a library and as the command stratovirt-img.

`open_disk` is the way in for virtual machine monitors: a disk with completion-based channels (`block_qcow2.disk`).

Importing this package imports nothing else of it: what is used is loaded when it is used.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .disk import Disk
    from .image import Image
    from .images import ImageFile, create_image, open_image
    from .qcow2.check import CheckResult
    from .qcow2.create import Options
    from .qcow2.image import Extent
    from .qcow2.snapshots import Snapshot
    from .secret import read_secret

__version__ = "0.1.0"
__all__ = [
    "CheckResult",
    "Extent",
    "Image",
    "ImageFile",
    "Options",
    "Snapshot",
    "create_image",
    "open_disk",
    "open_image",
    "read_secret",
]
_HOMES = {
    "CheckResult": "qcow2.check",
    "Extent": "qcow2.image",
    "Image": "image",
    "ImageFile": "images",
    "Options": "qcow2.create",
    "Snapshot": "qcow2.snapshots",
    "create_image": "images",
    "open_image": "images",
    "read_secret": "secret",
}


def open_disk(
    path: str | os.PathLike[str],
    *,
    format: str | None = "raw",
    read_only: bool = False,
    direct: bool = False,
    aio: str = "off",
    discard: bool = False,
    detect_zeroes: str = "off",
    allow: bool | Callable[[str], bool] = False,
    l2_cache_bytes: int = 0,
    refcount_cache_bytes: int = 0,
    passphrase: bytes | None = None,
) -> Disk:
    """Open an image for guest I/O. Takes no lock: see `Disk.lock`.

    `format`: "raw", "qcow2", or None to look (a guest can make a raw disk look like anything: say what it is). `aio`: "off" (in
    the caller where it does not block, else threads), "threads", "native" (libaio) or "io_uring". `discard`: pass discards to
    the host. `detect_zeroes`: "on" turns written zeroes into zeroed ranges, "unmap" into holes (if `discard`). `allow`:
    whether files that a qcow2 image names may be opened; a function is asked about each path. `l2_cache_bytes` and
    `refcount_cache_bytes` bound the metadata caches of a qcow2 image, 0 for 32 MiB each. `passphrase`: of a LUKS image. A
    qcow2 image that was not closed properly is repaired when it is locked.

    Raises OpenError (the file, or an option), EngineError (the host lacks the engine), ImageFormatError.
    """
    from .errors import OpenError
    from .hostfile import HostFile
    from .raw import RawDisk, check_options

    check_options(os.fspath(path), aio, detect_zeroes)
    disk: Disk
    if format != "raw":
        from .images import RawImage, open_any

        image = open_any(
            path,
            format=format,
            read_only=read_only,
            allow=allow,
            direct=direct,
            lock=False,
            discard=discard,
            l2_cache_bytes=l2_cache_bytes,
            passphrase=passphrase,
        )
        try:
            if isinstance(image, RawImage):
                disk = RawDisk(image.file, aio=aio, discard=discard, detect_zeroes=detect_zeroes)
            elif image.format != "qcow2":
                raise OpenError(f"{image.path}: {image.format} images cannot be disks of a machine: convert them")
            else:
                from .qcow2.disk import Qcow2Disk

                image.refcount_cache_bytes = refcount_cache_bytes
                disk = Qcow2Disk(image, aio=aio, discard=discard, detect_zeroes=detect_zeroes)
        except BaseException:
            image.close()
            raise
    else:
        file = HostFile(path, read_only=read_only, direct=direct)
        try:
            disk = RawDisk(file, aio=aio, discard=discard, detect_zeroes=detect_zeroes)
        except BaseException:
            file.close()
            raise
    if aio in ("native", "io_uring"):
        try:
            disk.channel().close()  # a host without the engine is found out now and not when a guest starts
        except BaseException:
            disk.close()
            raise
    return disk


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is not None:
        from importlib import import_module

        return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
