"""What a server can do, read from QEMU-style introspection (`query-qmp-schema`): its own, or that of StratoVirt's schema.

Works the same for this VMM, StratoVirt (whose server does not describe itself) and QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pystratovirt.qmpshell.client import QmpClient
from qmp_protocol.errors import QmpError


class Member(NamedTuple):
    """A member of an object: its name, the name of its type, and whether it may be left out."""

    name: str
    type: str
    optional: bool


class Model:
    """Commands, events and types by name."""

    def __init__(self, entries: list[Any], *, documented: bool = False) -> None:
        """`entries` is the result of `query-qmp-schema`. What is not understood in it is left out.

        `documented`: the documentation of StratoVirt's schema is that of this one too.
        """
        self.documented = documented
        self._entries: dict[str, Mapping[str, Any]] = {}
        for entry in entries:
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
                self._entries[entry["name"]] = entry

    @classmethod
    def stratovirt(cls) -> Model:
        """The model of StratoVirt's schema, without asking anybody."""
        from qmp_protocol.commands import STRATOVIRT
        from qmp_protocol.schema.introspect import introspect

        return cls(introspect(STRATOVIRT), documented=True)

    @classmethod
    def of(cls, client: QmpClient) -> Model:
        """The model of the server at the other end; StratoVirt's when it does not describe itself."""
        if str(client.greeting.version.get("package", "")).startswith("StratoVirt"):
            return cls.stratovirt()
        try:
            entries = client.execute("query-qmp-schema")
        except QmpError:
            entries = None
        return cls(list(entries)) if isinstance(entries, list) and entries else cls.stratovirt()

    def names(self, kind: str) -> list[str]:
        """The names of all entries of a meta-type (`command`, `event`), sorted."""
        return sorted(name for name, entry in self._entries.items() if entry.get("meta-type") == kind)

    def kind(self, name: str) -> str:
        """The meta-type of an entry, or an empty string."""
        return str(self._entries.get(name, {}).get("meta-type", ""))

    def json_type(self, name: str) -> str:
        """The JSON type of a built-in type (`string`, `int`, `boolean`, `value`…)."""
        return str(self._entries.get(name, {}).get("json-type", "value"))

    def values(self, name: str) -> list[str]:
        """The words of an enumeration."""
        entry = self._entries.get(name, {})
        members = [member["name"] for member in entry.get("members", []) if isinstance(member, Mapping) and "name" in member]
        return members or list(entry.get("values", []))

    def element(self, name: str) -> str:
        """The type of an array's elements."""
        return str(self._entries.get(name, {}).get("element-type", ""))

    def alternatives(self, name: str) -> list[str]:
        """The types of an alternate."""
        if self.kind(name) != "alternate":
            return []
        return [str(member.get("type", "")) for member in self._entries[name].get("members", [])]

    def arguments(self, name: str) -> str:
        """The type of a command's arguments or an event's data."""
        return str(self._entries.get(name, {}).get("arg-type", ""))

    def result(self, command: str) -> str:
        """The type of a command's result."""
        return str(self._entries.get(command, {}).get("ret-type", ""))

    def members(self, name: str) -> list[Member]:
        """The members of an object, those of all its variants included."""
        found: dict[str, Member] = {}
        for member in self._members(name):
            found.setdefault(member.name, member)
        return list(found.values())

    def _members(self, name: str) -> Iterator[Member]:
        entry = self._entries.get(name, {})
        for member in entry.get("members", []):
            if isinstance(member, Mapping) and "name" in member and "type" in member:
                yield Member(str(member["name"]), str(member["type"]), "default" in member)
        for variant in entry.get("variants", []):
            for member in self.members(str(variant.get("type", ""))):
                yield member._replace(optional=True)

    def object_behind(self, name: str) -> str:
        """The object type that a value of type `name` can be: itself, or one of its alternatives. Empty when it cannot."""
        for kind in (name, *self.alternatives(name)):
            if self.kind(kind) == "object":
                return kind
        return ""

    def describe(self, name: str) -> str:
        """A type in words."""
        kind = self.kind(name)
        if kind == "enum":
            return "|".join(self.values(name))
        if kind == "array":
            return f"list of {self.describe(self.element(name))}"
        if kind == "builtin":
            return self.json_type(name)
        if kind == "alternate":
            return " or ".join(self.describe(each) for each in self.alternatives(name))
        return "object" if kind == "object" else "value"
