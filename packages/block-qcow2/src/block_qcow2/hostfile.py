"""One open host file or block device: vectored I/O that finishes or fails, discarding, zeroing, alignment.

Short transfers are continued, interrupted calls repeated, misaligned direct I/O goes through a bounce buffer. Everything here
blocks and raises OSError. Not here: asynchronous engines (`engines`), image formats, who may open what.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Sequence
from struct import Struct

from .errors import OpenError
from .ranges import RangeGate

_IOV_MAX = 1024  # linux/uio.h, UIO_MAXIOV
_U64_PAIR = Struct("=QQ")
_FAR = 1 << 63  # behind every byte of every file
_BOUNCE = 1 << 20  # bytes of one bounce buffer: requests that need one are rare and copied anyway
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.ENODEV})
# What a file system says of O_DIRECT when it does not say it through statx: tried in this order.
_CANDIDATES = (512, 1024, 2048, 4096)


class HostFile:
    """A regular file or block device, open until close().

    `size` is in bytes. `alignment` is what offsets and lengths of direct I/O must be a multiple of (1 when buffered);
    callers need not care, misaligned requests are bounced. Safe from any thread.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, direct: bool = False) -> None:
        self.path = os.fspath(path)
        self.read_only = read_only
        self.direct = direct
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
        try:
            # O_NONBLOCK: a path that turns out to be a FIFO must not hang the open. It means nothing for files and disks.
            self.fd = os.open(self.path, flags)
        except OSError as e:
            hint = " (the file system does not offer direct I/O)" if direct and e.errno == errno.EINVAL else ""
            raise OpenError(f"{self.path}: {e.strerror}{hint}") from e
        except ValueError as e:  # a NUL character in the path
            raise OpenError(f"{self.path!r}: {e}") from None
        try:
            mode = os.fstat(self.fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OpenError(f"{self.path}: not a regular file or block device")
            self.is_block = stat.S_ISBLK(mode)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            self.alignment = self._direct_alignment() if direct else 1
        except OSError as e:
            os.close(self.fd)
            raise OpenError(f"{self.path}: {e.strerror}") from e
        except OpenError:
            os.close(self.fd)
            raise
        # Read-modify-write of a block excludes every other write to it; only direct I/O has either.
        self.gate = RangeGate()
        self.volatile = False  # flushes do nothing: for files that are thrown away if their making does not finish
        self._flush_error: OSError | None = None
        self._flushing = threading.Condition()
        self._flush_runs = False
        self._flushes_begun = self._flushes_done = 0  # the number of the last one
        self._zero_range = True
        self._punch_hole = True
        self._close_lock = threading.Lock()

    def close(self) -> None:
        """Close the descriptor. Harmless twice."""
        with self._close_lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def refresh_size(self) -> int:
        """Look again how long the file is, in bytes."""
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        return self.size

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the file system says that a range holds nothing, so reads as zeroes. False where it does not say."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as e:
            return e.errno == errno.ENXIO  # nothing from there on

    # --- reading and writing ---

    def _named(self, error: OSError) -> OSError:
        """The error with the name of the file, for whoever has to say which of several it was."""
        if error.filename is None:
            error.filename = self.path
        return error

    def read_some(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill `buffers` from `offset` as far as the file goes; return the number of bytes that were there."""
        try:
            return self._read_some(offset, buffers)
        except OSError as e:
            raise self._named(e) from None

    def _read_some(self, offset: int, buffers: Sequence[memoryview]) -> int:
        total = sum(map(len, buffers))
        align = self.alignment
        if not self.direct or not (offset % align or total % align):
            try:
                return _some(os.preadv, self.fd, offset, buffers, total)
            except OSError as e:
                if not self.direct or e.errno != errno.EINVAL:
                    raise
        target = Cursor(buffers)
        start, end = offset - offset % align, -(-(offset + total) // align) * align
        done = 0
        bounce = _aligned(min(_BOUNCE, end - start))
        at = start
        while at < end:
            part = bounce[: min(end - at, _BOUNCE)]
            got = _some(os.preadv, self.fd, at, [part], len(part))
            useful = part[max(offset - at, 0) : max(min(at + got, offset + total) - at, 0)]
            target.copy_from(useful)
            done += len(useful)
            at += len(part)
            if got < len(part):
                break
        return done

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` from `offset`. A file that ends before is EIO: somebody truncated it."""
        if self.read_some(offset, buffers) != sum(map(len, buffers)):
            raise OSError(errno.EIO, "the file ends inside the range to be read", self.path)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at `offset`."""
        total = sum(map(len, buffers))
        try:
            if not self.direct:
                _all(os.pwritev, self.fd, offset, buffers, total)
            elif offset % self.alignment or total % self.alignment:
                self._read_modify_write(offset, buffers, total)
            else:
                with self.gate.write(offset, offset + total):
                    self._write_aligned(offset, buffers, total)
        except OSError as e:
            raise self._named(e) from None

    def pread(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset`, or EIO."""
        data = bytearray(length)
        with memoryview(data) as view:
            self.readv(offset, [view])
        return data

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`."""
        with memoryview(data) as view:
            self.writev(offset, [view])

    def flush(self) -> None:
        """fdatasync: what was written before survives power loss when this returns.

        One that fails makes every later one fail. The kernel reports a write that failed once, and drops the pages or marks
        them clean: the next fdatasync would succeed without what was lost. Only who opens the file anew, and so reads what is
        really there, gets flushes that mean something again.

        For the same reason one runs at a time: of two, only one would be told. Whoever comes meanwhile is served by the next.
        """
        if self.volatile:
            return
        with self._flushing:
            wanted = self._flushes_begun + 1
            while self._flush_runs and self._flushes_done < wanted:
                self._flushing.wait()
            if self._flush_error is not None:
                error = self._flush_error
                raise OSError(error.errno, f"{error.strerror}, when the file was flushed before", self.path)
            if self._flushes_done >= wanted:
                return
            self._flushes_begun += 1
            self._flush_runs = True
        done = self._flushes_done
        try:
            os.fdatasync(self.fd)
            done = self._flushes_begun
        except OSError as e:
            self._flush_error = e
            raise self._named(e) from None
        finally:
            with self._flushing:
                self._flush_runs, self._flushes_done = False, done
                self._flushing.notify_all()

    # --- discarding and zeroing ---

    def discard(self, offset: int, length: int) -> None:
        """Give the range back to the host (it reads as zeroes or stale data). A host that cannot is not an error."""
        from . import syscalls

        if length <= 0:
            return
        try:
            if self.is_block:
                self._block_ioctl(syscalls.BLKDISCARD, offset, length)
            elif self._punch_hole:
                syscalls.fallocate(self.fd, syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE, offset, length)
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise self._named(e) from None
            self._punch_hole = False

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make the range read as zeroes, giving the space back if `unmap` and the host can.

        Tried in this order: punching a hole (if `unmap` and inside the file), zeroing the range, writing zeroes. On a block
        device the kernel decides between the device's own command and writing.
        """

        if length <= 0:
            return
        with self.gate.write(offset, offset + length):
            if self._zero_in_host(offset, length, unmap):
                return
        zeroes = memoryview(bytes(min(length, _BOUNCE)))
        while length:
            part = zeroes[:length]
            self.writev(offset, [part])
            offset += len(part)
            length -= len(part)

    def _zero_in_host(self, offset: int, length: int, unmap: bool) -> bool:
        from . import syscalls

        if self.is_block:
            try:
                self._block_ioctl(syscalls.BLKZEROOUT, offset, length)
            except OSError as e:
                if e.errno not in _UNSUPPORTED and e.errno != errno.EINVAL:
                    raise self._named(e) from None
                return False
            return True
        if unmap and self._punch_hole and offset + length <= os.fstat(self.fd).st_size:
            try:
                syscalls.fallocate(self.fd, syscalls.FALLOC_PUNCH_HOLE | syscalls.FALLOC_KEEP_SIZE, offset, length)
            except OSError as e:
                if e.errno not in _UNSUPPORTED:
                    raise self._named(e) from None
                self._punch_hole = False
            else:
                return True
        if self._zero_range:
            try:
                syscalls.fallocate(self.fd, syscalls.FALLOC_ZERO_RANGE, offset, length)
            except OSError as e:
                if e.errno not in _UNSUPPORTED:
                    raise self._named(e) from None
                self._zero_range = False
            else:
                return True
        return False

    def truncate(self, size: int) -> None:
        """Make a regular file `size` bytes long; what is added reads as zeroes."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as e:
            raise self._named(e) from None
        except OverflowError:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.path) from None
        self.size = size

    def _block_ioctl(self, request: int, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, request, _U64_PAIR.pack(offset, length))

    # --- direct I/O ---

    def _direct_alignment(self) -> int:
        from . import syscalls

        known = syscalls.direct_io_alignment(self.fd)
        if known:
            return known[1]
        if self.is_block:
            sector = fcntl.ioctl(self.fd, syscalls.BLKSSZGET, b"\0\0\0\0")
            return int.from_bytes(sector[:4], "little")
        buffer = _aligned(_CANDIDATES[-1])
        for size in _CANDIDATES:
            try:
                os.preadv(self.fd, [buffer[:size]], 0)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
            else:
                return size
        raise OpenError(f"{self.path}: no alignment up to {_CANDIDATES[-1]} works for direct I/O")

    def _write_aligned(self, offset: int, buffers: Sequence[memoryview], total: int) -> None:
        try:
            _all(os.pwritev, self.fd, offset, buffers, total)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            self._write_bounced(offset, buffers, total)  # the memory is misaligned

    def _write_bounced(self, offset: int, buffers: Sequence[memoryview], total: int) -> None:
        source = Cursor(buffers)
        bounce = _aligned(min(_BOUNCE, total))
        while total:
            part = bounce[: min(total, _BOUNCE)]
            source.copy_to(part)
            _all(os.pwritev, self.fd, offset, [part], len(part))
            offset += len(part)
            total -= len(part)

    def _read_modify_write(self, offset: int, buffers: Sequence[memoryview], total: int) -> None:
        align = self.alignment
        start, end = offset - offset % align, -(-(offset + total) // align) * align
        source = Cursor(buffers)
        bounce = _aligned(min(_BOUNCE, end - start))
        # Padding behind the end of the file is cut off again: nobody may be writing anything behind it meanwhile.
        at_end = not self.is_block and end > os.fstat(self.fd).st_size
        with self.gate.write(start, _FAR if at_end else end, exclusive=True):
            size = os.fstat(self.fd).st_size
            at = start
            while at < end:
                part = bounce[: min(end - at, _BOUNCE)]
                part_end = at + len(part)
                for block in {at, part_end - align}:
                    if block < offset or block + align > offset + total:
                        _read_block(self.fd, block, part[block - at : block - at + align])
                source.copy_to(part[max(offset - at, 0) : min(offset + total, part_end) - at])
                _all(os.pwritev, self.fd, at, [part], len(part))
                at = part_end
            if at_end and end > size:
                os.ftruncate(self.fd, max(size, offset + total))


class Cursor:
    """Walks over a list of buffers, copying piece by piece."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left = list(buffers)

    def copy_to(self, target: memoryview) -> None:
        """Fill `target` from the buffers."""
        while len(target):
            part = self._take(len(target))
            target[: len(part)] = part
            target = target[len(part) :]

    def copy_from(self, source: memoryview) -> None:
        """Put `source` into the buffers."""
        while len(source):
            part = self._take(len(source))
            part[:] = source[: len(part)]
            source = source[len(part) :]

    def views(self, length: int) -> list[memoryview]:
        """The next `length` bytes, as views of the buffers."""
        found = []
        while length:
            found.append(self._take(length))
            length -= len(found[-1])
        return found

    def _take(self, limit: int) -> memoryview:
        while not len(self._left[0]):
            del self._left[0]
        part = self._left[0][:limit]
        self._left[0] = self._left[0][len(part) :]
        return part


def _aligned(size: int) -> memoryview:
    """A zeroed page-aligned buffer of at least `size` bytes; it goes with the last view of it."""
    import mmap

    return memoryview(mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read_block(fd: int, offset: int, target: memoryview) -> None:
    got = _some(os.preadv, fd, offset, [target], len(target))
    target[got:] = bytes(len(target) - got)


def _some(
    call: Callable[[int, list[memoryview], int], int], fd: int, offset: int, buffers: Sequence[memoryview], total: int
) -> int:
    """Repeat a vectored transfer until everything is done or the file ends; return the number of bytes."""
    done = call(fd, buffers if isinstance(buffers, list) else list(buffers), offset) if len(buffers) <= _IOV_MAX else 0
    if done == total or (not done and total and len(buffers) <= _IOV_MAX):
        return done
    left = list(buffers)
    skip = done
    while done < total:
        while skip >= len(left[0]):
            skip -= len(left.pop(0))
        if skip:
            left[0] = left[0][skip:]
            skip = 0
        step = call(fd, left[:_IOV_MAX], offset + done)
        if not step:
            break
        done += step
        skip = step
    return done


def _all(
    call: Callable[[int, list[memoryview], int], int], fd: int, offset: int, buffers: Sequence[memoryview], total: int
) -> None:
    if _some(call, fd, offset, buffers, total) != total:
        raise OSError(errno.EIO, "nothing more can be written")


def read_padded(file: HostFile, offset: int, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers` from `offset`; what the file does not have reads as zeroes."""
    done = file.read_some(offset, buffers)
    for buffer in buffers:
        if done < len(buffer):
            buffer[done:] = bytes(len(buffer) - done)
        done = max(done - len(buffer), 0)
