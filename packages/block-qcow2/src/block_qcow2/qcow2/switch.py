"""Changing the header with its extensions and names, so that a loss of power leaves the old one or the new one.

A disk writes a sector as a whole or not at all, and the fields, which say where everything else is, are in the first one. So
what the present first sector does not name is written first, and then the first sector. What may be missing meanwhile is the
table of feature names, which is for people to read.

Not here: fields alone, which fit in a sector (`Metadata.write_header`).
"""

from __future__ import annotations

from ..hostfile import HostFile, read_padded
from .format import EXT_FEATURE_NAMES, Header

SECTOR = 512


def write_whole(file: HostFile, header: Header) -> None:
    """Write everything that `header` says, with a barrier on both sides. ImageFormatError, before anything, if it has no room.

    Where the necessary extensions of the old or the new one do not fit in a sector there is no such order: it is one write then.
    """
    whole = header.pack()
    file.flush()
    old = bytearray(header.cluster_size)
    with memoryview(old) as view:
        read_padded(file, 0, [view])
    steps = [(0, whole[:SECTOR])]
    if whole[SECTOR:] != old[SECTOR:]:
        steps = _steps(Header.parse(old, file.size), header) or [(0, header.pack())]
    for offset, data in steps:
        file.pwrite(offset, data)
        file.flush()


def _steps(old: Header, new: Header) -> list[tuple[int, bytes]]:
    """(offset, bytes) of writes with a barrier behind each; nothing where there is no room for that. Moves the name of `new`."""
    lean_old, lean_new, full = _chain(old, names=False), _chain(new, names=False), _chain(new, names=True)
    if max(lean_old, lean_new) > SECTOR:
        return []
    steps: list[tuple[int, bytes]] = []
    size, name = new.cluster_size, new.backing_file or b""
    kept = old.backing_file_offset, old.backing_file_offset + len(old.backing_file or b"")
    if _chain(old, names=True) > SECTOR:
        steps.append((0, _first(old, kept[0])))
    at = 0
    if name:
        room = (lean_new, 2 * SECTOR, max(kept[1], SECTOR), SECTOR, size - len(name))
        free = [p for p in room if lean_new <= p <= size - len(name) and _apart(p, len(name), *kept)]
        if not free:
            return []
        at = next((p for p in free if p >= full), free[0])
        if at >= SECTOR:
            steps.append((at, name))
    steps.append((0, _first(new, at)))
    if full <= (at or size) and full > lean_new:
        chain = new.pack_at(at)
        if full > SECTOR:
            steps.append((SECTOR, chain[SECTOR:full]))
        steps.append((0, chain[:SECTOR]))
    else:
        new.set_extension(EXT_FEATURE_NAMES, None)
        new.backing_file_offset = at
    return steps


def _apart(at: int, length: int, start: int, end: int) -> bool:
    """Whether a new name can be written while the old one, from `start` to `end`, still counts."""
    if at + length <= SECTOR:
        return True  # it comes with the fields
    return at >= SECTOR and (at >= end or at + length <= start)


def _chain(header: Header, *, names: bool) -> int:
    """The length of fields and extensions, with or without the feature names."""
    return header.packed_length(without=None if names else EXT_FEATURE_NAMES)


def _first(header: Header, name_at: int) -> bytes:
    """The first sector without the feature names."""
    names = header.extension(EXT_FEATURE_NAMES)
    extensions = list(header.extensions)
    try:
        if names is not None:
            header.set_extension(EXT_FEATURE_NAMES, None)
        return header.pack_at(name_at)[:SECTOR]
    finally:
        header.extensions = extensions
