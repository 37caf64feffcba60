"""How commands and events are declared, checked, introspected and documented."""

from __future__ import annotations

from qmp_protocol.schema.declare import Command, Empty, Machines, Notification, Schema
from qmp_protocol.schema.struct import Field, Struct, member, to_json
from qmp_protocol.schema.types import i64, u8, u16, u32, u64, usize

__all__ = [
    "Command",
    "Empty",
    "Field",
    "Machines",
    "Notification",
    "Schema",
    "Struct",
    "i64",
    "member",
    "to_json",
    "u8",
    "u16",
    "u32",
    "u64",
    "usize",
]
