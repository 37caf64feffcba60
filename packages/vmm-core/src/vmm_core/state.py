"""Saved state of components: versioned dataclasses, and their form on disk.

Every component with guest-visible state has `save()` and `restore(state)` (the `Stateful` protocol). Its state is a frozen
dataclass of plain values (int, bool, str, bytes, None, tuples and lists of them, nested state dataclasses) with a class
variable `VERSION`. `encode` and `decode` turn one into bytes and back; `decode` refuses what it does not understand with
the component's name.

Not here: files, migration streams, guest memory.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import types
import typing
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from vmm_core.errors import StateError


class State(Protocol):
    """A frozen dataclass with a version number that grows when its fields change meaning."""

    VERSION: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S", bound=State)


class Stateful(Protocol):
    """A component whose guest-visible state can be taken and put back while the machine is paused."""

    def save(self) -> State:
        """Return the component's whole guest-visible state."""
        ...

    def restore(self, state: Any) -> None:
        """Put a saved state into a component that was built with the same configuration.

        Raises StateError when the state is another component's or does not fit this one.
        """
        ...


def expect(state: object, kind: type[S], component: str) -> S:
    """Return `state` as a `kind`. Raises StateError naming `component` when it is something else."""
    if not isinstance(state, kind):
        raise StateError(f"{component}: expected a state of type {kind.__name__}, got {type(state).__name__}")
    return state


def encode(state: State) -> bytes:
    """Serialize a state as UTF-8 JSON: `{"type": class name, "version": n, "fields": {...}}`; bytes are base64."""
    return json.dumps(_to_plain(state), separators=(",", ":")).encode()


def decode(data: bytes, kind: type[S], component: str) -> S:
    """Rebuild a state of type `kind` from `encode`'s bytes.

    Raises StateError, naming `component`, when the bytes are malformed, of another type or version, or a field is missing,
    unknown or of the wrong type.
    """
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise StateError(f"{component}: saved state is not JSON: {error}") from None
    value = _from_plain(plain, kind, component)
    return typing.cast(S, value)


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, "version": getattr(type(value), "VERSION", 1), "fields": fields}
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _from_plain(plain: Any, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(kind):
            if (option is type(None)) == (plain is None):
                return None if plain is None else _from_plain(plain, option, where)
        raise StateError(f"{where}: null where a value was expected")
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_plain(plain, typing.cast(Any, kind), where)
    if origin in (list, tuple):
        return _sequence_from_plain(plain, origin, get_args(kind), where)
    if kind is bytes:
        if not isinstance(plain, str):
            raise StateError(f"{where}: expected base64 text, got {type(plain).__name__}")
        try:
            return base64.b64decode(plain, validate=True)
        except binascii.Error as error:
            raise StateError(f"{where}: {error}") from None
    if kind is bool or kind is str or kind is int:
        if type(plain) is not kind:
            raise StateError(f"{where}: expected {kind.__name__}, got {type(plain).__name__}")
        return plain
    raise TypeError(f"a state cannot declare a field of type {kind!r}")


def _sequence_from_plain(plain: Any, origin: Any, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(plain, list):
        raise StateError(f"{where}: expected a list, got {type(plain).__name__}")
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(plain) != len(args):
            raise StateError(f"{where}: expected {len(args)} items, got {len(plain)}")
        return tuple(_from_plain(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(plain, args, strict=True)))
    return origin(_from_plain(item, args[0], f"{where}[{i}]") for i, item in enumerate(plain))


def _dataclass_from_plain(plain: Any, kind: Any, where: str) -> Any:
    if not isinstance(plain, dict) or set(plain) != {"type", "version", "fields"} or not isinstance(plain["fields"], dict):
        raise StateError(f"{where}: not a saved state")
    if plain["type"] != kind.__name__:
        raise StateError(f"{where}: state of type {plain['type']!r}, expected {kind.__name__}")
    version = getattr(kind, "VERSION", 1)
    if plain["version"] != version:
        raise StateError(f"{where}: state version {plain['version']!r}, this build reads version {version}")
    names = {f.name for f in dataclasses.fields(kind)}
    given = set(plain["fields"])
    if names != given:
        odd = sorted(names ^ given)
        raise StateError(f"{where}: fields missing or unknown: {', '.join(odd)}")
    hints = get_type_hints(kind)
    return kind(**{name: _from_plain(plain["fields"][name], hints[name], f"{where}.{name}") for name in names})
