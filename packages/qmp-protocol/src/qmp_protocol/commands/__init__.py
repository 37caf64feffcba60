"""StratoVirt's commands, each declared once. `STRATOVIRT` is the schema of all of them and of the events."""

from __future__ import annotations

from typing import Any

from qmp_protocol.commands import fds, lifecycle, query
from qmp_protocol.events import EVENTS
from qmp_protocol.messages import Greeting
from qmp_protocol.schema import Command, Schema

COMMANDS: tuple[type[Command[Any]], ...] = (
    lifecycle.QmpCapabilities,
    lifecycle.Quit,
    lifecycle.Stop,
    lifecycle.Cont,
    lifecycle.SystemPowerdown,
    lifecycle.SystemReset,
    lifecycle.QueryStatus,
    fds.Getfd,
    query.QueryVersion,
    query.QueryCommands,
    query.QueryEvents,
    query.QueryQmpSchema,
)

STRATOVIRT = Schema(COMMANDS, EVENTS)

GREETING = Greeting(
    {
        # Clients (Kata's, libvirt's) read `qemu` and choose argument shapes by it; the manual shows `StratoVirt`.
        "qemu": {"micro": 1, "minor": 0, "major": 5},
        "StratoVirt": {"micro": 0, "minor": 4, "major": 2},
        "package": "StratoVirt-2.4.0",
    }
)
"""What StratoVirt's clients expect to be greeted with."""
