"""A qcow2 image as a disk with channels (`block_qcow2.disk`): the image engine between a guest and a host file.

A request whose clusters are known and ours alone goes straight to the file's channel, in parts where they are not adjacent;
everything else, allocation, missing tables, compressed clusters, runs on its own threads through the image's blocking interface.

Not here: the engine (`image`), how a file does asynchronous I/O (`engines`).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .. import locks
from ..disk import Channel
from ..errors import BlockError, ImageReadOnlyError, OpenError, PassphraseNeededError
from ..hostfile import Cursor
from ..pool import WorkerPool
from ..raw import THREADS, RawDisk
from ..zeroes import all_zero
from .image import Extent, Qcow2Image
from .reader import fill_zero

if TYPE_CHECKING:
    from .check import CheckResult
    from .lookup import Part
    from .snapshots import Snapshot

_UNLIMITED = 1 << 62


class _DataDisk(RawDisk):
    """The file that guest data are in, whatever its length: the image knows what is inside."""

    def __init__(self, image: Qcow2Image, aio: str) -> None:
        # Of an encrypted image nothing goes straight to the file.
        super().__init__(image.file if image.encrypted else image.data_file, aio=aio, any_size=True)
        self.size = _UNLIMITED
        self.read_only = image.read_only


class Qcow2Disk:
    """`disk.Disk` over a qcow2 image, which it owns. Snapshot and size operations wait for the requests that are running.

    They must not be called by a thread that still has completions to collect from one of the channels.
    """

    def __init__(self, image: Qcow2Image, *, aio: str, discard: bool, detect_zeroes: str) -> None:
        self.image = image
        self.path = image.path
        self.read_only = image.read_only
        self.request_alignment = image.data_file.alignment
        self.discard = discard
        self.detect_zeroes = detect_zeroes
        if image.encrypted and not image.unlocked:
            raise PassphraseNeededError(f"{image.path}: the image is encrypted (LUKS): its passphrase is needed")
        if image.size % self.request_alignment:
            raise OpenError(
                f"{image.path}: the size of the qcow2 image, {image.size}, is not aligned to {self.request_alignment}"
            )
        self._data = _DataDisk(image, aio)
        # Not the file's: what waits here for a snapshot must not take the threads that finish what the snapshot waits for.
        self.pool = WorkerPool(THREADS, "block-qcow2")
        self._locked: list[Any] = []
        self._channels: list[Qcow2Channel] = []
        self._opening = threading.Lock()  # channels are opened by the threads that use them

    @property
    def size(self) -> int:
        return self.image.size

    def channel(self) -> Channel:
        channel = Qcow2Channel(self, self._data.channel())
        with self._opening:
            self._channels = [c for c in self._channels if c.completion_fd >= 0] + [channel]
        return channel

    def lock(self) -> None:
        """Lock the image, its data file for what it is opened for, and its backing files for reading; then read the metadata
        again, as somebody may have changed them, and repair an image that was not closed properly.

        Raises ImageInUseError, ImageFormatError, OSError; and then holds no lock.
        """
        if self._locked:
            return
        files: list[tuple[Any, bool]] = [(self.image.file, not self.read_only)]
        if self.image.external:
            files.append((self.image.data_file, not self.read_only))
        below: Any = self.image.backing
        while below is not None:
            files.append((below.file, False))
            below = below.backing
        try:
            for file, write in files:
                locks.lock(file.fd, file.path, write=write)
                self._locked.append(file)
            self.image.reload()
            if self.image.needs_repair:
                from .check import repair_if_dirty

                repair_if_dirty(self.image)
            self.image.follow_bitmaps()
        except BaseException:
            self._drop_locks()
            raise

    def unlock(self) -> None:
        """Write back everything, then let go. Raises OSError, and then keeps the locks."""
        if self._locked:
            self.image.release_bitmaps()
            try:
                self.image.flush()
            except BaseException:
                with suppress(OSError, BlockError):  # then writes are refused
                    self.image.follow_bitmaps()
                raise
            self._drop_locks()

    def _drop_locks(self) -> None:
        while self._locked:
            locks.unlock(self._locked.pop().fd)

    def flush(self) -> None:
        self.image.flush()

    def drain(self) -> None:
        for channel in self._channels:
            channel.drain()

    def close(self) -> None:
        try:
            for channel in self._channels:
                channel.close()
            self._data.close_channels()
            self.pool.close()
        finally:
            self.image.close()

    # --- while the guest runs ---

    def snapshots(self) -> list[Snapshot]:
        return list(self.image.snapshots.list())

    def snapshot_create(self, name: str, *, vm_clock_nsec: int = 0) -> Snapshot:
        """Keep the present content. Raises SnapshotError, ImageReadOnlyError, OSError."""
        return self.image.snapshots.create(name, vm_clock_nsec=vm_clock_nsec)

    def snapshot_delete(self, name: str) -> Snapshot:
        """Forget the first snapshot of that name and return what it was. Raises as snapshot_create."""
        return self.image.snapshots.delete(name)

    def snapshot_apply(self, name: str) -> Snapshot:
        """Make the content that of the first snapshot of that name. Whoever has cached the old one must not write it back.

        The size is that of the snapshot then. Raises as snapshot_create.
        """
        return self.image.snapshots.apply(name)

    def resize(self, size: int) -> None:
        """Make the disk larger; the device tells the guest."""
        self.image.resize(size)

    def check(self, *, repair: str = "none", report: Callable[[str], None] = lambda line: None) -> CheckResult:
        """Check the metadata of the image in use: "none", "leaks" or "all" of what is wrong is repaired."""
        return self.image.check(repair=repair, report=report)

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What backs each part of a range, in order; this image's own part of it."""
        return self.image.block_status(offset, length)


# What the file's channel gets as a token: the operation that ends with a request which went straight to the file (0: it ran on
# the pool), the token of its owner, where to read once more and into what (None: it was a write). Of a part of a request: _PART,
# their _Parts, and nothing. A tuple: every request has one.
_Token = tuple[int, Any, int, "Sequence[memoryview] | None"]
_PART = -1


class _Parts:
    """A request in several places: how many of them the file's channel still has, the first error, and its token."""

    __slots__ = ("left", "of", "result")

    def __init__(self, of: _Token) -> None:
        self.of = of
        self.left = self.result = 0


class Qcow2Channel:
    """`disk.Channel` over the channel of the file."""

    def __init__(self, disk: Qcow2Disk, inner: Any) -> None:
        self._disk = disk
        self._image = disk.image
        self._inner = inner
        self._detect_zeroes = disk.detect_zeroes != "off"
        self._ready: list[tuple[Any, int]] = []  # finished, and collected by drain()
        self.completion_fd: int = inner.completion_fd

    @property
    def in_flight(self) -> int:
        in_flight: int = self._inner.in_flight
        return in_flight + len(self._ready)

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        image = self._image
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset < 0 or offset + length > image.size:
            return -errno.EINVAL
        found = image.lookup_now(offset, length, write=False)
        if found is None:
            parts = image.lookup_parts(offset, length, write=False)
            if parts is None:
                return self._run(token, lambda: image.read_into(offset, buffers))
            return self._in_parts(self._inner.readv, parts, token, offset, buffers, read=True)
        operation, host = found
        if host is None:
            fill_zero(buffers)
            image.end(operation)
            return 0
        result: int | None = self._inner.readv(host, buffers, (operation, token, offset, buffers))
        if result is None:
            return None
        image.end(operation)
        return self._again(token, offset, buffers) if result == -errno.EIO else result

    def writev(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        image = self._image
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset < 0 or offset + length > image.size:
            return -errno.EINVAL
        if image.read_only:
            return -errno.EROFS
        if self._detect_zeroes and all_zero(buffers):
            unmap = self._disk.detect_zeroes == "unmap" and self._disk.discard
            return self._run(token, lambda: image.write_zeroes(offset, length, unmap=unmap))
        found = image.lookup_now(offset, length, write=True)
        if found is None:
            parts = image.lookup_parts(offset, length, write=True)
            if parts is None:
                return self._run(token, lambda: image.write_from(offset, buffers))
            return self._in_parts(self._inner.writev, parts, token, offset, buffers, read=False)
        operation, host = found
        result: int | None = self._inner.writev(host, buffers, (operation, token, offset, None))
        if result is not None:
            image.end(operation)
        return result

    def _in_parts(
        self,
        start: Callable[[int, Sequence[memoryview], _Token], int | None],
        found: tuple[int, list[Part]],
        token: Any,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        read: bool,
    ) -> int | None:
        """Read or write what lies in several places: at once as far as the file's channel does that."""
        operation, parts = found
        joined = _Parts((operation, token, offset, buffers if read else None))
        of_file: _Token = (_PART, joined, 0, None)
        cursor = Cursor(buffers)
        for host, length in parts:
            views = cursor.views(length)
            if host is None:
                fill_zero(views)
                continue
            result = start(host, views, of_file)
            if result is None:
                joined.left += 1
            elif result:
                joined.result = result
                break
        if joined.left:
            return None
        self._image.end(operation)
        return self._again(token, offset, buffers) if joined.result == -errno.EIO and read else joined.result

    def flush(self, token: Any) -> int | None:
        return self._run(token, self._image.flush)

    def discard(self, offset: int, length: int, token: Any) -> int | None:
        image = self._image
        if offset < 0 or length < 0 or offset + length > image.size:
            return -errno.EINVAL
        if image.read_only:
            return -errno.EROFS
        if not self._disk.discard:
            return 0
        return self._run(token, lambda: image.discard(offset, length))

    def write_zeroes(self, offset: int, length: int, token: Any, unmap: bool) -> int | None:
        image = self._image
        if offset < 0 or length < 0 or offset + length > image.size:
            return -errno.EINVAL
        if image.read_only:
            return -errno.EROFS
        return self._run(token, lambda: image.write_zeroes(offset, length, unmap=unmap and self._disk.discard))

    def submit(self) -> None:
        self._inner.submit()

    def completions(self) -> list[tuple[Any, int]]:
        done, self._ready = self._ready, []
        of_file: _Token
        for of_file, result in self._inner.completions():
            operation, token, offset, buffers = of_file
            if operation == _PART:
                joined: _Parts = token
                joined.left -= 1
                joined.result = joined.result or result
                if joined.left:
                    continue
                operation, token, offset, buffers = joined.of
                result = joined.result
            if operation:
                self._image.end(operation)
                if result == -errno.EIO and buffers is not None:
                    again = self._again(token, offset, buffers)
                    if again is not None:
                        done.append((token, again))
                    continue
            done.append((token, result))
        return done

    def drain(self) -> None:
        """Ends the operations too: a snapshot while the owner of the channel stands still must not wait for it."""
        if self.completion_fd < 0:
            return
        while self._inner.in_flight:
            self._inner.drain()
            self._ready = self.completions()
        if self._ready:
            os.eventfd_write(self.completion_fd, 1)

    def close(self) -> None:
        if self.completion_fd < 0:
            return
        self.drain()
        self._ready.clear()
        self._inner.close()
        self.completion_fd = -1

    def _again(self, token: Any, offset: int, buffers: Sequence[memoryview]) -> int | None:
        """Read once more: the file may end inside a cluster, whose rest is zeroes, and the blocking way knows."""
        return self._run(token, lambda: self._image.read_into(offset, buffers))

    def _run(self, token: Any, work: Callable[[], None]) -> int | None:
        def mapped() -> None:
            try:
                work()
            except ImageReadOnlyError as e:
                raise OSError(errno.EROFS, str(e)) from e
            except BlockError as e:
                raise OSError(errno.EIO, str(e)) from e
            except ValueError as e:
                raise OSError(errno.EINVAL, str(e)) from e

        result: int | None = self._inner._run((0, token, 0, None), mapped, self._disk.pool)
        return result
