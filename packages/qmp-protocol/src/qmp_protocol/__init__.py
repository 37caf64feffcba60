"""Sans-I/O QMP (QEMU Machine Protocol): framing, messages, connection state machines and a typed command schema.

Not here: sockets, event loops and clocks. `qmp-server` adds them; so can any other program.
"""

from __future__ import annotations

from qmp_protocol.connection import (
    BadMessage,
    ClientConnection,
    CommandReceived,
    DescriptorsUnused,
    Negotiated,
    PeerClosed,
    Rejected,
    Reply,
    ServerConnection,
    State,
)
from qmp_protocol.errors import LocalProtocolError, QmpError, QmpProtocolError, SchemaError
from qmp_protocol.framing import Framer
from qmp_protocol.messages import ABSENT, Error, Event, Execute, Greeting, Json, Malformed, Return, Timestamp, encode

__all__ = [
    "ABSENT",
    "BadMessage",
    "ClientConnection",
    "CommandReceived",
    "DescriptorsUnused",
    "Error",
    "Event",
    "Execute",
    "Framer",
    "Greeting",
    "Json",
    "LocalProtocolError",
    "Malformed",
    "Negotiated",
    "PeerClosed",
    "QmpError",
    "QmpProtocolError",
    "Rejected",
    "Reply",
    "Return",
    "SchemaError",
    "ServerConnection",
    "State",
    "Timestamp",
    "encode",
]
