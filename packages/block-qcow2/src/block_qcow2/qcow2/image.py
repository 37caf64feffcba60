"""An open qcow2 image: opening with the rules for what an image may name, its header, flushing, closing.

Not here: reading (`reader`), writing (`writer`), resizing (`resize`), the order on the disk (`metadata`), snapshots, checking.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ..errors import ExternalFileError, ImageFormatError, PassphraseNeededError, UnsupportedFeatureError
from ..hostfile import HostFile, read_padded
from ..image import Qcow2Snapshots
from . import bitmaps, tables
from .format import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_DATA_FILE_RAW,
    COMPAT_LAZY_REFCOUNTS,
    CRYPT_AES,
    CRYPT_LUKS,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    INCOMPAT_CORRUPT,
    INCOMPAT_DATA_FILE,
    INCOMPAT_DIRTY,
    INCOMPAT_EXTENDED_L2,
    V2_LENGTH,
    V3_FULL_LENGTH,
    Header,
)
from .metadata import l2_clusters
from .reader import COMPRESSED_DATA, NORMAL, UNALLOCATED, ZERO_PLAIN, Source
from .resize import Resizer

if TYPE_CHECKING:
    from .check import CheckResult

_KNOWN_AUTOCLEAR = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW
_LAYOUT = INCOMPAT_DATA_FILE | INCOMPAT_EXTENDED_L2
_MAX_OTHER_CLUSTERS = 1 << 21  # of snapshots, and of bitmaps, in the file


class Extent(NamedTuple):
    """Adjacent guest bytes of one kind. What is not `present` comes from the backing image, or is zero without one."""

    offset: int
    length: int
    present: bool  # this image says what is here
    zero: bool  # it reads as zeroes
    compressed: bool
    host: int | None  # where the data are in the (data) file, if they are there as they are; of zeroes, the place kept for data


class Qcow2Image(Resizer):
    """A qcow2 image over an open file, which it owns. See `open_qcow2`."""

    format = "qcow2"

    def __init__(
        self,
        file: HostFile,
        header: Header,
        *,
        read_only: bool = True,
        backing: Source | None = None,
        data_file: HostFile | None = None,
        l2_cache_bytes: int = 0,
        discard: bool = False,
    ) -> None:
        super().__init__(file, header, read_only=read_only, data_file=data_file, l2_cache_bytes=l2_cache_bytes, discard=discard)
        self.path = file.path
        self.backing = backing
        self._closed = False
        self.unlocked = False
        self.snapshots_lock = threading.Lock()  # of their table, between reading it and writing it anew
        if self.encrypted:
            self.data_file = _Locked(file.path)  # type: ignore[assignment]
        self._mind_marks()

    def unlock(self, passphrase: bytes) -> None:
        """Make the guest data of a LUKS image readable. Raises WrongPassphraseError, ImageFormatError."""
        from .. import luks

        if self.header.crypt_method != CRYPT_LUKS:
            raise ImageFormatError(f"{self.path}: the image is not encrypted with LUKS")
        self.data_file = luks.CryptFile(self.file, luks.unlock(self.read_luks, passphrase))  # type: ignore[assignment]
        self.unlocked = True

    def read_luks(self, at: int, n: int) -> bytes:
        """Part of the LUKS header or its key material."""
        where = self.header.luks_header
        assert where is not None  # the header was checked
        offset, length = where
        if at + n > length:
            raise ImageFormatError(f"{self.path}: LUKS key material at {at:#x}, expected inside the header of {length} bytes")
        data = bytearray(n)
        with memoryview(data) as view:
            read_padded(self.file, offset + at, [view])
        return bytes(data)

    def show_snapshot(self, l1_table_offset: int, l1_size: int, disk_size: int) -> None:
        """Read the guest data of a snapshot from now on, instead of the present ones. Read-only images only."""
        if not self.read_only:
            raise ValueError("an image open for writing shows its present content")
        with self.exclusive(), self._lock:
            self.l1 = tables.load(self.file, l1_table_offset, l1_size)
            self.size = disk_size

    def empty(self) -> None:
        """Forget all guest data: everything comes from the backing image again."""
        self.must_be_writable()
        if self.size:
            self._clusterwise(0, self.size, self._forget_clusters, True, None)
        self.commit()

    def set_backing(self, name: str | None, fmt: str | None) -> None:
        """Write another backing file name and format into the header. Looks at neither file."""
        self.must_be_writable()
        with self.exclusive():
            self.must_be_writable()
            header = self.header
            old = header.backing_file, list(header.extensions)
            header.backing_file = os.fsencode(name) if name else None
            header.set_extension(EXT_BACKING_FORMAT, fmt.encode() if name and fmt else None)
            try:
                self.write_whole_header()
            except ImageFormatError:
                header.backing_file, header.extensions = old
                raise

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file as it stands in the image."""
        return os.fsdecode(self.header.backing_file) if self.header.backing_file else None

    @property
    def backing_format(self) -> str | None:
        data = self.header.extension(EXT_BACKING_FORMAT)
        return data.decode("utf-8", "replace") if data else None

    @property
    def data_file_name(self) -> str | None:
        data = self.header.extension(EXT_DATA_FILE)
        return os.fsdecode(data) if data else None

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What backs each part of a range, in order. Looks at this image only, not at its backing image.

        ValueError: a negative offset.
        """
        if offset < 0:
            raise ValueError(f"bytes from {offset} on of an image of {self.size}")
        end = self.size if length is None else min(offset + length, self.size)
        while offset < end:
            # One L2 table at a time: the answer for a large image is as lazy as its reader.
            stop = min((offset >> self._l2_shift) + 1 << self._l2_shift, end)
            for kind, host, n in self.map_range(offset, stop - offset):
                zero = kind == ZERO_PLAIN or (kind == UNALLOCATED and self.backing is None)
                where = host if kind == NORMAL or (kind == ZERO_PLAIN and host) else None
                yield Extent(offset, n, kind != UNALLOCATED, zero, kind == COMPRESSED_DATA, where)
                offset += n

    @property
    def snapshots(self) -> Qcow2Snapshots:
        """The internal snapshots: list, create, apply and delete them."""
        return Qcow2Snapshots(self)

    def check(self, *, repair: str = "none", report: Callable[[str], None] = lambda line: None) -> CheckResult:
        """Check the metadata and repair "none", "leaks" or "all" of what is wrong; `report` gets a line for each finding."""
        from .check import check

        return check(self, repair=repair, report=report)

    # --- life ---

    def flush(self) -> None:
        """Make every write that has finished survive power loss. Raises OSError, ImageFormatError."""
        if self.read_only:
            return
        with self._lock:
            busy = self._committing or self._dirty
        if busy:
            with self._commit_lock:  # what another thread was writing is on the disk now, or dirty again
                with self._lock:
                    dirty = self._dirty
                if dirty:
                    self.commit()
                    return
        if self.external:
            self.data_file.flush()
        self.file.flush()

    @property
    def _dirty(self) -> bool:
        """Whether there is something to commit. The lock is held."""
        return bool(self.l2.dirty or self._l1_dirty or self.refcounts.dirty or self._pending)

    def reload(self) -> None:
        """Read everything again: somebody else had the image meanwhile. Raises ImageFormatError, OSError."""
        with self.exclusive():
            self._read_anew()
            self._broken = None
            self.bitmaps = None
            self._mind_marks()

    def settle(self) -> None:
        """Have memory and disk agree in an image that was found wrong while it was written. Nothing else is running.

        Counting what is on the disk would otherwise miss what is in memory only, and the next change would bring it back.
        """
        self.commit(wrong=True)
        self._read_anew()
        if self.bitmaps is not None:
            self.bitmaps.resized()
            with self._lock:  # a change of size, or to a snapshot, may have been left half-way
                self.mark_dirty(0, self.size)

    def _read_anew(self) -> None:
        self.file.refresh_size()
        header = read_header(self.file)
        same = (header.cluster_bits, header.incompatible & _LAYOUT, header.backing_file, header.extension(EXT_DATA_FILE))
        old = self.header
        if same != (old.cluster_bits, old.incompatible & _LAYOUT, old.backing_file, old.extension(EXT_DATA_FILE)):
            raise ImageFormatError(f"{self.path}: the image was replaced by another one")
        self.header = header
        self._compressed_at = 0
        self._load_tables(self._l2_cache_bytes)

    def _mind_marks(self) -> None:
        if not self.read_only:
            if self.header.incompatible & INCOMPAT_CORRUPT:
                self._broken = "the image is marked corrupt"
            elif self.header.incompatible & INCOMPAT_DIRTY:
                self._broken = "the image was not closed properly and is not repaired yet"
        self._find_unready()

    def _find_unready(self) -> None:
        self._unready = self._misplaced is not None or self._unclaimed or self._unfollowed

    @property
    def _unclaimed(self) -> bool:
        """The header has yet to be made ours before the first change."""
        return bool(self.header.autoclear & ~_KNOWN_AUTOCLEAR)

    @property
    def _unfollowed(self) -> bool:
        """There are dirty bitmaps that would not be told of a write."""
        return self.bitmaps is None and bitmaps.present(self.header)

    def claim(self) -> None:
        """Clear the autoclear bits that are not known, before the first change: what they say is not kept true here.

        Not when the image is opened: then nobody has locked it yet.
        """
        with self._commit_lock:
            if self._unclaimed:
                old = self.header.autoclear
                self.header.autoclear &= _KNOWN_AUTOCLEAR
                try:
                    self.write_header()
                except OSError:
                    self.header.autoclear = old
                    raise
            self._find_unready()

    def must_be_writable(self) -> None:
        super().must_be_writable()
        if not self._unready:
            return
        if self._misplaced:
            raise self._corrupt(self._misplaced)
        if self._unfollowed:
            raise UnsupportedFeatureError(f"{self.path}: the image has dirty bitmaps, which are not followed")
        self.claim()

    def must_not_overlap(self, l1: array[int]) -> None:
        """Refuse an L1 table that is about to become ours if it names other metadata as its L2 tables."""
        wanted = l2_clusters(l1, self.cluster_bits)
        for what, clusters in self._metadata():
            if what == "L2 table" or wanted.isdisjoint(clusters):
                continue
            where = next(c for c in clusters if c in wanted) << self.cluster_bits
            raise self._corrupt(f"L2 table of a snapshot at {where:#x}, expected outside of the {what}")

    def _find_reserved(self) -> None:
        super()._find_reserved()
        self._find_unready()

    def _other_metadata(self) -> Iterator[tuple[str, Collection[int]]]:
        from . import snapshots

        bits = self.cluster_bits
        for what, found in (
            ("snapshot table or L1 table", snapshots.places(self.file, self.header)),
            ("bitmap directory or table", bitmaps.places(self.file, self.header)),
        ):
            ranges, clusters = [], 0
            try:
                for offset, length in found:
                    ranges.append(range(offset >> bits, -(-(offset + length) >> bits)))
            except ImageFormatError:
                pass  # whoever reads it says so; the place of the rest is known
            distinct: set[int] = set()
            for part in set(ranges):
                clusters += len(part)
                if clusters > _MAX_OTHER_CLUSTERS:
                    # Nobody has as many; they would have to be remembered one by one.
                    self._misplaced = f"{what}: more than {_MAX_OTHER_CLUSTERS} clusters"
                    return
                distinct.update(part)
            yield what, distinct

    def set_lazy_refcounts(self, on: bool) -> None:
        """Let other programs put off counting (they then mark the image dirty). This one never does. Version 3 only."""
        self.must_be_writable()
        if self.header.version < 3:
            raise ImageFormatError(f"{self.path}: lazy_refcounts needs compat=1.1")
        with self.exclusive():
            self.must_be_writable()
            self.header.compatible &= ~COMPAT_LAZY_REFCOUNTS
            self.header.compatible |= COMPAT_LAZY_REFCOUNTS if on else 0
            self.write_header()

    def upgrade(self) -> None:
        """Make a version 2 image one of version 3."""
        self.must_be_writable()
        header = self.header
        if header.version >= 3:
            return
        with self.exclusive():
            self.must_be_writable()
            header.version, header.header_length = 3, V3_FULL_LENGTH
            try:
                self.write_whole_header()
            except ImageFormatError:
                header.version, header.header_length = 2, V2_LENGTH
                raise

    def follow_bitmaps(self) -> None:
        """Begin to keep enabled dirty bitmaps right on writes: the image is locked. Raises BlockError, OSError."""
        if not self.read_only and not self._broken and self.bitmaps is None and bitmaps.present(self.header):
            followed = bitmaps.Bitmaps(self)
            followed.follow()
            self.bitmaps = followed
            self._find_unready()

    def release_bitmaps(self) -> None:
        """Store the dirty bitmaps that were followed. Raises OSError, BlockError, and then they still are."""
        if self.bitmaps is not None:
            self.bitmaps.release()
            self.bitmaps = None
            self._find_unready()

    def mark_dirty(self, offset: int, length: int) -> None:
        if self.bitmaps is not None:
            self.bitmaps.mark(offset, min(length, self.size - offset))  # nothing is marked behind the end of the disk

    def replace_extension(self, kind: int, data: bytes | None, autoclear: int) -> None:
        """Change a header extension that `autoclear` says is valid: it is said to be invalid meanwhile."""
        header = self.header
        header.autoclear &= ~autoclear
        self.write_header()
        old = list(header.extensions)
        header.set_extension(kind, data)
        try:
            self.write_whole_header()
        except ImageFormatError:
            header.extensions = old
            raise
        if data is not None:
            header.autoclear |= autoclear
        self.write_header()
        self._find_unready()

    def write_whole_header(self) -> None:
        """Write the header with its extensions and names. ImageFormatError: they have no room, and nothing was written."""
        from .switch import write_whole

        try:
            with self._header_lock:
                write_whole(self.file, self.header)
        except OSError:
            self._broken = "the header could not be changed"  # which of the two is on the disk is not known
            raise

    @property
    def needs_repair(self) -> bool:
        """The image was not closed properly while its counts were changing."""
        return bool(self.header.incompatible & INCOMPAT_DIRTY)

    def close(self) -> None:
        """Flush and close the image and what it named. Harmless twice. The files are closed even if flushing fails."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self.read_only and not self._broken:
                try:
                    self.release_bitmaps()
                finally:
                    self.flush()
        finally:
            self.file.close()
            if self.external:
                self.data_file.close()
            if self.backing is not None:
                self.backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Locked:
    """Stands for the guest data of an encrypted image until it is unlocked."""

    alignment = 1

    def __init__(self, path: str) -> None:
        self._path = path

    def _refuse(self, *_: object, **__: object) -> Any:
        raise PassphraseNeededError(f"{self._path}: the image is encrypted (LUKS): its passphrase is needed")

    read_some = writev = write_zeroes = _refuse


def read_header(file: HostFile) -> Header:
    """Parse the header of an open file. ImageFormatError, naming the file."""
    start = bytearray(min(file.size, 1 << 16))
    with memoryview(start) as view:
        read_padded(file, 0, [view])
    try:
        bits = int.from_bytes(start[20:24], "big")
        if 16 < bits <= 21 and file.size > len(start):
            start = bytearray(min(file.size, 1 << bits))
            with memoryview(start) as view:
                read_padded(file, 0, [view])
        return Header.parse(start, file.size)
    except ImageFormatError as e:
        raise type(e)(f"{file.path}: {e}") from None


def open_qcow2(
    file: HostFile,
    *,
    read_only: bool = True,
    open_backing: Callable[[str, str | None], Source] | None = None,
    open_data_file: Callable[[str], HostFile] | None = None,
    l2_cache_bytes: int = 0,
    discard: bool = False,
    for_repair: bool = False,
) -> Qcow2Image:
    """Open the image in `file`, which belongs to it from then on.

    What the image names is opened by `open_backing` (name, format) and `open_data_file` (name), which raise if the name is not
    to be opened; without them such an image is refused. `for_repair`: an image that is marked corrupt may be opened for
    writing; writes are refused until it is repaired, as they are in a dirty one.
    Raises ImageFormatError, UnsupportedFeatureError, OpenError.
    """
    header = read_header(file)
    path = file.path
    if header.crypt_method == CRYPT_AES:
        raise UnsupportedFeatureError(f"{path}: the image is encrypted with qcow2's old AES, which is not supported; LUKS is")
    if header.crypt_method == CRYPT_LUKS and header.has_data_file:
        raise UnsupportedFeatureError(f"{path}: encryption with an external data file is not supported")
    if not read_only and header.incompatible & INCOMPAT_CORRUPT and not for_repair:
        raise ImageFormatError(f"{path}: the image is marked corrupt: it can be read, or repaired by check")
    backing: Source | None = None
    data_file: HostFile | None = None
    try:
        if header.has_data_file:
            name = os.fsdecode(header.extension(EXT_DATA_FILE) or b"")
            if open_data_file is None:
                raise ExternalFileError(f"{path}: the image names a data file, {name!r}: opening it has to be allowed")
            data_file = open_data_file(name)
        if header.backing_file:
            name = os.fsdecode(header.backing_file)
            if open_backing is None:
                raise ExternalFileError(f"{path}: the image names a backing file, {name!r}: opening it has to be allowed")
            fmt = header.extension(EXT_BACKING_FORMAT)
            backing = open_backing(name, fmt.decode("utf-8", "replace") if fmt else None)
        return Qcow2Image(
            file,
            header,
            read_only=read_only,
            backing=backing,
            data_file=data_file,
            l2_cache_bytes=l2_cache_bytes,
            discard=discard,
        )
    except BaseException:
        if data_file is not None:
            data_file.close()
        if backing is not None:
            backing.close()
        raise
