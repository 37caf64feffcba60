"""Declarations: a class is a parameter string (`a=b,c`), its members are the keys.

One declaration is read by the parser, the messages, the help, the introspection commands and the documentation. The strict parser
of the reference (section 2.1), with two additions: `,,` is a comma inside a value, as in QEMU; a value may end with `=`. Nothing
that StratoVirt accepts is read differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from .errors import BadKey, CommandLineError, listing, show
from .values import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda cls: cls


T = TypeVar("T")
D = TypeVar("D")
_REQUIRED: Any = object()


class Key:
    """One key of a parameter string.

    `name` as typed; `attribute` as in Python; `positional`: the first item may give it without a name; `inverse`: a second name
    with the opposite meaning; `later`: only the default is accepted so far; `note`: what differs from StratoVirt.
    """

    __slots__ = ("attribute", "default", "doc", "inverse", "kind", "later", "name", "note", "positional")

    def __init__(
        self, kind: Kind[Any], doc: str, default: Any, name: str, positional: bool, inverse: str, later: bool, note: str
    ) -> None:
        self.kind, self.doc, self.default, self.name, self.positional = kind, doc, default, name, positional
        self.inverse, self.later, self.note = inverse, later, note
        self.attribute = ""

    @property
    def required(self) -> bool:
        """True when the key has no default."""
        return self.default is _REQUIRED


@overload
def key(
    kind: Kind[T], *, doc: str, name: str = "", positional: bool = False, inverse: str = "", later: bool = False, note: str = ""
) -> T: ...
@overload
def key(
    kind: Kind[T],
    *,
    doc: str,
    default: D,
    name: str = "",
    positional: bool = False,
    inverse: str = "",
    later: bool = False,
    note: str = "",
) -> T | D: ...
def key(
    kind: Kind[T],
    *,
    doc: str,
    default: Any = _REQUIRED,
    name: str = "",
    positional: bool = False,
    inverse: str = "",
    later: bool = False,
    note: str = "",
) -> Any:
    """Declare a key (see Key). Without `default` it is required. The name is the attribute's with `-` for `_` unless given."""
    return Key(kind, doc, default, name, positional, inverse, later, note)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(key,))
class Record:
    """A frozen class made from its annotations. A dataclass, without the 15 ms that importing those costs a start."""

    fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        own = (name for name, kind in cls.__annotations__.items() if not str(kind).startswith("ClassVar"))
        cls.fields = tuple(dict.fromkeys((*cls.fields, *own)))

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in self.fields:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
        self.__dict__.update(values)
        for name in self.fields:
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} needs a value for {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.fields)

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.fields)})"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in self.fields}, **changes})


class Parameters(Record):
    """Base of everything that is written `key=value,...`."""

    keys: ClassVar[dict[str, Key]] = {}
    selector: ClassVar[str] = ""  # the word in front (driver, type, backend) that chose this class
    unknown: ClassVar[dict[str, str]] = {}  # keys that deserve a better answer than "no such key"

    def __init_subclass__(cls, *, selector: str = "") -> None:
        super().__init_subclass__()
        cls.selector = selector or cls.selector
        keys = dict(cls.keys)
        for attribute, value in list(vars(cls).items()):
            if isinstance(value, Key):
                value.attribute = attribute
                value.name = value.name or attribute.replace("_", "-")
                keys[value.name] = value
                if value.required:
                    delattr(cls, attribute)
                else:
                    setattr(cls, attribute, value.default)
        cls.keys = keys

    def check(self) -> None:
        """Check what depends on several keys. Raises BadKey; where its name is a key's, a user reads what was typed for it."""

    @classmethod
    def parse(cls, option: str, text: str) -> Self:
        """Return the parameters in `text`; `option` names the option in errors. Raises CommandLineError."""
        where = ""
        values: dict[str, Any] = {}
        typed: dict[str, str] = {}  # items by key
        inverse = {found.inverse: found for found in cls.keys.values() if found.inverse}
        try:
            for number, (name, value) in enumerate(items(text)):
                if number == 0 and value is None:
                    if cls.selector:
                        where = f"{show(name)}: "
                        continue
                    name, value, item = cls._positional(name), name, show(name)
                else:
                    item = show(name) if value is None else f"{show(name)}={show(value)}"
                found = cls.keys.get(name) or inverse.get(name)
                if found is None:
                    raise BadKey(item, cls.unknown.get(name) or f"no such key; there are: {listing(cls.keys)}")
                if found.attribute in values:
                    raise BadKey(item, "given more than once")
                try:
                    parsed = cls._value(found, value)
                except ValueError as error:
                    raise BadKey(item, str(error)) from None
                if name == found.inverse:
                    parsed = not parsed
                if found.later and parsed != found.default:
                    raise BadKey(item, "not supported yet")
                values[found.attribute], typed[found.name] = parsed, item
                if name == "id" and not where:
                    where = f"{item}: "
            for found in cls.keys.values():
                if found.required and found.attribute not in values:
                    raise BadKey("", f"needs {found.name}=... ({found.doc})")
            result = cls(**values)
            try:
                result.check()
            except BadKey as error:
                raise BadKey(typed.get(error.name, error.name), error.reason) from None
        except BadKey as error:
            raise CommandLineError(option, (where + error.name).removesuffix(": "), error.reason) from None
        return result

    @classmethod
    def of(cls, values: Mapping[str, str | int | bool | tuple[str, ...]]) -> Self:
        """Return the parameters with these values by key, as a program has them: numbers and truth values, or text as typed.

        A tuple is taken as it is. Bounds and reasons are the command line's. Raises BadKey, whose name begins with a key's.
        """
        taken: dict[str, Any] = {}
        for name, value in values.items():
            found = cls.keys[name]
            try:
                parsed = value if isinstance(value, bool | tuple) else found.kind.parse(str(value))
            except ValueError as error:
                raise BadKey(name, str(error)) from None
            if found.later and parsed != found.default:
                raise BadKey(name, "not supported yet")
            taken[found.attribute] = parsed
        for found in cls.keys.values():
            if found.required and found.attribute not in taken:
                raise BadKey(found.name, "missing")
        result = cls(**taken)
        result.check()
        return result

    @classmethod
    def _positional(cls, text: str) -> str:
        for name, found in cls.keys.items():
            if found.positional:
                return name
        raise BadKey(show(text), f"not of the form key=value; the keys are: {listing(cls.keys)}")

    @staticmethod
    def _value(found: Key, value: str | None) -> Any:
        if value is not None:
            return found.kind.parse(value)
        if found.kind.optional_value:
            return True
        raise ValueError(f"needs a value ({found.kind.allowed})")

    def render(self) -> str:
        """Return a short text that parses to this: what differs from the default, and always what would come first."""
        parts = [self.selector] if self.selector else []
        for found in self.keys.values():
            value = getattr(self, found.attribute)
            if found.required or found.positional or value != found.default:
                parts.append(f"{found.name}={found.kind.render(value).replace(',', ',,')}")
        return ",".join(parts)


def items(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the items of a parameter string: (key, value), or (word, None) for an item without `=`. Raises BadKey."""
    if not text:  # often a variable of a script that has none
        raise BadKey(show(text), "empty")
    if "\0" in text:
        raise BadKey(show(text), "contains a NUL character")
    for part in text.replace(",,", "\0").split(","):
        part = part.replace("\0", ",")
        name, equals, value = part.partition("=")
        if not name:
            raise BadKey(
                show(part or text), "begins with '='" if equals else "an empty item; a comma inside a value is written ',,'"
            )
        yield (name, value) if equals else (name, None)


def word_in_front(text: str) -> str:
    """Return the driver, type or backend that a parameter string begins with; empty when it has none."""
    front = text.replace(",,", "\0").partition(",")[0].replace("\0", ",")
    return "" if "=" in front else front
