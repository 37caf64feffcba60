"""What every open image does, whatever its format: the interface of the library.

Offsets, lengths and sizes are bytes. Every method raises ValueError outside the image, OSError if the host fails, and
BlockError for everything that this package says. Not here: opening and creating images (`images`), guest I/O (`disk`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from .errors import ImageReadOnlyError, UnsupportedFeatureError

if TYPE_CHECKING:
    from .qcow2.check import CheckResult
    from .qcow2.image import Extent, Qcow2Image
    from .qcow2.snapshots import Snapshot, Snapshots


class ImageSnapshots(Protocol):
    """The internal snapshots of an open image. SnapshotError: there is none of that name, or one already."""

    def list(self) -> Sequence[Snapshot]:
        """All of them, oldest first."""
        ...

    def create(self, name: str) -> Snapshot:
        """Keep the present content."""
        ...

    def apply(self, name: str) -> Snapshot:
        """Make the content what it was then; what is there now is lost."""
        ...

    def delete(self, name: str) -> Snapshot:
        """Forget the first of that name, and return what it was."""
        ...


class Image(Protocol):
    """An open image. Use it as a context manager, or close() it."""

    format: str
    path: str
    size: int  # bytes of the disk
    read_only: bool

    @property
    def snapshots(self) -> ImageSnapshots:
        """Its internal snapshots. UnsupportedFeatureError: the format has none."""
        ...

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill writable buffers with what is at `offset`."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        ...

    def write_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers at `offset`. ImageReadOnlyError."""
        ...

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`. ImageReadOnlyError."""
        ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeroes. `unmap`: its space may be given back. ImageReadOnlyError."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """The content of a range is no longer needed. ImageReadOnlyError."""
        ...

    def flush(self) -> None:
        """Make what was written survive power loss."""
        ...

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What backs each part of a range, in order; None for up to the end, and nothing is behind it."""
        ...

    def check(self, *, repair: str = "none", report: Callable[[str], None] = lambda line: None) -> CheckResult:
        """Check the metadata and repair "none", "leaks" or "all" of what is wrong; `report` gets a line for each finding.

        UnsupportedFeatureError: the format has nothing to check. ValueError: `repair` is another word.
        """
        ...

    def resize(self, size: int, *, shrink: bool = False) -> None:
        """Set the size of the disk. Making it smaller loses data and wants `shrink`. ImageReadOnlyError."""
        ...

    def close(self) -> None:
        """Write back what is cached and let go of the file. Harmless twice."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Qcow2Snapshots:
    """`ImageSnapshots` of a qcow2 image. The table is read for each call, so that nothing here gets old; one change at a time."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image

    @contextmanager
    def _table(self) -> Iterator[Snapshots]:
        from .qcow2.snapshots import Snapshots

        with self._image.snapshots_lock:
            yield Snapshots(self._image)

    def list(self) -> Sequence[Snapshot]:
        from .qcow2.snapshots import load

        # As a request does: waits for the table to be whole, and not for somebody who waits for requests of this very thread.
        with self._image.operation(within=True):
            return tuple(load(self._image.file, self._image.header)[0])

    def create(self, name: str, *, vm_clock_nsec: int = 0) -> Snapshot:
        with self._table() as table:
            return table.create(name, vm_clock_nsec=vm_clock_nsec)

    def apply(self, name: str) -> Snapshot:
        with self._table() as table:
            snapshot = table.find(name)
            table.apply(snapshot)
            return snapshot

    def delete(self, name: str) -> Snapshot:
        with self._table() as table:
            snapshot = table.find(name)
            table.delete(snapshot)
            return snapshot


class PlainImage:
    """What images have in common whose format knows neither snapshots nor anything that could be checked."""

    format: str
    path: str

    @property
    def snapshots(self) -> ImageSnapshots:
        raise UnsupportedFeatureError(f"{self.path}: a {self.format} image has no snapshots")

    def check(self, *, repair: str = "none", report: Callable[[str], None] = lambda line: None) -> CheckResult:
        raise UnsupportedFeatureError(f"{self.path}: a {self.format} image has nothing to check")


class ReadOnlyImage(PlainImage):
    """The writing half of an image that is only read."""

    def write_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise self._only_read()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise self._only_read()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        raise self._only_read()

    def discard(self, offset: int, length: int) -> None:
        raise self._only_read()

    def resize(self, size: int, *, shrink: bool = False) -> None:
        raise self._only_read()

    def flush(self) -> None:
        """Nothing is written."""

    def _only_read(self) -> ImageReadOnlyError:
        return ImageReadOnlyError(f"{self.path}: {self.format} images are only read")
