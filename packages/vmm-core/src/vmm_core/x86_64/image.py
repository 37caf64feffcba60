"""A file that is to be put into guest memory: opened, measured, and read straight into it, without a copy.

Not here: what the bytes mean.
"""

from __future__ import annotations

import os
from stat import S_ISREG
from typing import Final, Self

from vmm_core.errors import BootError, GuestMemoryError
from vmm_core.guestmem import GuestMemory

_HUGE_PAGE: Final = 2 << 20


class ImageFile:
    """A kernel or RAM disk, open for reading. A context manager; every failure is an `error` that names the file."""

    def __init__(self, path: str, error: type[BootError] = BootError) -> None:
        """Open `path`. Raises `error` unless it is a readable regular file: anything else has no size to check."""
        self.path = path
        self._error = error
        try:
            # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
            raise error(f"{path}: cannot open: {_reason(problem)}") from None
        if not S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise error(f"{path}: not a regular file")
        self.measure()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self) -> None:
        """Find out how many bytes there are: before the first use, and whenever somebody may have written to the file."""
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def head(self, length: int) -> bytes:
        """Return the first `length` bytes, or all there are if fewer. Raises `error` when the file cannot be read."""
        return self.read(0, min(length, self.size))

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`. For headers: the caller bounds `length`. Raises `error` if there are fewer."""
        buffer = bytearray(length)
        self._fill(memoryview(buffer), offset)
        return bytes(buffer)

    def load(self, memory: GuestMemory, address: int, offset: int, length: int) -> None:
        """Read `length` bytes at file position `offset` to guest address `address`.

        Raises `error` when they are not all there, or not all of the destination is RAM.
        """
        try:
            view = memory.view(address, length)
            if length >= _HUGE_PAGE:
                memory.expect_writes(address, length)
        except GuestMemoryError as problem:
            raise self._error(f"{self.path}: does not fit guest memory: {problem}") from None
        self._fill(view, offset)

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except (OSError, OverflowError) as problem:
                raise self._error(f"{self.path}: cannot read: {_reason(problem)}") from None
            if count == 0:
                missing = len(view) - done
                raise self._error(f"{self.path}: truncated: ends at byte {offset + done}, {missing} bytes are missing")
            done += count


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
