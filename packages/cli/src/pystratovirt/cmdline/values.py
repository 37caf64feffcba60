"""The types of option and key values: what is accepted, how it is said, how it is written back.

Each accepts what StratoVirt accepts (reference command-line, section 3) minus its parsing accidents.
Not here: which key has which type.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"k": KiB, "m": MiB, "g": GiB}
UNIX_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, the last is NUL


class Kind(Generic[T]):
    """A type of value. `type` is its name in introspection, `allowed` says in words what is accepted."""

    type = "str"
    allowed = ""
    optional_value = False  # the key may stand alone, without `=value`

    def parse(self, text: str) -> T:
        """Return the value of `text`; raise ValueError with a reason for people."""
        raise NotImplementedError

    def render(self, value: T) -> str:
        """Return text that parses to `value`."""
        return str(value)


class _TooLarge(ValueError):
    """A number that no 64 bits hold."""


def _number(text: str) -> int:
    digits = text[1:] if text.startswith("+") else text
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError("not a whole decimal number")
    if len(digits.lstrip("0")) > 20:
        raise _TooLarge("does not fit in 64 bits")
    return int(digits)


class Integer(Kind[int]):
    """A decimal number from `low` to `high`, a leading `+` allowed."""

    def __init__(self, low: int, high: int, unit: str = "", bits: int = 64) -> None:
        self.low, self.high, self.type = low, high, f"uint{bits}"
        self._unit = f" {unit}" if unit else ""
        self.allowed = f"{low} to {high}{self._unit}"

    def parse(self, text: str) -> int:
        value = _number(text)
        if value > self.high:
            raise ValueError(f"at most {self.high}{self._unit}")
        if value < self.low:
            raise ValueError(f"at least {self.low}{self._unit.removesuffix('s') if self.low == 1 else self._unit}")
        return value


class PowerOfTwo(Integer):
    """An Integer that is a power of two."""

    def __init__(self, low: int, high: int, bits: int = 16) -> None:
        super().__init__(low, high, bits=bits)
        self.allowed = f"a power of two, {low} to {high}"

    def parse(self, text: str) -> int:
        value = super().parse(text)
        if value & (value - 1):
            raise ValueError("not a power of two")
        return value


class Size(Kind[int]):
    """Bytes: a number with K, M or G (binary, either case); without one it counts MiB."""

    type = "size"

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.allowed = f"{self._words(low)} to {self._words(high)}; a number without K, M or G counts MiB"

    @staticmethod
    def _words(value: int) -> str:
        for name, unit in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
            if value and value % unit == 0:
                return f"{value // unit} {name}"
        return f"{value} bytes"

    def parse(self, text: str) -> int:
        unit = _UNITS.get(text[-1:].lower())
        try:
            value = _number(text[:-1] if unit else text) * (unit or MiB)
        except _TooLarge:
            value = self.high + 1
        except ValueError:
            raise ValueError("not a size: a whole number, then K, M, G or nothing (MiB)") from None
        if value > self.high:
            raise ValueError(f"at most {self._words(self.high)}")
        if value < self.low:
            raise ValueError(f"at least {self._words(self.low)}")
        return value

    def render(self, value: int) -> str:
        return f"{value // KiB}K"


class Bool(Kind[bool]):
    """Two sets of words, one for true, one for false. Case matters."""

    type = "bool"

    def __init__(self, true: tuple[str, ...], false: tuple[str, ...], *, alone: bool = False) -> None:
        self._true, self._false = true, false
        self.optional_value = alone
        self.allowed = f"{'|'.join(true)} or {'|'.join(false)}"

    def parse(self, text: str) -> bool:
        if text in self._true:
            return True
        if text in self._false:
            return False
        raise ValueError(f"one of {', '.join(self._true + self._false)}")

    def render(self, value: bool) -> str:
        return (self._true if value else self._false)[0]


SWITCH = Bool(("on", "true", "yes"), ("off", "false", "no"))
UNMAP = Bool(("unmap", "on", "true", "yes"), ("ignore", "off", "false", "no"))
ALLOW = Bool(("allow",), ("deny",))
ON_OFF = Bool(("on",), ("off",))
FLAG = Bool(("on", "true", "yes"), ("off", "false", "no"), alone=True)


class Text(Kind[str]):
    """Text of at most `limit` bytes, not empty."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.allowed = f"at most {limit} bytes"

    def parse(self, text: str) -> str:
        if not text:
            raise ValueError("empty")
        if "\0" in text:
            raise ValueError("contains a NUL character")
        size = len(text.encode("utf-8", "surrogateescape")) if text.isascii() else _encoded(text)
        if size > self.limit:
            raise ValueError(f"at most {self.limit} bytes, this is {size}")
        return text


def _encoded(text: str) -> int:
    try:
        return len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise ValueError("contains characters that have no encoding") from None


ID = Text(255)
PATH = Text(4096)
SOCKET_PATH = Text(UNIX_PATH_MAX)


class Choice(Kind[str]):
    """One of `names`. Those in `later` are known and refused as not supported yet."""

    def __init__(self, *names: str, later: tuple[str, ...] = (), fold: bool = False) -> None:
        self.names, self.later, self._fold = names, later, fold
        self.allowed = " or ".join(names)
        self.type = names[0] if len(names) == 1 else "str"

    def parse(self, text: str) -> str:
        value = text.lower() if self._fold else text
        if value in self.later:
            raise ValueError("not supported yet")
        if value not in self.names:
            raise ValueError(f"must be {self.allowed}")
        return value


class Reference(Kind[str]):
    """The id of something that another option made: `to` says what. `shared` things can have several users."""

    def __init__(self, to: str, *, shared: bool = False) -> None:
        self.to, self.shared = to, shared
        self.allowed = f"id of {'an' if to[0] in 'aeiou' else 'a'} {to}"

    def parse(self, text: str) -> str:
        return ID.parse(text)
