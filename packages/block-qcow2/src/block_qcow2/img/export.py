"""Commands that drive an image as a machine would: serve exports it (NBD, vhost-user) until interrupted, bench measures it."""

from __future__ import annotations

import mmap
import os
import select
import signal
import sys
import time
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

from .. import open_disk
from ..errors import BlockError, UnsupportedFeatureError
from ..images import RawImage
from ..nbd.protocol import BASE_ALLOCATION, DIRTY_BITMAP, MAX_NAME, STATE_HOLE, STATE_ZERO
from ..vhost_user.blk import SERIAL_MAX
from . import args
from .args import UsageError, parse
from .basic import _one_path
from .look import joined, mapped
from .options import apply_cache, cache_mode, check_format, is_direct
from .secrets import SECRETS, passphrase

SERVE = {
    **SECRETS,
    "f": "value",
    "format": "=f",
    "r": "",
    "read-only": "=r",
    "k": "value",
    "socket": "=k",
    "b": "value",
    "bind": "=b",
    "p": "value",
    "port": "=p",
    "x": "value",
    "export-name": "=x",
    "e": "value",
    "shared": "=e",
    "discard": "",
    "allow-chain": "",
    "aio": "value",
    "direct": "",
    "type": "value",
    "num-queues": "value",
    "serial": "value",
    "B": "value",
    "bitmap": "=B",
    "tls-creds": "value",
    "tls-verify-peer": "value",
}


def serve(words: list[str]) -> int:
    given = parse(words, SERVE)
    path = _one_path(given.words, "Image serve requires path")
    if given.last("k") and (given.last("b") or given.last("p")):
        raise UsageError("--socket goes with neither --bind nor --port")
    port = args.number(given.last("p") or "10809", "port", 0, 65535)
    shared = args.number(given.last("e") or "16", "number of connections", 1, 1024)
    kind = given.last("type") or "nbd"
    if kind not in ("nbd", "vhost-user-blk"):
        raise UsageError(f"--type {kind}: expected nbd or vhost-user-blk")
    other = ("num-queues", "serial") if kind == "nbd" else ("b", "p", "x", "e", "B", "tls-creds", "tls-verify-peer")
    for name in other:
        if given.flag(name):
            raise UsageError(f"-{'-' if len(name) > 1 else ''}{name} does not go with --type {kind}")
    queues = args.number(given.last("num-queues") or "16", "number of queues", 1, 64)
    serial = given.last("serial") or ""
    if len(os.fsencode(serial)) > SERIAL_MAX:
        raise UsageError(f"Invalid serial number '{serial}': expected up to {SERIAL_MAX} bytes")
    export_name = given.last("x") or ""
    if len(os.fsencode(export_name)) > MAX_NAME:
        raise UsageError(f"Invalid export name of {len(os.fsencode(export_name))} bytes: expected up to {MAX_NAME}")
    if kind == "vhost-user-blk" and not given.last("k"):
        raise UsageError("--type vhost-user-blk needs a socket: -k PATH")
    if kind == "nbd":
        try:
            anyio = import_module("anyio")
            server = import_module("block_qcow2.nbd.server")
        except ImportError:
            raise UnsupportedFeatureError("serving NBD needs the package anyio: install block-qcow2[serve]") from None
    tls = _tls(given, server) if given.last("tls-creds") else None
    # Threads that come back from the disk want the interpreter now, not after the default 5 ms.
    sys.setswitchinterval(5e-5)
    disk: Any = open_disk(
        path,
        format=check_format(given.last("f")),
        read_only=given.flag("r"),
        direct=given.flag("direct"),
        aio=given.last("aio") or ("native" if given.flag("direct") else "off"),
        discard=given.flag("discard"),
        allow=given.flag("allow-chain"),
        passphrase=passphrase(given),
    )
    try:
        disk.lock()
        if kind == "vhost-user-blk":
            _serve_vhost_user(disk, given.last("k") or "", queues, serial)
            return 0
        status = {BASE_ALLOCATION: _status_of(disk)}
        for name in given.all("B"):
            status[DIRTY_BITMAP + name.encode("utf-8", "surrogateescape")] = _bitmap_status(disk, name)
        export = server.Export(disk, status, name=export_name, trim=given.flag("discard"), connections=shared, tls=tls)
        anyio.run(_serve, anyio, server, export, given.last("k"), given.last("b") or "localhost", port)
    finally:
        disk.close()
    return 0


def _tls(given: args.Given, server: Any) -> Any:
    import ssl

    folder = given.last("tls-creds") or ""
    verify = args.boolean(given.last("tls-verify-peer") or "on", "tls-verify-peer")
    try:
        return server.tls_context(folder, verify_peer=verify)
    except ssl.SSLError as e:
        raise BlockError(f"--tls-creds {folder}: the certificates cannot be used: {e.reason or e}") from None
    except OSError as e:
        wanted = "server-cert.pem, server-key.pem" + (", ca-cert.pem" if verify else "")
        raise BlockError(f"--tls-creds {folder}: {e.strerror}: expected {wanted} in that folder") from None


def _serve_vhost_user(disk: Any, path: str, queues: int, serial: str) -> None:
    from ..unix_socket import listening
    from ..vhost_user import server

    stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    before = {s: signal.signal(s, lambda *_: os.eventfd_write(stop, 1)) for s in _ends()}

    def report(text: str) -> None:
        args.warn(f"{path}: {text}")

    try:
        with listening(path) as listener:
            print(f"Serving {disk.path} on {path}", flush=True)
            server.serve(disk, listener, stop=stop, queues=queues, serial=serial, report=report)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        os.close(stop)


async def _serve(anyio: Any, server: Any, export: Any, socket: str | None, host: str, port: int) -> None:
    with anyio.open_signal_receiver(*_ends()) as signals:
        async with AsyncExitStack() as stack:
            try:
                listeners = await stack.enter_async_context(server.listening(path=socket, host=host, port=port))
            except OSError as e:
                raise BlockError(f"{host}:{port}: {e.strerror or e}") from e
            where = socket if socket is not None else f"{host}:{listeners[0].getsockname()[1]}"
            # Before there are tasks: whoever was to read this may have gone.
            print(f"Serving {export.disk.path} on {where}", flush=True)
            async with anyio.create_task_group() as group:
                group.start_soon(server.serve, listeners, export)
                async for _ in signals:
                    break
                group.cancel_scope.cancel()


def _ends() -> list[signal.Signals]:
    """The signals that end a server; one that is ignored (nohup) stays so."""
    return [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]


def _status_of(disk: Any) -> Any:
    image: Any = disk.image if hasattr(disk, "image") else RawImage(disk.file)

    def status(offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for m in joined(mapped(image, offset, length)):
            state = (STATE_ZERO if m.zero else 0) | (0 if m.data else STATE_HOLE if m.zero else 0)
            if found and found[-1][1] == state:
                found[-1] = (found[-1][0] + m.length, state)
            elif len(found) == limit:
                break
            else:
                found.append((m.length, state))
        return found

    return status


def _bitmap_status(disk: Any, name: str) -> Any:
    """What a dirty bitmap says. One that is followed keeps changing."""
    image = getattr(disk, "image", None)
    if image is None:
        raise BlockError(f"{disk.path}: a raw image has no bitmaps")
    from ..qcow2.bitmaps import Bitmaps, extents

    bitmaps = image.bitmaps or Bitmaps(image)
    bitmap = bitmaps.find(name)
    bits = bitmaps.bits(bitmap)

    def status(offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        return extents(bits, bitmap.granularity_bits, offset, length, limit)

    return status


BENCH = {
    "f": "value",
    "c": "value",
    "d": "value",
    "o": "value",
    "s": "value",
    "S": "value",
    "w": "",
    "aio": "value",
    "i": "=aio",
    "n": "",
    "t": "value",
    "no-drain": "",
    "direct": "",
    "q": "",
}
BENCH |= {"U": "", "force-share": "=U", "pattern": "value", "flush-interval": "value", "allow-chain": ""} | SECRETS


def bench(words: list[str]) -> int:
    """Send requests of one size, some in parallel, and say how long they took. Writing destroys what is in the image."""
    given = parse(words, BENCH)
    path = _one_path(given.words, "Image bench requires path")
    count = args.number(given.last("c") or "75000", "request count", 1, 1 << 31)
    depth = args.number(given.last("d") or "64", "queue depth", 1, 1 << 16)
    block = args.size(given.last("s") or "4096", "buffer size")
    offset = args.size(given.last("o") or "0", "offset")
    write = given.flag("w")
    if write and given.flag("U"):
        raise UsageError("-U is for reading: what -w writes to is locked")
    interval = args.number(given.last("flush-interval") or "0", "flush interval", 0, 1 << 31)
    if interval and not write:
        raise UsageError("--flush-interval needs -w")
    drain = not given.flag("no-drain")
    if not drain and not interval:
        raise UsageError("--no-drain needs --flush-interval")
    cache = cache_mode(given, "t", "none" if given.flag("direct") else "writeback")
    if given.flag("n") and given.last("aio") not in (None, "native"):
        raise UsageError(f"-n is -i native, and does not go with -i {given.last('aio')}")
    if given.flag("n") and not is_direct(cache):
        raise UsageError("-n needs -t none or directsync: native AIO blocks where the page cache is used")
    pattern = args.number(given.last("pattern") or "0", "pattern", 0, 255)
    disk: Any = open_disk(
        path,
        format=check_format(given.last("f")),
        read_only=not write,
        direct=is_direct(cache),
        aio=given.last("aio") or ("native" if is_direct(cache) else "off"),
        allow=given.flag("allow-chain"),
        passphrase=passphrase(given),
    )
    try:
        if not given.flag("U"):
            disk.lock()
        step = args.size(given.last("S") or "0", "step size") or block
        if not 0 < block <= disk.size:
            raise UsageError(f"Invalid buffer size {block}: expected 1 to {disk.size}")
        if not given.flag("q"):
            print(
                f"Sending {count} {'write' if write else 'read'} requests, {block} bytes each, {depth} in parallel "
                f"(starting at offset {offset}, step size {step})",
                flush=True,
            )
        if interval and not given.flag("q"):
            print(f"Sending flush every {interval} {'' if drain else 'non-'}draining requests", flush=True)
        apply_cache(getattr(disk, "image", disk), cache)
        seconds = _run_bench(disk, count, depth, block, offset, step, write, pattern, interval, drain)
        if not given.flag("q"):
            print(f"Run completed in {seconds:.3f} seconds.")
    finally:
        disk.close()
    return 0


def _run_bench(
    disk: Any,
    count: int,
    depth: int,
    block: int,
    offset: int,
    step: int,
    write: bool,
    pattern: int,
    interval: int,
    drain: bool,
) -> float:
    channel = disk.channel()
    poll = select.poll()
    poll.register(channel.completion_fd, select.POLLIN)
    depth = min(depth, max((64 << 20) // block, 1))
    memory = memoryview(mmap.mmap(-1, depth * block))
    if pattern:
        memory[:] = bytes([pattern]) * len(memory)
    free = [memory[i * block : (i + 1) * block] for i in range(depth)]
    start = time.perf_counter()
    sent = 0

    def done(buffer: Any, result: int) -> None:
        if result:
            raise OSError(-result, f"{disk.path}: a request failed: {os.strerror(-result)}")
        if buffer is not None:
            free.append(buffer)

    while sent < count or channel.in_flight:
        while free and sent < count:
            buffer = free.pop()
            at = (offset + sent * step) % (disk.size - block + 1)
            result = channel.writev(at, [buffer], buffer) if write else channel.readv(at, [buffer], buffer)
            sent += 1
            if result is not None:
                done(buffer, result)
            if interval and sent % interval == 0:
                if drain:
                    channel.submit()
                    while channel.in_flight:
                        poll.poll()
                        for buffer, result in channel.completions():
                            done(buffer, result)
                result = channel.flush(None)
                if result is not None:
                    done(None, result)
        channel.submit()
        if channel.in_flight:
            poll.poll()
            for buffer, result in channel.completions():
                done(buffer, result)
    channel.close()
    return time.perf_counter() - start
