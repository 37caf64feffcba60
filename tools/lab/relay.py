"""The lab's end of a forwarded socket: joins a virtio-serial port to a unix socket in the lab, one client at a time.

Runs in the lab as `python relay.py PORT SOCKET`. The other end of the port is a unix socket of QEMU outside.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time

_CHUNK = 4096
_PAUSE = 0.1  # seconds between two looks for a client, or for the socket of a program that is still starting


def main(port_path: str, socket_path: str) -> None:
    """Serve client after client, until killed."""
    port = os.open(port_path, os.O_RDWR | os.O_NONBLOCK)
    while True:
        while not _client(port):
            time.sleep(_PAUSE)
        with socket.socket(socket.AF_UNIX) as connection:
            while _client(port):
                with contextlib.suppress(OSError):
                    connection.connect(socket_path)
                    _pump(port, connection)
                    break
                time.sleep(_PAUSE)
        _drain(port)
        while _client(port):  # its program is gone; it has to hang up itself, which the end of the lab does for it
            time.sleep(_PAUSE)


def _client(port: int) -> bool:
    """Whether somebody is connected to the other end (a port without a peer is hung up)."""
    poll = select.poll()
    poll.register(port, 0)
    return not poll.poll(0)


def _pump(port: int, connection: socket.socket) -> None:
    """Copy both ways until one side has gone."""
    poll = select.poll()
    poll.register(port, select.POLLIN)
    poll.register(connection, select.POLLIN)
    while True:
        events = dict(poll.poll())
        if port in events:
            data = _read(port) if events[port] & select.POLLIN else b""
            if data:
                connection.sendall(data)
            elif events[port] & select.POLLHUP:
                return
        if connection.fileno() in events:
            data = connection.recv(_CHUNK)
            if not data:
                return
            _write(port, data)


def _read(port: int) -> bytes:
    try:
        return os.read(port, _CHUNK)
    except BlockingIOError:
        return b""


def _write(port: int, data: bytes) -> None:
    poll = select.poll()
    poll.register(port, select.POLLOUT)
    while data:
        if poll.poll()[0][1] & select.POLLHUP:
            return
        with contextlib.suppress(BlockingIOError):
            data = data[os.write(port, data) :]


def _drain(port: int) -> None:
    """Forget what a client sent that nobody took: the next client is another one."""
    while _read(port):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
