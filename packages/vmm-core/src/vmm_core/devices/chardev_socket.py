"""A character device on a socket, unix or TCP: one peer at a time, any number of times, whoever of the two connects.

Without a peer output is dropped. What a peer sent before it left is still read, unless the guest has not read it by the time
the next one comes. Here is the side that listens: while a peer is connected nobody else is accepted, further ones wait in the
backlog. The side that connects is `chardev_client`.

Source: reference usb-display-misc, section 17. Not here: vhost-user, whose back ends connect by themselves.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from contextlib import suppress

from vmm_core.devices.chardev import RETRY, CharFrontend, Report, Stream
from vmm_core.errors import ChardevError
from vmm_core.loop import READ, Loop


class SocketBackend:
    """What both sides share: the peer, while there is one. Subclasses find peers."""

    def __init__(self, name: str, report: Report) -> None:
        """`name` says where the socket is, for people."""
        self.name = name
        self._report = report
        self._loop: Loop | None = None
        self._frontend: CharFrontend | None = None
        self._peer: socket.socket | None = None
        self._stream: Stream | None = None
        self._closed = False

    def start(self, loop: Loop, frontend: CharFrontend) -> None:
        """Begin to look for peers."""
        self._loop, self._frontend = loop, frontend
        loop.run(self._begin)

    def write(self, data: bytes | memoryview) -> int:
        """Hand over output (`CharBackend`); dropped while there is no peer."""
        stream = self._stream
        return len(data) if stream is None else stream.write(data)

    def input_wanted(self) -> None:
        """There is room again (`CharBackend`)."""
        if (stream := self._stream) is not None:
            stream.input_wanted()

    def close(self) -> None:
        """Hang up, and look for peers no more. Twice is fine."""
        if self._closed:
            return
        if self._loop is not None:
            self._loop.run(self._stop)
        self._closed = True
        self._give_back()

    # For subclasses, on the loop

    def _begin(self) -> None:
        """Look for the first peer."""
        raise NotImplementedError

    def _seek(self) -> None:
        """Look for the next peer: the last one is gone, or nearly. May be called again while looking."""
        raise NotImplementedError

    def _rest(self) -> None:
        """Look for peers no more."""
        raise NotImplementedError

    def _give_back(self) -> None:
        """Close what is there without a peer. On the closing thread."""

    def _adopt(self, peer: socket.socket) -> None:
        """Serve `peer`, connected and non-blocking, instead of the last one."""
        assert self._loop is not None
        assert self._frontend is not None
        replaces = self._stream is not None
        self._hang_up()
        if peer.family != socket.AF_UNIX:
            with suppress(OSError):  # for key strokes; a peer that is gone already is found out by reading
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._stream = Stream(self._loop, self._frontend, peer.fileno(), peer.fileno(), self._ended, self._seek)
        self._frontend.peer_changed(True)
        if replaces:
            self._frontend.output_ready()  # what waited for the last one, which will not say any more that it takes bytes

    def _ended(self, reading: bool, error: OSError | None) -> None:
        if reading:
            self._hang_up()
        if self._frontend is not None:
            self._frontend.output_ready()  # what waited for the peer is dropped with it
        self._seek()

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
        self._rest()
        self._closed = True


class SocketListener(SocketBackend):
    """The side that listens. Made by listen_unix() or listen_tcp()."""

    def __init__(self, listener: socket.socket, name: str, report: Report, path: str | None = None) -> None:
        """Take over `listener`, which listens and is non-blocking; `path` is removed at the end if it is still this socket's."""
        super().__init__(name, report)
        self._listener = listener
        self._path = path
        self._inode = os.lstat(path).st_ino if path is not None else 0
        self._first: socket.socket | None = None  # who came before start()
        self._listening = False

    @property
    def address(self) -> object:
        """Where it listens, as socket.getsockname() says it."""
        return self._listener.getsockname()

    def wait(self, interrupted: int) -> bool:
        """Wait for the first peer, before start(). False when the descriptor `interrupted` became readable before that.

        Raises ChardevError.
        """
        watch = select.poll()
        watch.register(self._listener, select.POLLIN)
        watch.register(interrupted, select.POLLIN)
        while self._first is None:
            if any(fd == interrupted for fd, _ in watch.poll()):
                return False
            try:
                self._first, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue  # who knocked is gone already
            except OSError as error:
                raise ChardevError(f"{self.name}: cannot accept: {error.strerror}") from None
        self._first.setblocking(False)
        return True

    def _begin(self) -> None:
        first, self._first = self._first, None
        if first is None:
            self._seek()
        else:
            self._adopt(first)

    def _seek(self) -> None:
        if self._loop is not None and not self._closed and not self._listening:
            try:
                self._loop.add_fd(self._listener.fileno(), READ, self._accept)
            except OSError as error:  # the user's limit of watches is reached, or memory is short
                self._seek_later("listen", error)
            else:
                self._listening = True

    def _seek_later(self, what: str, error: OSError) -> None:
        assert self._loop is not None
        self._report(f"{self.name}: cannot {what}: {error.strerror}")
        self._loop.call_later(RETRY, self._seek, host=True)

    def _rest(self) -> None:
        if self._listening and self._loop is not None:
            self._listening = False
            self._loop.remove_fd(self._listener.fileno())

    def _accept(self, mask: int) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory: the connection stays in the backlog and would be reported without end.
            self._rest()
            self._seek_later("accept", error)
            return
        self._rest()
        peer.setblocking(False)
        self._adopt(peer)

    def _give_back(self) -> None:
        self._listener.close()
        if self._first is not None:
            self._first.close()
        if self._path is not None:
            with suppress(OSError):
                if os.lstat(self._path).st_ino == self._inode:
                    os.unlink(self._path)  # noqa: PTH108 - pathlib costs 5 ms at start


def listen_unix(path: str, report: Report) -> SocketListener:
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
        return SocketListener(listener, path, report, path)
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


def address_name(host: str, port: int) -> str:
    """Return a TCP address the way people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_tcp(host: str, port: int, report: Report) -> SocketListener:
    """Serve on TCP; `host` is an IPv4 or IPv6 address in digits. Raises ChardevError."""
    name = address_name(host, port)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(16)
        listener.setblocking(False)
        return SocketListener(listener, name, report)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ChardevError(f"cannot listen on {name}: {getattr(error, 'strerror', None) or error}") from None
