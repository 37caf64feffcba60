"""Images from elsewhere, to be read and converted: VDI, VHD (fixed, dynamic), VHDX, VMDK (monolithicSparse, streamOptimized).

Each is a table from blocks to places in the file, read as it is needed: an image may be of any size. Read-only; images that need
another file (differencing, split) are refused by name, so nothing here opens anything. Every number is checked before it is used.

Not here: writing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import ImageFormatError
from ..hostfile import HostFile, read_padded

if TYPE_CHECKING:
    from .blocks import ForeignImage

# Format: module and class, loaded when there is such an image.
_OPENERS = {"vhdx": ("vhdx", "VhdxImage"), "vdi": ("vdi", "VdiImage"), "vpc": ("vhd", "VhdImage"), "vmdk": ("vmdk", "VmdkImage")}
FORMATS = tuple(_OPENERS)


def probe(file: HostFile) -> str | None:
    """Which of these formats the file is in, if any."""
    start = bytearray(512)
    with memoryview(start) as view:
        read_padded(file, 0, [view])
    if start[64:68] == b"\x7f\x10\xda\xbe":
        return "vdi"
    if start[:4] == b"KDMV":
        return "vmdk"
    if start[:8] == b"conectix":
        return "vpc"
    if start[:8] == b"vhdxfile":
        return "vhdx"
    return None


def open_foreign(file: HostFile, fmt: str) -> ForeignImage:
    """Open an image of one of FORMATS. ImageFormatError, UnsupportedFeatureError."""
    module, name = _OPENERS[fmt]
    opener: Callable[[HostFile], ForeignImage] = getattr(import_module(f".{module}", __name__), name)
    try:
        return opener(file)
    except OSError as e:
        raise ImageFormatError(f"{file.path}: not a {fmt} image: {e.strerror}") from None
