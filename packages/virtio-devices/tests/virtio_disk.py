"""A disk in memory whose requests finish when the test says so, and fail when it says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any


class MemoryChannel:
    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self.completion_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.waiting: list[tuple[Callable[[], int], Any]] = []
        self.done: list[tuple[Any, int]] = []
        self.in_flight = 0
        self.submits = 0

    def _do(self, name: str, token: Any, work: Callable[[], int]) -> int | None:
        self.disk.log.append(name)

        def run() -> int:
            return self.disk.failure.get(name, 0) or work()

        if self.disk.inline:
            return run()
        self.waiting.append((run, token))
        self.in_flight += 1
        return None

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        def work() -> int:
            at = offset
            for buffer in buffers:
                buffer[:] = self.disk.data[at : at + len(buffer)]
                at += len(buffer)
            return 0

        assert offset + sum(map(len, buffers)) <= self.disk.size
        return self._do("read", token, work)

    def writev(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None:
        def work() -> int:
            data = b"".join(buffers)
            self.disk.data[offset : offset + len(data)] = data
            return 0

        assert offset + sum(map(len, buffers)) <= self.disk.size
        return -errno.EROFS if self.disk.read_only else self._do("write", token, work)

    def flush(self, token: Any) -> int | None:
        return self._do("flush", token, lambda: 0)

    def discard(self, offset: int, length: int, token: Any) -> int | None:
        assert 0 < length <= self.disk.size - offset
        return self._do(f"discard {offset}+{length}", token, lambda: 0)

    def write_zeroes(self, offset: int, length: int, token: Any, unmap: bool) -> int | None:
        def work() -> int:
            self.disk.data[offset : offset + length] = bytes(length)
            return 0

        assert 0 < length <= self.disk.size - offset
        return self._do(f"zero {offset}+{length}{' unmap' if unmap else ''}", token, work)

    def submit(self) -> None:
        self.submits += 1

    def finish(self, count: int | None = None) -> None:
        """Let the oldest requests finish."""
        count = len(self.waiting) if count is None else count
        for _ in range(count):
            run, token = self.waiting.pop(0)
            self.done.append((token, run()))
            os.eventfd_write(self.completion_fd, 1)

    def completions(self) -> list[tuple[Any, int]]:
        try:
            os.eventfd_read(self.completion_fd)
        except BlockingIOError:
            return []
        done, self.done = self.done, []
        self.in_flight -= len(done)
        return done

    def drain(self) -> None:
        self.finish()

    def close(self) -> None:
        assert not self.in_flight
        os.close(self.completion_fd)
        self.disk.channels.remove(self)


class MemoryDisk:
    def __init__(self, size: int = 1 << 16, *, inline: bool = True, read_only: bool = False) -> None:
        self.data = bytearray(os.urandom(size))
        self.size = size
        self.inline, self.read_only = inline, read_only
        self.failure: dict[str, int] = {}  # what fails, and with which result
        self.log: list[str] = []
        self.channels: list[MemoryChannel] = []
        self.channel_limit = 100

    def channel(self) -> MemoryChannel:
        if len(self.channels) >= self.channel_limit:
            raise RuntimeError("no more channels")
        self.channels.append(MemoryChannel(self))
        return self.channels[-1]

    def finish(self, count: int | None = None) -> None:
        for channel in self.channels:
            channel.finish(count)
