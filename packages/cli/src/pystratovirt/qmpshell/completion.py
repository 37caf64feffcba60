"""What can come next on a `qmp` line: for the interactive shell and for the shells of the system.

Not here: drawing (`shell`), and the scripts that hook into bash, zsh and fish (`scripts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pystratovirt.qmpshell.arguments import beside
from pystratovirt.qmpshell.model import Model


def words_after(model: Model, before: Sequence[str], word: str) -> list[str]:
    """The words that can stand where `word` has been begun, after the finished words `before` (the command first).

    A word that ends in `=` or `.` is to go on without a space.
    """
    if not before:
        return [name for name in model.names("command") if name.startswith(word)]
    command, given = before[0], {key: text for key, _, text in (each.partition("=") for each in before[1:])}
    kind = model.arguments(command)
    key, equals, value = word.partition("=")
    if equals:
        return [f"{key}={each}" for each in _values(model, _type_at(model, kind, key, key, given)) if each.startswith(value)]
    return [each for each in _keys(model, kind, key, given) if each.startswith(word) and each[:-1] not in given]


def _keys(model: Model, kind: str, key: str, given: Mapping[str, str], prefix: str = "") -> list[str]:
    found = []
    for member in model.members(kind, beside("", prefix, given)):
        inner = model.object_behind(member.type)
        if inner:
            if key.startswith(f"{member.name}."):
                found += _keys(model, inner, key[len(member.name) + 1 :], given, f"{prefix}{member.name}.")
            else:
                found.append(f"{prefix}{member.name}.")
        else:
            found.append(f"{prefix}{member.name}=")
    return found


def _type_at(model: Model, kind: str, key: str, whole: str, given: Mapping[str, str]) -> str:
    for member in model.members(kind, beside(key, whole, given)):
        if key == member.name:
            return member.type
        if key.startswith(f"{member.name}."):
            inner = _type_at(model, model.object_behind(member.type), key[len(member.name) + 1 :], whole, given)
            if inner:
                return inner
    return ""


def _values(model: Model, kind: str) -> list[str]:
    if model.kind(kind) == "enum":
        return model.values(kind)
    if model.kind(kind) == "builtin" and model.json_type(kind) == "boolean":
        return ["on", "off"]
    if model.kind(kind) == "alternate":
        return [value for each in model.alternatives(kind) for value in _values(model, each)]
    return []
