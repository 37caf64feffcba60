"""The three standard descriptors, whatever the caller left of them."""

from __future__ import annotations

import os


def ensure_standard_descriptors() -> None:
    """Open /dev/null at those of 0, 1 and 2 that are closed.

    Call it before anything else opens a file: every message for standard error would go into a disk image that got number 2.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number, which is this one


def say(fd: int, text: str) -> None:
    """Write `text` to the descriptor as far as somebody reads it."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return  # a pipe without a reader, a full disk: there is nobody left to tell
