"""The host's side of the user-space socket device: unix sockets at PATH and PATH_PORT.

Who wants to reach a port of the guest connects to PATH and sends `CONNECT PORT` and a newline; the answer is `OK PORT` and a
newline, with the port that the host's end got, or the end of the stream. What the guest connects to, port P of the host, is
whoever listens at PATH_P. This is the convention that Firecracker's documentation (docs/vsock.md) made common.

Not here: packets, and the connections that come out of this (`stream`).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress

from virtio_devices.device import DeviceError
from vmm_core.loop import READ, Loop, Timer

PATH_MAX = 107 - len("_4294967295")  # unix(7), and room for the port

_BACKLOG = 128
_LINE_MAX = len("CONNECT 4294967295\n")
_HANDSHAKE_LIMIT = 10_000_000_000  # ns; a client that says nothing holds a descriptor
_HANDSHAKES_MAX = 128  # that have not said where to; more wait in the backlog
_RETRY = 1_000_000_000  # ns to wait with accepting when there is no descriptor left


class _Client:
    """Somebody who has not said yet which port of the guest he wants."""

    def __init__(self, owner: Listener, peer: socket.socket) -> None:
        self.socket = peer
        self.timer: Timer | None = None
        self._owner = owner
        self._line = b""

    def heard(self, mask: int) -> None:
        """Read as far as the end of the line, and not beyond: what follows is the guest's."""
        try:
            seen = self.socket.recv(_LINE_MAX - len(self._line), socket.MSG_PEEK)
            taken = self.socket.recv(seen.find(b"\n") + 1 or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            taken = b""
        self._line += taken
        if self._line.endswith(b"\n"):
            self._owner.asked(self, _port(self._line))
        elif not taken or len(self._line) >= _LINE_MAX:
            self._owner.asked(self, None)


class Listener:
    """The socket at PATH. Clients that have said which port they want go to `connected`, with a non-blocking socket."""

    def __init__(
        self, name: str, path: str, connected: Callable[[socket.socket, int], None], report: Callable[[str], None] | None
    ) -> None:
        """Listen at `path`, mode 0600; a socket left there by someone dead is replaced. Raises DeviceError."""
        self.path = path
        self._name = name
        self._connected = connected
        self._report = report
        self._loop: Loop | None = None
        self._waiting: set[_Client] = set()
        self._retry: Timer | None = None
        self._socket = _listen(name, path)
        self._inode = os.lstat(path).st_ino

    def start(self, loop: Loop) -> None:
        """Accept from here on, or again. On the loop."""
        if self._loop is None and self._socket.fileno() >= 0:
            self._loop = loop
            self._open()
            for client in list(self._waiting):
                self._hear(client)

    def _open(self) -> None:
        """Watch who comes; where the host has no room for a watch, later."""
        self._retry = None
        if self._loop is None:
            return
        try:
            self._loop.add_fd(self._socket.fileno(), 0, self._accept)
        except OSError:
            self._retry = self._loop.call_later(_RETRY, self._open, host=True)
        else:
            self._accept_if_room()

    def _hear(self, client: _Client) -> None:
        assert self._loop is not None
        try:
            self._loop.add_fd(client.socket.fileno(), READ, client.heard)
        except OSError:  # better hung up on than never heard
            self.asked(client, None)

    def stop(self) -> None:
        """Leave everybody waiting. On the loop."""
        if self._loop is not None:
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self._loop.remove_fd(self._socket.fileno())
            for client in self._waiting:
                self._loop.remove_fd(client.socket.fileno())
            self._loop = None

    def close(self) -> None:
        """Hang up on everybody and remove the path, if it is still this socket's. On the loop; twice is fine."""
        if self._socket.fileno() < 0:
            return
        self.stop()
        for client in list(self._waiting):
            self._forget(client)
            client.socket.close()
        self._socket.close()
        with suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)  # noqa: PTH108 - pathlib costs 5 ms at start

    def asked(self, client: _Client, port: int | None) -> None:
        """A client has said where to; or will not, with None."""
        self._forget(client)
        if port is None:
            client.socket.close()
        else:
            self._connected(client.socket, port)

    def _accept(self, mask: int) -> None:
        loop = self._loop
        assert loop is not None
        try:
            peer, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the connection stays in the backlog and would be reported without end.
            if self._report:
                self._report(f"{self._name}: {self.path}: cannot accept: {error.strerror}")
            loop.modify_fd(self._socket.fileno(), 0)
            self._retry = loop.call_later(_RETRY, self._accept_again, host=True)
            return
        peer.setblocking(False)
        client = _Client(self, peer)
        client.timer = loop.call_later(_HANDSHAKE_LIMIT, lambda: self._give_up(client), host=True)
        self._waiting.add(client)
        self._hear(client)
        self._accept_if_room()

    def _accept_again(self) -> None:
        self._retry = None
        self._accept_if_room()

    def _accept_if_room(self) -> None:
        if self._loop is not None and self._retry is None:
            self._loop.modify_fd(self._socket.fileno(), READ if len(self._waiting) < _HANDSHAKES_MAX else 0)

    def _give_up(self, client: _Client) -> None:
        if client in self._waiting:
            self.asked(client, None)

    def _forget(self, client: _Client) -> None:
        self._waiting.discard(client)
        if client.timer is not None:
            client.timer.cancel()
        if self._loop is not None:
            self._loop.remove_fd(client.socket.fileno())
            self._accept_if_room()


def connect(path: str, port: int) -> socket.socket | None:
    """Connect to who serves host port `port`; None when nobody does, or either side cannot take one more right now."""
    try:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError:  # no descriptor left
        return None
    try:
        client.connect(f"{path}_{port}")
    except OSError:
        client.close()
        return None
    return client


def _port(line: bytes) -> int | None:
    """Return the port of `CONNECT PORT` and a newline; None for anything else."""
    word, _, number = line.rstrip(b"\n").partition(b" ")
    if word != b"CONNECT" or not line.endswith(b"\n") or not number.isdigit() or not number.isascii():
        return None
    port = int(number)
    return port if port <= 0xFFFF_FFFF else None


def _listen(name: str, path: str) -> socket.socket:
    if len(os.fsencode(path)) > PATH_MAX:
        raise DeviceError(f"{name}: path {path} has more than {PATH_MAX} bytes")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise DeviceError(f"{name}: {path} is there already and is not a socket")
            if _is_served(path):
                raise DeviceError(f"{name}: {path} is in use: somebody listens on it")
            os.unlink(path)  # noqa: PTH108 - pathlib costs 5 ms at start
        os.fchmod(listener.fileno(), 0o600)  # Linux takes the mode of the socket for the file that bind() makes
        listener.bind(path)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise DeviceError(f"{name}: cannot listen on {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # so busy that its backlog is full
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True
