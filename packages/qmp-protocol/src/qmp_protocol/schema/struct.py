"""Structures that are declared once: a class whose annotations are the members of a JSON object.

The class is at once the typed value that handlers and clients hold, the validator of what arrives, and the source of
introspection and documentation. Declaring costs little; what an annotation means is worked out when it is first needed, so
a program pays only for the commands that it uses.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self, dataclass_transform

from qmp_protocol.errors import SchemaError
from qmp_protocol.messages import Json, describe, shorten
from qmp_protocol.schema.types import (
    Anything,
    Array,
    Bits,
    Boolean,
    Choice,
    Integer,
    Number,
    Object,
    Switch,
    Text,
    Type,
    invalid,
    one_of,
)

_REQUIRED = object()


class _Member(NamedTuple):
    name: str
    default: Any
    longest: int
    low: int | None
    high: int | None
    also: Mapping[str, str]
    words: tuple[str, str] | None
    always: bool
    doc: str


def member(
    name: str = "",
    *,
    default: Any = _REQUIRED,
    max_length: int = 0,
    low: int | None = None,
    high: int | None = None,
    also: Mapping[str, str] | None = None,
    words: tuple[str, str] | None = None,
    always: bool = False,
    doc: str = "",
) -> Any:
    """Say more about a member than its annotation does.

    `name` is its JSON name when that is no Python name; `default` makes it optional; `max_length` bounds text in characters;
    `low` and `high` bound a number; `also` maps further spellings of a choice to the one meant; `words` are how a boolean is
    written, false first; `always`: a client sends it even when it says the default, because other servers have none; `doc` is a
    sentence.
    """
    return _Member(name, default, max_length, low, high, also or {}, words, always, doc)


class Field(NamedTuple):
    """One member of a Struct, worked out: Python name, JSON name, type, and whether it may be left out."""

    attribute: str
    name: str
    type: Type
    required: bool
    default: Any
    doc: str


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(member,))
class Struct:
    """Base of every structure. Values are immutable, compared by content, and made with keyword arguments."""

    strict: ClassVar[bool] = True
    """Whether members that are not declared are refused (or else ignored)."""

    _members: ClassVar[dict[str, _Member]] = {}
    _fields: ClassVar[tuple[Field, ...] | None] = None
    _by_name: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        members = dict(cls._members)
        for attribute, text in inspect.get_annotations(cls).items():
            if text.startswith(("ClassVar", "typing.ClassVar")):
                continue
            given = cls.__dict__.get(attribute, _REQUIRED)
            if not isinstance(given, _Member):
                given = _Member("", given, 0, None, None, {}, None, False, "")
            if not given.name:
                given = given._replace(name=attribute)
            members[attribute] = given
            # The default is what an instance without the attribute answers.
            if given.default is not _REQUIRED:
                setattr(cls, attribute, given.default)
            elif attribute in cls.__dict__:
                delattr(cls, attribute)
        cls._members = members
        cls._fields = None

    def __init__(self, **values: Any) -> None:
        """Make a value from its members by Python name. Raises SchemaError on a member that is unknown or missing."""
        for attribute, declared in self._members.items():
            if declared.default is _REQUIRED and attribute not in values:
                raise SchemaError(f"{type(self).__name__}: member {attribute} is missing")
        for attribute in values:
            if attribute not in self._members:
                raise SchemaError(f"{type(self).__name__}: no member {attribute}; there are: {', '.join(self._members)}")
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._members)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    @classmethod
    def fields(cls) -> tuple[Field, ...]:
        """The members in the order of declaration. Raises SchemaError when an annotation is none that a schema can have."""
        if cls._fields is None:
            hints = typing.get_type_hints(cls, include_extras=True)
            cls._fields = tuple(_work_out(name, hints[name], declared) for name, declared in cls._members.items())
            cls._by_name = {field.name: field for field in cls._fields}
        return cls._fields

    @classmethod
    def wire_name(cls) -> str:
        """The structure's name in introspection and in error texts."""
        return cls.__name__

    @classmethod
    def from_json(cls, value: Json, path: str = "") -> Self:
        """Check a JSON object and return the typed value. Raises QmpError that names the member and what is allowed.

        Of several mistakes it is the first one in the text, and a member that is missing after all others: StratoVirt's parser
        finds them in this order.
        """
        if not isinstance(value, Mapping):
            raise invalid(f"invalid type: {describe(value)}, expected struct {cls.wire_name()}", path)
        fields = cls.fields()
        by_name = cls._by_name
        values: dict[str, Any] = {}
        for name, item in value.items():
            field = by_name.get(name)
            if field is None:
                if cls.strict:
                    allowed = f"expected {one_of(tuple(by_name))}" if by_name else "there are no fields"
                    raise invalid(f"unknown field `{shorten(name)}`, {allowed}", path)
            elif item is not None or field.required:  # StratoVirt takes null for absent
                values[field.attribute] = field.type.check(item, f"{path}.{name}" if path else name)
        for field in fields:
            if field.required and field.attribute not in values:
                raise invalid(f"missing field `{field.name}`", path)
        return cls(**values)

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object for this value. Optional members that are None are left out."""
        return {
            declared.name: self.member_to_json(attribute)
            for attribute, declared in self._members.items()
            if declared.default is _REQUIRED or getattr(self, attribute) is not None
        }

    def member_to_json(self, attribute: str) -> Json:
        """Return the JSON for one member, by its Python name."""
        value = getattr(self, attribute)
        words = self._members[attribute].words
        return to_json(value) if words is None else words[bool(value)]


def to_json(value: Any) -> Any:
    """Return the JSON for a typed value: a Struct, a list of them, or anything that is JSON already."""
    if isinstance(value, Struct):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return value


def type_of(hint: Any, declared: _Member | None = None) -> Type:
    """Return the schema type for an annotation. Raises SchemaError when there is none."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        bits = hint.__metadata__[0]
        if not isinstance(bits, Bits):
            raise SchemaError(f"{hint} is no type of a schema")
        low, high = (declared.low, declared.high) if declared else (None, None)
        if low is None and high is None:
            return Integer(*bits)
        low, high = bits.low if low is None else low, bits.high if high is None else high
        return Integer(f"{bits.name} from {low} to {high}", low, high)
    if origin is Literal:
        return Choice(typing.get_args(hint), declared.also if declared else {})
    if origin is list:
        return Array(type_of(typing.get_args(hint)[0]))
    if origin in (typing.Union, types.UnionType):
        inner = [item for item in typing.get_args(hint) if item is not type(None)]
        if len(inner) == 1:
            return type_of(inner[0], declared)
    if isinstance(hint, type):
        if issubclass(hint, Struct):
            return Object(hint)
        if hint is str:
            return Text(declared.longest if declared else 0)
        if hint is bool and declared and declared.words:
            return Switch(*declared.words)
        if hint in _PLAIN:
            return _PLAIN[hint]
    if hint is Any:
        return Anything()
    raise SchemaError(f"{hint} is no type of a schema")


_PLAIN: dict[type, Type] = {
    bool: Boolean(),
    int: Integer("i64", -(2**63), 2**63 - 1),
    float: Number(),
    dict: Anything(),
}


def _work_out(attribute: str, hint: Any, declared: _Member) -> Field:
    required = declared.default is _REQUIRED
    default = None if required else declared.default
    return Field(attribute, declared.name, type_of(hint, declared), required, default, declared.doc)
