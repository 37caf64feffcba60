"""The thread-pool engine, and the base of the asynchronous ones: they leave to it whatever the kernel only does blocking.

With `inline` (engine `off`), a read that the page cache holds and a small buffered write finish in the caller: a hand-over to
another thread costs thirty times a 4 KiB copy. Everything else runs on the disk's pool. Some file systems cannot say what the
page cache holds (tmpfs, and overlayfs of some kernels): there a read is tried in the caller, more rarely the more of them waited.

Not here: kernel rings (`native`, `uring`).
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..hostfile import HostFile
from ..pool import WorkerPool
from ..zeroes import all_zero

_RWF_NOWAIT = os.RWF_NOWAIT
# A buffered write up to this many bytes is a copy into the page cache; longer ones would hold the caller's loop.
_INLINE_WRITE = 1 << 18
# Where the kernel does not tell, a read that takes longer (ns, and more for each byte of it) may have waited for a device.
# So may one whose thread lost its processor: the reads after it are looked at (this many), and if one takes long again and its
# thread was seen to wait, those after it go to the pool. One, as the wait may have been for Python's lock; twice as many whenever
# the next that is tried waits too.
_WATCH = 16
_WAITED, _WAITED_BYTE = 500_000, 10
_MOST_AFTER_A_WAIT = 64


class Options(Protocol):
    """What a channel needs to know of its disk."""

    file: HostFile
    size: int
    read_only: bool
    discard: bool
    detect_zeroes: str

    def forget(self, channel: Any) -> None:
        """The channel is closed."""
        ...


class ThreadChannel:
    """`disk.Channel` over a HostFile and a pool."""

    def __init__(self, disk: Options, pool: WorkerPool, *, inline: bool) -> None:
        self._disk = disk
        self._file = disk.file
        self._fd = disk.file.fd
        self._pool = pool
        self._inline_write = inline and not disk.file.direct
        self._nowait = _RWF_NOWAIT if not disk.file.direct else 0
        self._untold = False  # the file system does not know RWF_NOWAIT
        self._pooled = 0  # reads that go to the pool before one is tried in the caller again
        self._after_a_wait = 1
        self._watched = 0  # reads that are still to be looked at
        self._detect_zeroes = disk.detect_zeroes != "off"
        self._done: deque[tuple[Any, int]] = deque()
        # Held from appending to signalling: who finds everything finished and closes waits for the signal of the last one.
        self._signal = threading.Lock()
        self.in_flight = 0
        self.completion_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # --- requests ---

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset < 0 or offset + length > self._disk.size:
            return -errno.EINVAL
        if self._nowait:
            try:
                if os.preadv(self._fd, buffers, offset, _RWF_NOWAIT) == length:
                    return 0
            except OSError as e:
                # EAGAIN: not in the page cache. EINVAL: more than 1024 buffers. Others may be of this file system's making.
                if e.errno == errno.EOPNOTSUPP:
                    self._nowait = 0
                    self._untold = self._inline_write
        if self._untold and length <= _INLINE_WRITE:
            if self._pooled:
                self._pooled -= 1
            else:
                watched = self._watched
                waits = _waits() if watched else 0
                began = time.perf_counter_ns()
                try:
                    whole = os.preadv(self._fd, buffers, offset) == length
                except OSError as e:
                    if e.errno != errno.EINVAL:
                        return -(e.errno or errno.EIO)
                    whole = False
                if time.perf_counter_ns() - began > _WAITED + _WAITED_BYTE * length:
                    self._watched = _WATCH
                    if watched and _waits() != waits:
                        self._pooled = self._after_a_wait
                        self._after_a_wait = min(2 * self._after_a_wait, _MOST_AFTER_A_WAIT)
                else:
                    self._after_a_wait = 1
                    if watched:
                        self._watched = watched - 1
                if whole:
                    return 0
        return self._start_read(offset, buffers, length, token)

    def writev(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        if offset < 0 or offset + length > self._disk.size:
            return -errno.EINVAL
        if self._disk.read_only:
            return -errno.EROFS
        if self._detect_zeroes and all_zero(buffers):
            return self._zero(offset, length, token, self._disk.detect_zeroes == "unmap" and self._disk.discard)
        if self._inline_write and length <= _INLINE_WRITE:
            try:
                if os.pwritev(self._fd, buffers, offset) == length:
                    return 0
            except OSError as e:
                if e.errno != errno.EINVAL:
                    return -(e.errno or errno.EIO)
        return self._start_write(offset, buffers, length, token)

    def flush(self, token: Any) -> int | None:
        return self._run(token, self._file.flush)

    def discard(self, offset: int, length: int, token: Any) -> int | None:
        if offset < 0 or length < 0 or offset + length > self._disk.size:
            return -errno.EINVAL
        if self._disk.read_only:
            return -errno.EROFS
        if not self._disk.discard:
            return 0
        return self._run(token, lambda: self._file.discard(offset, length))

    def write_zeroes(self, offset: int, length: int, token: Any, unmap: bool) -> int | None:
        if offset < 0 or length < 0 or offset + length > self._disk.size:
            return -errno.EINVAL
        if self._disk.read_only:
            return -errno.EROFS
        return self._zero(offset, length, token, unmap and self._disk.discard)

    def submit(self) -> None:
        """Nothing waits here: the pool starts a request when it gets it."""

    # --- completion ---

    def completions(self) -> list[tuple[Any, int]]:
        try:
            os.eventfd_read(self.completion_fd)
        except BlockingIOError:
            return []
        self._reap()
        done = self._done
        result = []
        while done:
            result.append(done.popleft())
        self.in_flight -= len(result)
        return result

    def drain(self) -> None:
        if self.in_flight == len(self._done):
            return
        poll = select.poll()
        poll.register(self.completion_fd, select.POLLIN)
        self.submit()
        while self.in_flight > len(self._done):
            poll.poll()
            try:
                os.eventfd_read(self.completion_fd)
            except BlockingIOError:
                continue
            self._reap()
            self.submit()
        os.eventfd_write(self.completion_fd, 1)  # the owner still has to collect

    def close(self) -> None:
        fd = self.completion_fd
        if fd < 0:
            return
        self.drain()
        self._done.clear()
        self.in_flight = 0
        self.completion_fd = -1
        with self._signal:
            os.close(fd)
        self._disk.forget(self)

    # --- for the asynchronous engines ---

    def _reap(self) -> None:
        """Move what the kernel has finished to `_done`."""

    def _start_read(self, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> int | None:
        return self._run(token, lambda: self._file.readv(offset, buffers))

    def _start_write(self, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> int | None:
        return self._run(token, lambda: self._file.writev(offset, buffers))

    def _zero(self, offset: int, length: int, token: Any, unmap: bool) -> int | None:
        return self._run(token, lambda: self._file.write_zeroes(offset, length, unmap=unmap))

    def _run(self, token: Any, work: Callable[[], None], pool: WorkerPool | None = None) -> int | None:
        """Do `work` on the pool, or on another one, and complete `token` with its result."""
        done, fd, signal = self._done, self.completion_fd, self._signal

        def job() -> None:
            result = -errno.EIO  # of a mistake of ours: whoever waits is answered, and the pool tells of it
            try:
                work()
                result = 0
            except OSError as e:
                result = -(e.errno or errno.EIO)
            except MemoryError:
                result = -errno.ENOMEM
            finally:
                with signal:
                    done.append((token, result))
                    os.eventfd_write(fd, 1)

        self.in_flight += 1
        try:
            (pool or self._pool).submit(job)
        except RuntimeError:
            self.in_flight -= 1
            return -errno.EAGAIN
        return None


def _waits() -> int:
    """How often this thread has given its processor away because it had to wait: for a device, or for a lock (getrusage(2))."""
    from resource import RUSAGE_THREAD, getrusage

    return getrusage(RUSAGE_THREAD).ru_nvcsw
