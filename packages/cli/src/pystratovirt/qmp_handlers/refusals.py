"""What a machine type lacks: StratoVirt's own words for it, from the schema.

Not here: what this program cannot do *yet*; the server says so by itself for every command without a handler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_protocol.schema import Machines

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmp_server.dispatch import Call
    from qmp_server.server import QmpServer


def register(server: QmpServer, machine: Machines) -> None:
    """Refuse every command that `machine` lacks, unless it has a handler already."""
    for name, command in server.schema.commands.items():
        if not command.machines & machine and name not in server.dispatcher:
            server.register(name, _refusing(command.refusal), concurrent=True)


def _refusing(text: str) -> Callable[[Any, Call], None]:
    def refuse(_: object, call: Call) -> None:
        raise QmpError(GENERIC_ERROR, text)

    return refuse
