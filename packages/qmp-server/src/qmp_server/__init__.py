"""An anyio QMP server over unix and TCP sockets with leaky-bucket flow control.

`qmp_server.sockets` can be imported without paying for an event loop; the names here load theirs when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmp_server.bucket import LeakyBucket
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer
    from qmp_server.sockets import Listener, listen_tcp, listen_unix

__all__ = ["Call", "LeakyBucket", "Listener", "QmpServer", "listen_tcp", "listen_unix"]

_HOMES = {
    "Call": "dispatch",
    "LeakyBucket": "bucket",
    "Listener": "sockets",
    "QmpServer": "server",
    "listen_tcp": "sockets",
    "listen_unix": "sockets",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
