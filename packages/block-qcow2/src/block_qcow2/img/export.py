"""The command serve: an image for other programs, over NBD, until it is interrupted."""

from __future__ import annotations

import signal
from importlib import import_module
from typing import Any

from .. import open_disk
from ..errors import BlockError, UnsupportedFeatureError
from ..images import RawImage
from . import args
from .args import UsageError, parse
from .basic import _one_path, check_format, key_file
from .look import joined, mapped

SERVE = {
    "f": "value",
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
    "key-file": "value",
    "aio": "value",
    "direct": "",
}


def serve(words: list[str]) -> int:
    given = parse(words, SERVE)
    path = _one_path(given.words, "Image serve requires path")
    if given.last("k") and (given.last("b") or given.last("p")):
        raise UsageError("--socket goes with neither --bind nor --port")
    port = args.number(given.last("p") or "10809", "port", 0, 65535)
    shared = args.number(given.last("e") or "16", "number of connections", 1, 1024)
    try:
        anyio = import_module("anyio")
        server = import_module("block_qcow2.nbd.server")
    except ImportError:
        raise UnsupportedFeatureError("serving needs the package anyio: install block-qcow2[serve]") from None
    disk: Any = open_disk(
        path,
        format=check_format(given.last("f")),
        read_only=given.flag("r"),
        direct=given.flag("direct"),
        aio=given.last("aio") or ("native" if given.flag("direct") else "off"),
        discard=given.flag("discard"),
        allow=given.flag("allow-chain"),
        passphrase=key_file(given),
    )
    try:
        disk.lock()
        export = server.Export(disk, _status_of(disk), name=given.last("x") or "", trim=given.flag("discard"), connections=shared)
        anyio.run(_serve, anyio, server, export, given.last("k"), given.last("b") or "localhost", port)
    finally:
        disk.close()
    return 0


async def _serve(anyio: Any, server: Any, export: Any, socket: str | None, host: str, port: int) -> None:
    try:
        async with server.listening(path=socket, host=host, port=port) as listener, anyio.create_task_group() as group:
            group.start_soon(server.serve, listener, export)
            if socket is not None:
                where = socket
            else:
                where = f"{host}:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                print(f"Serving {export.disk.path} on {where}", flush=True)
                async for _ in signals:
                    break
            group.cancel_scope.cancel()
    except OSError as e:
        raise BlockError(f"{socket or f'{host}:{port}'}: {e.strerror or e}") from e


def _status_of(disk: Any) -> Any:
    image: Any = disk.image if hasattr(disk, "image") else RawImage(disk.file)

    def status(offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        from ..nbd.protocol import STATE_HOLE, STATE_ZERO

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
