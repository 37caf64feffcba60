"""Other processes' sides of devices, for tests of what a driver can do to this one: they answer what they must, and do nothing.

Not here: back ends that serve requests (those of virtio-devices' tests).
"""

from __future__ import annotations

import os
import socket
import threading
from array import array
from struct import pack, unpack
from typing import TYPE_CHECKING, cast

from virtio_devices.net.vhost import VhostBackend
from virtio_devices.vhost_kernel import VhostKernel

if TYPE_CHECKING:
    from virtio_devices.net.tap import TapBackend

_F_VERSION_1, _F_PROTOCOL_FEATURES = 1 << 32, 1 << 30
_MQ, _REPLY_ACK, _CONFIG = 1 << 0, 1 << 3, 1 << 9
_GET_VRING_BASE, _GET_CONFIG = 11, 24
_ANSWERS = {1: _F_VERSION_1 | _F_PROTOCOL_FEATURES | 3 << 28, 15: _MQ | _REPLY_ACK | _CONFIG, 17: 4}  # by GET_* request


class DeafBackEnd:
    """A vhost-user back end that takes every queue and serves none, for one front end. Close it after that one."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept(), if nobody ever came
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self.answer(connection)

    @classmethod
    def answer(cls, connection: socket.socket) -> None:
        """Answer a front end until it hangs up."""
        with connection:
            while header := cls._receive(connection, 12):
                request, flags, size = unpack("=III", header)
                payload = cls._receive(connection, size) if size else b""
                if request in _ANSWERS:
                    answer = pack("=Q", _ANSWERS[request])
                elif request in (_GET_VRING_BASE, _GET_CONFIG):
                    answer = payload
                elif flags & 8:  # a reply is wanted: it went well
                    answer = bytes(8)
                else:
                    continue
                connection.sendall(pack("=III", request, 5, len(answer)) + answer)

    @staticmethod
    def _receive(connection: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part, ancillary, _, _ = connection.recvmsg(count - len(data), socket.CMSG_SPACE(4 * 32))
            for _, _, content in ancillary:
                for fd in array("i", content):
                    os.close(fd)
            if not part:
                return b""
            data += part
        return data


def serve_all(path: str) -> None:
    """Be a back end for any number of front ends, until the process is ended. Says when it listens."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            threading.Thread(target=DeafBackEnd.answer, args=(listener.accept()[0],), daemon=True).start()


def deaf_kernel(fd: int, number: int, data: bytearray) -> int:
    """Stands in for the ioctls of vhost devices: the kernel that takes every queue and serves none."""
    if number & 0xFF == 0 and number >> 31:  # VHOST_GET_FEATURES
        data[:] = pack("=Q", _F_VERSION_1 | 3 << 28)
    return 0


class DeafTap:
    """Stands in for a tap that the kernel serves, so that nobody here reads or writes it."""

    features = 0
    pairs = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC)]

    def alive(self) -> bool:
        return True

    def set_offloads(self, features: int) -> None:
        """Nothing to do."""

    def set_pairs(self, count: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def deaf_vhost(name: str, _path: str = "") -> VhostKernel:
    """Stands in for `VhostKernel.open`."""
    return VhostKernel(name, os.eventfd(0, os.EFD_CLOEXEC), ioctl=deaf_kernel)


def deaf_network(name: str) -> VhostBackend:
    """A network that the kernel carries, or would."""
    return VhostBackend(cast("TapBackend", DeafTap(name)), [deaf_vhost(name)])
