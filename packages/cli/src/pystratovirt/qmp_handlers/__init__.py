"""What QMP commands do to a virtual machine: a module a subject, each with a `register(server, runtime)`.

A command that no module registers is answered "not supported yet" by the server; one that the machine type lacks, with
StratoVirt's words for it (`refusals`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pystratovirt.qmp_handlers import balloon, block, debug, hotplug, human, lifecycle, queries, refusals
from qmp_protocol.schema import Machines

if TYPE_CHECKING:
    from pystratovirt.runtime import Runtime
    from qmp_server.server import QmpServer


def register_all(server: QmpServer, runtime: Runtime, machine: Machines = Machines.MICROVM) -> None:
    """Register everything that a machine of the given type can do."""
    for module in (lifecycle, queries, balloon, block, hotplug, debug, human):
        module.register(server, runtime)
    refusals.register(server, machine)
