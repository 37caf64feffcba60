"""What images from elsewhere have in common: a table from blocks to places in the file. Not here: what their headers mean."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import ImageFormatError
from ..hostfile import Cursor, HostFile, read_padded
from ..image import ReadOnlyImage

if TYPE_CHECKING:
    from ..qcow2.image import Extent

MAX_BLOCK = 64 << 20  # bytes, where a format does not say more
MAX_SIZE = 1 << 50
_PAGE = 4096  # entries that are read at once
PAGES = 256  # of one table in memory: 8 MiB at most
_ZEROES = bytes(1 << 16)


class Table:
    """`count` entries from `offset` on, of 4 bytes ("I") or 8 ("Q").

    `there` tells from an entry whether its block is in the file.
    """

    def __init__(self, file: HostFile, offset: int, count: int, code: str, order: str, there: Callable[[int], bool]) -> None:
        self._file, self._offset, self.count, self._code = file, offset, count, code
        self._swap = order != sys.byteorder
        self._there = there
        # And whether any of its blocks is there, and whether all are.
        self._pages: OrderedDict[int, tuple[array[int], bool, bool]] = OrderedDict()

    def __getitem__(self, index: int) -> int:
        number = index // _PAGE
        return (self._pages.get(number) or self._load(number))[0][index % _PAGE]

    def _load(self, number: int) -> tuple[array[int], bool, bool]:
        page = array(self._code)
        first = number * _PAGE
        data = bytearray(min(_PAGE, self.count - first) * page.itemsize)
        with memoryview(data) as view:
            read_padded(self._file, self._offset + first * page.itemsize, [view])
        page.frombytes(data)
        if self._swap:
            page.byteswap()
        there = set(map(self._there, set(page)))
        loaded = self._pages[number] = page, True in there, False not in there
        while len(self._pages) > PAGES:
            self._pages.popitem(last=False)
        return loaded

    def skip(self, index: int, there: bool) -> int:
        """The first index from this one on whose block may not be as `there` says, without looking at each."""
        while index < self.count:
            number = index // _PAGE
            _, some, every = self._pages.get(number) or self._load(number)
            if not (every if there else not some):
                return index
            index = (number + 1) * _PAGE
        return self.count


class ForeignImage(ReadOnlyImage):
    """A read-only image of fixed-size blocks. Subclasses find blocks."""

    format = ""
    read_only = True
    backing = None

    def __init__(self, file: HostFile) -> None:
        self.file = file
        self.path = file.path
        self.size = 0
        self.block_size = 0

    def _block(self, index: int) -> int | None:
        """Where a block's data are in the file, None for zeroes."""
        raise NotImplementedError

    def _skip(self, index: int, there: bool) -> int:
        """The first block from this one on that may not be as `there` says, in the file or not; `index` is always right."""
        return index

    def _refuse(self, what: str) -> ImageFormatError:
        return ImageFormatError(f"{self.path}: {what}")

    def _check_shape(self, blocks: int, low: int = 512, high: int = MAX_BLOCK) -> None:
        size, block = self.size, self.block_size
        if not 0 < size <= MAX_SIZE or not low <= block <= high or block & (block - 1):
            raise self._refuse(f"{self.format} header: size {size}, blocks of {block} bytes")
        if blocks < -(-size // block):
            raise self._refuse(f"{self.format} header: a table of {blocks} blocks for {size} bytes in blocks of {block}")

    def _table(self, offset: int, count: int, code: str, order: str, there: Callable[[int], bool]) -> Table:
        length = count * (4 if code == "I" else 8)
        if offset + length > self.file.size:
            # Not zeroes instead: a few bytes would be as much work as a table of any size.
            raise self._refuse(
                f"{self.format} block table of {length} bytes at {offset:#x}, expected inside the file of {self.file.size} bytes"
            )
        return Table(self.file, offset, count, code, order, there)

    # --- what every image does ---

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = sum(map(len, buffers))
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} of an image of {self.size}")
        target = Cursor(buffers)
        while length:
            inside = offset % self.block_size
            n = min(self.block_size - inside, length)
            self._read_part(offset // self.block_size, inside, target.views(n))
            offset += n
            length -= n

    def _read_part(self, index: int, inside: int, views: list[memoryview]) -> None:
        where = self._block(index)
        if where is None:
            for view in views:
                view[:] = bytes(len(view)) if len(view) > len(_ZEROES) else _ZEROES[: len(view)]
            return
        if where >= self.file.size:
            raise self._refuse(f"{self.format} block {index} at {where:#x}, expected inside the file of {self.file.size} bytes")
        read_padded(self.file, where + inside, views)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        with memoryview(data) as view:
            self.read_into(offset, [view])
        return bytes(data)

    def block_status(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        from ..qcow2.image import Extent

        if offset < 0:
            raise ValueError(f"bytes from {offset} on of an image of {self.size}")
        end = self.size if length is None else min(offset + length, self.size)
        while offset < end:
            index = offset // self.block_size
            there = self._block(index) is not None
            index += 1
            while index * self.block_size < end and (self._block(index) is not None) == there:
                index = max(self._skip(index, there), index + 1)
            stop = min(index * self.block_size, end)
            yield Extent(offset, stop - offset, there, not there, False, None)
            offset = stop

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
