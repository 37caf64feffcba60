"""A character device on a socket that this side connects, unix or TCP.

Without `reconnect` the peer has to be there at the start, and when it hangs up that is the end. With it the peer is looked for
again and again, from the start on and whenever it has left.

Not here: the side that listens, and what both share (`chardev_socket`).
"""

from __future__ import annotations

import errno
import os
import socket

from vmm_core.devices.chardev import Report
from vmm_core.devices.chardev_socket import SocketBackend, address_name
from vmm_core.errors import ChardevError
from vmm_core.loop import WRITE, Timer

PATIENCE = 10.0  # seconds that a start waits for a peer that it cannot do without
_SECOND = 1_000_000_000  # nanoseconds


class SocketClient(SocketBackend):
    """The side that connects. Made by connect_unix() or connect_tcp()."""

    def __init__(self, family: int, address: str | tuple[str, int], name: str, report: Report, reconnect: int = 0) -> None:
        """Connect to `address`; after `reconnect` seconds try again, if that is not 0. Raises ChardevError when it is."""
        super().__init__(name, report)
        self._family, self._address, self._reconnect = family, address, reconnect
        self._trying: socket.socket | None = None  # its connection is under way, or waits for start()
        self._timer: Timer | None = None
        self._failing = False
        if not reconnect:
            self._trying = sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(PATIENCE)
                sock.connect(address)
                sock.setblocking(False)
            except OSError as error:
                sock.close()
                raise ChardevError(f"cannot connect to {name}: {error.strerror or error}") from None

    def _begin(self) -> None:
        if self._trying is None:
            self._connect()
        else:
            self._connected()

    def _seek(self) -> None:
        if self._closed or self._loop is None or self._timer is not None or self._trying is not None:
            return
        if not self._reconnect:
            self._report(f"{self.name}: the peer has left")
            return
        self._timer = self._loop.call_later(self._reconnect * _SECOND, self._connect, host=True)

    def _connect(self) -> None:
        self._timer = None
        if self._closed or self._loop is None:
            return
        try:
            self._trying = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            status = self._trying.connect_ex(self._address)
            if status == errno.EINPROGRESS:
                self._loop.add_fd(self._trying.fileno(), WRITE, self._progress)
                return
        except OSError as error:  # no descriptor or no watch left, or an address that cannot be one
            status = error.errno or errno.EINVAL
        if status:
            self._failed(status)
        else:
            self._connected()

    def _progress(self, mask: int) -> None:
        assert self._loop is not None
        assert self._trying is not None
        self._loop.remove_fd(self._trying.fileno())
        status = self._trying.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            self._failed(status)
        else:
            self._connected()

    def _connected(self) -> None:
        peer, self._trying = self._trying, None
        self._failing = False
        if peer is not None:
            self._adopt(peer)

    def _failed(self, status: int) -> None:
        if self._trying is not None:
            self._trying.close()
            self._trying = None
        if not self._failing:
            self._failing = True
            every = f"{self._reconnect} second{'s' if self._reconnect > 1 else ''}"
            self._report(f"{self.name}: cannot connect: {os.strerror(status)}; trying again every {every}")
        self._seek()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._trying is not None and self._loop is not None:
            self._loop.remove_fd(self._trying.fileno())

    def _give_back(self) -> None:
        if self._trying is not None:
            self._trying.close()
            self._trying = None


def connect_unix(path: str, report: Report, reconnect: int = 0) -> SocketClient:
    """Connect to the unix socket at `path` (`SocketClient`). Raises ChardevError."""
    return SocketClient(socket.AF_UNIX, path, path, report, reconnect)


def connect_tcp(host: str, port: int, report: Report, reconnect: int = 0) -> SocketClient:
    """Connect to a TCP port of `host`, an IPv4 or IPv6 address in digits (`SocketClient`). Raises ChardevError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return SocketClient(family, (host, port), address_name(host, port), report, reconnect)
