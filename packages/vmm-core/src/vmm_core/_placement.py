"""On which nodes of the host guest RAM lies: mbind(2). Loaded when a machine asks for it.

Not here: nodes of the guest, which it learns of from tables.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from ctypes import CDLL, addressof, c_char, c_ulong, get_errno

from vmm_core.errors import GuestMemoryError
from vmm_core.guestmem import Placement, Region

_MODES = {"preferred": 1, "bind": 2, "interleave": 3}  # linux/mempolicy.h, MPOL_*
_STRICT, _MOVE = 1, 2  # MPOL_MF_*: say so when a page is elsewhere already, after trying to move it
_MBIND = {"x86_64": 237, "aarch64": 235}
_WORD = 64


def place(regions: Sequence[Region], maps: Sequence[memoryview], placement: Sequence[Placement], page_size: int) -> None:
    """Bind RAM to nodes of the host. Before it is touched: what is there already may be unable to move.

    Raises GuestMemoryError when the pieces are not in whole pages, or the system refuses.
    """
    for wanted, views in _pieces(regions, maps, placement, page_size):
        if not wanted.nodes or wanted.mode == "default":
            continue
        for view in views:
            number = mbind(addressof(c_char.from_buffer(view)), len(view), _MODES[wanted.mode], wanted.nodes)
            if number:
                nodes = ", ".join(map(str, wanted.nodes))
                where = f"node{'s' if len(wanted.nodes) > 1 else ''} {nodes} of the host (policy {wanted.mode})"
                raise GuestMemoryError(f"cannot have {len(view):#x} bytes of guest RAM on {where}: {os.strerror(number)}")


def _pieces(
    regions: Sequence[Region], maps: Sequence[memoryview], placement: Sequence[Placement], page_size: int
) -> Iterator[tuple[Placement, list[memoryview]]]:
    """Yield each placement with the RAM it is about: one after the other, through all regions."""
    start = 0
    for wanted in placement:
        if wanted.size <= 0 or wanted.size % page_size:
            raise GuestMemoryError(f"{wanted.size:#x} bytes of RAM for one node are not in whole pages of {page_size:#x} bytes")
        end = start + wanted.size
        views = []
        for region, view in zip(regions, maps, strict=True):
            low, high = max(start, region.offset), min(end, region.offset + region.size)
            if low < high:
                views.append(view[low - region.offset : high - region.offset])
        yield wanted, views
        start = end
    if start != sum(region.size for region in regions):
        raise GuestMemoryError(f"the nodes have {start:#x} bytes of RAM together, the machine has another amount")


def mask(nodes: Sequence[int]) -> tuple[object, int]:
    """Return the set of nodes as the kernel reads it, and how many bits of it there are."""
    words = max(nodes) // _WORD + 1
    value = (c_ulong * words)()
    for node in nodes:
        value[node // _WORD] |= 1 << node % _WORD
    return value, words * _WORD + 1  # the kernel takes one bit less than it is told


def mbind(address: int, length: int, mode: int, nodes: Sequence[int]) -> int:
    """Call mbind(2); return 0, or the error's number."""
    value, bits = mask(nodes)
    syscall = CDLL(None, use_errno=True).syscall
    arguments = (_MBIND[platform.machine()], c_ulong(address), c_ulong(length), mode, value, c_ulong(bits), _STRICT | _MOVE)
    return get_errno() if syscall(*arguments) else 0
