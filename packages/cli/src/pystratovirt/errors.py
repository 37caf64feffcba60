"""Why a start ends before a guest runs. Every message is one line that names the option and the reason; the status is 1."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmm_core.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Iterator


class StartError(Exception):
    """What was asked for cannot be started."""


class VmError(StartError):
    """A virtual machine, or a part of it, that cannot be built as asked."""


@contextlib.contextmanager
def blame(option: str) -> Iterator[None]:
    """Say which option a failure of the parts (VmmError, OSError) comes from. Raises VmError."""
    try:
        yield
    except (VmmError, OSError) as error:
        raise VmError(f"{option}: {error}" if option else str(error)) from None
