"""Saved state of components: versioned records of plain values, and their form on disk.

Every component with guest-visible state has `save()` and `restore(state)` (the `Stateful` protocol). Its state is a
`NamedTuple` under `@versioned(n)`, of plain values: int, bool, str, bytes, None, tuples and lists of them, nested states.
`encode` and `decode` turn one into bytes and back; `decode` refuses what it does not understand with the component's name.

    @versioned(1)
    class TimerState(NamedTuple):
        divisor: int
        remaining: int | None

Frozen dataclasses with a class variable `VERSION` are read and written as well. A start that saves nothing should not pay
for them, though: importing `dataclasses` costs more than all device modules together, and each class 0.5 ms against 0.08.

Not here: files, migration streams, guest memory.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from vmm_core.errors import StateError


class TupleState(Protocol):
    """A `NamedTuple` under `@versioned`."""

    @property
    def _fields(self) -> tuple[str, ...]: ...


class DataclassState(Protocol):
    """A frozen dataclass with a class variable `VERSION`, an int."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


State: TypeAlias = TupleState | DataclassState

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


def versioned(version: int) -> Callable[[type[S]], type[S]]:
    """Give a state class its version, which grows when the fields change: in number, name, type or meaning."""

    def mark(kind: type[S]) -> type[S]:
        kind.VERSION = version  # type: ignore[attr-defined]
        return kind

    return mark


def expect(state: object, kind: type[S], component: str) -> S:
    """Return `state` as a `kind`. Raises StateError naming `component` when it is something else."""
    if not isinstance(state, kind):
        raise StateError(f"{component}: expected a state of type {kind.__name__}, got {type(state).__name__}")
    return state


def expect_range(value: int, low: int, high: int, what: str) -> int:
    """Return `value`. Raises StateError when it is outside `low` to `high` (both allowed); `what` names component and field."""
    if not low <= value <= high:
        raise StateError(f"{what}: {value} is not within {low} to {high}")
    return value


def encode(state: State) -> bytes:
    """Serialize a state as UTF-8 JSON: `{"type": class name, "version": n, "fields": {...}}`; bytes are base64."""
    import json  # only who saves pays for it

    return json.dumps(_to_plain(state), separators=(",", ":")).encode()


def decode(data: bytes, kind: type[S], component: str) -> S:
    """Rebuild a state of type `kind` from `encode`'s bytes.

    Raises StateError, naming `component`, when the bytes are malformed, of another type or version, or a field is missing,
    unknown or of the wrong type.
    """
    import json

    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{component}: saved state is not JSON: {error}") from None
    return typing.cast(S, _from_plain(plain, kind, component))


def _field_names(kind: Any) -> tuple[str, ...] | None:
    """Names of a state class's fields; None for anything else."""
    if isinstance(kind, type):
        if issubclass(kind, tuple):
            return getattr(kind, "_fields", None)
        if hasattr(kind, "__dataclass_fields__"):
            from dataclasses import fields  # whoever declared this class has paid for the import

            return tuple(field.name for field in fields(typing.cast(Any, kind)))
    return None


def _version(kind: type) -> int:
    version = getattr(kind, "VERSION", None)
    if not isinstance(version, int):
        raise TypeError(f"state class {kind.__name__} has no version: decorate it with @versioned")
    return version


def _to_plain(value: Any) -> Any:
    if (names := _field_names(type(value))) is not None:
        fields = {name: _to_plain(getattr(value, name)) for name in names}
        return {"type": type(value).__name__, "version": _version(type(value)), "fields": fields}
    if isinstance(value, (bytes, bytearray)):
        import binascii

        return binascii.b2a_base64(value, newline=False).decode()
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
    if _field_names(kind) is not None:
        return _record_from_plain(plain, kind, where)
    if origin in (list, tuple):
        return _sequence_from_plain(plain, origin, get_args(kind), where)
    if kind is bytes:
        return _bytes_from_plain(plain, where)
    if kind is bool or kind is str or kind is int:
        if type(plain) is not kind:
            raise StateError(f"{where}: expected {kind.__name__}, got {type(plain).__name__}")
        return plain
    raise TypeError(f"a state cannot declare a field of type {kind!r}")


def _bytes_from_plain(plain: Any, where: str) -> bytes:
    import binascii

    if not isinstance(plain, str):
        raise StateError(f"{where}: expected base64 text, got {type(plain).__name__}")
    try:
        return binascii.a2b_base64(plain, strict_mode=True)
    except ValueError as error:
        raise StateError(f"{where}: {error}") from None


def _sequence_from_plain(plain: Any, origin: Any, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(plain, list):
        raise StateError(f"{where}: expected a list, got {type(plain).__name__}")
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(plain) != len(args):
            raise StateError(f"{where}: expected {len(args)} items, got {len(plain)}")
        return tuple(_from_plain(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(plain, args, strict=True)))
    return origin(_from_plain(item, args[0], f"{where}[{i}]") for i, item in enumerate(plain))


def _record_from_plain(plain: Any, kind: Any, where: str) -> Any:
    if not isinstance(plain, dict) or set(plain) != {"type", "version", "fields"} or not isinstance(plain["fields"], dict):
        raise StateError(f"{where}: not a saved state")
    if plain["type"] != kind.__name__:
        raise StateError(f"{where}: state of type {plain['type']!r}, expected {kind.__name__}")
    version = _version(kind)
    if type(plain["version"]) is not int or plain["version"] != version:
        raise StateError(f"{where}: state version {plain['version']!r}, this build reads version {version}")
    names = set(_field_names(kind) or ())
    if odd := sorted(names ^ set(plain["fields"])):
        raise StateError(f"{where}: fields missing or unknown: {', '.join(odd)}")
    hints = get_type_hints(kind)
    return kind(**{name: _from_plain(plain["fields"][name], hints[name], f"{where}.{name}") for name in names})
