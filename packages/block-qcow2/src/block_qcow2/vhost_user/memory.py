"""Memory that a front end shares with us: regions of files, found by guest address (buffers) or by user address (rings).

Every address and length comes from outside and is checked against the region, every region against the length of its file. A
front end that cuts its file short afterwards ends this process (SIGBUS), as it does every vhost-user back end: mapped memory
can be trusted to stay only where it is sealed, and not every front end can seal it.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import NamedTuple

from ..errors import BlockError

MAX_REGIONS = 32  # slots: what hot-plugged memory needs
_END = 1 << 64


class SharedMemoryError(BlockError):
    """An address or a region that is not there, or cannot be mapped."""


class Region(NamedTuple):
    """`size` bytes of guest memory from `guest` on, which the front end itself sees at `user`."""

    guest: int
    size: int
    user: int
    view: memoryview


def map_file(fd: int, offset: int, size: int) -> memoryview:
    """`size` bytes of a file from `offset` on, shared. The mapping goes with the last view of it. SharedMemoryError."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SharedMemoryError("shared memory has to be a file")
        if not size or offset + size > status.st_size:
            raise SharedMemoryError(f"{size} bytes at {offset:#x} of a file of {status.st_size}")
        # Huge pages are mapped from page to page, and st_blksize says how large they are.
        page = max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
        before = offset % page
        length = min(-(-(before + size) // page) * page, status.st_size - offset + before)
        return memoryview(mmap.mmap(fd, length, offset=offset - before))[before : before + size]
    except (OSError, ValueError, OverflowError) as e:
        raise SharedMemoryError(f"{size} bytes at {offset:#x} cannot be mapped: {e}") from None


class SharedMemory:
    """The regions of one front end."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, guest: int, size: int, user: int, offset: int, fd: int) -> None:
        """Map a region. Does not keep `fd`. SharedMemoryError if it overlaps another, or the file does not have it."""
        if not 0 < size <= _END - max(guest, user) or len(self.regions) >= MAX_REGIONS:
            raise SharedMemoryError(f"region of {size} bytes at {guest:#x}, beside {len(self.regions)} others")
        for r in self.regions:
            if (guest < r.guest + r.size and r.guest < guest + size) or (user < r.user + r.size and r.user < user + size):
                raise SharedMemoryError(f"region of {size} bytes at {guest:#x} overlaps the one at {r.guest:#x}")
        self.regions.append(Region(guest, size, user, map_file(fd, offset, size)))

    def remove(self, guest: int, size: int, user: int) -> None:
        """Forget a region; it is unmapped when nothing uses it any more."""
        for i, r in enumerate(self.regions):
            if r[:3] == (guest, size, user):
                del self.regions[i]
                return
        raise SharedMemoryError(f"there is no region of {size} bytes at {guest:#x}")

    def at_user(self, address: int, length: int) -> memoryview:
        """Memory at an address of the front end's own, all in one region."""
        for r in self.regions:
            start = address - r.user
            if 0 <= start <= r.size - length:
                return r.view[start : start + length]
        raise SharedMemoryError(f"{length} bytes at the user address {address:#x} are in no region")

    def views(self, address: int, length: int) -> list[memoryview]:
        """Guest memory at `address`, in as many views as it has adjacent regions."""
        found = []
        while True:
            for r in self.regions:
                start = address - r.guest
                if 0 <= start < r.size:
                    break
            else:
                raise SharedMemoryError(f"{length} bytes at the guest address {address:#x} are in no region")
            n = min(length, r.size - start)
            found.append(r.view[start : start + n])
            length -= n
            if not length:
                return found
            address += n
