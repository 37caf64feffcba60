"""The loop that serves one front end: the next waits on the listening socket until it has gone.

One thread does everything. A request that the disk answers at once never leaves it.

Not here: the socket (`unix_socket`), what messages and requests mean (`session`, `blk`).
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Any

from ..errors import BlockError
from .blk import SERIAL_MAX, Blk
from .protocol import Connection
from .session import Session

MAX_QUEUES = 64
_ACCEPT_AGAIN = 0.1  # seconds until another try, when there are no descriptors left; nobody is served meanwhile
_MESSAGES = 64  # of a front end that sends without end, before its rings have their turn


class Loop:
    """Descriptors and what to do when they are readable."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._soon: list[Callable[[], None]] = []

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._ready[fd] = ready

    def forget(self, fd: int) -> None:
        # Before it is closed: others may hold the same file open, and the kernel would go on reporting it.
        if self._ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def soon(self, work: Callable[[], None]) -> None:
        self._soon.append(work)

    def turn(self) -> None:
        """Wait until something is ready, and do all of it."""
        events = self._epoll.poll(0 if self._soon else -1)
        soon, self._soon = self._soon, []
        for work in soon:
            work()
        for fd, _ in events:
            ready = self._ready.get(fd)
            if ready is not None:  # what came before may have ended it
                ready()

    def close(self) -> None:
        self._epoll.close()


def serve(
    disk: Any, listener: socket.socket, *, stop: int, queues: int = 1, serial: str = "", report: Callable[[str], None]
) -> None:
    """Serve `disk` to one front end after the other until the descriptor `stop` is readable. `report` gets one line a mistake.

    `queues`: what the front end may use at most. `serial`: what the guest reads as the disk's, up to 20 bytes.
    """
    encoded = serial.encode(errors="surrogateescape")
    if not 1 <= queues <= MAX_QUEUES or len(encoded) > SERIAL_MAX:
        raise ValueError(
            f"{queues} queues, expected 1 to {MAX_QUEUES}; a serial number of {len(encoded)} bytes, at most {SERIAL_MAX}"
        )
    listener.setblocking(False)
    loop = Loop()
    try:
        stopped: list[bool] = []
        loop.watch(stop, lambda: stopped.append(True))
        waiting: list[socket.socket] = []

        def come() -> None:
            try:
                waiting.append(listener.accept()[0])
            except (BlockingIOError, ConnectionError):
                pass
            except OSError:
                time.sleep(_ACCEPT_AGAIN)

        while not stopped:
            loop.watch(listener.fileno(), come)
            while not (waiting or stopped):
                loop.turn()
            loop.forget(listener.fileno())
            if waiting:
                sock = waiting.pop()
                try:
                    device = Blk(disk, queues=queues, serial=encoded)
                except (BlockError, OSError) as e:
                    report(f"a front end is turned away: {e}")
                    sock.close()
                    continue
                _serve_one(loop, sock, device, stopped, report)
    finally:
        loop.close()


def _serve_one(loop: Loop, sock: socket.socket, device: Blk, stopped: list[bool], report: Callable[[str], None]) -> None:
    connection = Connection(sock)
    gone: list[bool] = []
    session = Session(connection, device, loop, report)

    def arrived() -> None:
        try:
            for _ in range(_MESSAGES):
                message = connection.receive()
                if message is None:
                    return
                session.handle(message)
        except EOFError:
            gone.append(True)
        except (BlockError, OSError) as e:
            report(f"the front end is left: {e}")
            gone.append(True)

    fd = sock.fileno()
    try:
        loop.watch(fd, arrived)
        while not (gone or stopped):
            loop.turn()
    finally:
        loop.forget(fd)
        session.close()
