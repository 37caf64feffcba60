"""What a server can do, read from QEMU-style introspection (`query-qmp-schema`): its own, or that of StratoVirt's schema.

Works the same for this VMM, StratoVirt (whose server does not describe itself) and QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pystratovirt.qmpshell.client import QmpClient
from qmp_protocol.errors import QmpError


class Member(NamedTuple):
    """A member of an object: its name, the name of its type, and whether it may be left out.

    `cases` are the values of the object's tag with which it has this type; empty when it has no other.
    """

    name: str
    type: str
    optional: bool
    cases: tuple[str, ...] = ()


class _Entry(NamedTuple):
    kind: str  # the meta-type
    json_type: str
    members: tuple[Member, ...]
    tag: str  # the member that tells which of the variants an object is
    variants: tuple[tuple[str, str], ...]  # value of the tag, type with the further members
    words: tuple[str, ...]
    parts: tuple[str, ...]  # the types that a value of this one is made of, or can be: array, alternate
    arguments: str
    result: str


_NOTHING: Final = _Entry("", "value", (), "", (), (), (), "", "")
_REMEMBERED: Final = 4096  # objects whose members have been put together
_NONE_CHOSEN: Final[Mapping[str, str]] = {}


class Model:
    """Commands, events and types by name."""

    def __init__(self, entries: list[Any], *, documented: bool = False) -> None:
        """`entries` is the result of `query-qmp-schema`. What is not understood in it is left out.

        `documented`: the documentation of StratoVirt's schema is that of this one too.
        """
        self.documented = documented
        self._entries: dict[str, _Entry] = {}
        self._members: dict[tuple[str, frozenset[tuple[str, str]]], list[Member]] = {}
        for entry in entries:
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
                self._entries[entry["name"]] = _read(entry)
        self._break_circles()

    def _break_circles(self) -> None:
        """A type that is made of itself, which no honest server has, is made of nothing."""
        waiting = {
            name: {*entry.parts, *(variant for _, variant in entry.variants)} & self._entries.keys()
            for name, entry in self._entries.items()
        }
        while done := [name for name, needed in waiting.items() if not needed]:
            for name in done:
                del waiting[name]
            for needed in waiting.values():
                needed.difference_update(done)
        for name in waiting:
            self._entries[name] = self._entries[name]._replace(parts=(), variants=())

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
        return sorted(name for name, entry in self._entries.items() if entry.kind == kind)

    def _entry(self, name: str) -> _Entry:
        return self._entries.get(name, _NOTHING)

    def kind(self, name: str) -> str:
        """The meta-type of an entry, or an empty string."""
        return self._entry(name).kind

    def json_type(self, name: str) -> str:
        """The JSON type of a built-in type (`string`, `int`, `boolean`, `value`…)."""
        return self._entry(name).json_type

    def values(self, name: str) -> list[str]:
        """The words of an enumeration."""
        return list(self._entry(name).words)

    def element(self, name: str) -> str:
        """The type of an array's elements."""
        return next(iter(self._entry(name).parts), "")

    def alternatives(self, name: str) -> list[str]:
        """The types of an alternate."""
        return list(self._entry(name).parts) if self.kind(name) == "alternate" else []

    def arguments(self, name: str) -> str:
        """The type of a command's arguments or an event's data."""
        return self._entry(name).arguments

    def result(self, command: str) -> str:
        """The type of a command's result."""
        return self._entry(command).result

    def members(self, name: str, chosen: Mapping[str, str] = _NONE_CHOSEN) -> list[Member]:
        """The members of an object, each name once.

        `chosen` are values of members. When the object's tag is among them, the variant's members are that variant's; else they
        are those of all variants, and where these have the same name, the first one's.
        """
        key = name, frozenset(chosen.items())
        if key not in self._members:
            if len(self._members) >= _REMEMBERED:
                self._members.clear()
            self._members[key] = self._gather(self._entry(name), chosen)
        return self._members[key]

    def _gather(self, entry: _Entry, chosen: Mapping[str, str]) -> list[Member]:
        found: dict[str, Member] = {}
        for member in entry.members:
            found.setdefault(member.name, member)
        case = chosen.get(entry.tag, "")
        known = any(each == case for each, _ in entry.variants)
        for each, variant in entry.variants:
            if not known or each == case:
                for member in self.members(variant, chosen):
                    found.setdefault(member.name, member if known else member._replace(optional=True))
        return list(found.values())

    def shapes(self, name: str) -> list[Member]:
        """The members of an object as in `members`, but those of variants once for each type that they have there."""
        entry = self._entry(name)
        cases: dict[str, dict[str, list[str]]] = {}
        for case, variant in entry.variants:
            for member in self.members(variant):
                cases.setdefault(member.name, {}).setdefault(member.type, []).append(case)
        found = []
        own = {member.name for member in entry.members}
        for member in self.members(name):
            kinds = cases.get(member.name, {})
            if member.name in own or len(kinds) < 2:
                found.append(member)
            else:
                found += [member._replace(type=kind, cases=tuple(each)) for kind, each in kinds.items()]
        return found

    def tag(self, name: str) -> str:
        """The name of the member that tells which of its variants an object is; empty when it has none."""
        return self._entry(name).tag

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


def _read(entry: Mapping[str, Any]) -> _Entry:
    """Return what is understood of one entry."""
    kind = _text(entry, "meta-type")
    members = _objects(entry, "members")
    words = [_text(member, "name") for member in members] or [word for word in _list(entry, "values") if isinstance(word, str)]
    parts = [_text(entry, "element-type")] if kind == "array" else [_text(member, "type") for member in members]
    return _Entry(
        kind,
        _text(entry, "json-type") or "value",
        tuple(
            Member(_text(member, "name"), _text(member, "type"), "default" in member)
            for member in members
            if _text(member, "name") and _text(member, "type")
        ),
        _text(entry, "tag"),
        tuple((_text(variant, "case"), _text(variant, "type")) for variant in _objects(entry, "variants")),
        tuple(words) if kind == "enum" else (),
        tuple(parts) if kind in ("array", "alternate") else (),
        _text(entry, "arg-type"),
        _text(entry, "ret-type"),
    )


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    value = entry.get(name)
    return value if isinstance(value, list) else []


def _objects(entry: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [each for each in _list(entry, name) if isinstance(each, Mapping)]
