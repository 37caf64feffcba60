"""What libaio and io_uring have in common: slots, batching, and leaving the odd cases to the thread pool.

At most DEPTH requests are in the kernel, the rest wait in order. A request that comes back short, or that the kernel refuses
as misaligned, is done again on the pool, which continues, bounces and serialises (`hostfile`): reads and writes are idempotent.

Not here: the system calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ..pool import WorkerPool
from .threads import Options, ThreadChannel

DEPTH = 128
_RETRY = frozenset({errno.EINVAL, errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.EOPNOTSUPP})


class Request:
    """One read or write on its way through the kernel."""

    __slots__ = ("buffers", "count", "iovecs", "keep", "length", "offset", "ticket", "token", "write")

    def __init__(self, write: bool, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> None:
        self.write = write
        self.offset = offset
        self.buffers = buffers
        self.length = length
        self.token = token
        self.ticket: int | None = None
        from_buffer, addressof = ctypes.c_char.from_buffer, ctypes.addressof
        # These pin the memory: it cannot be unmapped while the kernel writes to it.
        self.keep = [from_buffer(b) for b in buffers]
        flat: list[int] = []
        for pin, buffer in zip(self.keep, buffers, strict=True):
            flat += (addressof(pin), len(buffer))
        self.iovecs = array("Q", flat)  # struct iovec: base, length
        self.count = len(buffers)


class RingChannel(ThreadChannel):
    """A channel whose reads and writes go through a kernel queue with DEPTH slots."""

    def __init__(self, disk: Options, pool: WorkerPool) -> None:
        super().__init__(disk, pool, inline=False)
        self._slots: list[Request | None] = [None] * DEPTH
        self._free = list(range(DEPTH))
        self._queued: list[int] = []  # slots that submit() will hand over
        self._waiting: deque[Request] = deque()  # requests without a slot
        self._in_kernel = 0

    def _push(self, slots: list[int]) -> int:
        """Hand slots to the kernel in order; return how many it took. Raises OSError when it took none."""
        raise NotImplementedError

    def _collect(self) -> Iterable[tuple[int, int]]:
        """(slot, result) of everything that the kernel has finished."""
        raise NotImplementedError

    def _start_read(self, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> int | None:
        return self._enqueue(False, offset, buffers, length, token)

    def _start_write(self, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> int | None:
        return self._enqueue(True, offset, buffers, length, token)

    def _enqueue(self, write: bool, offset: int, buffers: Sequence[memoryview], length: int, token: Any) -> int | None:
        if not length:
            return 0
        file = self._file
        if file.direct and (offset % file.alignment or length % file.alignment):
            return self._on_pool(write, offset, buffers, token)
        try:
            request = Request(write, offset, buffers, length, token)
        except (TypeError, ValueError):  # a read-only or empty buffer
            return self._on_pool(write, offset, buffers, token)
        if len(buffers) > 1024:
            return self._on_pool(write, offset, buffers, token)
        if write and file.direct:
            request.ticket = file.gate.try_enter(offset, offset + length)
            if request.ticket is None:
                return self._on_pool(write, offset, buffers, token)
        self.in_flight += 1
        if self._free:
            slot = self._free.pop()
            self._slots[slot] = request
            self._queued.append(slot)
        else:
            self._waiting.append(request)
        return None

    def _on_pool(self, write: bool, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        file = self._file
        return self._run(token, lambda: file.writev(offset, buffers) if write else file.readv(offset, buffers))

    def submit(self) -> None:
        queued = self._queued
        while queued:
            try:
                taken = self._push(queued)
            except OSError as e:
                if e.errno in (errno.EAGAIN, errno.EBUSY) and self._in_kernel:
                    return  # completions() tries again: there will be some
                taken = 0
            if taken:
                self._in_kernel += taken
                del queued[:taken]
            else:
                self._again(queued.pop(0))

    def _reap(self) -> None:
        for slot, result in self._collect():
            self._in_kernel -= 1
            request = self._slots[slot]
            if request is None:
                continue
            if result != request.length and (result >= 0 or -result in _RETRY):
                self._again(slot)
                continue
            self._release(slot, request)
            self._done.append((request.token, 0 if result >= 0 else result))
        waiting = self._waiting
        while waiting and self._free:
            slot = self._free.pop()
            self._slots[slot] = waiting.popleft()
            self._queued.append(slot)
        if self._queued:
            self.submit()

    def _again(self, slot: int) -> None:
        request = self._slots[slot]
        assert request is not None
        self._release(slot, request)
        self.in_flight -= 1
        result = self._on_pool(request.write, request.offset, request.buffers, request.token)
        if result is not None:
            self.in_flight += 1
            self._done.append((request.token, result))
            os.eventfd_write(self.completion_fd, 1)  # nothing else may be on its way that would say so

    def _release(self, slot: int, request: Request) -> None:
        if request.ticket is not None:
            self._file.gate.leave(request.ticket)
        self._slots[slot] = None
        self._free.append(slot)
