"""From `key=value` words to a command's arguments, typed by the schema.

`id=net-0 num-queues=4 multifunction=on file.filename=/x 'cache={"direct":false}'`: dots go into objects, and a value that begins
with `{` or `[` where an object or a list belongs is JSON. What a value means is decided by the type, not by how it looks.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from pystratovirt.qmpshell.model import Model
from qmp_protocol.messages import ABSENT, Absent, Execute, Json, encode

TRUE = ("on", "true", "yes")
FALSE = ("off", "false", "no")

_LOWEST: Final = -(2**63)
_HIGHEST: Final = 2**64 - 1
_MANY_DIGITS = re.compile(r"\d{19}")
_COMMENT = re.compile(r"""((?:\s*+(?!\#)(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")++)*+)\s*+\#.*""", re.DOTALL)


class ArgumentError(Exception):
    """Words that are no arguments of the command; one line that names the word and what is allowed."""


def split(line: str) -> list[str]:
    """Return the words of a line as a shell of the system has them, without a comment. Raises ValueError for open quotes."""
    # shlex itself would take a comment to begin in the middle of a word, and `device_del id=disk#1` would mean another disk.
    comment = _COMMENT.fullmatch(line)
    return shlex.split(comment[1] if comment else line)


def parse(model: Model, command: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments for a command. Raises ArgumentError.

    A missing member is left to the server to refuse: it knows better what it needs.
    """
    arguments: dict[str, Any] = {}
    kind = model.arguments(command)
    known = model.kind(command) == "command"
    given = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        for word in words:
            key, equals, text = word.partition("=")
            if not equals or not key:
                raise ArgumentError(f"{word}: not key=value")
            if known:
                _put(model, arguments, kind, key, text, key, given)
            else:
                _insert(arguments, key, _guess(text, key), key)
    except RecursionError:
        raise ArgumentError(f"{command}: the arguments are nested too deeply") from None
    _expect_sendable(command, arguments)
    return arguments


def from_json(line: str) -> tuple[str, Json | Absent]:
    """Return the command and the arguments of a line `{"execute": …}`. Raises ArgumentError. An `id` counts for nothing."""
    try:
        value = exactly(line)
    except ValueError as error:
        raise ArgumentError(f"not JSON: {error}") from None
    command = value.get("execute") if isinstance(value, dict) else None
    if not isinstance(command, str):
        raise ArgumentError('an object with "execute" is wanted')
    for name in value:
        if name not in ("execute", "arguments", "id"):
            raise ArgumentError(f"{name}: no such member of a command; there are: execute, arguments, id")
    values: Json | Absent = value.get("arguments", ABSENT)
    _expect_sendable(command, values)
    return command, values


def exactly(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for none, and for a number that would be sent as another one."""
    value = orjson.loads(text)
    if _MANY_DIGITS.search(text):  # of a whole number that is too large orjson makes a float
        try:
            json.loads(text, parse_int=_whole)
        except RecursionError:
            raise ValueError("nested too deeply") from None
    return value


def _whole(text: str) -> int:
    number = int(text)
    if not _LOWEST <= number <= _HIGHEST:
        raise ValueError(f"{text} has more than 64 bits")
    return number


def _expect_sendable(command: str, values: Json | Absent) -> None:
    try:
        encode(Execute(command, values, ""))
    except TypeError as error:
        raise ArgumentError(f"{command}: the arguments cannot be sent: {error}") from None


def beside(key: str, whole: str, given: Mapping[str, str]) -> dict[str, str]:
    """Return what is given, on the whole line, for the object that has the member `key`, which is called `whole` there.

    Members by their name in the object: the tag among them says which variant it is, wherever it stands.
    """
    prefix = whole[: len(whole) - len(key)]
    return {name[len(prefix) :]: text for name, text in given.items() if name.startswith(prefix)}


def _put(model: Model, into: dict[str, Any], kind: str, key: str, text: str, whole: str, given: Mapping[str, str]) -> None:
    chosen = {name: value for name, value in into.items() if isinstance(value, str)}  # by JSON
    members = {member.name: member for member in model.members(kind, {**beside(key, whole, given), **chosen})}
    if key in members:
        if key in into:
            raise ArgumentError(f"{whole}: given twice")
        into[key] = convert(model, members[key].type, text, whole)
        return
    # A name may have dots in it itself, so the longest name that fits comes first.
    for name in sorted(members, key=len, reverse=True):
        if key.startswith(f"{name}."):
            inner = model.object_behind(members[name].type)
            if inner:
                deeper = into.setdefault(name, {})
                if not isinstance(deeper, dict):
                    raise ArgumentError(f"{whole}: {name} has been given another value")
                _put(model, deeper, inner, key[len(name) + 1 :], text, whole, given)
                return
    there_are = ", ".join(members) if members else "none"
    raise ArgumentError(f"{whole}: no such argument; there are: {there_are}")


def convert(model: Model, kind: str, text: str, name: str) -> Any:
    """Return the JSON value that `text` means as a value of type `kind`. Raises ArgumentError."""
    meta = model.kind(kind)
    if meta == "enum":
        return text  # what is allowed is the server's to say: it may know further spellings
    if meta == "builtin":
        return _scalar(model.json_type(kind), text, name)
    if meta == "array":
        if text.startswith("["):
            return _json(text, name)
        element = model.element(kind)
        return [convert(model, element, item, name) for item in text.split(",")] if text else []
    if meta == "alternate":
        return _alternate(model, kind, text, name)
    if meta == "object":
        value = _json(text, name)
        if not isinstance(value, dict):
            raise ArgumentError(f"{name}={text}: an object is wanted: {name}.MEMBER=VALUE, or JSON")
        return value
    return _guess(text, name)


def _alternate(model: Model, kind: str, text: str, name: str) -> Any:
    problem = ArgumentError(f"{name}={text}: fits nothing that {name} can be")
    for each in model.alternatives(kind):
        try:
            return convert(model, each, text, name)
        except ArgumentError as error:
            problem = error
    raise problem


def _scalar(json_type: str, text: str, name: str) -> Any:
    if json_type == "string":
        return text
    if json_type == "boolean":
        if text in TRUE:
            return True
        if text in FALSE:
            return False
        raise ArgumentError(f"{name}={text}: on or off is wanted")
    if json_type == "int":
        try:
            number = int(text, 0)
        except ValueError:
            raise ArgumentError(f"{name}={text}: a whole number is wanted (decimal, or with 0x)") from None
        if not _LOWEST <= number <= _HIGHEST:
            raise ArgumentError(f"{name}={text}: a whole number from -2^63 to 2^64-1 is wanted")
        return number
    if json_type == "number":
        try:
            real = float(text)
        except ValueError:
            raise ArgumentError(f"{name}={text}: a number is wanted") from None
        if not math.isfinite(real):
            raise ArgumentError(f"{name}={text}: a number is wanted")
        return real
    if json_type == "null":
        if text == "null":
            return None
        raise ArgumentError(f"{name}={text}: null is wanted")
    return _guess(text, name)


def _json(text: str, name: str) -> Any:
    try:
        return exactly(text)
    except ValueError as error:
        raise ArgumentError(f"{name}={text}: not JSON: {error}") from None


def _guess(text: str, name: str) -> Any:
    """A value of unknown type: JSON when it is, else a string."""
    try:
        return exactly(text)
    except orjson.JSONDecodeError:
        return text
    except ValueError as error:
        raise ArgumentError(f"{name}={text}: {error}") from None


def _insert(into: dict[str, Any], key: str, value: Any, whole: str) -> None:
    *path, last = key.split(".")
    for name in path:
        into = into.setdefault(name, {})
        if not isinstance(into, dict):
            raise ArgumentError(f"{whole}: {name} has been given another value")
    into[last] = value
