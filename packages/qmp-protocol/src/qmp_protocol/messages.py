"""QMP messages as small frozen values, and the two plain functions between them and bytes.

QMP specification, section 2. Every message is one JSON object on one line ended by CR LF.

Not here: where one message ends and the next begins (`framing`), who may send what when (`connection`), and what a command's
arguments mean (`schema`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import orjson

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"


class _Absent(Enum):
    ABSENT = "absent"

    def __bool__(self) -> Literal[False]:
        return False


ABSENT: Final = _Absent.ABSENT
"""A member that is not there, which is not the same as one that is null."""

Absent: TypeAlias = Literal[_Absent.ABSENT]


class Greeting(NamedTuple):
    """What a server says first (2.2): its version object and the capabilities that it offers."""

    version: Mapping[str, Json]
    capabilities: Sequence[str] = ()


class Execute(NamedTuple):
    """A command (2.3). `id` comes back with the reply; what it may be, decode_request() says."""

    command: str
    arguments: Json | Absent = ABSENT
    id: Json | Absent = ABSENT


class Return(NamedTuple):
    """A command's success (2.4.1)."""

    value: Json
    id: Json | Absent = ABSENT


class Error(NamedTuple):
    """A command's failure (2.4.2)."""

    class_name: str
    desc: str
    id: Json | Absent = ABSENT


class Timestamp(NamedTuple):
    """Wall-clock time of an event: seconds since the epoch, and microseconds from 0 to 999,999."""

    seconds: int
    microseconds: int


class Event(NamedTuple):
    """Something that happened (2.5), not asked for by anybody."""

    name: str
    data: Mapping[str, Json]
    timestamp: Timestamp


class Malformed(NamedTuple):
    """Input that is no QMP message; `desc` says why. Framing and decoding both answer with it."""

    desc: str
    id: Json | Absent = ABSENT


Message: TypeAlias = Greeting | Execute | Return | Error | Event

_dumps = orjson.dumps
_SORTED = orjson.OPT_SORT_KEYS
_new = tuple.__new__  # a quarter of the cost of a NamedTuple's own constructor


def encode(message: Message) -> bytes:
    """Return the line that carries `message`, CR LF included.

    Members stand in StratoVirt's order: inside `return` alphabetically at every depth, `id` last. What is no Unicode
    in a text (the name of a file may be any bytes) goes out escaped. Raises TypeError on a value that JSON cannot carry.
    """
    try:
        # The two that there are most of, here and not in a function of their own.
        if type(message) is Execute:
            command, arguments, id_ = message
            if id_ is ABSENT:
                if arguments is ABSENT:
                    return _dumps({"execute": command}) + b"\r\n"
                return _dumps({"execute": command, "arguments": arguments}) + b"\r\n"
            if arguments is ABSENT:
                return _dumps({"execute": command, "id": id_}) + b"\r\n"
            return _dumps({"execute": command, "arguments": arguments, "id": id_}) + b"\r\n"
        if type(message) is Return:
            value, id_ = message
            if id_ is ABSENT:
                return b'{"return":%b}\r\n' % _dumps(value, None, _SORTED)
            return b'{"return":%b,"id":%b}\r\n' % (_dumps(value, None, _SORTED), _dumps(id_))
        return _dumps(_body(message)) + b"\r\n"
    except TypeError:
        pass
    try:
        return _encode_printable(_printable(message))
    except RecursionError:
        raise TypeError("nested too deeply") from None


def _encode_printable(message: Message) -> bytes:
    """Encode what orjson would not take as it was: other mappings than dict, lone surrogates."""
    if isinstance(message, Return):
        line = b'{"return":' + _dumps(message.value, None, _SORTED)
        return line + (b"}\r\n" if message.id is ABSENT else b',"id":%b}\r\n' % _dumps(message.id))
    return _dumps(_body(message)) + b"\r\n"


def _printable(value: Any) -> Any:
    """Return `value` with the lone surrogates in its texts escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return _printable_members(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_printable, value))
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return value


def _printable_members(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the members of `value`, none of which takes the place of another whose name is already what its own becomes."""
    members: dict[Any, Any] = {}
    for name, item in value.items():
        shown = _printable(name)
        while shown != name and (shown in value or shown in members):
            shown = f"\\{shown}"
        members[shown] = _printable(item)
    return members


def _body(message: Message) -> dict[str, object]:
    if isinstance(message, Execute):
        members = {"execute": message.command, "arguments": message.arguments, "id": message.id}
        return {name: value for name, value in members.items() if value is not ABSENT}
    if isinstance(message, Event):
        seconds, microseconds = message.timestamp
        stamp = {"seconds": seconds, "microseconds": microseconds}
        return {"event": message.name, "data": message.data, "timestamp": stamp}
    if isinstance(message, Error):
        error = {"class": message.class_name, "desc": message.desc}
        return {"error": error} if message.id is ABSENT else {"error": error, "id": message.id}
    if isinstance(message, Greeting):
        return {"QMP": {"version": message.version, "capabilities": list(message.capabilities)}}
    raise TypeError(f"not a QMP message: {message!r}")


def decode_request(value: Mapping[str, Json]) -> Execute | Malformed:
    """Turn an object that a client sent into its command. Never raises: what is wrong comes back as Malformed.

    Members other than `execute`, `arguments` and `id` are refused, as StratoVirt's server does. The texts are its own as well,
    with the member's name instead of line and column; those about an id are ours, since StratoVirt takes no other than a string.

    An id is any JSON value that can be sent back as it came: nested 128 deep at most, and of whole numbers those from -2^63 to
    2^64 - 1. Another one is refused, without an id.
    """
    arguments: Json | Absent = ABSENT
    id_: Json | Absent = ABSENT
    known = 1
    # Asking for what is there costs less than a call of get().
    if "id" in value:
        id_ = value["id"]
        known += 1
        if type(id_) is not str and type(id_) is not int and (problem := _why_not_returned(id_)):
            return Malformed(f"{problem} (member `id`)")
    try:
        command = value["execute"]
    except KeyError:
        return Malformed("missing field `execute`", id_)
    if "arguments" in value:
        arguments = value["arguments"]
        known += 1
    if type(command) is not str:
        return Malformed(f"invalid type: {describe(command)}, expected variant identifier (member `execute`)", id_)
    if len(value) != known:
        unknown = next(name for name in value if name not in _REQUEST_MEMBERS)
        return Malformed(f"unknown field `{shorten(unknown)}`, expected `arguments` or `id`", id_)
    return _new(Execute, (command, arguments, id_))


def _why_not_returned(id_: Json) -> str:
    """Say why an id would not come back as it came; empty when it would."""
    level: list[Json] = [id_]
    for _ in range(_DEEPEST_ID + 1):
        below: list[Json] = []
        for each in level:
            kind = type(each)
            if kind is float and not _LOW < each < _HIGH:  # type: ignore[operator]
                # orjson makes a float of a whole number that has no 64 bits.
                return f"invalid value: {describe(each)}, expected a number from -2^63 to 2^64-1"
            if kind is dict:
                below += each.values()  # type: ignore[union-attr]
            elif kind is list:
                below += each  # type: ignore[arg-type]
        if not below:
            return ""
        level = below
    return "recursion limit exceeded"


def decode_response(value: Mapping[str, Json]) -> Greeting | Return | Error | Event | Malformed:
    """Turn an object that a server sent into its message. Unknown members are ignored, as clients must (section 6)."""
    if "return" in value:
        return _new(Return, (value["return"], value.get("id", ABSENT)))
    if "event" in value:
        return _decode_event(value)
    if "error" in value:
        error = value["error"]
        if isinstance(error, Mapping):
            class_name, desc = error.get("class"), error.get("desc")
            if isinstance(class_name, str) and isinstance(desc, str):
                return Error(class_name, desc, value.get("id", ABSENT))
        return Malformed("an error without class and desc", value.get("id", ABSENT))
    if "QMP" in value:
        return _decode_greeting(value["QMP"])
    return Malformed("neither a greeting, a reply nor an event")


def _decode_event(value: Mapping[str, Json]) -> Event | Malformed:
    name, data, stamp = value["event"], value.get("data", {}), value.get("timestamp")
    if not isinstance(name, str) or not isinstance(data, Mapping) or not isinstance(stamp, Mapping):
        return Malformed("an event without a name, a data object and a timestamp")
    seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
    if not isinstance(seconds, int) or not isinstance(microseconds, int):
        return Malformed(f"event {shorten(name)} has no time in its timestamp")
    return _new(Event, (name, data, _new(Timestamp, (seconds, microseconds))))


def _decode_greeting(body: Json) -> Greeting | Malformed:
    if isinstance(body, Mapping):
        version, capabilities = body.get("version"), body.get("capabilities")
        if isinstance(version, Mapping) and isinstance(capabilities, list):
            return Greeting(version, tuple(name for name in capabilities if isinstance(name, str)))
    return Malformed("a greeting without version and capabilities")


_DEEPEST_ID = 128  # StratoVirt's parser goes no deeper; orjson writes 254 levels, and reads 1024
_LOW, _HIGH = -(2.0**63), 2.0**64
_REQUEST_MEMBERS = frozenset({"execute", "arguments", "id"})
_SHOWN = 64  # characters of a peer's text in an error reply: enough to recognise, too few to amplify


def shorten(text: str) -> str:
    """Return `text`, cut when it is longer than an error message should repeat."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def describe(value: Json) -> str:
    """Name a JSON value as StratoVirt's error texts do: ``integer `1` ``, ``string "x"``, `map`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f'string "{shorten(value)}"'
    return "map" if isinstance(value, Mapping) else "sequence"
