"""Finding out whether a buffer holds nothing but zero bytes, at memory speed. Not here: what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

_CHUNK = 1 << 16
_ZEROES = bytes(_CHUNK)


def is_zero(view: memoryview) -> bool:
    """True if every byte of `view` (contiguous, format "B") is zero. An empty view is zero."""
    size = len(view)
    if not size:
        return True
    # Data hardly ever starts and ends with zero bytes: most answers cost two loads.
    if view[0] or view[-1]:
        return False
    for start in range(0, size, _CHUNK):
        part = bytes(view[start : start + _CHUNK])  # a copy and a memcmp beat an interpreted loop by far
        if part != (_ZEROES if len(part) == _CHUNK else _ZEROES[: len(part)]):
            return False
    return True


def all_zero(views: Iterable[memoryview]) -> bool:
    """True if every byte of every view is zero."""
    return all(map(is_zero, views))
