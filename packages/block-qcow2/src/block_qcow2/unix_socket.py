"""The unix sockets that clients of an exported image come to."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import BlockError


@contextmanager
def listening(path: str, *, backlog: int = 1) -> Iterator[socket.socket]:
    """A listener on a unix socket for this user only; the socket goes with it. BlockError if somebody listens there already."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        except OSError as e:
            raise BlockError(f"{path}: {e.strerror or e}") from e
        finally:
            os.umask(mask)
        try:
            listener.listen(backlog)
            yield listener
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
    finally:
        listener.close()


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except OSError as e:
        if e.errno == errno.ECONNREFUSED:
            os.unlink(path)  # noqa: PTH108
