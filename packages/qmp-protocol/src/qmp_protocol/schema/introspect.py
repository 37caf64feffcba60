"""A schema described in the format of QEMU's `query-qmp-schema` (qapi/introspect.json: SchemaInfo).

Types have readable names here, where QEMU numbers them; clients are told to follow names and not to know them.
"""

from __future__ import annotations

from typing import Any

from qmp_protocol.messages import Json
from qmp_protocol.schema.declare import Command, Schema
from qmp_protocol.schema.struct import Field, Struct, type_of
from qmp_protocol.schema.types import Anything, Array, Boolean, Choice, Integer, Number, Object, Switch, Text, Type

_BUILTIN: dict[type, tuple[str, str]] = {
    Text: ("str", "string"),
    Boolean: ("bool", "boolean"),
    Integer: ("int", "int"),
    Number: ("number", "number"),
    Anything: ("any", "value"),
}


def introspect(schema: Schema) -> list[Json]:
    """Return one SchemaInfo object for every command, event and type that they use, each before it is first named."""
    return _Introspection(schema).entries


class _Introspection:
    def __init__(self, schema: Schema) -> None:
        self.entries: list[Json] = []
        self._known: set[str] = set()
        for command in schema.commands.values():
            self._command(command)
        for event in schema.events.values():
            arguments = self._object(f"q_obj_{event.name}-arg", event)
            self.entries.append({"name": event.name, "meta-type": "event", "arg-type": arguments})

    def _command(self, command: type[Command[Any]]) -> None:
        arguments = self._object(f"q_obj_{command.name}-arg", command)
        result = self._type(type_of(command.result_hint()), command.name)
        self.entries.append({"name": command.name, "meta-type": "command", "arg-type": arguments, "ret-type": result})

    def _add(self, name: str, entry: dict[str, Json]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.entries.append({"name": name, **entry})
        return name

    def _object(self, name: str, struct: type[Struct]) -> str:
        fields = struct.fields()
        name = name if fields else "q_empty"
        if name in self._known:
            return name
        return self._add(name, {"meta-type": "object", "members": [self._member(name, field) for field in fields]})

    def _member(self, owner: str, field: Field) -> Json:
        entry = {"name": field.name, "type": self._type(field.type, f"{owner}.{field.name}")}
        # A null default says "optional, and what absence means is not told" (SchemaInfoObjectMember).
        return entry if field.required else {**entry, "default": None}

    def _type(self, kind: Type, place: str) -> str:
        if isinstance(kind, Object):
            return self._object(kind.struct.__name__, kind.struct)
        if isinstance(kind, Array):
            element = self._type(kind.item, place)
            return self._add(f"[{element}]", {"meta-type": "array", "element-type": element})
        if isinstance(kind, Choice | Switch):
            values = list(kind.values if isinstance(kind, Choice) else kind)
            members = [{"name": value} for value in values]
            return self._add(f"{place}-enum", {"meta-type": "enum", "members": members, "values": values})
        name, json_type = _BUILTIN[type(kind)]
        return self._add(name, {"meta-type": "builtin", "json-type": json_type})
