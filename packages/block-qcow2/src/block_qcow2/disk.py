"""The seam between a disk image and whoever does I/O on it (a virtio device, an NBD server, a copy job).

A Disk is one open image. A Channel is one I/O thread's way to it: requests go in with a token, and either finish inline or
come out of `completions()` later. Offsets and lengths are bytes of the disk as the guest sees it. Buffers are writable
memory views of format "B", used in place: they must stay valid until the request has finished.

Results are 0 or a negative errno: -EINVAL outside the disk, -EROFS for a change to a read-only disk, -EIO, -ENOSPC…
Requests in flight are not ordered; flush covers the writes that had finished before it was issued.

Not here: command lines, formats, which engine is behind a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Token = Any


class Channel(Protocol):
    """Belongs to one thread. Every request returns its result when it finished inline, or None when it will come later."""

    completion_fd: int  # an event descriptor, readable while completions() has something

    @property
    def in_flight(self) -> int:
        """Requests not finished inline and not yet handed out by completions()."""
        ...

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Token) -> int | None: ...

    def writev(self, offset: int, buffers: Sequence[memoryview], token: Token) -> int | None: ...

    def flush(self, token: Token) -> int | None:
        """Make finished writes survive power loss."""
        ...

    def discard(self, offset: int, length: int, token: Token) -> int | None:
        """The content is no longer needed. Does nothing, successfully, unless the disk was opened with `discard`."""
        ...

    def write_zeroes(self, offset: int, length: int, token: Token, unmap: bool) -> int | None:
        """Make the range read as zeroes. `unmap`: giving space back is welcome (if the disk was opened with `discard`)."""
        ...

    def submit(self) -> None:
        """Hand what is queued to the kernel: once a batch."""
        ...

    def completions(self) -> list[tuple[Token, int]]:
        """Finished requests, each once. Never blocks."""
        ...

    def drain(self) -> None:
        """Wait until every request has finished; completions() still hands them out."""
        ...

    def close(self) -> None:
        """Wait for what is in flight, forget it, release the descriptors. Harmless twice."""
        ...


class Disk(Protocol):
    """One open image."""

    path: str
    read_only: bool
    request_alignment: int  # bytes; requests that are a multiple of it go without a copy

    @property
    def size(self) -> int:
        """Bytes, as the guest sees them. May grow."""
        ...

    def channel(self) -> Channel: ...

    def lock(self) -> None:
        """Take QEMU-compatible locks on the image; raises ImageInUseError, and then holds none."""
        ...

    def unlock(self) -> None: ...

    def flush(self) -> None:
        """Make finished writes survive power loss. Blocks; raises OSError."""
        ...

    def drain(self) -> None:
        """Wait until no request of any channel is being worked on. The channels' threads must be quiet meanwhile."""
        ...

    def close(self) -> None:
        """Drain, write back what is cached, release everything. Harmless twice."""
        ...
