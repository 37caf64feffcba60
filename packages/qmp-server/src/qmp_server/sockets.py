"""Listening sockets, made without an event loop, so that a program can open its doors before it imports one.

A unix socket file is replaced only when nobody listens on it, has mode 0600 before anybody can connect, and is removed at the
end if it is still ours.

Not here: accepting (`server`), and StratoVirt's option syntax.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK_TRIES = 20
_LOCK_PAUSE = 0.025  # seconds: half a second in all, far longer than a bind takes


class Listener:
    """A listening socket, and the file that goes with it. Usable as a context manager."""

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        """Take over a socket that listens already. `path` is its file, if it is a unix socket with one."""
        sock.setblocking(False)
        self.socket = sock
        self.path = path
        self._file = _identity(path) if path else None

    def close(self) -> None:
        """Close the socket and remove its file, unless somebody else has put another one there. Harmless twice."""
        path, self.path = self.path, None
        if path and self._file and _identity(path) == self._file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - pathlib costs a start 5 ms
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen_unix(path: str | os.PathLike[str], *, backlog: int = 128) -> Listener:
    """Listen on a unix socket at `path`.

    Raises OSError: EADDRINUSE when a process listens there, EEXIST when a file is there that is no socket, ENAMETOOLONG, and
    what the file system reports.
    """
    path = os.fspath(path)
    # The working directory may change before the file is removed. A socket's address has no room for all of it.
    whole = os.path.abspath(path)  # noqa: PTH100 - as above
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone(whole):
            try:
                _bind(sock, path)
            except FileExistsError:
                _remove_stale(path)
                _bind(sock, path)
            os.chmod(path, 0o600)  # noqa: PTH101  # connecting is not possible before listen(), so nobody gets in between
            sock.listen(backlog)  # from here on the next one in line finds it alive
    except BaseException:
        sock.close()
        raise
    return Listener(sock, whole)


def listen_tcp(host: str, port: int, *, backlog: int = 128) -> Listener:
    """Listen on a TCP port of a literal IPv4 or IPv6 address; port 0 picks a free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return Listener(sock)


def _bind(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FileExistsError(errno.EEXIST, "the file exists", path) from None
        if error.errno is None:  # CPython's own check of the length has no number
            raise OSError(errno.ENAMETOOLONG, "the path is too long for a unix socket", path) from None
        raise OSError(error.errno, error.strerror, path) from None


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Lock the directory of `path` if possible: a socket that is bound and does not listen yet looks as stale as a dead one.

    Not every file system has locks, and anybody who may read a directory can keep it locked: that must not stop a start.
    """
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    except OSError:  # one that may not be read, which is no reason not to bind there; bind() reports the rest
        yield
        return
    try:
        _lock(directory)
        yield
    finally:
        os.close(directory)


def _lock(directory: int) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE)
        except OSError:
            return
        else:
            return


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "the file is not a socket", path)
        if _somebody_listens(path):
            raise OSError(errno.EADDRINUSE, "another process listens there", path)
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        pass  # it went away by itself


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its backlog is full
            return True
    return True


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
