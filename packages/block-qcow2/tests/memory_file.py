"""A host file in memory that remembers what was written between which flushes, for tests of what a power loss leaves."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence

from block_qcow2.ranges import RangeGate

FULL = 64 << 20  # bytes that a file may have
SECTOR = 512  # bytes that a disk writes as a whole or not at all


class MemoryFile:
    """Does what `block_qcow2.hostfile.HostFile` does, on a byte array."""

    path = "memory"
    read_only = False
    direct = False
    is_block = False
    alignment = 1
    fd = -1

    def __init__(self, data: bytes = b"", *, log: bool = False) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.gate = RangeGate()
        self.log: list[tuple[int, bytes] | None] | None = [] if log else None  # writes; None is a flush

    def is_hole(self, offset: int, length: int) -> bool:
        return False

    def refresh_size(self) -> int:
        self.size = len(self.data)
        return self.size

    def read_some(self, offset: int, buffers: Sequence[memoryview]) -> int:
        done = 0
        for buffer in buffers:
            part = self.data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
            offset += len(part)
            if len(part) < len(buffer):
                break
        return done

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        if self.read_some(offset, buffers) != sum(map(len, buffers)):
            raise OSError(5, "short")

    def pread(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        self.readv(offset, [memoryview(data)])
        return data

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.pwrite(offset, b"".join(map(bytes, buffers)))

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        data = bytes(data)
        if offset + len(data) > FULL:
            raise OSError(errno.ENOSPC, "a disk has an end")
        if len(self.data) < offset + len(data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data
        if self.log is not None:
            self.log.append((offset, data))

    def flush(self) -> None:
        if self.log is not None:
            self.log.append(None)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.pwrite(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        # A hole reads as anything until it is written again.
        self.pwrite(offset, b"\xdb" * length)

    def truncate(self, size: int) -> None:
        self.data[size:] = bytes(max(size - len(self.data), 0))

    def close(self) -> None:
        """Nothing is open."""


class Below:
    """A backing image full of "B"."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = b"B" * len(buffer)

    def close(self) -> None:
        """Nothing is open."""


class PowerLosses:
    """What a disk holds when the power fails after some entries of a log: what was flushed, any sectors of what was not."""

    def __init__(self, start: bytes, log: Sequence[tuple[int, bytes] | None]) -> None:
        self._log = log
        self._flushed = bytearray(start)
        self._at = 0  # entries that `_flushed` has

    def after(self, cut: int, rng: random.Random) -> bytes:
        """The disk after `cut` entries, which must not be fewer than they were before."""
        log = self._log
        last = max((i for i in range(self._at, cut) if log[i] is None), default=self._at)
        for entry in log[self._at : last]:
            if entry is not None:
                _put(self._flushed, *entry)
        self._at = last
        disk = bytearray(self._flushed)
        keep = rng.choice([0.0, 0.3, 0.7, 1.0])
        for entry in log[last:cut]:
            if entry is None:
                continue
            offset, data = entry
            disk.extend(bytes(max(offset + len(data) - len(disk), 0)))
            at = 0
            whole = rng.random() < 0.5  # often a write is there or not, sometimes only some of its sectors are
            there = rng.random() < keep
            while at < len(data):
                n = min(SECTOR - (offset + at) % SECTOR, len(data) - at)
                if there if whole else rng.random() < keep:
                    disk[offset + at : offset + at + n] = data[at : at + n]
                at += n
        return bytes(disk)


def _put(disk: bytearray, offset: int, data: bytes) -> None:
    disk.extend(bytes(max(offset + len(data) - len(disk), 0)))
    disk[offset : offset + len(data)] = data
