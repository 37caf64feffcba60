"""Opening and creating images as a library: raw and qcow2, with the rules for what an image may name.

An image that somebody else made may name any file of this host as its backing or data file. So nothing that an image names is
opened unless the caller allows it: `allow=True`, or a function that is asked about each path. Formats are never guessed when
they are given, and a given backing format is believed.

Not here: guest I/O with channels (`open_disk`), the command line.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import locks, prealloc
from .errors import ExternalFileError, ImageFormatError, ImageReadOnlyError, OpenError, UnsupportedFeatureError
from .hostfile import HostFile, read_padded
from .image import Image, PlainImage
from .prealloc import Report
from .qcow2.format import MAGIC

if TYPE_CHECKING:
    from .foreign.blocks import ForeignImage
    from .qcow2.create import Options
    from .qcow2.image import Extent, Qcow2Image

Allow = bool | Callable[[str], bool]
FORMATS = ("raw", "qcow2")  # read and written
READ_FORMATS = (*FORMATS, "vdi", "vhdx", "vpc", "vmdk")
_SECTOR = 512  # what the size of a new qcow2 image is a multiple of
MAX_CHAIN = 64  # images; more are a mistake, and each costs descriptors


class RawImage(PlainImage):
    """A raw image: byte n of the disk is byte n of the file."""

    format = "raw"

    def __init__(self, file: HostFile) -> None:
        self.file = file
        self.path = file.path
        self.size = file.size
        self.read_only = file.read_only
        self.backing = None

    def _check(self, offset: int, length: int, *, write: bool = False) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of an image of {self.size}")
        if write and self.read_only:
            raise ImageReadOnlyError(f"{self.path}: the image is open for reading")

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check(offset, sum(map(len, buffers)))
        self.file.readv(offset, buffers)

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return bytes(self.file.pread(offset, length))

    def write_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check(offset, sum(map(len, buffers)), write=True)
        self.file.writev(offset, buffers)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data) as view:
            self.write_from(offset, [view])

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self._check(offset, length, write=True)
        self.file.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._check(offset, length, write=True)
        self.file.discard(offset, length)

    def flush(self) -> None:
        if not self.read_only:
            self.file.flush()

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Data and holes as the file system tells them."""
        from .qcow2.image import Extent

        self._check(min(offset, self.size), 0)
        end = self.size if length is None else min(offset + length, self.size)
        while offset < end:
            try:
                data = min(os.lseek(self.file.fd, offset, os.SEEK_DATA), end)
            except OSError:
                data = end  # nothing but a hole up to the end
            if data > offset:
                yield Extent(offset, data - offset, True, True, False, offset)
            if data < end:
                try:
                    hole = min(os.lseek(self.file.fd, data, os.SEEK_HOLE), end)
                except OSError:
                    hole = end
                yield Extent(data, hole - data, True, False, False, data)
                data = hole
            offset = data

    def resize(self, size: int, *, shrink: bool = False) -> None:
        """Set the size, in bytes. Making it smaller loses data and wants `shrink`. Regular files only."""
        self._check(0, 0, write=True)
        if self.file.is_block:
            raise OpenError(f"{self.path}: a block device cannot be resized")
        if not 0 <= size < 1 << 63:
            raise ValueError(f"size {size}: expected 0 to 2^63-1")
        if size < self.size and not shrink:
            raise ValueError("making an image smaller loses data: it has to be asked for")
        self.file.truncate(size)
        self.size = size

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def probe(file: HostFile) -> str:
    """The format that the file looks like: "raw" if it is none of the others. ("vpc" of fixed size looks like raw.)"""
    start = bytearray(4)
    with memoryview(start) as view:
        read_padded(file, 0, [view])
    if int.from_bytes(start, "big") == MAGIC:
        return "qcow2"
    from . import foreign

    return foreign.probe(file) or "raw"


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = True,
    allow: Allow = False,
    direct: bool = False,
    lock: bool = True,
    force_share: bool = False,
    discard: bool = True,
    for_repair: bool = False,
    named: bool = True,
    l2_cache_bytes: int = 0,
    passphrase: bytes | None = None,
    share_named: bool = False,
) -> Image:
    """Open an image; use it as a context manager, or close() it.

    `format`: "raw", "qcow2", or "vdi", "vhdx", "vpc", "vmdk" (only read), or None to look at the first bytes. `allow`:
    whether what the image names may be opened: False, True, or a function of the absolute path. `lock`: take QEMU-compatible
    locks; `force_share` reads what somebody else may be writing, `share_named` does so with the backing files. `passphrase`: of
    the LUKS images of the chain; without it their metadata can be looked at. `named=False`: open a qcow2 image without what it
    names (for looking at its metadata only).

    Raises OpenError, ImageInUseError, ImageFormatError, UnsupportedFeatureError; ImageFormatError also for a loop in the chain.
    """
    image: RawImage | ForeignImage | Qcow2Image = open_any(
        path,
        format=format,
        read_only=read_only,
        allow=allow,
        direct=direct,
        lock=lock,
        force_share=force_share,
        discard=discard,
        for_repair=for_repair,
        named=named,
        l2_cache_bytes=l2_cache_bytes,
        passphrase=passphrase,
        share_named=share_named,
    )
    return image


def open_any(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = True,
    allow: Allow = False,
    direct: bool = False,
    lock: bool = True,
    force_share: bool = False,
    discard: bool = True,
    for_repair: bool = False,
    named: bool = True,
    l2_cache_bytes: int = 0,
    passphrase: bytes | None = None,
    share_named: bool = False,
) -> Any:
    """`open_image`, for callers that look into the formats: the image may be of any of their classes."""
    path = os.fspath(path)
    if force_share and not read_only:
        raise OpenError(f"{path}: sharing is for reading: what is written to is locked")
    share = force_share or share_named
    image: Any = _open(path, format, read_only, allow, direct, lock, share, discard, for_repair, named, l2_cache_bytes, ())
    if passphrase is not None:
        try:
            if not unlock(image, passphrase):
                raise OpenError(f"{image.path}: the image is not encrypted: it has no passphrase")
        except BaseException:
            image.close()
            raise
    return image


def unlock(image: Any, passphrase: bytes) -> int:
    """Unlock every encrypted image of a chain; how many there are. Raises WrongPassphraseError, ImageFormatError."""
    count = 0
    while image is not None:
        if getattr(image, "encrypted", False):
            image.unlock(passphrase)
            count += 1
        image = getattr(image, "backing", None)
    return count


def _open(
    path: str,
    fmt: str | None,
    read_only: bool,
    allow: Allow,
    direct: bool,
    lock: bool,
    force_share: bool,
    discard: bool,
    for_repair: bool,
    named: bool,
    l2_cache_bytes: int,
    above: tuple[tuple[int, int], ...],
) -> RawImage | ForeignImage | Qcow2Image:
    if fmt is not None and fmt not in READ_FORMATS:
        raise OpenError(f"{path}: format {fmt!r} is not supported; there are: {', '.join(READ_FORMATS)}")
    file = HostFile(path, read_only=read_only, direct=direct)
    try:
        status = os.fstat(file.fd)
        me = (status.st_dev, status.st_ino)
        if me in above:
            raise ImageFormatError(f"{path}: the chain of backing files comes back to this image")
        if len(above) >= MAX_CHAIN:
            raise ImageFormatError(f"{path}: a chain of more than {MAX_CHAIN} backing files")
        if lock:
            locks.lock(file.fd, path, write=not read_only, share=force_share)
        found = fmt or probe(file)
        if found == "raw":
            return RawImage(file)
        if found != "qcow2":
            if not read_only:
                raise OpenError(f"{path}: {found} images are only read")
            from .foreign import open_foreign

            return open_foreign(file, found)
        from .qcow2.image import open_qcow2

        def resolve(name: str) -> str:
            return resolve_name(path, name, allow)

        def open_backing(name: str, backing_format: str | None) -> Any:
            return _open(
                resolve(name), backing_format, True, allow, direct, lock, force_share, False, False, True, 0, (*above, me)
            )

        def open_data_file(name: str) -> HostFile:
            data = HostFile(resolve(name), read_only=read_only, direct=direct)
            try:
                status = os.fstat(data.fd)
                if (status.st_dev, status.st_ino) in (*above, me):
                    raise ImageFormatError(f"{path}: the image names itself, or one that it is below, as its data file")
                if lock:
                    locks.lock(data.fd, data.path, write=not read_only, share=force_share)
            except BaseException:
                data.close()
                raise
            return data

        image = open_qcow2(
            file,
            read_only=read_only,
            open_backing=(open_backing if allow else None) if named else _nothing,
            open_data_file=(open_data_file if allow else None) if named else _no_data(path),
            l2_cache_bytes=l2_cache_bytes,
            discard=discard,
            for_repair=for_repair,
        )
    except BaseException:
        file.close()
        raise
    if lock and not for_repair and not read_only:
        try:
            if image.needs_repair:
                from .qcow2.check import repair_if_dirty

                repair_if_dirty(image)
            image.follow_bitmaps()
        except BaseException:
            image.close()
            raise
    return image


class _Nothing:
    """Stands for a backing image that must not be looked at."""

    size = 0

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise UnsupportedFeatureError("the backing image was not opened")

    def close(self) -> None:
        """There is nothing to close."""


def _nothing(name: str, fmt: str | None) -> Any:
    return _Nothing()


def _no_data(image: str) -> Any:
    return lambda name: _NoData(image)


class _NoData:
    """Stands for a data file that must not be looked at."""

    alignment = 1
    size = 0

    def __init__(self, image: str) -> None:
        self.path = image

    def _refuse(self, *_: object, **__: object) -> Any:
        raise UnsupportedFeatureError(f"{self.path}: the data file of the image was not opened")

    read_some = writev = write_zeroes = discard = truncate = _refuse

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """There is nothing to close."""


def resolve_name(image: str, name: str, allow: Allow) -> str:
    """The path that `image` means by `name`, if it may be opened. Relative names start at the image's folder."""
    if name.startswith("json:"):
        raise UnsupportedFeatureError(f"{image}: the image names {name!r}: json: names are not supported")
    head = name.split("/", 1)[0]
    if ":" in head:
        if not name.startswith("file:"):
            raise UnsupportedFeatureError(f"{image}: the image names {name!r}: only files are supported")
        name = name[5:]
    if "\0" in name or not name:
        raise ImageFormatError(f"{image}: the image names {name!r}, which is no path")
    path = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(image)), name))  # noqa: PTH118,PTH120,PTH100
    if not allow or (callable(allow) and not allow(path)):
        raise ExternalFileError(f"{image}: the image names {path!r}: opening it has to be allowed")
    return path


def create_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    format: str = "qcow2",
    options: Options | None = None,
    report: Report | None = None,
    made: Callable[[str], None] | None = None,
) -> None:
    """Create an empty image of `size` bytes, replacing what is at `path` unless somebody uses it.

    The size of a qcow2 image is rounded up to a multiple of 512.

    `options` are of qcow2 images; raw ones have `preallocation` (not "metadata"), `nocow` and `extent_size_hint` of them.
    `report` is called with the bytes that are preallocated and those that are to be. `made` is called with the path of
    each file when the content that it had is gone. Options are checked before anything is touched; a creation that fails
    leaves no image. Raises OpenError, ImageInUseError, ImageFormatError, OSError.
    """
    from .qcow2 import create

    path = os.fspath(path)
    if format not in FORMATS:
        raise OpenError(f"{path}: format {format!r} is not supported; there are: {', '.join(FORMATS)}")
    o = options or create.Options()
    if format == "qcow2":
        size = -(-size // _SECTOR) * _SECTOR if size > 0 else size  # as qemu-img does: QEMU opens no other
        create.check_options(size, o)
    else:
        _check_raw_options(path, size, o)
    paths: list[str] = []

    def touched(name: str) -> None:
        paths.append(name)
        if made is not None:
            made(name)

    try:
        fresh = not os.path.lexists(path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
    except OSError as e:
        raise OpenError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise OpenError(f"{path!r}: {e}") from e
    file = HostFile(path)
    try:
        locks.lock(file.fd, path, write=True)
        if fresh:
            paths.append(path)
        if format == "raw" and file.is_block and size > file.size:
            raise OpenError(f"{path}: the device has {file.size} bytes, {size} were asked for")
        touched(path)
        if not file.is_block:
            file.truncate(0)
            _set_attributes(file, o)
        if format == "qcow2":
            create.write_empty(file, size, o)
            if o.data_file:
                create.make_data_file(resolve_name(path, o.data_file, True), size, touched)
            if o.preallocation != "off":
                _preallocate(file, o, report)
        elif not file.is_block:
            file.truncate(size)
            if o.preallocation != "off":
                prealloc.fill(file, 0, size, o.preallocation, report)
    except BaseException:
        for name in paths:
            if os.path.isfile(name):  # noqa: PTH113
                os.unlink(os.path.realpath(name))  # noqa: PTH108
        raise
    finally:
        file.close()


def _check_raw_options(path: str, size: int, o: Options) -> None:
    if o._replace(preallocation="off", nocow=False, extent_size_hint=0) != type(o)():
        raise OpenError(f"{path}: raw images have no such options")
    if o.preallocation not in prealloc.MODES or o.preallocation == "metadata":
        raise OpenError(f"{path}: preallocation={o.preallocation}: raw images have off, falloc and full")
    if not 0 <= size < 1 << 63:
        raise OpenError(f"{path}: size={size}: expected 0 to 2^63-1")


def _set_attributes(file: HostFile, o: Options) -> None:
    if o.nocow:
        prealloc.set_nocow(file)
    if o.extent_size_hint:
        prealloc.set_extent_size(file, o.extent_size_hint)


def _preallocate(file: HostFile, o: Options, report: Report | None) -> None:
    """Preallocate the new qcow2 image in `file`, which nothing below it is opened for."""
    from .qcow2.create import preallocate
    from .qcow2.image import open_qcow2

    def open_data_file(name: str) -> HostFile:
        return HostFile(resolve_name(file.path, name, True))

    # The creator holds the locks. The backing file's content does not matter, so it is not looked at.
    with open_qcow2(HostFile(file.path), read_only=False, open_backing=_nothing, open_data_file=open_data_file) as image:
        preallocate(image, 0, o.preallocation, report)


class ImageFile(io.RawIOBase):
    """An open image as a binary file: anything in Python that reads files reads images. Closes the image with itself.

    It is as long as the image: writes do not make it longer, and behind its end they are an OSError (ENOSPC).
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._at = 0

    def _must_be_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def readable(self) -> bool:
        self._must_be_open()
        return True

    def writable(self) -> bool:
        self._must_be_open()
        return not self._image.read_only

    def seekable(self) -> bool:
        self._must_be_open()
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._must_be_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._image.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError(f"seek to {offset} from {whence}: expected a place in the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        self._must_be_open()
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._must_be_open()
        with memoryview(buffer).cast("B") as view:
            n = min(len(view), max(self._image.size - self._at, 0))
            if n:
                self._image.read_into(self._at, [view[:n]])
        self._at += n
        return n

    def write(self, data: Any) -> int:
        if not self.writable():
            raise io.UnsupportedOperation("the image is open for reading")
        with memoryview(data).cast("B") as view:
            n = min(len(view), max(self._image.size - self._at, 0))
            if n < len(view) and not n:
                raise OSError(errno.ENOSPC, "the image ends here", self._image.path)
            if n:
                self._image.write_from(self._at, [view[:n]])
        self._at += n
        return n

    def flush(self) -> None:
        if not self.closed and not self._image.read_only:
            self._image.flush()

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()
            finally:
                self._image.close()
