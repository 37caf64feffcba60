"""The types that a schema is written in: integers with bounds, text with a length, choices, lists and structures.

A type checks a JSON value and converts it; its error texts end with the member's name. What StratoVirt's parser refuses too (a
wrong type, a number out of bounds, a word that is none of a choice) is said in its words; the rest, as a text that is too long,
in our own.

Not here: which command has which members (`qmp_protocol.commands`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from qmp_protocol.errors import GENERIC_ERROR, QmpError
from qmp_protocol.messages import Json, describe, shorten

if TYPE_CHECKING:
    from qmp_protocol.schema.struct import Struct


class Bits(NamedTuple):
    """An integer's name in error texts and its bounds, both included."""

    name: str
    low: int
    high: int


u8 = Annotated[int, Bits("u8", 0, 2**8 - 1)]
u16 = Annotated[int, Bits("u16", 0, 2**16 - 1)]
u32 = Annotated[int, Bits("u32", 0, 2**32 - 1)]
u64 = Annotated[int, Bits("u64", 0, 2**64 - 1)]
usize = Annotated[int, Bits("usize", 0, 2**64 - 1)]
i64 = Annotated[int, Bits("i64", -(2**63), 2**63 - 1)]


def invalid(text: str, path: str) -> QmpError:
    """The error for a member's value. `path` is its name, dotted from the arguments down; empty for the arguments themselves."""
    return QmpError(GENERIC_ERROR, f"{text} (member `{path}`)" if path else text)


class Type(Protocol):
    """One JSON type."""

    def check(self, value: Json, path: str) -> Any:
        """Return the Python value for a JSON value. Raises QmpError that names the member and what is allowed."""
        ...


class Text(NamedTuple):
    """A JSON string of at most `longest` characters (0: any length)."""

    longest: int = 0

    def check(self, value: Json, path: str) -> str:
        if not isinstance(value, str):
            raise invalid(f"invalid type: {describe(value)}, expected a string", path)
        if self.longest and len(value) > self.longest:
            raise invalid(f"invalid length {len(value)}, expected at most {self.longest} characters", path)
        return value


class Boolean(NamedTuple):
    """JSON true or false."""

    def check(self, value: Json, path: str) -> bool:
        if not isinstance(value, bool):
            raise invalid(f"invalid type: {describe(value)}, expected a boolean", path)
        return value


class Switch(NamedTuple):
    """A boolean that is written as one of two words. A peer that writes true or false is understood too."""

    off: str
    on: str

    def check(self, value: Json, path: str) -> bool:
        if isinstance(value, bool):
            return value
        if not isinstance(value, str):
            raise invalid(f"invalid type: {describe(value)}, expected a string", path)
        if value not in self:
            raise invalid(f"unknown variant `{shorten(value)}`, expected {one_of(tuple(self))}", path)
        return value == self.on


class Integer(NamedTuple):
    """A whole JSON number within bounds, both included. `name` says them in error texts."""

    name: str
    low: int
    high: int

    def check(self, value: Json, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(f"invalid type: {describe(value)}, expected {self.name}", path)
        if not self.low <= value <= self.high:
            raise invalid(f"invalid value: {describe(value)}, expected {self.name}", path)
        return value


class Number(NamedTuple):
    """Any JSON number."""

    def check(self, value: Json, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"invalid type: {describe(value)}, expected a number", path)
        return value


class Anything(NamedTuple):
    """Any JSON value."""

    def check(self, value: Json, path: str) -> Json:
        return value


class Choice(NamedTuple):
    """One of some words. `others` are spellings that mean one of them."""

    values: tuple[str, ...]
    others: Mapping[str, str]

    def check(self, value: Json, path: str) -> str:
        if not isinstance(value, str):
            raise invalid(f"invalid type: {describe(value)}, expected a string", path)
        if value in self.values:
            return value
        if value in self.others:
            return self.others[value]
        raise invalid(f"unknown variant `{shorten(value)}`, expected {one_of(self.values)}", path)


class Array(NamedTuple):
    """A JSON array."""

    item: Type

    def check(self, value: Json, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise invalid(f"invalid type: {describe(value)}, expected a sequence", path)
        return [self.item.check(item, f"{path}[{at}]") for at, item in enumerate(value)]


class Object(NamedTuple):
    """A JSON object that is a Struct."""

    struct: type[Struct]

    def check(self, value: Json, path: str) -> Struct:
        return self.struct.from_json(value, path)


def one_of(words: tuple[str, ...]) -> str:
    """List words as StratoVirt's error texts do: `` `a` ``, `` `a` or `b` ``, ``one of `a`, `b`, `c` ``."""
    quoted = [f"`{word}`" for word in words]
    return " or ".join(quoted) if len(quoted) <= 2 else "one of " + ", ".join(quoted)
