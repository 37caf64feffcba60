"""The commands that the server answers out of itself, when its schema has them.

Not here: anything about a virtual machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_server.descriptors import close_all

if TYPE_CHECKING:
    from qmp_protocol.commands.device import Getfd
    from qmp_protocol.messages import Json
    from qmp_protocol.schema import Schema
    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer


def register(server: QmpServer) -> None:
    """Register what this module answers."""
    for name, function in _HANDLERS.items():
        if name in server.schema.commands:
            server.register(name, function, concurrent=True)


def _query_version(_: object, call: Call) -> dict[str, Any]:
    version = call.server.greeting.version
    return {"qemu": version.get("qemu", {}), "package": version.get("package", "")}


def _query_commands(_: object, call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in call.server.schema.commands]


def _query_events(_: object, call: Call) -> list[dict[str, str]]:
    return [{"name": name} for name in call.server.schema.events]


def _query_qmp_schema(_: object, call: Call) -> list[Json]:
    return _introspection(call.server.schema)


@lru_cache(4)
def _introspection(schema: Schema) -> list[Json]:
    from qmp_protocol.schema import introspect  # never asked for by most clients

    return introspect.introspect(schema)


def _getfd(arguments: Getfd, call: Call) -> None:
    fds = call.take_fds()
    if not fds:
        raise QmpError(GENERIC_ERROR, "Invalid SCM message")
    close_all(fds[:-1])
    call.server.fds.put(arguments.fdname, fds[-1])


_HANDLERS = {
    "query-version": _query_version,
    "query-commands": _query_commands,
    "query-events": _query_events,
    "query-qmp-schema": _query_qmp_schema,
    "getfd": _getfd,
}
