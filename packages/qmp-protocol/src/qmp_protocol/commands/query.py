"""Commands that ask about the server itself (reference section 6)."""

from __future__ import annotations

from typing import Any

from qmp_protocol.schema import Command, Struct, member


class VersionTriple(Struct):
    """Three parts of a version."""

    major: int
    minor: int
    micro: int


class VersionInfo(Struct):
    """What the server is."""

    qemu: VersionTriple = member(doc="the QEMU version whose schema clients may expect")
    package: str = member(doc="product and version")


class QueryVersion(Command[VersionInfo], name="query-version", strict=False):
    """Say what the server is."""


class CommandName(Struct):
    """The name of a command."""

    name: str


class QueryCommands(Command[list[CommandName]], name="query-commands", strict=False):
    """List every command by its name on the wire."""


class EventName(Struct):
    """The name of an event."""

    name: str


class QueryEvents(Command[list[EventName]], name="query-events", strict=False):
    """List every event."""


class QueryQmpSchema(Command[list[Any]], name="query-qmp-schema", strict=False):
    """Describe every command, event and type, in the format of QEMU's introspection (`SchemaInfo`)."""
