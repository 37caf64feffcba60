"""What a server answers, understood as far as it can be: other servers, and later ones, know words and members that we do not.

Members that are not declared are ignored, a word that is none of a choice stays the string that it is, numbers may be of any
size, and `{}` for a list is an empty one (StratoVirt's answer where it has nothing to list). What is left is checked: a member
that must be there and is not, or is of another kind, is an error.

Not here: checking what a client asks, which is strict (`types`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmp_protocol.messages import Json, describe
from qmp_protocol.schema.struct import Struct
from qmp_protocol.schema.types import Array, Choice, Integer, Object, Switch, Text, Type, invalid


def read(kind: Type, value: Json, path: str = "") -> Any:
    """Return the typed value for a JSON value. Raises QmpError that names the member and what was expected."""
    if isinstance(kind, Object):
        return _object(kind.struct, value, path)
    if isinstance(kind, Array):
        if isinstance(value, Mapping) and not value:
            return []
        if not isinstance(value, list):
            raise invalid(f"invalid type: {describe(value)}, expected a sequence", path)
        return [read(kind.item, item, f"{path}[{at}]") for at, item in enumerate(value)]
    if isinstance(kind, Choice) and isinstance(value, str):
        return kind.others.get(value, value)
    if isinstance(kind, Switch) and isinstance(value, str):
        return value == kind.on
    if isinstance(kind, Integer) and isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(kind, Text) and isinstance(value, str):
        return value
    return kind.check(value, path)


def _object(struct: type[Struct], value: Json, path: str) -> Struct:
    if not isinstance(value, Mapping):
        raise invalid(f"invalid type: {describe(value)}, expected struct {struct.wire_name()}", path)
    values: dict[str, Any] = {}
    for field in struct.fields():
        item = value.get(field.name)
        if item is not None:
            values[field.attribute] = read(field.type, item, f"{path}.{field.name}" if path else field.name)
        elif field.required:
            raise invalid(f"missing field `{field.name}`", path)
    return struct(**values)
