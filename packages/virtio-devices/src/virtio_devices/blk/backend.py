"""What the block device needs of a disk. Any disk with this face will do; `block_qcow2` has them.

Offsets and lengths are bytes. Buffers are views of guest memory, used in place until the request has finished. Results are 0
or a negative errno. Requests in flight are not ordered; a flush covers the writes that had finished before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Channel(Protocol):
    """One loop's way to a disk; not thread-safe. A request returns its result, or None when completions() will have it."""

    @property
    def completion_fd(self) -> int:
        """An event descriptor, readable while completions() has something."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that returned None and that completions() has not handed out."""
        ...

    def readv(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None: ...

    def writev(self, offset: int, buffers: Sequence[memoryview], token: Any) -> int | None: ...

    def flush(self, token: Any) -> int | None: ...

    def discard(self, offset: int, length: int, token: Any) -> int | None: ...

    def write_zeroes(self, offset: int, length: int, token: Any, unmap: bool) -> int | None: ...

    def submit(self) -> None:
        """Hand what is queued to the kernel: once a batch."""
        ...

    def completions(self) -> list[tuple[Any, int]]:
        """Return what has finished, as (token, result). Never blocks."""
        ...

    def drain(self) -> None:
        """Wait until every request has finished; completions() hands them out."""
        ...

    def close(self) -> None: ...


class Disk(Protocol):
    """One open image. `size` may change; the device is told by disk_resized()."""

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def channel(self) -> Channel:
        """Open a channel for one loop. Raises OSError or an exception derived from it, or an error of the disk's own."""
        ...
