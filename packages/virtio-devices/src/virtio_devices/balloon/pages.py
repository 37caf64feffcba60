"""Page numbers of a request into ranges of guest RAM.

Not here: what is done with the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_core.guestmem import Region

PAGE_SHIFT = 12  # 5.5.6: page numbers are in units of 4096 bytes, whatever the guest's or the host's pages are


def page_numbers(data: bytes) -> list[int]:
    """Return the page numbers in `data` (5.5.6.1, little-endian 32 bits each), ascending, each once. A cut-off one is dropped."""
    return sorted(set(unpack(f"<{len(data) // 4}I", data[: len(data) & ~3])))


def runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join ascending page numbers: yield (first page, number of pages)."""
    if not pages:
        return
    if pages[-1] - pages[0] == len(pages) - 1:  # the usual case, without a look at each
        yield pages[0], len(pages)
        return
    first = following = pages[0]
    for page in pages:
        if page != following:
            yield first, following - first
            first = page
        following = page + 1
    yield first, following - first


def in_ram(ranges: Iterable[tuple[int, int]], regions: Sequence[Region]) -> Iterator[tuple[int, int]]:
    """Cut ranges of pages to what is RAM: yield (guest address, bytes)."""
    for first, count in ranges:
        start, end = first << PAGE_SHIFT, (first + count) << PAGE_SHIFT
        for region in regions:
            low, high = max(start, region.base), min(end, region.base + region.size)
            if low < high:
                yield low, high - low
