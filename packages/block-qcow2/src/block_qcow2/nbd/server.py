"""An NBD server for one disk: anyio (extra `serve`) accepts clients; each has a thread (`connection`) and a channel of its own.

A client that waits for each answer gets it with three system calls: an event loop's turn would take longer than all of them.

Not here: what a thread does for its client, and the wire format (`protocol`).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio

from .. import unix_socket
from . import protocol as p
from .budget import Budget
from .connection import Connection

_BACKLOG = 128  # clients that have come and are not accepted yet
_ACCEPT_AGAIN = 0.1  # seconds until another try, when there are no descriptors left
# A client whose machine or network has gone says nothing: after two minutes without any answer its place is free.
_TCP = ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))

Status = Callable[[int, int, int], list[tuple[int, int]]]


def tls_context(folder: str, *, verify_peer: bool = True) -> ssl.SSLContext:
    """TLS for a server from the files of a folder, which are named as QEMU's tls-creds-x509 wants them: server-cert.pem,
    server-key.pem, and to check clients (`verify_peer`) ca-cert.pem, perhaps ca-crl.pem. Raises OSError, ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    at = Path(folder)
    context.load_cert_chain(at / "server-cert.pem", at / "server-key.pem")
    if verify_peer:
        context.load_verify_locations(at / "ca-cert.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        if (at / "ca-crl.pem").exists():
            context.load_verify_locations(at / "ca-crl.pem")
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


class Export:
    """What is served. `status` tells for each context (offset, length, limit) -> (length, state) extents of a range, as many as
    the limit says at most; it may block, so it runs on a thread. With `tls` nobody gets anything without encryption.
    """

    def __init__(
        self,
        disk: Any,
        status: dict[bytes, Status],
        *,
        name: str = "",
        trim: bool = False,
        connections: int = 16,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.disk = disk
        self.contexts = list(status)
        self.status = list(status.values())
        self.tls = tls
        self.name = name
        self.connections = connections
        self.budget = Budget(connections)
        self.flags = p.HAS_FLAGS | p.CAN_MULTI_CONN | p.SEND_DF
        if disk.read_only:
            self.flags |= p.READ_ONLY
        else:
            self.flags |= p.SEND_FLUSH | p.SEND_FUA | p.SEND_WRITE_ZEROES | (p.SEND_TRIM if trim else 0)
        self.served = 0

    def handshake(self) -> p.Handshake:
        block = (1, 65536, p.MAX_PAYLOAD)
        return p.Handshake(self.name, self.disk.size, self.flags, block, contexts=self.contexts, tls=self.tls is not None)


@asynccontextmanager
async def listening(*, path: str | None = None, host: str = "localhost", port: int = 10809) -> AsyncIterator[list[socket.socket]]:
    """Listeners on a unix socket, which goes with it, or on TCP. OSError or BlockError if the address is taken."""
    if path is not None:
        with unix_socket.listening(path, backlog=_BACKLOG) as unix:
            unix.setblocking(False)
            yield [unix]
        return
    async with await anyio.create_tcp_listener(local_host=host, local_port=port) as tcp:
        yield [each.extra(anyio.abc.SocketAttribute.raw_socket) for each in tcp.listeners]


async def serve(listeners: Sequence[socket.socket], export: Export) -> None:
    """Serve until cancelled; then every client is cut off. A connection that breaks the protocol ends alone."""
    limiter = anyio.CapacityLimiter(export.connections)
    async with anyio.create_task_group() as group:

        async def accept(sock: socket.socket) -> None:
            while True:
                await anyio.wait_readable(sock)
                try:
                    client, _ = sock.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError:
                    await anyio.sleep(_ACCEPT_AGAIN)
                    continue
                if export.served < export.connections:
                    export.served += 1
                    group.start_soon(_serve_client, client, export, limiter)
                else:
                    client.close()

        for each in listeners:
            group.start_soon(accept, each)


async def _serve_client(client: socket.socket, export: Export, limiter: anyio.CapacityLimiter) -> None:
    # For the end: the thread may be in the middle of anything with a TLS socket, which is not to be touched from here.
    try:
        line = client.dup()
    except OSError:  # no descriptors left
        client.close()
        export.served -= 1
        return
    connection = Connection(client, export)
    with line:
        with suppress(OSError):  # a unix socket has no such options
            for option, value in _TCP:
                client.setsockopt(socket.IPPROTO_TCP, option, value)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

        async def hang_up() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                connection.stopped = True
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)  # most of what the thread may wait for ends at once

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(hang_up)
                try:
                    await anyio.to_thread.run_sync(connection.run, limiter=limiter)
                except RuntimeError:
                    if connection.began:
                        raise
                    # The system has no room for another thread; the client has to try again.
                group.cancel_scope.cancel()
        finally:
            client.close()  # whose thread has ended, or never began
            export.served -= 1
