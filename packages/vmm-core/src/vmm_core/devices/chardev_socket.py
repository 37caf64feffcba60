"""A character device served on a listening socket, unix or TCP: one peer at a time, any number of times.

While a peer is connected nobody else is accepted; further ones wait in the backlog. Without a peer output is dropped. What a
peer sent before it left is still read, unless the guest has not read it by the time the next one comes.
Source: reference usb-display-misc, section 17. Not here: sockets that this side connects (vhost-user).
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from vmm_core.devices.chardev import CharFrontend, Report, Stream
from vmm_core.errors import ChardevError
from vmm_core.loop import READ, Loop

RETRY = 1_000_000_000  # nanoseconds to wait with accepting when the process has no descriptor left


class SocketBackend:
    """The server. Made by listen_unix() or listen_tcp()."""

    def __init__(self, listener: socket.socket, name: str, report: Report, path: str | None = None) -> None:
        """Take over `listener`, which listens and is non-blocking; `path` is removed at the end if it is still this socket's."""
        self.name = name
        self._listener = listener
        self._report = report
        self._path = path
        self._inode = os.lstat(path).st_ino if path is not None else 0
        self._loop: Loop | None = None
        self._frontend: CharFrontend | None = None
        self._peer: socket.socket | None = None
        self._stream: Stream | None = None
        self._listening = False
        self._closed = False

    @property
    def address(self) -> object:
        """Where it listens, as socket.getsockname() says it."""
        return self._listener.getsockname()

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Begin to accept."""
        self._loop, self._frontend = loop, frontend
        loop.run(self._listen)

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output (`CharBackend`); dropped while there is no peer."""
        return len(data) if self._stream is None else self._stream.write(data)

    def input_wanted(self) -> None:
        """There is room again (`CharBackend`)."""
        if (stream := self._stream) is not None:
            stream.input_wanted()

    def close(self) -> None:
        """Hang up, stop listening, remove the path. Twice is fine."""
        if self._closed:
            return
        if self._loop is not None:
            self._loop.run(self._stop)
        self._closed = True
        self._listener.close()
        if self._path is not None:
            with suppress(OSError):
                if os.lstat(self._path).st_ino == self._inode:
                    os.unlink(self._path)  # noqa: PTH108 - pathlib costs 5 ms at start

    def _listen(self, wanted: bool = True) -> None:
        if self._loop is None or self._closed or wanted == self._listening:
            return
        self._listening = wanted
        if wanted:
            self._loop.add_fd(self._listener.fileno(), READ, self._accept)
        else:
            self._loop.remove_fd(self._listener.fileno())

    def _accept(self, mask: int) -> None:
        assert self._loop is not None
        assert self._frontend is not None
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the connection stays in the backlog and would be reported without end.
            self._report(f"{self.name}: cannot accept: {error.strerror}")
            self._listen(False)
            self._loop.call_later(RETRY, self._listen, host=True)
            return
        self._listen(False)
        self._hang_up()
        peer.setblocking(False)
        if peer.family != socket.AF_UNIX:
            with suppress(OSError):  # for key strokes; a peer that is gone already is found out by reading
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._stream = Stream(self._loop, self._frontend, peer.fileno(), peer.fileno(), self._ended)
        self._frontend.peer_changed(True)

    def _ended(self, reading: bool, error: OSError | None) -> None:
        if reading:
            self._hang_up()
        if self._frontend is not None:
            self._frontend.output_ready()  # what waited for the peer is dropped with it
        self._listen()

    def _hang_up(self) -> None:
        stream, self._stream = self._stream, None
        peer, self._peer = self._peer, None
        if stream is not None:
            stream.close()
        if peer is not None:
            peer.close()
            if self._frontend is not None:
                self._frontend.peer_changed(False)

    def _stop(self) -> None:
        self._frontend = None
        self._hang_up()
        self._listen(False)
        self._closed = True


def listen_unix(path: str, report: Report) -> SocketBackend:
    """Serve on a unix socket at `path`, mode 0600; a socket left there by someone dead is replaced. Raises ChardevError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ChardevError(f"{path} is there already and is not a socket")
            if _is_served(path):
                raise ChardevError(f"{path} is in use: somebody listens on it")
            os.unlink(path)  # noqa: PTH108 - pathlib costs 5 ms at start
        os.fchmod(listener.fileno(), 0o600)  # Linux takes the mode of the socket for the file that bind() makes
        listener.bind(path)
        listener.listen(16)
        listener.setblocking(False)
        return SocketBackend(listener, path, report, path)
    except OSError as error:
        listener.close()
        raise ChardevError(f"cannot listen on {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise


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


def listen_tcp(host: str, port: int, report: Report) -> SocketBackend:
    """Serve on TCP; `host` is an IPv4 or IPv6 address in digits. Raises ChardevError."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(16)
        listener.setblocking(False)
        return SocketBackend(listener, name, report)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ChardevError(f"cannot listen on {name}: {getattr(error, 'strerror', None) or error}") from None
