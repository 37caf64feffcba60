"""Why a start ends before a guest runs. Every message is one line that names the option and the reason; the status is 1."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from vmm_core.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator


class StartError(Exception):
    """What was asked for cannot be started."""


class VmError(StartError):
    """A virtual machine, or a part of it, that cannot be built as asked."""


_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def shortage(error: BaseException) -> str:
    """Return what this process or its host has no more of, in the system's words, when `error` comes from that; else nothing.

    It can come from anywhere, also from the import of a module, and is no bug of ours.
    """
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _SCARCE else ""
    if isinstance(error, ImportError):  # of a compiled module: the dynamic loader has words and no number
        return next((words for words in map(os.strerror, _SCARCE) if words in str(error)), "")
    return ""


@contextlib.contextmanager
def blame(option: str) -> Iterator[None]:
    """Say which option a failure of the parts (VmmError, OSError, `shortage`) comes from. Raises VmError."""
    try:
        yield
    except (VmmError, OSError, ImportError) as error:
        if why := shortage(error):  # where it was noticed first says nothing: often a module of ours that could not be read
            raise VmError(f"{option or 'out of resources'}: {why}") from None
        if isinstance(error, ImportError):
            raise
        raise VmError(f"{option}: {error}" if option else str(error)) from None
