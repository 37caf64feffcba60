"""An NBD server for one disk, with anyio (extra `serve`). Each connection has a channel of its own.

A request that the channel finishes inline is answered at once; others when the channel's event descriptor says so. Replies go
out in batches. A connection holds at most 128 requests and 64 MiB; it reads no further before some are answered.

Not here: the wire format (`protocol`).
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import SocketStream
from anyio.streams.tls import TLSStream

from . import protocol as p

_HANDSHAKE_SECONDS = 30
_MAX_REQUESTS = 128
_MAX_BYTES = 64 << 20
_READ = 1 << 18
# How connections end: the client leaves, breaks the protocol, or is cut off.
_GONE = (p.ProtocolError, ssl.SSLError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


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
async def listening(*, path: str | None = None, host: str = "localhost", port: int = 10809) -> AsyncIterator[Any]:
    """A listener on a unix socket, which goes with it, or on TCP. OSError if the address is taken."""
    if path is not None:
        listener: Any = await anyio.create_unix_listener(path, mode=0o600)
        try:
            async with listener:
                yield listener
        finally:
            Path(path).unlink(missing_ok=True)
        return
    async with await anyio.create_tcp_listener(local_host=host, local_port=port) as tcp:
        yield tcp


async def serve(listener: Any, export: Export) -> None:
    """Serve until cancelled. A connection that breaks the protocol ends alone."""

    async def handle(stream: SocketStream) -> None:
        async with stream:
            if export.served >= export.connections:
                return
            export.served += 1
            try:
                with suppress(*_GONE, TimeoutError):
                    await _Connection(stream, export).run()
            finally:
                export.served -= 1

    await listener.serve(handle)


class _Connection:
    def __init__(self, stream: SocketStream, export: Export) -> None:
        self._stream: Any = stream
        self._export = export
        self._input = bytearray()
        self._output: list[bytes | bytearray] = []
        self._held = 0  # bytes of the requests that run
        self._running = 0
        self._structured = False
        self._chosen: list[int] = []
        self._eased = anyio.Event()
        self._sending = anyio.Lock()

    async def run(self) -> None:
        with suppress(OSError, KeyError):
            self._stream.extra_attributes[anyio.abc.SocketAttribute.raw_socket]().setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )
        with anyio.fail_after(_HANDSHAKE_SECONDS):
            await self._handshake()
        channel = self._export.disk.channel()
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._collect, channel)
                with suppress(*_GONE):
                    await self._requests(channel, group)
                group.cancel_scope.cancel()
        finally:
            channel.close()

    async def _handshake(self) -> None:
        handshake = self._export.handshake()
        while not handshake.done:
            if handshake.output:
                await self._stream.send(bytes(handshake.output))
                handshake.output.clear()
            try:
                handshake.feed(await self._stream.receive())
            finally:
                if handshake.output:
                    await self._stream.send(bytes(handshake.output))
                    handshake.output.clear()
            if handshake.start_tls:
                # Without a polite end: clients close the socket, and a reply that is cut off shows in its length.
                self._stream = await TLSStream.wrap(
                    self._stream, server_side=True, ssl_context=self._export.tls, standard_compatible=False
                )
                handshake.secured()
        self._structured = handshake.structured
        self._chosen = handshake.chosen
        self._input += handshake.rest()

    async def _requests(self, channel: Any, group: Any) -> None:
        while True:
            self._take_requests(channel, group)
            channel.submit()
            await self._send()
            while self._running >= _MAX_REQUESTS or self._held > _MAX_BYTES:
                self._eased = anyio.Event()
                await self._eased.wait()
            self._input += await self._stream.receive(_READ)

    def _take_requests(self, channel: Any, group: Any) -> None:
        data, at = self._input, 0
        try:
            while len(data) - at >= p.REQUEST.size and self._running < _MAX_REQUESTS:
                with memoryview(data) as view:
                    request = p.parse_request(view[at:])
                head = at + p.REQUEST.size
                payload = request.length if request.kind == p.CMD_WRITE else 0
                if len(data) - head < payload:
                    return
                at = head + payload
                self._start(channel, request, data[head:at] if payload else b"", group)
        finally:
            del data[:at]

    def _start(self, channel: Any, request: p.Request, payload: bytes | bytearray, group: Any) -> None:
        kind, offset, length = request.kind, request.offset, request.length
        export = self._export
        self._running += 1
        self._held += length if kind in (p.CMD_READ, p.CMD_WRITE) else 0
        buffer: bytearray | None = None
        token: tuple[p.Request, bytearray | None] = (request, None)
        result: int | None
        if kind == p.CMD_DISC:
            raise p.ProtocolError("the client said goodbye")
        if kind == p.CMD_READ and length <= p.MAX_PAYLOAD:
            buffer = bytearray(length)
            token = (request, buffer)
            result = channel.readv(offset, [memoryview(buffer)], token) if length else 0
        elif kind == p.CMD_WRITE:
            result = channel.writev(offset, [memoryview(payload)], token) if length else 0
        elif kind == p.CMD_FLUSH:
            result = channel.flush(token)
        elif kind == p.CMD_TRIM:
            result = channel.discard(offset, length, token)
        elif kind == p.CMD_WRITE_ZEROES:
            result = channel.write_zeroes(offset, length, token, not request.flags & p.CMD_FLAG_NO_HOLE)
        elif kind == p.CMD_BLOCK_STATUS and self._chosen and length and offset + length <= export.disk.size:
            group.start_soon(self._block_status, request)
            return
        else:
            result = -errno.EINVAL
        if result is not None:
            self._finished(channel, request, buffer, result)

    def _finished(
        self, channel: Any, request: p.Request, buffer: bytearray | None, result: int, *, flushed: bool = False
    ) -> None:
        changes = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
        if request.flags & p.CMD_FLAG_FUA and request.kind in changes and not result and not flushed:
            flushing = channel.flush((request, None, True))
            if flushing is None:
                return
            result = flushing
        data = buffer if request.kind == p.CMD_READ and not result else None
        self._output += p.answer(request, result, structured=self._structured, data=data)
        self._release(request)

    def _release(self, request: p.Request) -> None:
        self._running -= 1
        self._held -= request.length if request.kind in (p.CMD_READ, p.CMD_WRITE) else 0
        self._eased.set()

    async def _collect(self, channel: Any) -> None:
        """Answer what did not finish inline."""
        while True:
            await anyio.wait_readable(channel.completion_fd)
            for token, result in channel.completions():
                self._finished(channel, token[0], token[1], result, flushed=len(token) == 3)
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # whoever reads requests finds that out
                await self._send()

    async def _block_status(self, request: p.Request) -> None:
        limit = 1 if request.flags & p.CMD_FLAG_REQ_ONE else 1024
        try:
            answers = []
            for i in self._chosen:
                extents = await anyio.to_thread.run_sync(self._export.status[i], request.offset, request.length, limit)
                answers.append((i, extents))
            self._output += p.answer_status(request, answers)
        except Exception:  # an image that is found wrong: the client hears of an I/O error
            self._output += p.answer(request, -errno.EIO, structured=True)
        self._release(request)
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._send()

    async def _send(self) -> None:
        async with self._sending:
            while self._output:
                pieces, self._output = self._output, []
                await self._stream.send(b"".join(pieces))
