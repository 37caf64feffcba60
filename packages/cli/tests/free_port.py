"""A TCP port for a server that a test starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1. Servers that reuse addresses, as ours do, can listen on it; the kernel gives it to nobody.

    A port that was only free a moment ago can be another's by the time at which a server is there: of a test that runs beside
    this one, and of any connection that is made meanwhile.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
